# SPDX-License-Identifier: Apache-2.0
"""Negatives: pinned values, the kernel's plain twin, evenness, and users with nearly everything."""

import numpy as np
import numpy.typing as npt
import pytest

from oarlock.data.draws import MASK, NEGATIVES
from oarlock.data.negatives import NegativeSampler, Positives, draw_negatives, group_positives
from oarlock.proto.errors import InvalidArgument

Keys = npt.NDArray[np.uint64]


def keys(*values: int) -> Keys:
    return np.array(values, np.uint64)


def absorb_slowly(stream: int, value: int) -> int:
    x = (stream + (value + 1) * 0x9E3779B97F4A7C15) & MASK
    x = ((x ^ x >> 30) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ x >> 27) * 0x94D049BB133111EB) & MASK
    return x ^ x >> 31


def draw_slowly(
    rows: Keys, taken: set[tuple[int, int]], catalogue: list[int], per_positive: int, numbers: tuple[int, ...]
) -> list[list[int]]:
    # mix(seed) is an element of the stream that starts one step before the seed.
    stream = absorb_slowly(numbers[0] - 0x9E3779B97F4A7C15, 0)
    for number in (*numbers[1:], NEGATIVES):
        stream = absorb_slowly(stream, number)
    out = []
    for row, user in enumerate(rows.tolist()):
        drawn = []
        for column in range(per_positive):
            place = absorb_slowly(stream, row * per_positive + column)
            tries = [absorb_slowly(place, attempt) * len(catalogue) >> 64 for attempt in range(64)]
            tries += [(tries[-1] + step) % len(catalogue) for step in range(1, len(catalogue))]
            drawn.append(next(catalogue[i] for i in tries if (user, catalogue[i]) not in taken))
        out.append(drawn)
    return out


POSITIVES = group_positives(keys(9, 9, 9, 5, 2**62, 9), keys(3, 1, 1, 8, 2**40, 3))
CATALOGUE = keys(1, 3, 8, 20, 2**40, 2**62)


def test_positives_are_sorted_and_distinct() -> None:
    assert POSITIVES.users.tolist() == [5, 9, 2**62]
    assert POSITIVES.offsets.tolist() == [0, 1, 3, 4]
    assert POSITIVES.items.tolist() == [8, 1, 3, 2**40]
    none = group_positives(keys(), keys())
    assert (none.users.size, none.offsets.tolist(), none.items.size) == (0, [0], 0)


def test_draws_never_change() -> None:
    sampler = NegativeSampler(POSITIVES, CATALOGUE, per_positive=3, seed=11)
    users = keys(5, 9, 77, 2**62, 9)
    assert sampler.draw(users, epoch=1, split=2, batch=3).tolist() == [
        [1, 1, 3],
        [20, 8, 20],
        [20, 1, 20],
        [8, 3, 20],
        [2**62, 2**62, 2**40],
    ]


def test_kernel_equals_its_twin(rng: np.random.Generator) -> None:
    catalogue = np.unique(rng.integers(0, 2**63, 40).astype(np.uint64))
    users = rng.integers(0, 20, 500).astype(np.uint64)
    items = rng.choice(catalogue, 500)
    # One user has all items but one: the scan after the last attempt is reached.
    users, items = np.append(users, np.full(39, 99, np.uint64)), np.append(items, catalogue[:-1])
    positives = group_positives(users, items)
    taken = set(zip(users.tolist(), items.tolist(), strict=True))
    rows = np.append(rng.integers(0, 25, 60), [99] * 20).astype(np.uint64)
    for numbers in ((1, 0, 0, 0), (2**63 + 5, 3, 10**9, 7)):
        seed, epoch, split, batch = numbers
        sampler = NegativeSampler(positives, catalogue, per_positive=4, seed=seed)
        found = sampler.draw(rows, epoch=epoch, split=split, batch=batch)
        assert found.tolist() == draw_slowly(rows, taken, catalogue.tolist(), 4, numbers)


def test_a_draw_depends_on_its_place_alone() -> None:
    sampler = NegativeSampler(POSITIVES, CATALOGUE, per_positive=2, seed=1)
    users = np.resize(keys(5, 9, 7), 64)
    whole = sampler.draw(users, epoch=0, split=0, batch=0)
    again = NegativeSampler(POSITIVES, CATALOGUE, per_positive=2, seed=1)
    again.draw(users, epoch=5, split=5, batch=5)
    changed = users.copy()
    changed[1:] = 2**62
    assert np.array_equal(again.draw(users[:10], epoch=0, split=0, batch=0), whole[:10])
    assert np.array_equal(again.draw(changed, epoch=0, split=0, batch=0)[0], whole[0])
    for other in ({"epoch": 1}, {"split": 1}, {"batch": 1}):
        numbers = {"epoch": 0, "split": 0, "batch": 0, **other}
        assert not np.array_equal(again.draw(users, **numbers), whole)
    other_seed = NegativeSampler(POSITIVES, CATALOGUE, per_positive=2, seed=2)
    assert not np.array_equal(other_seed.draw(users, epoch=0, split=0, batch=0), whole)


def test_negatives_are_even_and_never_positive() -> None:
    catalogue = np.arange(50, dtype=np.uint64) * np.uint64(7)
    positives = group_positives(np.full(20, 3, np.uint64), catalogue[:20])
    sampler = NegativeSampler(positives, catalogue, per_positive=10, seed=4)
    drawn = sampler.draw(np.full(3000, 3, np.uint64), epoch=0, split=0, batch=0)
    counts = np.bincount((drawn // np.uint64(7)).astype(int).ravel(), minlength=50)
    assert counts[:20].tolist() == [0] * 20
    # Chi-square with 29 degrees of freedom: over 66 happens once in ten thousand seeds.
    assert ((counts[20:] - 1000.0) ** 2 / 1000.0).sum() < 66


def test_a_user_with_everything_is_named() -> None:
    positives = group_positives(np.repeat(keys(4, 6), 6), np.tile(CATALOGUE, 2))
    sampler = NegativeSampler(positives, CATALOGUE, per_positive=1, seed=0)
    with pytest.raises(InvalidArgument, match="user 6 has all 6 items"):
        sampler.draw(keys(5, 6, 4), epoch=0, split=0, batch=0)


def test_no_positives_no_rows_no_draws() -> None:
    nobody = Positives(keys(), np.zeros(1, np.int64), keys())
    assert NegativeSampler(nobody, CATALOGUE, per_positive=0, seed=0).draw(
        keys(1, 2), epoch=0, split=0, batch=0
    ).shape == (2, 0)
    some = NegativeSampler(nobody, CATALOGUE, per_positive=5, seed=0)
    assert some.draw(keys(), epoch=0, split=0, batch=0).shape == (0, 5)
    assert set(some.draw(keys(1, 2), epoch=0, split=0, batch=0).ravel().tolist()) <= set(CATALOGUE.tolist())


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="catalogue"):
        NegativeSampler(POSITIVES, keys(), per_positive=1, seed=0)
    with pytest.raises(InvalidArgument, match="per positive = -1"):
        NegativeSampler(POSITIVES, CATALOGUE, per_positive=-1, seed=0)
    sampler = NegativeSampler(POSITIVES, CATALOGUE, per_positive=1, seed=0)
    with pytest.raises(InvalidArgument, match=r"users are int64\[2\]"):
        sampler.draw(np.zeros(2, np.int64), epoch=0, split=0, batch=0)  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument, match=r"out uint64\[2, 2\]"):
        sampler.draw(keys(1, 2), epoch=0, split=0, batch=0, out=np.zeros((2, 2), np.uint64))


def test_one_compiled_form_serves_all_calls() -> None:
    signatures = getattr(draw_negatives, "signatures", None)
    if signatures is not None:
        assert len(signatures) == 1
