# SPDX-License-Identifier: Apache-2.0
"""Probing: the pass on stale rows tells what they cost, and leaves the pass that trains as it would be without it."""

import numpy as np
import pytest

from oarlock.client.caches import Caches
from oarlock.client.probe import Probe
from oarlock.embedding.spec import CacheSpec, TableSpec
from oarlock.nn import Linear, Model, binary_cross_entropy, concat, dropout, lookup, relu, sigmoid
from oarlock.worker.adaptive import is_probe, relative_excess
from oarlock.worker.compute import train_group
from oarlock.worker.prepare import Prepared
from oarlock.worker.probing import Probing
from oarlock.worker.recipe import Rates

SIZES = (40, 23)  # a group of two batches


class Known(Probe):
    """A probe that was pulled with, of whose rows some were kept otherwise than they are now."""

    def __init__(self, caches, stale):
        super().__init__(caches, "t")
        self.rows = stale

    def stale(self, rows):
        return self.rows

    def saved(self, bounds):
        return tuple(0.1 * bound for bound in bounds)


@pytest.fixture
def model():
    hidden = Linear(8, name="fc")(concat([lookup("a", table="t", dim=4), lookup("b", table="u", dim=4)]))
    logit = Linear(1, name="out")(dropout(relu(hidden), 0.3))
    return Model(score=sigmoid(logit), loss=binary_cross_entropy(logit, label="label"))


@pytest.fixture
def caches():
    return Caches([TableSpec("t", 4, cache=CacheSpec(9, 50, adaptive=True)), TableSpec("u", 4, cache=CacheSpec(9, 3))])


def group(model, rng, probe=None):
    n = sum(SIZES)
    size = sum(spec.size for spec in model.parameters)
    return Prepared(
        SIZES,
        {},
        {name: rng.integers(0, 30, n).astype(np.int32) for name in ("a", "b")},
        {"label": rng.integers(0, 2, n).astype(np.float32)},
        {name: rng.normal(size=(30, 4)).astype(np.float32) for name in ("t", "u")},
        rng.normal(size=size).astype(np.float32),
        probe=probe,
    )


def train(model, program, prepared):
    trained = train_group(program, model.lookups, prepared, Rates(0.1, 0.1), seed=5, draw=3, local=False)
    return trained.loss_sum, {t: g.tobytes() for t, g in trained.rows.items()}, trained.dense.tobytes()


def test_the_pass_on_stale_rows_changes_no_gradient(model, caches, rng):
    probing = Probing(caches, model.lookups)
    prepared, stale = group(model, rng), rng.normal(size=(30, 4)).astype(np.float32)
    expected = train(model, model.bind(64), prepared)
    before = {name: rows.copy() for name, rows in prepared.rows.items()}
    program = model.bind(64)
    prepared.probe = Known(caches, stale)
    excess = probing.excess(program, prepared)
    assert train(model, program, prepared) == expected
    assert all(np.array_equal(rows, before[name]) for name, rows in prepared.rows.items())
    # Both passes are of all batches of the group, without what training drops.
    scores = []
    for rows in (before["t"], stale):
        found = []
        for run in (slice(0, SIZES[0]), slice(SIZES[0], sum(SIZES))):
            feeds = {"a": (rows, prepared.inverse["a"][run]), "b": (before["u"], prepared.inverse["b"][run])}
            found.append(program.predict(feeds, len(feeds["a"][1])).copy())
        scores.append(np.concatenate(found))
    assert excess == relative_excess(*scores) > 0.01


def test_rows_that_would_be_the_same_cost_nothing(model, caches, rng):
    probing = Probing(caches, model.lookups)
    prepared = group(model, rng, Known(caches, None))
    assert probing.excess(model.bind(64), prepared) == 0


def test_adaptive_tables_take_turns_and_others_keep_their_bound(model):
    tables = [TableSpec(name, 4, cache=CacheSpec(9, 50, adaptive=name != "u")) for name in ("t", "u", "v")]
    caches = Caches(tables)
    probing = Probing(caches, model.lookups)
    assert caches.bounds == {"t": 1, "u": 50, "v": 1}
    probes = [probe.table for turn in range(64) if (probe := probing.probe(turn))]
    assert len(probes) == sum(map(is_probe, range(64))) == 16
    assert probes.count("t") == probes.count("v") == 8
    assert not any(Probing(Caches(tables[1:2]), model.lookups).probe(turn) for turn in range(64))


def test_a_probe_of_a_bound_that_is_over_is_not_learnt_from(model, caches):
    probing = Probing(caches, model.lookups)
    late = Known(caches, None)
    for _ in range(4):
        probing.learn(Known(caches, None), 0.0)
    assert caches.bounds == {"t": 2, "u": 3}
    for _ in range(8):
        probing.learn(late, 1.0)
    assert caches.bounds["t"] == 2
    assert probing.told() == {"t": {"probes": 12, "excess": 0.0}}
