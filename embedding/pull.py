# SPDX-License-Identifier: Apache-2.0
"""The pull kernel: a request's rows, gathered in one pass over its keys.

    aim     128 keys ahead    where does the key's bucket lie? ask for it
    look    up to 128 keys    find their words, ask for their rows; those that are not in their home bucket, last
    copy    128 keys behind   copy the rows out

Invariant: a pull changes nothing but the heat of keys, waits for no block while it is inside another one, and leaves every
block that it entered. The stages run across the borders of blocks: what is looked up in one block is copied while the
next is looked up, and a block is left when its last row is copied. Scratch is two rings that stay in the first cache.
"""

from typing import NamedTuple

import numpy as np

from oarlock.embedding.aim import FAR, RING, STAGE, Grouped, aim, renew, start_aiming
from oarlock.embedding.descriptor import BUCKETS, CHUNKS, COUNT, DESCRIPTOR_BYTES, NEXT
from oarlock.embedding.index import PENDING, SPILLED, find, peek, warm
from oarlock.embedding.jit import jit
from oarlock.embedding.lock import enter, leave, try_enter
from oarlock.embedding.pointer import LINE, Int, copy, load_i64, load_u32, load_u64, prefetch, store_f32, store_i64
from oarlock.embedding.precision import FLOAT32, decode_row
from oarlock.embedding.slab import First, Layout, draw_weights, prefetch_bytes, weights_at

_RING = RING - 1

ABSENT = 0  # in place of a row's address
IN_FILE = -1


@jit
def copy_row(out: Int, row: Int, size: Int) -> None:
    """Copy ``size`` bytes, a multiple of 4, in pieces of fixed size: of any other, a copy is a call."""
    while size >= 64:
        copy(out, row, 64)
        out += 64
        row += 64
        size -= 64
    while size >= 16:
        copy(out, row, 16)
        out += 16
        row += 16
        size -= 16
    while size > 0:
        copy(out, row, 4)
        out += 4
        row += 4
        size -= 4


class PullScratch(NamedTuple):
    """Addresses of scratch memory: cursor, hints, late as in ``embedding/aim.py``, rows: int64[RING]; and what a pull finds.

    cold, records: int64[n], position and record of rows in the spill file; found: int64[2], rows in memory and in the file.
    """

    cursor: int
    hints: int
    late: int
    rows: int
    cold: int
    records: int
    found: int


@jit
def copy_out(rows: Int, begin: Int, end: Int, keys: Int, shape: Layout, first: First, zeros: bool, out: Int) -> None:
    """Write the weights of keys begin to end - 1, or what an absent key reads as, to their lines of ``out``."""
    pitch = 4 * shape.dim
    for i in range(begin, end):
        row = load_i64(rows, i & _RING)
        if row > 0:
            if shape.code == FLOAT32:
                copy_row(out + i * pitch, row, pitch)
            else:
                decode_row(row, shape.code, shape.dim, out + i * pitch)
        elif row == ABSENT:
            if zeros:
                for column in range(shape.dim):
                    store_f32(out + i * pitch, column, np.float32(0))
            else:
                draw_weights(load_u64(keys, i), shape, first, out + i * pitch)


@jit
def look_stage(
    descriptor: Int, shape: Layout, heated: bool, keys: Int, begin: Int, end: Int, scratch: PullScratch
) -> None:
    """Find the rows of keys begin to end - 1 of one block and ask for them."""
    buckets: Int = load_i64(descriptor, BUCKETS)
    count: Int = load_i64(descriptor, COUNT)
    chunks: Int = load_i64(descriptor, CHUNKS)
    odd = np.int64(0)
    some = max(load_i64(descriptor, NEXT) - 1, 0)  # any slot that may be asked for
    for i in range(begin, end):
        # Without a branch: whether a key is in its home bucket cannot be predicted.
        entry, hit = peek(load_i64(scratch.hints, i & _RING), load_u64(keys, i))
        word = np.int64(load_u32(entry, 0))
        plain = hit & (word < PENDING)
        row = weights_at(chunks, word if plain else some, shape)
        store_i64(scratch.rows, i & _RING, row)
        prefetch_bytes(row, shape.weight_bytes)
        store_i64(scratch.late, odd, i)
        odd += not plain
        if heated and plain:
            warm(entry)
    for k in range(odd):
        prefetch(load_i64(scratch.hints, load_i64(scratch.late, k) & _RING) + LINE)
    present = end - begin - odd
    in_file: Int = load_i64(scratch.found, 1)
    for k in range(odd):
        i = load_i64(scratch.late, k)
        row = np.int64(ABSENT)
        entry = find(buckets, count, load_i64(scratch.hints, i & _RING), load_u64(keys, i))
        if entry != 0:
            word = np.int64(load_u32(entry, 0))
            if word < PENDING:
                row = weights_at(chunks, word, shape)
                prefetch_bytes(row, shape.weight_bytes)
                present += 1
            elif word >= SPILLED:
                row = np.int64(IN_FILE)
                store_i64(scratch.cold, in_file, i)
                store_i64(scratch.records, in_file, word - SPILLED)
                in_file += 1
            if heated:
                warm(entry)
        store_i64(scratch.rows, i & _RING, row)
    store_i64(scratch.found, 0, load_i64(scratch.found, 0) + present)
    store_i64(scratch.found, 1, in_file)


@jit
def pull_rows(
    descriptors: Int,
    salt: np.uint64,
    shape: Layout,
    first: First,
    zeros: bool,
    heated: bool,
    grouped: Grouped,
    scratch: PullScratch,
    out: Int,
) -> int:
    """Write the weights of the keys to address out: float32[n, dim]; return -1, or the group whose block is not stored.

    ``zeros``: absent keys read as zeros; ``heated``: the table spills, so uses are counted. The lines of rows in the spill
    file are left as they are.
    """
    n = grouped.n
    store_i64(scratch.found, 0, 0)
    store_i64(scratch.found, 1, 0)
    start_aiming(scratch.cursor, grouped, 0, 0)
    copied = np.int64(0)  # rows before this one are out
    oldest = np.int64(0)  # the first group whose block we are in
    oldest_end = np.int64(0)
    missing = np.int64(-1)
    at = np.int64(0)
    for group in range(grouped.groups):
        descriptor = descriptors + np.int64(load_u32(grouped.blocks, group)) * DESCRIPTOR_BYTES
        size = np.int64(load_u32(grouped.counts, group))
        if not try_enter(descriptor):
            copy_out(scratch.rows, copied, at, grouped.keys, shape, first, zeros, out)
            copied = at
            while oldest < group:
                leave(descriptors + np.int64(load_u32(grouped.blocks, oldest)) * DESCRIPTOR_BYTES)
                oldest += 1
            enter(descriptor)
        if oldest == group:
            oldest_end = at + size
        if load_i64(descriptor, BUCKETS) == 0:
            leave(descriptor)
            missing = np.int64(group)
            break
        end = at + size
        while at < end:
            stop = min(at + STAGE, end)
            aim(descriptors, salt, grouped, scratch.cursor, min(n, stop + FAR), scratch.hints)
            renew(descriptor, salt, grouped.keys, scratch.cursor, group, at, stop, scratch.hints)
            look_stage(descriptor, shape, heated, grouped.keys, at, stop, scratch)
            at = stop
            ready = max(copied, at - STAGE)
            copy_out(scratch.rows, copied, ready, grouped.keys, shape, first, zeros, out)
            copied = ready
            while oldest < group and copied >= oldest_end:
                leave(descriptors + np.int64(load_u32(grouped.blocks, oldest)) * DESCRIPTOR_BYTES)
                oldest += 1
                oldest_end += np.int64(load_u32(grouped.counts, oldest))
    copy_out(scratch.rows, copied, at, grouped.keys, shape, first, zeros, out)
    last = np.int64(grouped.groups) if missing < 0 else missing
    while oldest < last:
        leave(descriptors + np.int64(load_u32(grouped.blocks, oldest)) * DESCRIPTOR_BYTES)
        oldest += 1
    return missing
