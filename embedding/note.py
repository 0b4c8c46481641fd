# SPDX-License-Identifier: Apache-2.0
"""What a push notes of rows before their update: how often they came, what was clicked, how often they changed, what they were.

Invariant: only what the table keeps is written; a row's old values go to the undo ring before the update changes them.
Kernel only, under the block's lock.
"""

import numpy as np

from oarlock.embedding.jit import jit
from oarlock.embedding.pointer import Int, copy, load_f32, load_i64, load_u32, store_f32, store_u32
from oarlock.embedding.request import Request, Scratch
from oarlock.embedding.slab import Layout
from oarlock.embedding.versions import next_version


@jit
def note(shape: Layout, request: Request, at: Int, end: Int, scratch: Scratch) -> None:
    """Count occurrences, shows, clicks and versions, and keep the values that the update is about to change."""
    for i in range(at, end):
        row = load_i64(scratch.rows, i)
        if row <= 0:
            continue
        side: Int = load_i64(scratch.sides, i)
        counters = side + 4 * shape.state_columns
        amount = load_u32(request.occurrences, i) if request.occurrences != 0 else np.uint32(1)
        if shape.occurrences >= 0:
            total = np.uint64(load_u32(counters, shape.occurrences)) + np.uint64(amount)
            store_u32(counters, shape.occurrences, np.uint32(min(total, np.uint64(0xFFFFFFFF))))
        if shape.shows >= 0:
            store_f32(counters, shape.shows, load_f32(counters, shape.shows) + np.float32(amount))
            if request.clicks != 0:
                clicks = load_f32(counters, shape.shows + 1) + load_f32(request.clicks, i)
                store_f32(counters, shape.shows + 1, clicks)
        if shape.version >= 0:
            store_u32(counters, shape.version, next_version(load_u32(counters, shape.version)))
        if shape.undo > 0:
            ring = np.int64(load_u32(counters, shape.recorded))
            place = ring & 0xFFFF
            old = load_i64(scratch.undo, i) + place * (shape.weight_bytes + 4 * shape.state_columns)
            copy(old, row, shape.weight_bytes)
            copy(old + shape.weight_bytes, side, 4 * shape.state_columns)
            kept: Int = min((ring >> 16) + 1, shape.undo)
            store_u32(counters, shape.recorded, np.uint32((kept << 16) | ((place + 1) % shape.undo)))
        if shape.updated >= 0:
            store_u32(counters, shape.updated, np.uint32(request.tick))
