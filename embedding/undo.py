# SPDX-License-Identifier: Apache-2.0
"""Undo: rows get back the values that they had before their last updates.

Invariant: what the push kernel kept (``embedding/note.py``) comes back newest first; each kept value serves once.
A row that changes back has changed: its version rises. Kernel only, with the block shut and
room for what a view needs.
"""

import numpy as np
from numpy.typing import NDArray

from oarlock.embedding.descriptor import BUCKETS, CHUNKS, COUNT
from oarlock.embedding.hashing import key_mix
from oarlock.embedding.index import PENDING, VALUE, find, home
from oarlock.embedding.jit import jit
from oarlock.embedding.pointer import Int, copy, load_i64, load_u32, store_u32
from oarlock.embedding.slab import Layout, side_at, undo_at, weights_at
from oarlock.embedding.versions import next_version
from oarlock.embedding.view_kernels import mark_changed


@jit
def undo_rows(
    descriptor: Int, salt: np.uint64, shape: Layout, keys: NDArray[np.uint64], steps: int, done: NDArray[np.int32]
) -> None:
    """Take back up to ``steps`` updates of each of keys: uint64[n]; write to done: int32[n] how many."""
    buckets: Int = load_i64(descriptor, BUCKETS)
    count: Int = load_i64(descriptor, COUNT)
    chunks: Int = load_i64(descriptor, CHUNKS)
    size = shape.weight_bytes + 4 * shape.state_columns
    for i in range(keys.shape[0]):
        done[i] = 0
        entry = find(buckets, count, home(buckets, count, key_mix(salt, keys[i])), keys[i])
        if entry == 0:
            continue
        word = np.int64(load_u32(entry, 0))
        if word >= PENDING:
            continue
        slot = word & VALUE
        side = side_at(chunks, slot, shape)
        recorded = side + 4 * (shape.state_columns + shape.recorded)
        ring = np.int64(load_u32(recorded, 0))
        kept = ring >> 16
        place = ring & 0xFFFF
        back: Int = min(kept, steps)
        if back > 0:
            mark_changed(descriptor, shape, entry)
            place = (place - back) % shape.undo
            old = undo_at(chunks, slot, shape) + place * size
            copy(weights_at(chunks, slot, shape), old, shape.weight_bytes)
            copy(side, old + shape.weight_bytes, 4 * shape.state_columns)
            store_u32(recorded, 0, np.uint32(((kept - back) << 16) | place))
            if shape.version >= 0:
                counters = side + 4 * shape.state_columns
                store_u32(counters, shape.version, next_version(load_u32(counters, shape.version)))
            done[i] = back
