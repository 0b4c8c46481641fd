# SPDX-License-Identifier: Apache-2.0
import embedding_reference as reference
import numpy as np
import pytest

from oarlock.embedding import index
from oarlock.embedding.hashing import table_salt
from oarlock.embedding.pointer import address_of

SALT = table_salt("t")


def place(entries, key, slot):
    """Enter a key by linear probing, as the format says; ``entries`` is a list of (key, slot + 1)."""
    at = reference.mix64(int(key) ^ int(SALT)) % len(entries)
    while entries[at][1] != 0 and entries[at][0] != key:
        at = (at + 1) % len(entries)
    entries[at] = (key, slot + 1)


def keys_at(position, capacity, count):
    """Return keys whose probing starts at ``position``."""
    found = (key for key in range(1 << 30) if reference.mix64(key ^ int(SALT)) % capacity == position)
    return [next(found) for _ in range(count)]


@pytest.mark.parametrize("case", ["spread", "last entry", "one before the last", "key 0"])
def test_growing_places_every_entry_where_the_twin_does(case):
    keys = {
        "spread": list(range(1, 13)),
        "last entry": keys_at(31, 32, 8),
        "one before the last": keys_at(30, 32, 12),
        "key 0": [0, reference.WORD, *keys_at(5, 32, 5)],
    }[case]
    small, large = [(0, 0)] * 16, [(0, 0)] * 32
    for slot, key in enumerate(keys):
        place(small, key, slot)
    for key, word in small:
        if word:
            place(large, key, word - 1)
    entries = np.zeros((33, 2), np.uint64)  # one more than the index has: a watchman
    index.rehash(SALT, np.array(small, np.uint64), address_of(entries), 31)
    assert entries[32].tolist() == [0, 0]
    assert [tuple(entry) for entry in entries[:32].tolist()] == large


def test_crowded_lists_the_groups_whose_block_could_overflow():
    descriptors = np.zeros((4, index.FIELDS), np.int64)
    descriptors[:, index.ROWS] = [0, 10, 12, 11]
    descriptors[:, index.ROOM] = [0, 12, 12, 12]
    out = np.full(4, -1, np.int32)
    blocks = np.array([3, 0, 2, 1], np.int32)
    assert index.crowded(descriptors, blocks, np.array([1, 1, 1, 2], np.int32), out) == 2
    assert out[:2].tolist() == [1, 2]
    assert index.crowded(descriptors, blocks, np.array([2, 1, 1, 3], np.int32), out) == 4
    assert index.crowded(descriptors, blocks[:0], blocks[:0], out) == 0
