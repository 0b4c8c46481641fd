# SPDX-License-Identifier: Apache-2.0
"""The push kernel: a request's gradients, block by block.

    look     find each row and ask for it; refuse gradients that would poison it; count what is absent
    mark     stamp the words of keys that change; save them first if a view needs them (``embedding/view_kernels.py``)
    admit    (only if keys are absent) create rows, or count keys that are not admitted yet
    note     (only if the table keeps them) counters, and old values for the undo ring
    update   the optimizer, called by address for all rows of the block at once

Invariant: a block changes only after its ``look`` found everything that is needed: room for every absent key and for
what a view needs, no row in the spill file, and no more rows than the table's budget allows. Otherwise the kernel stops before
this block, with the blocks before it done, and is called again from there.
Results are a pure function of (what the block holds, request), whatever the split into requests, and wherever rows lie: a copy of
the block on another shard, with an index and slots of its own, takes the same request to the same bits. So what makes rows go
is how many there are, never whether there is memory for more. One block is held at a time.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from oarlock.embedding.admission import Rules, admit
from oarlock.embedding.aim import FAR, RING, STAGE, addresses, aim, ask, lap_end, renew, start_aiming
from oarlock.embedding.descriptor import (
    BUCKETS,
    CHUNKS,
    COUNT,
    DESCRIPTOR_BYTES,
    ENTRIES,
    ENTRY_ROOM,
    FREE_ROWS,
    NEXT,
    ROWS,
    SLOT_ROOM,
    STAMP,
    VERSION,
)
from oarlock.embedding.index import PENDING, SPILLED, STAMPS, VALUE, ask_away, find, peek, warm
from oarlock.embedding.initial import stream
from oarlock.embedding.jit import jit
from oarlock.embedding.lock import enter_mutex, leave_mutex, reopen, shut
from oarlock.embedding.note import note
from oarlock.embedding.pointer import (
    Int,
    load_f64,
    load_i64,
    load_u8,
    load_u32,
    load_u64,
    store_i64,
    store_u8,
    store_u64,
)
from oarlock.embedding.precision import FLOAT32, decode_row, encode_row, seed_of
from oarlock.embedding.refusal import poisonous
from oarlock.embedding.regularise import update_rows
from oarlock.embedding.request import ABSENT, REFUSED_ROW, UPDATE_ROWS, Request, Scratch
from oarlock.embedding.slab import First, Layout, prefetch_bytes, row_at, undo_at
from oarlock.embedding.view_kernels import cannot_save, mark_entries

_RING = RING - 1

# How a call ended.
DONE = 0
NO_ROOM = 1  # progress[NEED] more keys and rows must fit into the block
IN_FILE = 2  # progress[NEED] keys, listed in ``cold``, must come back from the spill file
NOT_STORED = 3
NOT_SAVED = 4  # progress[NEED] keys must be saved for a view, or the sketch
OVER_BUDGET = 5  # with progress[NEED] more rows the block would have too many, so that some of it must go first

# Words of int64[WORDS] ``progress``: where the call begins and stopped, what it did.
GROUP, POSITION, NEED, APPLIED, CREATED, REFUSED, WAITING = range(7)
WORDS = 8

# Words of a part's line in int64[parts, PART_FIELDS]: each part of a row has its own optimizer.
UPDATE, COLUMN, STATE, WIDTH, HYPER, PASSES = range(6)
PART_FIELDS = 6


class Parts(NamedTuple):
    """The parts of a row: how many, and the address of their lines."""

    number: int
    lines: int


class Outcome(NamedTuple):
    """Addresses: progress: int64[WORDS]; sample: uint64[size], a ring that takes refused keys."""

    progress: int
    sample: int
    size: int


@jit
def look(
    descriptor: Int,
    shape: Layout,
    rules: Rules,
    keys: Int,
    gradients: Int,
    begin: Int,
    end: Int,
    scratch: Scratch,
    listed: Int,
    stale: Int,
) -> tuple[Int, Int, Int]:
    """Fill in rows, sides and undo of keys begin to end - 1; return how many are absent, and how many are in the file.

    Those are listed in scratch.cold from place ``listed`` on. Where the words lie of keys that change and have another
    stamp than the block's is listed in scratch.stale, from place ``stale`` on; how many that are in all is returned, too.
    """
    stamp: Int = load_i64(descriptor, STAMP)
    buckets: Int = load_i64(descriptor, BUCKETS)
    count: Int = load_i64(descriptor, COUNT)
    chunks: Int = load_i64(descriptor, CHUNKS)
    side_bytes = 4 * (shape.state_columns + shape.counters)
    stride = 4 * shape.dim
    odd = np.int64(0)
    last = max(load_i64(descriptor, NEXT) - 1, 0)
    for i in range(begin, end):
        ask(scratch.hints, i + FAR)
        # Without a branch: whether a key is in its home bucket cannot be predicted. If it is not, the row is some other.
        entry, hit = peek(load_i64(scratch.hints, i & _RING), load_u64(keys, i))
        word = np.int64(load_u32(entry, 0))
        # A row in memory whose word has the block's stamp: nothing but the slot differs.
        fresh = hit & (word ^ stamp <= VALUE)
        slot = min(word & VALUE, last)
        row, side = row_at(chunks, slot, shape)
        prefetch_bytes(row, shape.weight_bytes)
        if side_bytes > 0:
            prefetch_bytes(side, side_bytes)
        bad = poisonous(gradients + i * stride, shape.dim, rules.limit)
        store_i64(scratch.rows, i, np.int64(REFUSED_ROW) if bad else row)
        store_i64(scratch.sides, i, side)
        if shape.undo > 0:
            store_i64(scratch.undo, i, undo_at(chunks, slot, shape))
        store_i64(scratch.late, odd, i)
        odd += (not fresh) & (not bad)
        if rules.heated and hit & (word < PENDING):
            warm(entry)
    away = np.int64(0)
    for k in range(odd):
        i = load_i64(scratch.late, k)
        line = load_i64(scratch.hints, i & _RING)
        entry, hit = peek(line, load_u64(keys, i))
        if hit and np.int64(load_u32(entry, 0)) < PENDING:
            store_i64(scratch.stale, stale, entry)
            stale += 1
        else:
            ask_away(line)
            store_i64(scratch.late, away, i)
            away += 1
    absent = np.int64(0)
    in_file = np.int64(0)
    for k in range(away):
        i = load_i64(scratch.late, k)
        row = np.int64(ABSENT)
        entry = find(buckets, count, load_i64(scratch.hints, i & _RING), load_u64(keys, i))
        if entry != 0:
            word = np.int64(load_u32(entry, 0))
            if word < SPILLED and word & STAMPS != stamp:
                store_i64(scratch.stale, stale, entry)
                stale += 1
            if word < PENDING:
                row, side = row_at(chunks, word & VALUE, shape)
                prefetch_bytes(row, shape.weight_bytes)
                if side_bytes > 0:
                    prefetch_bytes(side, side_bytes)
                store_i64(scratch.sides, i, side)
                if shape.undo > 0:
                    store_i64(scratch.undo, i, undo_at(chunks, word & VALUE, shape))
                if rules.heated:
                    warm(entry)
            elif word >= SPILLED:
                store_i64(scratch.cold, listed + in_file, i)
                in_file += 1
        store_i64(scratch.rows, i, row)
        absent += row == ABSENT
    return absent, in_file, stale


@jit
def settle(keys: Int, at: Int, end: Int, scratch: Scratch, outcome: Outcome) -> None:
    """Count what becomes of keys at to end - 1, and mark those without an update with ABSENT."""
    refused: Int = load_i64(outcome.progress, REFUSED)
    waiting: Int = load_i64(outcome.progress, WAITING)
    applied: Int = load_i64(outcome.progress, APPLIED) + end - at
    for i in range(at, end):
        row = load_i64(scratch.rows, i)
        if row > 0:
            continue
        applied -= 1
        if row == REFUSED_ROW:
            if outcome.size > 0:
                store_u64(outcome.sample, refused % outcome.size, load_u64(keys, i))
            refused += 1
            store_i64(scratch.rows, i, np.int64(ABSENT))
        else:
            waiting += 1
    store_i64(outcome.progress, REFUSED, refused)
    store_i64(outcome.progress, WAITING, waiting)
    store_i64(outcome.progress, APPLIED, applied)


@jit
def different(rows: Int, n: Int, marks: Int) -> Int:
    """Return how many of ``n`` rows, from the first on, are surely not the same row twice; marks: 256 bytes of scratch."""
    for word in range(32):
        store_i64(marks, word, 0)
    for j in range(n):
        row = load_i64(rows, j)
        if row > 0:
            place = ((row >> 2) + (row >> 7) + (row >> 13)) & 2047
            mark = np.int64(1) << (place & 7)
            seen = np.int64(load_u8(marks, place >> 3))
            if seen & mark != 0:
                return np.int64(j)
            store_u8(marks, place >> 3, np.uint8(seen | mark))
    return n


@jit
def update_block(
    shape: Layout, first: First, parts: Parts, keys: Int, request: Request, at: Int, end: Int, scratch: Scratch
) -> None:
    """Note and run the optimizers over rows at to end - 1; where a key comes again, one after the other."""
    stride = 4 * shape.dim
    batch = UPDATE_ROWS if shape.code == FLOAT32 else 1
    # What is done to all rows of a run before the first of them is updated must not look at what the run changes.
    looks = shape.undo > 0
    for p in range(parts.number):
        looks = looks or load_i64(parts.lines + 8 * PART_FIELDS * p, PASSES) != 0
    ready = scratch.values + stride  # where prepared gradients go, behind one row's decoded weights
    i: Int = at
    while i < end:
        n = min(batch, end - i)
        rows = scratch.rows + 8 * i
        if looks and n > 1:
            n = different(rows, n, scratch.values)
        sides = scratch.sides + 8 * i
        if shape.counters > 0:
            note(shape, request, i, i + n, scratch)
        stored = load_i64(rows, 0)
        decoded = shape.code != FLOAT32 and stored > 0
        if decoded:
            decode_row(stored, shape.code, shape.dim, scratch.values)
            store_i64(rows, 0, scratch.values)
        for p in range(parts.number):
            part = parts.lines + 8 * PART_FIELDS * p
            if p > 0:
                before = part - 8 * PART_FIELDS
                columns = load_i64(part, COLUMN) - load_i64(before, COLUMN)
                states = load_i64(part, STATE) - load_i64(before, STATE)
                for j in range(n):
                    if load_i64(rows, j) > 0:
                        store_i64(rows, j, load_i64(rows, j) + 4 * columns)
                        store_i64(sides, j, load_i64(sides, j) + 4 * states)
            update_rows(
                load_i64(part, UPDATE),
                load_i64(part, PASSES),
                rows,
                sides,
                n,
                request.gradients + i * stride + 4 * load_i64(part, COLUMN),
                stride,
                load_i64(part, WIDTH),
                load_f64(request.rates, p),
                request.step,
                load_i64(part, HYPER),
                ready,
            )
        if decoded:
            seed = seed_of(stream(first.origin, load_u64(keys, i)), request.step)
            encode_row(stored, shape.code, shape.dim, scratch.values, seed)
        i += n


@jit
def push_block(
    descriptor: Int,
    salt: np.uint64,
    shape: Layout,
    first: First,
    rules: Rules,
    parts: Parts,
    keys: Int,
    request: Request,
    at: Int,
    end: Int,
    absent: Int,
    stale: Int,
    scratch: Scratch,
    outcome: Outcome,
) -> int:
    """Do what comes after ``look`` to keys at to end - 1; return DONE, or another code before anything was changed."""
    if cannot_save(descriptor, stale, absent > 0):
        store_i64(outcome.progress, NEED, stale)
        return NOT_SAVED
    if absent > 0:
        rows = load_i64(descriptor, ROWS)
        # With none left to go, a push that brings more than the budget all at once may have its rows.
        if rules.most > 0 and rows > 0 and rows + absent > rules.most:
            store_i64(outcome.progress, NEED, absent)
            return OVER_BUDGET
        slots = load_i64(descriptor, SLOT_ROOM) - load_i64(descriptor, NEXT) + load_i64(descriptor, FREE_ROWS)
        if load_i64(descriptor, ENTRIES) + absent > load_i64(descriptor, ENTRY_ROOM) or absent > slots:
            store_i64(outcome.progress, NEED, absent)
            return NO_ROOM
    mark_entries(descriptor, shape, scratch.stale, stale)
    if absent > 0:
        created = admit(descriptor, salt, shape, first, rules, keys, request, at, end, scratch)
        store_i64(outcome.progress, CREATED, load_i64(outcome.progress, CREATED) + created)
    settle(keys, at, end, scratch, outcome)
    update_block(shape, first, parts, keys, request, at, end, scratch)
    store_i64(descriptor, VERSION, load_i64(descriptor, VERSION) + 1)
    return DONE


@jit
def push_rows(
    descriptors: Int,
    salt: np.uint64,
    shape: Layout,
    first: First,
    rules: Rules,
    parts: Parts,
    keys: NDArray[np.uint64],
    blocks: NDArray[np.int32],
    counts: NDArray[np.int32],
    request: Request,
    scratch: Scratch,
    outcome: Outcome,
) -> int:
    """Apply the request from group progress[GROUP] on; return how it ended."""
    grouped = addresses(keys, blocks, counts)
    at: Int = load_i64(outcome.progress, POSITION)
    start = load_i64(outcome.progress, GROUP)
    start_aiming(descriptors, salt, grouped, scratch.cursor, start, at, grouped.n, scratch.hints)
    for group in range(start, grouped.groups):
        descriptor = descriptors + np.int64(load_u32(grouped.blocks, group)) * DESCRIPTOR_BYTES
        end = at + np.int64(load_u32(grouped.counts, group))
        enter_mutex(descriptor)
        shut(descriptor)
        code = DONE
        if load_i64(descriptor, BUCKETS) == 0:
            code = NOT_STORED
        else:
            absent = np.int64(0)
            in_file = np.int64(0)
            stale = np.int64(0)
            begin: Int = at
            while begin < end:
                stop = min(begin + STAGE, end, lap_end(begin))
                aim(descriptors, salt, grouped, scratch.cursor, min(grouped.n, stop + FAR), scratch.hints)
                renew(descriptor, salt, grouped.keys, scratch.cursor, group, begin, stop, scratch.hints)
                more, cold, stale = look(
                    descriptor, shape, rules, grouped.keys, request.gradients, begin, stop, scratch, in_file, stale
                )
                absent += more
                in_file += cold
                begin = stop
            if in_file > 0:
                store_i64(outcome.progress, NEED, in_file)
                code = IN_FILE
            else:
                code = push_block(
                    descriptor,
                    salt,
                    shape,
                    first,
                    rules,
                    parts,
                    grouped.keys,
                    request,
                    at,
                    end,
                    absent,
                    stale,
                    scratch,
                    outcome,
                )
        reopen(descriptor)
        leave_mutex(descriptor)
        if code != DONE:
            store_i64(outcome.progress, GROUP, group)
            store_i64(outcome.progress, POSITION, at)
            return code
        at = end
    return DONE
