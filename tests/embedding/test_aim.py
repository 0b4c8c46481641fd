# SPDX-License-Identifier: Apache-2.0
"""Hints taken outside of the locks: what is used inside a block is right, whatever happened to its index meanwhile."""

import embedding_reference as reference
import numpy as np
import pytest

from oarlock.embedding.aim import CURSOR, RING, Grouped, aim, renew, start_aiming
from oarlock.embedding.descriptor import BUCKETS, COUNT, FIELDS
from oarlock.embedding.hashing import table_salt
from oarlock.embedding.pointer import LINE, address_of

SALT = table_salt("t")
MEMORY = np.zeros(64 * LINE, np.uint8)  # hints are asked for, so they lie in memory of ours


def homes(keys, buckets, count):
    mixes = [reference.mix64(key ^ int(SALT)) & 0xFFFFFFFF for key in keys]
    return [buckets + (mix * count >> 32) * LINE for mix in mixes]


@pytest.mark.parametrize("between", [(0, 0), (1, 9), (0, 9), (1, 7)], ids=str)
@pytest.mark.parametrize("after", [(0, 7), (1, 7), (0, 9)], ids=str)
def test_hints_are_renewed_unless_all_of_them_are_for_the_index_that_is_there(between, after):
    descriptors = np.zeros((2, FIELDS), np.int64)
    keys = np.arange(40, dtype=np.uint64)
    blocks, counts = np.array([1, 0], np.int32), np.array([30, 10], np.int32)
    grouped = Grouped(40, 2, *map(address_of, (keys, blocks, counts)))
    cursor, hints = np.zeros(CURSOR, np.int64), np.zeros(RING, np.int64)
    begin = address_of(MEMORY)

    def exchange(where, count):
        descriptors[1, [BUCKETS, COUNT]] = (begin + where * LINE if count else 0), count

    descriptors[0, [BUCKETS, COUNT]] = begin + 32 * LINE, 5
    exchange(0, 7)
    start_aiming(address_of(descriptors), SALT, grouped, address_of(cursor), 0, 0, 12, address_of(hints))
    exchange(*between)
    aim(address_of(descriptors), SALT, grouped, address_of(cursor), 20, address_of(hints))
    exchange(*after)
    aim(address_of(descriptors), SALT, grouped, address_of(cursor), 40, address_of(hints))
    block = address_of(descriptors[1])
    renew(block, SALT, address_of(keys), address_of(cursor), 0, 0, 30, address_of(hints))
    assert hints[:30].tolist() == homes(range(30), begin + after[0] * LINE, after[1])
    renew(address_of(descriptors), SALT, address_of(keys), address_of(cursor), 1, 30, 40, address_of(hints))
    assert hints[30:40].tolist() == homes(range(30, 40), begin + 32 * LINE, 5)
