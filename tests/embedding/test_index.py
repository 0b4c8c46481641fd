# SPDX-License-Identifier: Apache-2.0
"""The index of a block: every bucket stands where a list of Python buckets says, byte for byte."""

import embedding_reference as reference
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oarlock.embedding import index
from oarlock.embedding.hashing import table_salt
from oarlock.embedding.pointer import LINE, address_of

SALT = table_salt("t")


class Buckets:
    """Zeroed buckets on lines of their own, with one more behind them that nothing may touch."""

    def __init__(self, count):
        self.memory = np.zeros((count + 2) * LINE, np.uint8)
        begin = -address_of(self.memory) % LINE
        self.bytes = self.memory[begin : begin + count * LINE].reshape(count, LINE)
        self.watchman = self.memory[begin + count * LINE :]
        self.address, self.count = address_of(self.bytes), count

    def home(self, key):
        return index.home(self.address, self.count, np.uint64(reference.mix64(int(key) ^ int(SALT))))

    def find(self, key):
        """Return the address of a key's word, 0 if it is not there."""
        return int(index.find(self.address, self.count, self.home(key), np.uint64(key)))

    def insert(self, key, word):
        return int(index.insert(self.address, self.count, self.home(key), np.uint64(key), np.uint32(word)))

    def word(self, entry):
        at = entry - self.address
        return int(self.bytes.reshape(-1)[at : at + 4].view(np.uint32)[0])


class Twin:
    """The same from the written format: five places a bucket; from a full home on to where others of it went, or to the
    emptiest of the next seven, or to the first with a place behind those."""

    def __init__(self, count):
        self.places = [[None] * 5 for _ in range(count)]
        self.away = [0] * count
        self.reach = [0] * count
        self.heat = {}
        self.where = {}

    def home(self, key):
        return (reference.mix64(int(key) ^ int(SALT)) & 0xFFFFFFFF) * len(self.places) >> 32

    def insert(self, key, word, heat=0):
        start = self.home(key)
        distance = 0
        if None not in self.places[start]:
            distance = self.overflow(start)
            self.away[start] |= 1 << min(distance - 1, 7)
            if distance > 7:
                fits = (n for n in range(7) if distance < 16 << n)
                self.reach[start] = max(self.reach[start], next(fits, 7))
        at = (start + distance) % len(self.places)
        place = self.places[at].index(None)
        self.places[at][place] = key, word
        self.where[key], self.heat[key] = (at, place), heat

    def overflow(self, start):
        count = len(self.places)
        free = [self.places[(start + distance) % count].count(None) for distance in range(count)]
        near = range(1, min(8, count))
        known = [d for d in near if self.away[start] >> (d - 1) & 1 and free[d]]
        if known:
            return known[0]
        if any(free[d] for d in near):
            return max(near, key=lambda d: (free[d], -d))
        return next(d for d in range(8, count) if free[d])

    def erase(self, key):
        at, place = self.where.pop(key)
        self.places[at][place] = None
        del self.heat[key]

    def grown(self, count):
        new = Twin(count)
        for line in self.places:
            for entry in line:
                if entry is not None:
                    new.insert(*entry, self.heat[entry[0]])
        return new

    def check(self, buckets):
        """What is at unused places does not matter; all else is the same."""
        assert not buckets.watchman.any()
        for at, line in enumerate(buckets.bytes):
            keys, words = line[:40].view(np.uint64).tolist(), line[40:60].view(np.uint32).tolist()
            used, away, low, high = line[60:].tolist()
            assert (away, low >> 5) == (self.away[at], self.reach[at])
            for place, entry in enumerate(self.places[at]):
                assert (used >> place & 1) == (entry is not None)
                heat = (low >> place & 1) + 2 * (high >> place & 1)
                assert heat == (self.heat[entry[0]] if entry is not None else 0)
                if entry is not None:
                    assert (keys[place], words[place]) == entry


def keys_at(position, count, n):
    """Return n keys whose home is bucket ``position`` of ``count``: mixes made first, then the keys that have them."""
    low = -(-(position << 32) // count)
    return [reference.unmix64(high << 32 | low) ^ int(SALT) for high in range(n)]


CASES = {
    "spread": list(range(1, 40)),
    "last bucket": keys_at(15, 16, 12),
    "one before the last": keys_at(14, 16, 27),
    "key 0 and the last": [0, reference.WORD, *keys_at(3, 16, 8)],
    "far from home": keys_at(5, 16, 60),
    "full": list(range(100, 180)),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("count", [17, 19, 33])
def test_growing_places_every_entry_where_the_twin_does(case, count):
    small, twin = Buckets(16), Twin(16)
    for word, key in enumerate(CASES[case]):
        twin.insert(key, word | index.SPILLED * (word % 3 == 2) | index.PENDING * (word % 3 == 1))
        entry = small.insert(key, twin.places[twin.where[key][0]][twin.where[key][1]][1])
        for _ in range(word % 4):
            index.warm(entry)
        twin.heat[key] = word % 4
    twin.check(small)
    large = Buckets(count)
    index.rehash(small.address, 16, SALT, large.address, count)
    twin.grown(count).check(large)
    keys, words = np.empty(len(CASES[case]), np.uint64), np.empty(len(CASES[case]), np.uint32)
    assert index.list_entries(large.address, 0, count, keys, words) == len(keys)
    assert dict(zip(keys.tolist(), words.tolist(), strict=True)) == {
        key: entry for line in twin.places for key, entry in filter(None, line)
    }


STEPS = st.lists(st.tuples(st.sampled_from(["insert", "erase", "warm", "cool"]), st.integers(0, 23)), max_size=80)


@given(STEPS)
@settings(max_examples=60 if reference.JIT else 6)
def test_random_inserts_and_erases_are_those_of_the_twin(steps):
    pool = [0, reference.WORD, *keys_at(6, 7, 14), *range(1, 9)]
    buckets, twin = Buckets(7), Twin(7)
    for number, (what, chosen) in enumerate(steps):
        key = pool[chosen]
        entry = buckets.find(key)
        if key not in twin.where:
            assert entry == 0
            if what == "insert":
                twin.insert(key, number)
                assert buckets.insert(key, number) == buckets.find(key) != 0
            continue
        assert buckets.word(entry) == twin.places[twin.where[key][0]][twin.where[key][1]][1]
        if what == "erase":
            twin.erase(key)
            index.erase(entry)
        elif what == "warm":
            twin.heat[key] = min(3, twin.heat[key] + 1)
            index.warm(entry)
        elif what == "cool":
            assert index.cool(index.line_of(entry), index.place_of(entry)) == (twin.heat[key] == 0)
            twin.heat[key] = max(0, twin.heat[key] - 1)
    twin.check(buckets)


def test_keys_that_all_belong_to_one_bucket_are_found_however_far_they_lie():
    many = 2000 if reference.JIT else 60
    count = -(-many * 100 // (index.LOAD * index.PLACES)) + 1
    keys = keys_at(count - 2, count, many + 50)
    buckets, twin = Buckets(count), Twin(count)
    for word, key in enumerate(keys[:many]):
        buckets.insert(key, word)
        twin.insert(key, word)
    twin.check(buckets)
    assert twin.away[count - 2] == 255
    assert twin.reach[count - 2] == (5 if reference.JIT else 0)
    assert [buckets.word(buckets.find(key)) for key in keys[:many]] == list(range(many))
    assert [buckets.find(key) for key in keys[many:]] == [0] * 50
    for key in keys[:many:2]:
        index.erase(buckets.find(key))
    assert [buckets.find(key) == 0 for key in keys[:many]] == [i % 2 == 0 for i in range(many)]


def test_an_index_is_never_asked_to_hold_more_than_its_load():
    for buckets in range(1, 4000):
        assert 0.8 * (buckets - 1) * index.PLACES <= index.entries_of(buckets) <= 0.83 * buckets * index.PLACES
