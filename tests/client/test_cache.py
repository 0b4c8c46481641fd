# SPDX-License-Identifier: Apache-2.0
"""The row cache against caches in plain Python, which know keys and order and nothing of memory."""

from collections import OrderedDict

import numpy as np
import pytest

from oarlock.client.cache import RowCache
from oarlock.client.cache_kernels import AGE, TOP
from oarlock.embedding.spec import CacheSpec
from oarlock.proto.errors import InvalidArgument, Malformed

DIM = 3
POLICIES = ("lru", "lfu")
TURNS = 800


class Lru:
    """Kept rows by key, the least recently used first; ``used``: keys of this batch that are kept."""

    def __init__(self, rows):
        self.most, self.kept, self.used, self.evictions = rows, OrderedDict(), set(), 0

    def begin(self):
        self.used.clear()

    def use(self, key):
        self.kept.move_to_end(key)
        self.used.add(key)

    def enter(self, key, content):
        if len(self.kept) == self.most and not self.evict():
            return
        self.kept[key] = content
        self.used.add(key)

    def evict(self):
        key = next(iter(self.kept))
        if key in self.used:
            return False
        self.remove(key)
        self.evictions += 1
        return True

    def remove(self, key):
        del self.kept[key]


class Lfu(Lru):
    """The same, by number of uses, of equal ones by the time of the last one; both in ``rank``."""

    def __init__(self, rows):
        super().__init__(rows)
        self.rank, self.clock, self.uses = {}, 0, 0

    def begin(self):
        super().begin()
        if self.uses >= AGE * self.most:
            self.uses = 0
            for key in sorted(self.rank, key=self.rank.get):
                self.clock += 1
                self.rank[key] = (self.rank[key][0] // 2, self.clock)

    def use(self, key):
        self.used.add(key)
        self.clock += 1
        self.uses += 1
        self.rank[key] = (min(self.rank.get(key, (0, 0))[0] + 1, TOP), self.clock)

    def enter(self, key, content):
        super().enter(key, content)
        if key in self.kept:
            self.use(key)

    def evict(self):
        self.kept.move_to_end(min(self.rank, key=self.rank.get), last=False)
        return super().evict()

    def remove(self, key):
        super().remove(key)
        del self.rank[key]


TWINS = {"lru": Lru, "lfu": Lfu}


def merge(twin, keys, came):
    """Do to a twin what ``RowCache.merge`` does; came: {key: (version, row)}."""
    twin.begin()
    new = []
    for key in keys:
        if key not in twin.kept:
            new += [key] if key in came and came[key][0] else []
        elif key in came and not came[key][0]:
            twin.remove(key)
        else:
            twin.use(key)
            twin.kept[key] = came.get(key, twin.kept[key])
    for key in new:
        twin.enter(key, came[key])


def ask(cache, keys, out):
    return cache.versions_of(np.array(keys, np.uint64), out)


class Rig:
    """A cache beside its twin, and the numbers that rows are made of."""

    def __init__(self, policy, rows, seed):
        self.cache, self.twin = RowCache(CacheSpec(rows, policy=policy), DIM), TWINS[policy](rows)
        self.rng, self.made = np.random.default_rng(seed), 0

    def row(self):
        self.made += 1
        return np.array([self.made, -self.made, self.made / 2], np.float32)

    def turn(self, keys, *, share=0.2, absent=0.05):
        """One batch: some of the kept rows come newly, some are absent."""
        rng, n = self.rng, len(keys)
        out = np.full((n, DIM), np.nan, np.float32)
        versions = ask(self.cache, keys, out)
        known = [self.twin.kept.get(key, (0, None)) for key in keys]
        assert versions.tolist() == [version for version, _ in known]
        came = {
            key: (0 if rng.random() < absent else int(rng.integers(1, 1 << 32)), self.row())
            for key, (version, _) in zip(keys, known, strict=True)
            if version == 0 or rng.random() < share
        }
        positions = rng.permutation([i for i, key in enumerate(keys) if key in came]).astype(np.int32)
        order = [keys[i] for i in positions.tolist()]
        rows = np.array([came[key][1] for key in order], np.float32).reshape(-1, DIM)
        sent = np.array([came[key][0] for key in order], np.uint32)
        self.cache.merge(np.array(keys, np.uint64), versions, positions, rows, sent, out)
        expected = [came[key][1] if key in came else row for key, (_, row) in zip(keys, known, strict=True)]
        assert out.tolist() == [row.tolist() for row in expected]
        merge(self.twin, keys, came)
        assert len(self.cache) == len(self.twin.kept) <= self.twin.most
        assert self.cache.evictions == self.twin.evictions

    def keys(self, most, spread):
        """Draw distinct keys, low ones more often; multiplied so that all bits take part."""
        drawn = (self.rng.random(self.rng.integers(0, most)) ** 3 * spread).astype(np.uint64)
        return list(dict.fromkeys((drawn * np.uint64(0x9E3779B97F4A7C15)).tolist()))

    def check(self, keys):
        """Compare all that is kept, looked at by all keys at once."""
        out = np.zeros((len(keys), DIM), np.float32)
        versions = ask(self.cache, keys, out)
        for key, version, row in zip(keys, versions.tolist(), out.tolist(), strict=True):
            known = self.twin.kept.get(key, (0, np.zeros(DIM)))
            assert (version, row) == (known[0], known[1].tolist())


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(("rows", "most", "spread"), [(1, 4, 6), (7, 12, 40), (64, 40, 300), (200, 500, 1000)])
def test_a_cache_keeps_what_its_twin_keeps(policy, rows, most, spread, seed):
    rig = Rig(policy, rows, seed)
    for turn in range(TURNS if most < 100 else TURNS // 5):
        rig.turn(rig.keys(most, spread))
        if turn % 50 == 0:
            rig.check(sorted({*rig.twin.kept, *rig.keys(50, spread)}))
    rig.check(sorted(rig.twin.kept))
    assert rig.twin.evictions > 0


@pytest.mark.parametrize("policy", POLICIES)
def test_keys_at_the_ends_are_keys_like_others(policy, seed):
    rig = Rig(policy, 4, seed)
    ends = [0, (1 << 64) - 1, 1 << 63, (1 << 63) - 1, 1, 1 << 32]
    for _ in range(60):
        rig.turn([ends[i] for i in rig.rng.permutation(len(ends))[: rig.rng.integers(0, 6)]])
    rig.check(ends)


def test_a_use_count_has_a_limit_and_fades(seed):
    rows = 300
    rig = Rig("lfu", rows, seed)
    rig.turn(list(range(rows)), share=0, absent=0)
    for _ in range(TOP + 20):
        rig.turn([7, 8], share=0, absent=0)
    most = max(count for count, _ in rig.twin.rank.values())
    assert most == TOP
    for begin in range(1000, 1000 + 100 * rows, rows // 2):
        rig.turn(list(range(begin, begin + rows // 2)), share=0, absent=0)
        if 7 not in rig.twin.kept:
            break
    assert 7 not in rig.twin.kept, "what was used much once stays for ever"


def test_lfu_keeps_what_lru_lets_go():
    """A key that came twice, then a run of keys that come once."""
    kept = {}
    for policy in POLICIES:
        cache = RowCache(CacheSpec(4, policy=policy), 1)
        for keys in ([5], [5], *([n, n + 1, n + 2] for n in range(100, 124, 3))):
            out = np.zeros((len(keys), 1), np.float32)
            versions = ask(cache, keys, out)
            positions = np.flatnonzero(versions == 0).astype(np.int32)
            rows, ones = np.ones((len(positions), 1), np.float32), np.ones(len(positions), np.uint32)
            cache.merge(np.array(keys, np.uint64), versions, positions, rows, ones, out)
        kept[policy] = int(ask(cache, [5], np.zeros((1, 1), np.float32))[0])
    assert kept == {"lru": 0, "lfu": 1}


@pytest.mark.parametrize("policy", POLICIES)
def test_a_batch_larger_than_the_cache_is_served_and_its_surplus_not_kept(policy):
    cache = RowCache(CacheSpec(10, policy=policy), DIM)
    keys = np.arange(25, dtype=np.uint64)
    rows = np.arange(75, dtype=np.float32).reshape(25, DIM)
    for turn in range(3):
        out = np.full((25, DIM), np.nan, np.float32)
        kept = cache.versions_of(keys, out)
        assert np.flatnonzero(kept).tolist() == (list(range(10)) if turn else [])
        positions = np.flatnonzero(kept == 0).astype(np.int32)
        cache.merge(keys, kept, positions, rows[positions], np.ones(len(positions), np.uint32), out)
        assert (out == rows).all()
    assert (cache.hits, cache.misses, cache.evictions, len(cache)) == (20, 55, 0, 10)


@pytest.mark.parametrize("policy", POLICIES)
def test_what_a_batch_asked_for_stays_with_it_whatever_others_do_meanwhile(policy):
    cache = RowCache(CacheSpec(2, policy=policy), 1)
    first, others = np.array([1, 2], np.uint64), np.array([3, 4], np.uint64)

    def put(keys, values):
        out = np.zeros((2, 1), np.float32)
        kept = cache.versions_of(keys, out)
        where = np.arange(2, dtype=np.int32)
        cache.merge(keys, kept, where, np.array(values, np.float32)[:, None], np.ones(2, np.uint32), out)

    put(first, [10, 20])
    out = np.zeros((2, 1), np.float32)
    kept = cache.versions_of(first, out)
    put(others, [30, 40])
    assert cache.evictions == 2
    none = np.zeros(0, np.int32)
    cache.merge(first, kept, none, np.zeros((0, 1), np.float32), np.zeros(0, np.uint32), out)
    assert out.tolist() == [[10], [20]]
    assert cache.versions_of(first, out).tolist() == [0, 0]


def test_it_counts_and_forgets_and_its_memory_stays(seed):
    rig = Rig("lru", 50, seed)
    before = rig.cache.nbytes
    for _ in range(20):
        rig.turn(rig.keys(60, 200))
    cache = rig.cache
    counts = cache.hits, cache.misses, cache.outdated, cache.evictions
    assert min(counts) > 0
    assert cache.outdated < cache.misses
    assert cache.saved_bytes == cache.hits * 4 * DIM
    assert cache.nbytes == before >= 50 * (4 * DIM + 32 + 16)
    cache.clear()
    assert len(cache) == 0
    assert counts == (cache.hits, cache.misses, cache.outdated, cache.evictions)
    keys = sorted(rig.twin.kept)
    assert not ask(cache, keys, np.zeros((len(keys), DIM), np.float32)).any()
    rig.twin = Lru(50)
    rig.twin.evictions = counts[-1]
    for _ in range(20):
        rig.turn(rig.keys(60, 200))


def answer(**other):
    """Return what merge takes, whole but for ``other``: keys 1 and 2, of which 2 is kept."""
    given = {
        "keys": np.array([1, 2], np.uint64),
        "kept": np.array([0, 9], np.uint32),
        "positions": np.array([0], np.int32),
        "rows": np.ones((1, DIM), np.float32),
        "versions": np.ones(1, np.uint32),
        "out": np.zeros((2, DIM), np.float32),
    }
    return given | other


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"positions": np.array([2], np.int32)}, "position 2 of 2"),
        ({"positions": np.array([-1], np.int32)}, "position -1"),
        ({"positions": np.array([1], np.int32)}, "key 1, at position 0, did not come"),
        (
            {
                "positions": np.zeros(2, np.int32),
                "rows": np.ones((2, DIM), np.float32),
                "versions": np.ones(2, np.uint32),
            },
            "came twice",
        ),
        ({"rows": np.ones((2, DIM), np.float32)}, "rows is"),
        ({"rows": np.ones((1, DIM + 1), np.float32)}, "rows is"),
        ({"versions": np.ones(2, np.uint32)}, "versions"),
        ({"kept": np.ones(3, np.uint32)}, "versions"),
        ({"out": np.zeros((3, DIM), np.float32)}, "out is"),
        ({"positions": np.array([0], np.int64)}, "positions"),
    ],
)
def test_an_answer_that_does_not_fit_changes_nothing(other, said):
    cache = RowCache(CacheSpec(4), DIM)
    keys, out = np.array([2], np.uint64), np.full((1, DIM), 7, np.float32)
    cache.merge(keys, np.zeros(1, np.uint32), np.zeros(1, np.int32), out, np.array([9], np.uint32), out.copy())
    with pytest.raises((Malformed, InvalidArgument), match=said):
        cache.merge(**answer(**other))
    assert (cache.hits, cache.misses, len(cache)) == (0, 1, 1)
    cache.merge(**answer())
    assert (cache.hits, cache.misses, len(cache)) == (1, 2, 2)


def test_versions_are_not_asked_for_into_what_does_not_fit():
    cache = RowCache(CacheSpec(4), DIM)
    keys = np.arange(2, dtype=np.uint64)
    with pytest.raises(Malformed, match="expected float32\\[2, 3\\]"):
        cache.versions_of(keys, np.zeros((1, DIM), np.float32))
    fixed = np.zeros((2, DIM), np.float32)
    fixed.flags.writeable = False
    with pytest.raises(InvalidArgument):
        cache.versions_of(keys, fixed)
    with pytest.raises(InvalidArgument, match="dim"):
        RowCache(CacheSpec(4), 0)


def put(cache, keys, positions, versions):
    """Merge an answer with these versions; return which of keys 1 to 9 are kept then."""
    keys, out = np.array(keys, np.uint64), np.zeros((len(keys), 1), np.float32)
    kept = cache.versions_of(keys, out)
    rows, versions = np.zeros((len(positions), 1), np.float32), np.array(versions, np.uint32)
    cache.merge(keys, kept, np.array(positions, np.int32), rows, versions, out)
    everything = np.arange(1, 10, dtype=np.uint64)
    return (np.flatnonzero(cache.versions_of(everything, np.zeros((9, 1), np.float32))) + 1).tolist()


def test_a_key_that_stands_twice_has_one_place_and_none_when_it_left():
    cache = RowCache(CacheSpec(2), 1)
    assert put(cache, [5, 5, 6], [0, 1, 2], [1, 1, 1]) == [5, 6]
    assert len(cache) == 2
    assert put(cache, [5, 5], [0], [0]) == [6]
    assert len(cache) == 1
    assert put(cache, [7], [0], [1]) == [6, 7]
    assert put(cache, [8], [0], [1]) == [7, 8]
    assert put(cache, [9], [0], [1]) == [8, 9]
    assert (len(cache), cache.evictions) == (2, 2)


def test_a_key_that_stands_twice_does_no_harm(rng):
    cache = RowCache(CacheSpec(3), 1)
    for _ in range(200):
        keys = rng.integers(0, 6, rng.integers(1, 8)).astype(np.uint64)
        out = np.zeros((len(keys), 1), np.float32)
        kept = cache.versions_of(keys, out)
        positions = np.flatnonzero((kept == 0) | (rng.random(len(keys)) < 0.3)).astype(np.int32)
        rows, versions = keys[positions].astype(np.float32)[:, None], rng.integers(0, 3, len(positions))
        cache.merge(keys, kept, positions, rows, versions.astype(np.uint32), out)
        assert (out[:, 0] == keys).all()
        assert 0 <= len(cache) <= 3
