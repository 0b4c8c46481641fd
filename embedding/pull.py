# SPDX-License-Identifier: Apache-2.0
"""The pull kernel: a request's rows, gathered in one pass over its keys.

    aim     128 keys ahead    where do the keys' buckets lie?
    look    up to 64 keys     find their words, ask for their rows, and for the buckets 128 keys ahead
    late    64 keys behind    the same for those that are not in their home bucket
    copy    128 keys behind   copy the rows out

Invariant: a pull changes nothing but the heat of keys, waits for no block while it is inside another one, and leaves every
block that it entered. The stages run across the borders of blocks: what is looked up in one block is copied while the
next is looked up, and a block is left when its last row is copied. Blocks that a push is in are served last. Scratch is
two rings that stay in the first cache.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from oarlock.embedding.aim import (
    FAR,
    RING,
    STAGE,
    Grouped,
    addresses,
    aim,
    ask,
    in_ring,
    lap_end,
    renew,
    start_aiming,
)
from oarlock.embedding.descriptor import BUCKETS, CHUNKS, COUNT, DESCRIPTOR_BYTES, NEXT
from oarlock.embedding.index import PENDING, SPILLED, VALUE, ask_away, find, next_line, peek, record_of, warm
from oarlock.embedding.jit import jit
from oarlock.embedding.lock import enter, leave, try_enter
from oarlock.embedding.pointer import (
    LINE,
    Int,
    address_in,
    copy,
    load_i64,
    load_u32,
    load_u64,
    prefetch,
    store_f32,
    store_i64,
)
from oarlock.embedding.precision import FLOAT32, decode_row
from oarlock.embedding.slab import First, Layout, draw_weights, prefetch_bytes, weights_at

_RING = RING - 1
LAG = 2 * STAGE  # keys between those that are looked up and those whose rows are copied

ABSENT = 0  # in place of a row's address
IN_FILE = -1

PRESENT, FILED, PUT_OFF = range(3)  # words of ``found``
FOUND_WORDS = 3


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


@jit
def copy_rows(rows: Int, n: Int, size: Int, out: Int) -> Int:
    """Copy those of ``n`` rows of ``size`` bytes that are in memory to their lines; return how many are not.

    The two loops of one copy are for the commonest widths, 16 and 32 numbers: 1 ns a row in the cache, where the general one
    takes 3.7 and 4.5.
    """
    left = np.int64(0)
    if size == 64:
        for i in range(n):
            row = load_i64(rows, i)
            if row > 0:
                copy(out + i * 64, row, 64)
            else:
                left += 1
    elif size == 128:
        for i in range(n):
            row = load_i64(rows, i)
            if row > 0:
                copy(out + i * 128, row, 128)
            else:
                left += 1
    else:
        for i in range(n):
            row = load_i64(rows, i)
            if row > 0:
                copy_row(out + i * size, row, size)
            else:
                left += 1
    return left


class PullScratch(NamedTuple):
    """Addresses of scratch memory: cursor, hints, late as in ``embedding/aim.py``, rows: int64[RING]; and what a pull finds.

    cold, records: int64[n], position and record of rows in the spill file; later: int64[n, 2], groups put off; found:
    int64[FOUND_WORDS], rows in memory, rows in the file, groups put off.
    """

    cursor: int
    hints: int
    late: int
    rows: int
    cold: int
    records: int
    later: int
    found: int


@jit
def copy_out(rows: Int, begin: Int, end: Int, keys: Int, shape: Layout, first: First, zeros: bool, out: Int) -> None:
    """Write the weights of keys begin to end - 1, or what an absent key reads as, to their lines of ``out``."""
    pitch = 4 * shape.dim
    while begin < end:
        n = min(end, lap_end(begin)) - begin
        window = in_ring(rows, begin)
        lines = out + begin * pitch
        left: Int = n
        if shape.code == FLOAT32:
            left = copy_rows(window, n, pitch, lines)
        if left > 0:
            for i in range(n):
                row = load_i64(window, i)
                if row == ABSENT:
                    if zeros:
                        for column in range(shape.dim):
                            store_f32(lines + i * pitch, column, np.float32(0))
                    else:
                        draw_weights(load_u64(keys, begin + i), shape, first, lines + i * pitch)
                elif row > 0 and shape.code != FLOAT32:
                    decode_row(row, shape.code, shape.dim, lines + i * pitch)
        begin += n


@jit
def look_stage(
    descriptor: Int, shape: Layout, heated: bool, keys: Int, begin: Int, end: Int, late: Int, scratch: PullScratch
) -> Int:
    """Find the rows of keys begin to end - 1 of one block and ask for them; return how many are not where most are.

    Those are listed at address late: int64[STAGE], and their next buckets asked for.
    """
    chunks: Int = load_i64(descriptor, CHUNKS)
    odd = np.int64(0)
    last = max(load_i64(descriptor, NEXT) - 1, 0)
    hints = in_ring(scratch.hints, begin)
    rows = in_ring(scratch.rows, begin)
    first = keys + 8 * begin
    for i in range(end - begin):
        ask(scratch.hints, begin + FAR + i)
        # Without a branch: whether a key is in its home bucket cannot be predicted. If it is not, the row is some other.
        entry, hit = peek(load_i64(hints, i), load_u64(first, i))
        word = np.int64(load_u32(entry, 0))
        plain = hit & (word < PENDING)
        row = weights_at(chunks, min(word & VALUE, last), shape)
        store_i64(rows, i, row)
        prefetch(row)
        store_i64(late, odd, begin + i)
        odd += not plain
        if heated and plain:
            warm(entry)
    if LINE % shape.weight_bytes != 0:  # or a row lies within one line
        for i in range(end - begin):
            prefetch_bytes(load_i64(rows, i), shape.weight_bytes)
    for k in range(odd):
        ask_away(load_i64(scratch.hints, load_i64(late, k) & _RING))
    store_i64(scratch.found, PRESENT, load_i64(scratch.found, PRESENT) + end - begin - odd)
    return odd


@jit
def look_late(
    descriptor: Int, shape: Layout, heated: bool, keys: Int, late: Int, odd: Int, scratch: PullScratch
) -> None:
    """Find the rows of the ``odd`` keys listed at address ``late``, wherever they are."""
    buckets: Int = load_i64(descriptor, BUCKETS)
    count: Int = load_i64(descriptor, COUNT)
    chunks: Int = load_i64(descriptor, CHUNKS)
    present = np.int64(0)
    in_file: Int = load_i64(scratch.found, FILED)
    for k in range(odd):
        i = load_i64(late, k)
        row = np.int64(ABSENT)
        key = load_u64(keys, i)
        home_line = load_i64(scratch.hints, i & _RING)
        entry, hit = peek(next_line(buckets, count, home_line), key)
        if not hit:
            entry = find(buckets, count, home_line, key)
        if entry != 0:
            word = np.int64(load_u32(entry, 0))
            if word < PENDING:
                row = weights_at(chunks, word & VALUE, shape)
                prefetch_bytes(row, shape.weight_bytes)
                present += 1
            elif word >= SPILLED:
                row = np.int64(IN_FILE)
                store_i64(scratch.cold, in_file, i)
                store_i64(scratch.records, in_file, record_of(word))
                in_file += 1
            if heated:
                warm(entry)
        store_i64(scratch.rows, i & _RING, row)
    store_i64(scratch.found, PRESENT, load_i64(scratch.found, PRESENT) + present)
    store_i64(scratch.found, FILED, in_file)


@jit
def pull_groups(
    descriptors: Int,
    salt: np.uint64,
    shape: Layout,
    first: First,
    zeros: bool,
    heated: bool,
    grouped: Grouped,
    begin_group: Int,
    end_group: Int,
    begin: Int,
    limit: Int,
    wait: bool,
    scratch: PullScratch,
    out: Int,
) -> Int:
    """Serve groups begin_group to end_group - 1, whose keys are ``begin`` to limit - 1; return -1 or a group not stored.

    Groups whose block is taken are listed in scratch.later, unless ``wait`` says to wait for them.
    """
    start_aiming(descriptors, salt, grouped, scratch.cursor, begin_group, begin, limit, scratch.hints)
    copied: Int = begin  # rows before this one are out
    oldest: Int = begin_group  # the first group whose block we are in
    oldest_end = np.int64(0)
    at: Int = begin
    group: Int = begin_group
    missing = np.int64(-1)
    late: Int = scratch.late  # where the next stage lists keys that are not in their home bucket
    other = scratch.late ^ (scratch.late + 8 * STAGE)
    odd = np.int64(0)  # how many the stage before listed
    before: Int = descriptors  # and the block they belong to
    while group < end_group:
        descriptor = descriptors + np.int64(load_u32(grouped.blocks, group)) * DESCRIPTOR_BYTES
        size = np.int64(load_u32(grouped.counts, group))
        inside = try_enter(descriptor)
        if not inside:
            look_late(before, shape, heated, grouped.keys, late ^ other, odd, scratch)
            odd = np.int64(0)
            copy_out(scratch.rows, copied, at, grouped.keys, shape, first, zeros, out)
            copied = at
            while oldest < group:
                leave(descriptors + np.int64(load_u32(grouped.blocks, oldest)) * DESCRIPTOR_BYTES)
                oldest += 1
            if wait:
                enter(descriptor)
            else:
                put_off(scratch, group, at)
                at += size
                group += 1
                copied = at
                oldest = group
                start_aiming(descriptors, salt, grouped, scratch.cursor, group, at, limit, scratch.hints)
                continue
        if oldest == group:
            oldest_end = at + size
        if load_i64(descriptor, BUCKETS) == 0:
            leave(descriptor)
            missing = group
            break
        end = at + size
        while at < end:
            stop = min(at + STAGE, end, lap_end(at))
            aim(descriptors, salt, grouped, scratch.cursor, min(limit, stop + FAR), scratch.hints)
            renew(descriptor, salt, grouped.keys, scratch.cursor, group, at, stop, scratch.hints)
            more = look_stage(descriptor, shape, heated, grouped.keys, at, stop, late, scratch)
            late ^= other
            look_late(before, shape, heated, grouped.keys, late, odd, scratch)
            odd = more
            before = descriptor
            at = stop
            ready = max(copied, at - LAG)
            copy_out(scratch.rows, copied, ready, grouped.keys, shape, first, zeros, out)
            copied = ready
            while oldest < group and copied >= oldest_end:
                leave(descriptors + np.int64(load_u32(grouped.blocks, oldest)) * DESCRIPTOR_BYTES)
                oldest += 1
                oldest_end += np.int64(load_u32(grouped.counts, oldest))
        group += 1
    look_late(before, shape, heated, grouped.keys, late ^ other, odd, scratch)
    copy_out(scratch.rows, copied, at, grouped.keys, shape, first, zeros, out)
    while oldest < group:
        leave(descriptors + np.int64(load_u32(grouped.blocks, oldest)) * DESCRIPTOR_BYTES)
        oldest += 1
    return missing


@jit
def put_off(scratch: PullScratch, group: Int, at: Int) -> None:
    """Note a group, and the position of its first key, for later."""
    listed: Int = load_i64(scratch.found, PUT_OFF)
    store_i64(scratch.later, 2 * listed, group)
    store_i64(scratch.later, 2 * listed + 1, at)
    store_i64(scratch.found, PUT_OFF, listed + 1)


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
    scratch: PullScratch,
    out: NDArray[np.float32],
) -> Int:
    """Write the weights of keys: uint64[n] to out: float32[n, dim]; return -1, or the group whose block is not stored.

    ``zeros``: absent keys read as zeros; ``heated``: the table spills, so uses are counted. The lines of rows in the spill
    file are left as they are.
    """
    for word in range(FOUND_WORDS):
        store_i64(scratch.found, word, 0)
    grouped = addresses(keys, blocks, counts)
    lines = address_in(out, 0)
    missing = pull_groups(
        descriptors, salt, shape, first, zeros, heated, grouped, 0, grouped.groups, 0, grouped.n, False, scratch, lines
    )
    # Blocks that a push was in come last: behind it, this pull would wait in each block that the push is just in.
    for k in range(load_i64(scratch.found, PUT_OFF)):
        group = load_i64(scratch.later, 2 * k)
        at = load_i64(scratch.later, 2 * k + 1)
        end = at + np.int64(load_u32(grouped.counts, group))
        if missing < 0:
            missing = pull_groups(
                descriptors, salt, shape, first, zeros, heated, grouped, group, group + 1, at, end, True, scratch, lines
            )
    return missing
