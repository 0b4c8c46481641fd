# SPDX-License-Identifier: Apache-2.0
"""The counting sketch: never too low within its memory, seldom too high, forgets, and comes back from its bytes."""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import embedding_reference as reference
import numpy as np
import pytest

from oarlock.embedding.sketch import MOST, Sketch, sketch_add, sketch_bytes, sketch_estimate, sketch_line, too_high
from oarlock.proto.errors import InvalidArgument, Malformed

N = reference.MANY


def mixes(n, seed=0):
    return np.random.default_rng(seed).integers(0, 1 << 64, n, dtype=np.uint64)


def add(sketch, keys, amount=1):
    return sketch.add(keys, np.full(len(keys), amount, np.int64))


class Twin:
    """The sketch from its description, in dictionaries."""

    def __init__(self, sketch, capacity):
        self.lines, self.capacity = sketch.lines, capacity
        self.windows = [{} for _ in range(sketch.windows)]
        self.current = self.added = 0

    def places(self, mix):
        bits = reference.mix64((int(mix) + reference.GOLDEN) & reference.WORD)
        line = (bits >> 32) * self.lines >> 32
        left = list(range(1, 32))
        first = bits & 31
        second = left.pop((bits >> 5 & 8191) * 31 >> 13)
        third = left[(bits >> 18 & 8191) * 30 >> 13]
        return [(line, first), (line, (first + second) % 32), (line, (first + third) % 32)]

    def add(self, mix, amount):
        places = self.places(mix)
        assert len(set(places)) == 3
        if amount > 0:
            if self.added >= self.capacity:
                self.current = (self.current + 1) % len(self.windows)
                self.windows[self.current] = {}
                self.added = 0
            self.added = min(self.added + amount, self.capacity)
            window = self.windows[self.current]
            count = min(MOST, amount + min(window.get(place, 0) for place in places))
            for place in places:
                window[place] = max(window.get(place, 0), count)
        return min(MOST, sum(min(w.get(place, 0) for place in places) for w in self.windows))


@pytest.mark.parametrize("windows", [2, 4, 7])
@pytest.mark.parametrize("error", [0.01, 0.5])
def test_equals_its_twin_over_many_rotations(windows, error):
    n = max(N, 600)
    capacity = n // 20
    sketch = Sketch(capacity, windows, error)
    twin = Twin(sketch, capacity)
    rng = np.random.default_rng(3)
    keys = mixes(n // 4)[rng.zipf(1.3, n) % (n // 4)]
    amounts = rng.choice(
        [-3, 0, 1, 1, 1, 2, 5, capacity + 1, 1 << 40], n, p=[0.02, 0.1, 0.3, 0.3, 0.1, 0.1, 0.06, 0.01, 0.01]
    )
    out = sketch.add(keys, amounts)
    assert out.tolist() == [twin.add(key, amount) for key, amount in zip(keys, amounts.tolist(), strict=True)]
    assert (sketch.current, sketch.added) == (twin.current, twin.added)
    assert sketch.estimate(keys).tolist() == [twin.add(key, 0) for key in keys]


def test_is_never_too_low_before_anything_is_forgotten():
    capacity, windows = N // 4, 4
    sketch = Sketch(capacity, windows, 0.5)
    keys = mixes(N // 10)[np.random.default_rng(1).zipf(1.2, windows * capacity) % (N // 10)]
    true = Counter()
    for key, estimate in zip(keys.tolist(), add(sketch, keys), strict=True):
        true[key] += 1
        assert estimate >= true[key]
    assert sketch.current == windows - 1


def test_what_is_younger_than_all_windows_but_one_is_never_forgotten():
    capacity, windows = max(N // 40, 2), 3
    sketch = Sketch(capacity, windows, 0.5)
    keys = mixes(N // 20)[np.random.default_rng(2).integers(0, N // 20, N)]
    out = add(sketch, keys)
    kept = (windows - 1) * capacity
    for i in range(N):
        assert out[i] >= np.count_nonzero(keys[max(0, i + 1 - kept) : i + 1] == keys[i])


def test_old_occurrences_age_out():
    sketch = Sketch(10, 4)
    key, others = mixes(1), mixes(200, seed=1)
    assert add(sketch, key, 7).tolist() == [7]
    for rotation in range(1, 5):
        sketch.rotate()
        assert sketch.estimate(key).tolist() == ([7] if rotation < 4 else [0])
        assert (sketch.current, sketch.added) == (rotation % 4, 0)
    add(sketch, key, 7)
    add(sketch, others[:32])  # 3 more for this window, then 10 each for two, and 9
    assert sketch.current == 3
    assert sketch.estimate(key)[0] >= 7
    add(sketch, others[32:40])
    assert sketch.current == 0
    before = Sketch(10, 4)
    add(before, others[3:40])  # the same without the window that is gone
    assert sketch.estimate(key).tolist() == before.estimate(key).tolist()


@pytest.mark.skipif(not reference.JIT, reason="needs many keys; the twin says that the code is the same")
@pytest.mark.parametrize("error", [0.01, 0.05, 0.2, 0.5])
def test_is_too_high_as_seldom_as_promised(error):
    capacity, windows = 20 * N, 4
    keys = mixes((windows + 1) * capacity)
    new = mixes(10 * N, seed=9)
    sketch = Sketch(capacity, windows, error)
    add(sketch, keys[:capacity])
    of_new = (sketch.estimate(new) > 0).mean()
    of_counted = (sketch.estimate(keys[:capacity]) > 1).mean()
    assert error / 2 < of_new <= error  # more memory than that would be wasted
    assert of_counted <= of_new * 1.1 + 0.01
    add(sketch, keys[capacity : windows * capacity])
    assert (sketch.current, sketch.added) == (windows - 1, capacity)
    of_all = (sketch.estimate(new) > 0).mean()
    assert of_new < of_all <= windows * error


def test_the_chance_to_be_too_high_is_that_of_random_triples():
    rng = np.random.default_rng(4)
    for load in (1.5, 6.0):
        hits = 0
        for _ in range(4000):
            touched = np.zeros(32, bool)
            for _ in range(rng.poisson(load)):
                touched[rng.permutation(32)[:3]] = True
            hits += touched[:3].all()
        chance = too_high(load)
        assert abs(hits / 4000 - chance) < 6 * np.sqrt(chance * (1 - chance) / 4000)


def test_counts_stop_at_the_largest():
    sketch = Sketch(10**5, 2, 0.5)
    key = mixes(1)
    assert add(sketch, key, MOST - 1).tolist() == [MOST - 1]
    assert add(sketch, key, 3).tolist() == [MOST]
    assert add(sketch, key, 1).tolist() == [MOST]
    sketch.rotate()
    assert add(sketch, key, 1 << 62).tolist() == [MOST]
    assert add(sketch, key, (1 << 63) - 1).tolist() == [MOST]
    assert sketch.added <= 10**5
    other = mixes(1, seed=1)[0]
    shape = (sketch.address + 64, 2, sketch.lines, sketch.current)
    assert sketch_add(*shape, other, 1) == 1
    assert sketch_add(*shape, other, (1 << 63) - 1) == MOST


def test_the_state_depends_on_the_order_of_additions_alone_and_comes_back_from_its_bytes():
    keys = mixes(N // 10)[np.random.default_rng(5).integers(0, N // 10, N)]
    whole, parts = Sketch(N // 7), Sketch(N // 7)
    add(whole, keys)
    for begin in range(0, N, 17):
        add(parts, keys[begin : begin + 17])
    state = whole.export()
    assert len(state) == whole.nbytes == sketch_bytes(N // 7)
    assert state == parts.export()
    fresh = Sketch(N // 7)
    assert fresh.export() != state
    fresh.load(state)
    assert fresh.export() == state
    assert add(fresh, keys).tolist() == add(parts, keys).tolist()
    assert fresh.export() == parts.export()
    assert whole.export() == state  # nothing is shared


def test_rotating_through_all_windows_leaves_nothing():
    sketch = Sketch(N, 3, 0.5)
    add(sketch, mixes(9 * N))
    for _ in range(3):
        sketch.rotate()
    assert not any(sketch.export()[64:])


def test_memory_begins_at_a_cache_line():
    sketches = [Sketch(capacity) for capacity in range(1, 40)]
    assert [sketch.address % 64 for sketch in sketches] == [0] * 39


def test_a_window_by_hand_equals_the_policy():
    sketch, keys = Sketch(N), mixes(N)
    expected = add(Sketch(N), keys)
    shape = (sketch.address + 64, sketch.windows, sketch.lines)
    assert [sketch_add(*shape, 0, key, 1) for key in keys] == expected.tolist()
    estimates = [sketch_estimate(*shape, key) for key in keys]
    assert estimates == sketch.estimate(keys).tolist()
    lines = {sketch_line(*shape, key) for key in keys}
    assert all(line % 64 == 0 and shape[0] <= line < sketch.address + sketch.nbytes for line in lines)
    assert len(lines) > sketch.lines / 2


def test_a_state_that_does_not_fit_is_refused_and_changes_nothing():
    sketch = Sketch(50, 3)
    add(sketch, mixes(60))
    state = sketch.export()
    other = bytearray(state)
    bad = [b"", state[:-1], state + b"\0", state[:64], Sketch(51, 3).export(), Sketch(5000, 3).export()]
    for place, value in (
        (0, 2),
        (1, 1 << 40),
        (1, -1),
        (2, 0),
        (3, 3),
        (3, -1),
        (4, 51),
        (4, -1),
        (5, 1),
        (7, 1 << 62),
    ):
        other[:] = state
        other[8 * place : 8 * place + 8] = value.to_bytes(8, "little", signed=True)
        bad.append(bytes(other))
    for given in bad:
        with pytest.raises(Malformed, match="sketch's state"):
            sketch.load(given)
        assert sketch.export() == state
    sketch.load(state)


def test_shapes_and_arrays_out_of_bounds_are_refused():
    for capacity, windows, error in (
        *(
            (0, 4, 0.05),
            (-1, 4, 0.05),
            (1 << 40, 4, 0.05),
            (10, 1, 0.05),
            (10, 65, 0.05),
            (True, 4, 0.05),
            (1.5, 4, 0.05),
        ),
        *((10, 4, 0), (10, 4, 1), (10, 4, float("nan")), (10, 4, "0.1"), (10, "4", 0.1)),
    ):
        with pytest.raises(InvalidArgument, match="give a"):
            sketch_bytes(capacity, windows, error)
    sketch = Sketch(1)
    assert add(sketch, mixes(0)).tolist() == []
    with pytest.raises(Malformed, match="one for each"):
        sketch.add(mixes(2), np.ones(3, np.int64))
    with pytest.raises(Malformed, match="mixes"):
        sketch.add(mixes(2).astype(np.int64), np.ones(2, np.int64))


def test_shapes_never_change():
    shapes = ((1,), (1000, 4, 0.05), (10**6, 2, 0.01), (10**6, 7, 0.2), (1 << 30, 64, 1e-3))
    assert [sketch_bytes(*shape) for shape in shapes] == [320, 58688, 62060736, 50126336, 6545929691200]


@pytest.mark.skipif(not reference.JIT, reason="is what that runs")
def test_all_this_holds_without_compiling():
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__],
        env=os.environ | {"NUMBA_DISABLE_JIT": "1"},
        cwd=Path(__file__).resolve().parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
