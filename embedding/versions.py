# SPDX-License-Identifier: Apache-2.0
"""A row's version: how often it changed, for workers that keep rows and ask only for those that changed too often.

    created by a push    1; where rows of its block were evicted: above the highest of their versions by more than the bound
    updated, or undone   + 1
    no row               0; also a row that came without counters and was not updated since

Invariant: of two versions of one key, also of two lives of its row, the higher one is the later one; and a worker's row of an
earlier life is more than the cache's bound behind. A row that began at 1 again would soon be taken for the one before.
A version stays at MOST once it is there, and a row with that is always sent: it may have changed, and cannot say so.
Nobody keeps a row over a restore, so LEFT starts at 0 with each content. Kernels only, with the block shut.
"""

import numpy as np

from oarlock.embedding.descriptor import LEFT
from oarlock.embedding.jit import jit
from oarlock.embedding.pointer import Int, load_i64, load_u32, store_i64
from oarlock.embedding.slab import Layout

MOST = (1 << 32) - 1


@jit
def next_version(version: np.uint32) -> np.uint32:
    """Return the version of a row that changed once more."""
    raised: Int = np.int64(version) + 1
    return np.uint32(min(raised, MOST))


@jit
def first_version(descriptor: Int, shape: Layout) -> np.uint32:
    """Return what a new row of a block has before the update that it is created for."""
    left: Int = load_i64(descriptor, LEFT)
    return np.uint32(min(left + shape.bound, MOST - 1) if left > 0 else 0)


@jit
def note_left(descriptor: Int, shape: Layout, counters: Int) -> None:
    """Remember the version of a row that is evicted; ``counters``: address of its counters."""
    if shape.version >= 0:
        version = np.int64(load_u32(counters, shape.version))
        if version > load_i64(descriptor, LEFT):
            store_i64(descriptor, LEFT, version)


@jit
def is_outdated(kept: np.uint32, version: np.uint32, bound: Int) -> bool:
    """Tell whether who keeps version ``kept`` of a row (0: none) must get the one that is at ``version`` now (0: absent)."""
    old = np.int64(kept)
    now = np.int64(version)
    # Without branches, for they cannot be predicted.
    return bool((old == 0) | (now < old) | (now - old > bound) | (now == MOST))
