# SPDX-License-Identifier: Apache-2.0
"""The adaptive bound as a pure function: it climbs as far as staleness costs nothing, and no further, whatever it is told."""

import numpy as np
import pytest

from oarlock.worker import adaptive
from oarlock.worker.adaptive import (
    LADDER,
    LEAST_GAIN,
    LOOK,
    PATIENCE,
    TOLERANCE,
    AdaptiveBound,
    Measured,
    is_probe,
    ladder,
    relative_excess,
)

GROWING = tuple(np.linspace(0.0, 0.9, len(LADDER)).tolist())


def train(policy, excess, probes, rng, noise=0.0, saved=GROWING):
    """Step through probes whose excess follows ``excess(bound)``; return the bounds, one after each."""
    rungs = len(policy.rungs)
    return [
        policy.step(
            Measured(excess(policy.bound) + rng.normal(0, noise) if noise else excess(policy.bound), saved[:rungs])
        )
        for _ in range(probes)
    ]


def test_the_ladder_ends_at_the_highest_bound():
    assert ladder(100) == LADDER
    assert ladder(1) == (0, 1)
    assert ladder(4) == (0, 1, 2, 3, 4)
    assert ladder(1000) == (*LADDER, 1000)
    assert ladder(7) == (0, 1, 2, 3, 5, 7)
    for highest in range(200):
        found = ladder(highest)
        assert found[-1] == highest
        assert list(found) == sorted(set(found))


@pytest.mark.parametrize("highest", [0, 1, 7, 100, 5000])
def test_what_costs_nothing_is_climbed_to_the_top_and_not_beyond(rng, highest):
    policy = AdaptiveBound(highest)
    bounds = train(policy, lambda bound: 0.0, 200, rng, saved=(*GROWING, 0.99))
    assert bounds[-1] == highest
    assert max(bounds) <= highest
    assert bounds == sorted(bounds)


def square(bound):
    """Excess as it is measured: with the square of the bound; up to 10 it is less than is tolerated."""
    return TOLERANCE * (bound / 11) ** 2


@pytest.mark.parametrize("noise", [0.0, 0.3, 1.0])
def test_it_climbs_to_the_last_bound_that_costs_little_and_tries_none_beyond(rng, noise):
    for _ in range(20):
        policy = AdaptiveBound(100)
        bounds = [policy.step(Measured(square(policy.bound) * rng.gamma(1, 1) ** noise, GROWING)) for _ in range(400)]
        # Where a probe says little by itself it may stray for a while.
        assert max(bounds) == 10 if noise < 1 else np.mean(np.array(bounds) > 10) < 0.2
        assert bounds[-1] == 10 if noise < 1 else np.median(bounds) in (5, 10)


@pytest.mark.parametrize("wall", [2, 5, 20, 100])
def test_a_cost_that_could_not_be_foreseen_is_left_and_tried_again_ever_more_seldom(rng, wall):
    policy = AdaptiveBound(100)
    bounds = np.array(train(policy, lambda bound: 3 * TOLERANCE if bound >= wall else 0.0, 400, rng))
    assert np.median(bounds[100:]) == max(b for b in LADDER if b < wall)
    assert max(bounds) == wall
    tried = np.flatnonzero((bounds[1:] == wall) & (bounds[:-1] < wall))
    gaps = np.diff(tried)
    assert 2 <= len(gaps) <= np.log2(400 / PATIENCE) + 1
    assert (gaps[1:] > 1.5 * gaps[:-1]).all()


def test_it_goes_down_again_when_what_it_stands_on_begins_to_cost(rng):
    policy = AdaptiveBound(100)
    assert train(policy, lambda bound: 0.0, 40, rng)[-1] == 100
    bounds = train(policy, lambda bound: TOLERANCE * (bound / 4) ** 2, 120, rng)
    assert bounds[-1] == 3
    assert min(bounds) == 3
    assert train(policy, lambda bound: 2 * TOLERANCE if bound else 0.0, 60, rng)[-1] == 0


def test_what_was_measured_long_ago_is_forgotten(rng):
    policy = AdaptiveBound(100)
    assert train(policy, square, 400, rng)[-1] == 10
    assert train(policy, lambda bound: square(bound) / 100, 120, rng)[-1] == 100


def test_a_bound_that_would_save_nothing_is_not_tried(rng):
    policy = AdaptiveBound(100)
    flat = (0.0, 0.2, 0.4, 0.5, *[0.5 + LEAST_GAIN / 2] * 6)
    assert max(train(policy, lambda bound: 0.0, 200, rng, saved=flat)) == 3


def test_no_step_is_made_before_it_has_looked(rng):
    policy = AdaptiveBound(100)
    assert train(policy, lambda bound: 1.0, LOOK - 1, rng) == [1] * (LOOK - 1)
    assert policy.step(Measured(1.0, GROWING)) == 0


def test_the_same_measurements_give_the_same_bounds():
    runs = []
    for _ in range(2):
        rng = np.random.default_rng(3)
        runs.append(train(AdaptiveBound(50), square, 300, rng, noise=TOLERANCE / 4))
    assert runs[0] == runs[1]
    assert len(set(runs[0])) > 2


def test_the_excess_is_what_labels_as_fresh_rows_say_would_show(rng):
    fresh = rng.uniform(0.02, 0.6, 400).astype(np.float32)
    stale = (fresh + rng.normal(0, 0.02, 400)).clip(0.01, 0.99).astype(np.float32)
    labels = rng.random((4000, 400)) < fresh

    def loss(p):
        return -np.where(labels, np.log(p), np.log(1 - p)).mean()

    found = relative_excess(fresh, stale)
    assert found == pytest.approx((loss(stale) - loss(fresh)) / loss(fresh), rel=0.2)
    assert relative_excess(fresh, fresh) == 0
    # The same scores as logits; and none that are numbers.
    logits = [np.log(p / (1 - p)) for p in (fresh, stale)]
    assert relative_excess(*logits) == pytest.approx(found, rel=1e-3)
    for wrong in (np.nan, np.inf):
        assert relative_excess(fresh, np.where(fresh > 0.5, np.float32(wrong), stale)) == 1
    assert relative_excess(np.zeros(3, np.float32), np.ones(3, np.float32)) == 1
    assert relative_excess(np.full(3, -1e30, np.float32), np.full(3, 1e30, np.float32)) == 1


def test_probes_are_frequent_at_first_and_one_in_32_at_last():
    probes = np.array([turn for turn in range(100_000) if is_probe(turn)])
    assert (np.diff(probes) >= 4).all()
    assert (np.diff(probes) <= 32).all()
    assert 3 <= (probes < 16).sum() <= 4
    assert (np.diff(probes[probes > 1000]) == 32).all()
    assert adaptive.START > 0
