# SPDX-License-Identifier: Apache-2.0
"""The pull kernel: a request's rows, gathered in one pass over its keys.

    key i + FAR      its bucket is asked for            so that memory works on dozens of lines at once
    key i            is looked up, its row asked for
    key i - NEAR     its row is copied out

Invariant: a pull changes nothing but the heat of keys, waits for no block while it is inside another one, and leaves every
block that it entered. The three stages run across the borders of blocks: what is looked up in one block is copied while the
next is looked up, and a block is left when its last row is copied.
"""

import numpy as np
from numpy.typing import NDArray

from oarlock.embedding.descriptor import BUCKETS, CHUNKS, COUNT, DESCRIPTOR_BYTES
from oarlock.embedding.hashing import key_mix
from oarlock.embedding.index import PENDING, SPILLED, VALUE, find, home, warm
from oarlock.embedding.jit import jit
from oarlock.embedding.lock import enter, leave, try_enter
from oarlock.embedding.pointer import Int, load_f32, load_i64, load_u32, prefetch, store_f32
from oarlock.embedding.precision import FLOAT32, decode_row
from oarlock.embedding.slab import First, Layout, draw_weights, prefetch_bytes, weights_at

FAR = 32
NEAR = 16

ABSENT = 0  # in place of a row's address
IN_FILE = -1


@jit
def aim(
    descriptors: Int,
    salt: np.uint64,
    keys: NDArray[np.uint64],
    blocks: NDArray[np.int32],
    counts: NDArray[np.int32],
    mixes: NDArray[np.uint64],
    hints: NDArray[np.int64],
) -> None:
    """Write the mix of each key, and where its bucket lies unless the index is exchanged meanwhile: good for prefetch."""
    begin = 0
    for group in range(blocks.shape[0]):
        descriptor = descriptors + blocks[group] * DESCRIPTOR_BYTES
        buckets: Int = load_i64(descriptor, BUCKETS)
        count: Int = load_i64(descriptor, COUNT)
        end = begin + counts[group]
        for i in range(begin, end):
            mix = key_mix(salt, keys[i])
            mixes[i] = mix
            hints[i] = home(buckets, count, mix)
        begin = end


@jit
def copy_out(row: Int, key: np.uint64, shape: Layout, first: First, zeros: bool, out: Int) -> None:
    """Write a row's weights, or what an absent key reads as, to address ``out``."""
    if row > 0:
        if shape.code == FLOAT32:
            for column in range(shape.dim):
                store_f32(out, column, load_f32(row, column))
        else:
            decode_row(row, shape.code, shape.dim, out)
    elif row == ABSENT:
        if zeros:
            for column in range(shape.dim):
                store_f32(out, column, np.float32(0))
        else:
            draw_weights(key, shape, first, out)


@jit
def pull_rows(
    descriptors: Int,
    salt: np.uint64,
    shape: Layout,
    first: First,
    zeros: bool,
    heated: bool,
    keys: NDArray[np.uint64],
    blocks: NDArray[np.int32],
    counts: NDArray[np.int32],
    mixes: NDArray[np.uint64],
    hints: NDArray[np.int64],
    rows: NDArray[np.int64],
    records: NDArray[np.int64],
    out: Int,
    found: NDArray[np.int64],
) -> int:
    """Write the weights of keys: uint64[n] to out: float32[n, dim]; return -1, or the group whose block is not stored.

    mixes, hints, rows: scratch of n. found: int64[2] = rows present in memory, rows in the file; of the latter the record
    goes to ``records`` (of n if there may be any) and out is left as it is.
    """
    n = keys.shape[0]
    pitch = 4 * shape.dim
    aim(descriptors, salt, keys, blocks, counts, mixes, hints)
    for i in range(min(FAR, n)):
        prefetch(hints[i])
    present = 0
    in_file = 0
    copied = 0  # rows before this one are out
    oldest = 0  # the first group whose block we are in
    oldest_end = np.int64(counts[0]) if n > 0 else np.int64(0)
    missing = -1
    at = 0
    for group in range(blocks.shape[0]):
        descriptor = descriptors + blocks[group] * DESCRIPTOR_BYTES
        if not try_enter(descriptor):
            while copied < at:
                copy_out(rows[copied], keys[copied], shape, first, zeros, out + copied * pitch)
                copied += 1
            while oldest < group:
                leave(descriptors + blocks[oldest] * DESCRIPTOR_BYTES)
                oldest += 1
            oldest_end = at + counts[group]
            enter(descriptor)
        buckets: Int = load_i64(descriptor, BUCKETS)
        count: Int = load_i64(descriptor, COUNT)
        chunks: Int = load_i64(descriptor, CHUNKS)
        if buckets == 0:
            leave(descriptor)
            missing = group
            break
        end = at + counts[group]
        for i in range(at, end):
            if i + FAR < n:
                prefetch(hints[i + FAR])
            entry = find(buckets, count, home(buckets, count, mixes[i]), keys[i])
            row: Int = np.int64(ABSENT)
            if entry != 0:
                word = np.int64(load_u32(entry, 0))
                if word < PENDING:
                    row = weights_at(chunks, word & VALUE, shape)
                    prefetch_bytes(row, shape.weight_bytes)
                    present += 1
                elif word >= SPILLED:
                    row = np.int64(IN_FILE)
                    records[i] = word - SPILLED
                    in_file += 1
                if heated:
                    warm(entry)
            rows[i] = row
            if i >= copied + NEAR:
                copy_out(rows[copied], keys[copied], shape, first, zeros, out + copied * pitch)
                copied += 1
                if copied == oldest_end:
                    leave(descriptors + blocks[oldest] * DESCRIPTOR_BYTES)
                    oldest += 1
                    oldest_end += counts[oldest]
        at = end
    while copied < at:
        copy_out(rows[copied], keys[copied], shape, first, zeros, out + copied * pitch)
        copied += 1
    last = blocks.shape[0] if missing < 0 else missing
    while oldest < last:
        leave(descriptors + blocks[oldest] * DESCRIPTOR_BYTES)
        oldest += 1
    found[0] = present
    found[1] = in_file
    return missing
