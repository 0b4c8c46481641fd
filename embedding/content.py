# SPDX-License-Identifier: Apache-2.0
"""A block's content as plain arrays, and the kernels that copy it out of a block and into one.

Invariant: a content written into an empty block and read out again is the same content, but for the order of keys; weights
travel as float32, which holds every stored dtype exactly (an int8 row's scale travels as its last column of state).
Kernels only look at rows in memory; the caller holds the block's mutex.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from oarlock.embedding.descriptor import BUCKETS, CHUNKS, COUNT, ENTRIES, NEXT, PENDING_KEYS, ROWS
from oarlock.embedding.hashing import key_mix
from oarlock.embedding.index import PENDING, VALUE, find, home, insert
from oarlock.embedding.jit import jit
from oarlock.embedding.pointer import Int, load_f32, load_i64, load_u32, store_f32, store_i64, store_u32
from oarlock.embedding.precision import INT8, decode_row, encode_nearest, row_scale
from oarlock.embedding.slab import Layout, side_at, weights_at

NO_COUNTERS: NDArray[np.uint32] = np.zeros((0, 0), np.uint32)
NO_KEYS: NDArray[np.uint64] = np.zeros(0, np.uint64)
NO_COUNTS: NDArray[np.uint32] = np.zeros(0, np.uint32)


class BlockRows(NamedTuple):
    """A block's content: keys: uint64[r], weights: float32[r, dim], state: float32[r, columns], and what its policies count.

    counters: uint32[r, c], the table's counters in the order of ``embedding/slab.py`` without the undo ring's (empty:
    all zero); waiting: uint64[p], keys that are not admitted yet, and waited: uint32[p], how often they have come; sketch:
    the state of the block's sketch, empty if it has none.
    """

    keys: NDArray[np.uint64]
    weights: NDArray[np.float32]
    state: NDArray[np.float32]
    counters: NDArray[np.uint32] = NO_COUNTERS
    waiting: NDArray[np.uint64] = NO_KEYS
    waited: NDArray[np.uint32] = NO_COUNTS
    sketch: bytes = b""


@jit
def read_row(
    weights: Int,
    side: Int,
    shape: Layout,
    counters: int,
    at: Int,
    out: Int,
    state: NDArray[np.float32],
    counted: NDArray[np.uint32],
) -> None:
    """Copy a row to line ``at``: weights to address out: float32[dim], state and the first ``counters`` counters."""
    decode_row(weights, shape.code, shape.dim, out)
    for column in range(shape.state_columns):
        state[at, column] = load_f32(side, column)
    if shape.code == INT8:
        state[at, shape.state_columns] = row_scale(weights, shape.code, shape.dim)
    for column in range(counters):
        counted[at, column] = load_u32(side, shape.state_columns + column)


@jit
def write_row(
    weights: Int,
    side: Int,
    shape: Layout,
    at: Int,
    source: Int,
    state: NDArray[np.float32],
    counted: NDArray[np.uint32],
) -> None:
    """Write line ``at`` into a row; counters that ``counted`` has no column for become zero."""
    scale = state[at, shape.state_columns] if shape.code == INT8 else np.float32(0)
    encode_nearest(weights, shape.code, shape.dim, source, scale)
    for column in range(shape.state_columns):
        store_f32(side, column, state[at, column])
    for column in range(shape.counters):
        value = counted[at, column] if column < counted.shape[1] else np.uint32(0)
        store_u32(side, shape.state_columns + column, value)


@jit
def export_rows(
    descriptor: Int,
    shape: Layout,
    keys: NDArray[np.uint64],
    words: NDArray[np.uint32],
    weights: Int,
    state: NDArray[np.float32],
    counted: NDArray[np.uint32],
) -> int:
    """Copy the rows of those entries that are in memory to lines 0, 1, ...; put their keys first in keys; return how many."""
    chunks: Int = load_i64(descriptor, CHUNKS)
    at = 0
    for i in range(keys.shape[0]):
        word = np.int64(words[i])
        if word < PENDING:
            row = weights_at(chunks, word & VALUE, shape)
            side = side_at(chunks, word & VALUE, shape)
            read_row(row, side, shape, counted.shape[1], at, weights + 4 * at * shape.dim, state, counted)
            keys[i], keys[at] = keys[at], keys[i]
            words[i], words[at] = words[at], words[i]
            at += 1
    return at


@jit
def import_rows(
    descriptor: Int,
    salt: np.uint64,
    shape: Layout,
    keys: NDArray[np.uint64],
    weights: Int,
    state: NDArray[np.float32],
    counted: NDArray[np.uint32],
) -> int:
    """Fill an empty block with room: slot i = key i. Return -1, or the position of the first key that came before."""
    buckets: Int = load_i64(descriptor, BUCKETS)
    count: Int = load_i64(descriptor, COUNT)
    chunks: Int = load_i64(descriptor, CHUNKS)
    for i in range(keys.shape[0]):
        line = home(buckets, count, key_mix(salt, keys[i]))
        if find(buckets, count, line, keys[i]) != 0:
            return i
        insert(buckets, count, line, keys[i], np.uint32(i))
        write_row(
            weights_at(chunks, i, shape),
            side_at(chunks, i, shape),
            shape,
            i,
            weights + 4 * i * shape.dim,
            state,
            counted,
        )
    for word in (ENTRIES, ROWS, NEXT):
        store_i64(descriptor, word, np.int64(keys.shape[0]))
    return -1


@jit
def import_waiting(descriptor: Int, salt: np.uint64, keys: NDArray[np.uint64], counts: NDArray[np.uint32]) -> int:
    """Enter keys that are not admitted yet, with how often they came. Return as import_rows."""
    buckets: Int = load_i64(descriptor, BUCKETS)
    count: Int = load_i64(descriptor, COUNT)
    for i in range(keys.shape[0]):
        line = home(buckets, count, key_mix(salt, keys[i]))
        if find(buckets, count, line, keys[i]) != 0:
            return i
        insert(buckets, count, line, keys[i], np.uint32(PENDING | np.int64(min(np.int64(counts[i]), np.int64(VALUE)))))
    store_i64(descriptor, ENTRIES, load_i64(descriptor, ENTRIES) + keys.shape[0])
    store_i64(descriptor, PENDING_KEYS, np.int64(keys.shape[0]))
    return -1
