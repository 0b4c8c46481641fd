# SPDX-License-Identifier: Apache-2.0
"""Keys by part: the kernels do what plain numpy does, and every key is in one part."""

import numpy as np
import pytest

from oarlock.embedding.hashing import blocks_of, table_salt
from oarlock.embedding.partition import find_other, group_by_part, grouped_by_part

SALT = table_salt("user")
KEYS = np.random.default_rng(0).integers(0, 1 << 64, 3000, dtype=np.uint64)
EDGES = np.array([0, (1 << 64) - 1, 0, 7, 7], np.uint64)


def parts_of(keys, blocks, parts):
    number = np.empty(len(keys), np.int32)
    blocks_of(keys, SALT, blocks.bit_length() - 1, number)
    return number % parts


@pytest.mark.parametrize("keys", [KEYS, KEYS[:1], KEYS[:0], EDGES, np.full(50, 9, np.uint64)], ids=len)
@pytest.mark.parametrize(("blocks", "parts"), [(1, 1), (1, 3), (8, 2), (64, 3), (64, 64), (4, 1024)])
def test_keys_are_grouped_as_numpy_groups_them(keys, blocks, parts):
    keys = keys.copy()
    keys.flags.writeable = False
    of = parts_of(keys, blocks, parts)
    found = grouped_by_part(keys, SALT, blocks, parts)
    order = np.argsort(of, kind="stable")
    assert (found.positions == order).all()
    assert (found.keys == keys[order]).all()
    assert (found.starts == np.searchsorted(of[order], np.arange(parts + 1))).all()
    for part in range(min(parts, 5)):
        others = np.flatnonzero(of != part)
        first = (int(others[0]), int(of[others[0]])) if len(others) else (-1, -1)
        assert find_other(keys, SALT, blocks, parts, part) == first


def test_no_kernel_is_compiled_twice():
    if hasattr(group_by_part, "signatures"):
        assert len(group_by_part.signatures) == 1
