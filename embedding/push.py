# SPDX-License-Identifier: Apache-2.0
"""The push kernel: a request's gradients, block by block.

    look     find each row and ask for it; refuse gradients that would poison it; count what is absent
    admit    (only if keys are absent) create rows, or count keys that are not admitted yet
    note     (only if the table keeps them) counters, and old values for the undo ring
    update   the optimizer, called by address for all rows of the block at once

Invariant: a block changes only after its ``look`` found everything that is needed: room for every absent key, and no row in
the spill file. Otherwise the kernel stops before this block, with the blocks before it done, and is called again from there.
Results are a pure function of (block, request), whatever the split into requests. One block is held at a time.
"""

import numpy as np
from numpy.typing import NDArray

from oarlock.embedding.admission import Rules, admit
from oarlock.embedding.descriptor import (
    BUCKETS,
    CHUNKS,
    COUNT,
    DESCRIPTOR_BYTES,
    ENTRIES,
    ENTRY_ROOM,
    FREE_ROWS,
    NEXT,
    SLOT_ROOM,
    VERSION,
)
from oarlock.embedding.index import PENDING, SPILLED, VALUE, find, home, warm
from oarlock.embedding.initial import stream
from oarlock.embedding.jit import jit
from oarlock.embedding.lock import enter_mutex, leave_mutex, reopen, shut
from oarlock.embedding.pointer import Int, copy, load_f32, load_i64, load_u32, prefetch, store_f32, store_i64, store_u32
from oarlock.embedding.precision import FLOAT32, decode_row, encode_row, seed_of
from oarlock.embedding.pull import FAR, aim
from oarlock.embedding.refusal import poisonous
from oarlock.embedding.regularise import update_rows
from oarlock.embedding.request import ABSENT, REFUSED_ROW, UPDATE_ROWS, Request, Scratch
from oarlock.embedding.slab import First, Layout, prefetch_bytes, row_at, undo_at

# How a call ended.
DONE = 0
NO_ROOM = 1  # progress[NEED] more keys and rows must fit into the block
IN_FILE = 2  # progress[NEED] keys, listed in ``cold``, must come back from the spill file
NOT_STORED = 3

# Words of int64[WORDS] ``progress``: where the call begins and stopped, what it did.
GROUP, POSITION, NEED, APPLIED, CREATED, REFUSED, WAITING = range(7)
WORDS = 8

# Columns of int64[parts, PART_FIELDS] ``parts``, one line for each part of a row that has its own optimizer.
UPDATE, COLUMN, STATE, WIDTH, HYPER, PASSES = range(6)
PART_FIELDS = 6


@jit
def look(
    descriptor: Int, shape: Layout, rules: Rules, request: Request, at: Int, end: Int, gradients: Int, scratch: Scratch
) -> tuple[Int, Int]:
    """Fill rows, sides and undo of keys at to end - 1; return how many are absent, and how many are in the file."""
    n = request.keys.shape[0]
    buckets: Int = load_i64(descriptor, BUCKETS)
    count: Int = load_i64(descriptor, COUNT)
    chunks: Int = load_i64(descriptor, CHUNKS)
    absent = 0
    in_file = 0
    for i in range(at, end):
        if i + FAR < n:
            prefetch(scratch.hints[i + FAR])
        if poisonous(gradients + i * 4 * shape.dim, shape.dim, rules.limit):
            scratch.rows[i] = REFUSED_ROW
            continue
        entry = find(buckets, count, home(buckets, count, scratch.mixes[i]), request.keys[i])
        row: Int = np.int64(ABSENT)
        if entry != 0:
            word = np.int64(load_u32(entry, 0))
            if word < PENDING:
                slot = word & VALUE
                row, side = row_at(chunks, slot, shape)
                prefetch_bytes(row, shape.weight_bytes)
                prefetch_bytes(side, 4 * (shape.state_columns + shape.counters))
                scratch.sides[i] = side
                if shape.undo > 0:
                    scratch.undo[i] = undo_at(chunks, slot, shape)
                if rules.heated:
                    warm(entry)
            elif word >= SPILLED:
                scratch.cold[in_file] = i
                in_file += 1
        if row == ABSENT:
            absent += 1
        scratch.rows[i] = row
    return absent, in_file


@jit
def note(shape: Layout, request: Request, at: Int, end: Int, scratch: Scratch) -> None:
    """Count occurrences, shows and clicks, and keep the values that the update is about to change."""
    counted = request.occurrences.shape[0] > 0
    for i in range(at, end):
        if scratch.rows[i] <= 0:
            continue
        side = scratch.sides[i]
        counters = side + 4 * shape.state_columns
        amount = request.occurrences[i] if counted else np.uint32(1)
        if shape.occurrences >= 0:
            total = np.uint64(load_u32(counters, shape.occurrences)) + np.uint64(amount)
            store_u32(counters, shape.occurrences, np.uint32(min(total, np.uint64(0xFFFFFFFF))))
        if shape.shows >= 0:
            store_f32(counters, shape.shows, load_f32(counters, shape.shows) + np.float32(amount))
            if request.clicks.shape[0] > 0:
                store_f32(counters, shape.shows + 1, load_f32(counters, shape.shows + 1) + request.clicks[i])
        if shape.undo > 0:
            ring = np.int64(load_u32(counters, shape.recorded))
            place = ring & 0xFFFF
            size = shape.weight_bytes + 4 * shape.state_columns
            old = scratch.undo[i] + place * size
            copy(old, scratch.rows[i], shape.weight_bytes)
            copy(old + shape.weight_bytes, side, 4 * shape.state_columns)
            kept = min((ring >> 16) + 1, shape.undo)
            store_u32(counters, shape.recorded, np.uint32((kept << 16) | ((place + 1) % shape.undo)))
        if shape.updated >= 0:
            store_u32(counters, shape.updated, np.uint32(request.tick))


@jit
def update_block(
    shape: Layout,
    first: First,
    request: Request,
    parts: NDArray[np.int64],
    at: Int,
    end: Int,
    gradients: Int,
    scratch: Scratch,
    places: Int,
    values: Int,
) -> None:
    """Run the optimizers over rows at to end - 1. ``places``: address of scratch.rows, sides behind; values: float32."""
    stride = 4 * shape.dim
    rows = scratch.rows
    sides = scratch.sides
    step = request.step
    batch = UPDATE_ROWS if shape.code == FLOAT32 else 1
    ready = values + 4 * shape.dim  # where prepared gradients go, behind one row's decoded weights
    i: Int = at
    while i < end:
        n = min(batch, end - i)
        decoded = shape.code != FLOAT32 and rows[i] > 0
        stored = rows[i]
        if decoded:
            decode_row(stored, shape.code, shape.dim, values)
            rows[i] = values
        for p in range(parts.shape[0]):
            if p > 0:
                for j in range(i, i + n):
                    if rows[j] > 0:
                        rows[j] += 4 * parts[p - 1, WIDTH]
                        sides[j] += 4 * (parts[p, STATE] - parts[p - 1, STATE])
            update_rows(
                parts[p, UPDATE],
                parts[p, PASSES],
                places + 8 * i,
                places + 8 * (rows.shape[0] + i),
                n,
                gradients + i * stride + 4 * parts[p, COLUMN],
                stride,
                parts[p, WIDTH],
                request.rates[p],
                step,
                parts[p, HYPER],
                ready,
            )
        if decoded:
            seed = seed_of(stream(first.origin, request.keys[i]), step)
            encode_row(stored, shape.code, shape.dim, values, seed)
        i += n


@jit
def push_rows(
    descriptors: Int,
    salt: np.uint64,
    shape: Layout,
    first: First,
    rules: Rules,
    parts: NDArray[np.int64],
    request: Request,
    scratch: Scratch,
    gradients: Int,
    places: Int,
    values: Int,
    sample: NDArray[np.uint64],
    progress: NDArray[np.int64],
) -> int:
    """Apply the request from group progress[GROUP] on; return how it ended.

    gradients, places, values: the addresses of request.gradients, scratch.rows (sides follow it in memory) and
    scratch.values. sample: uint64[s] takes refused keys, in a ring counted by progress[REFUSED].
    """
    if progress[GROUP] == 0:
        aim(descriptors, salt, request.keys, request.blocks, request.counts, scratch.mixes, scratch.hints)
        for i in range(min(FAR, request.keys.shape[0])):
            prefetch(scratch.hints[i])
    at = progress[POSITION]
    for group in range(progress[GROUP], request.blocks.shape[0]):
        descriptor = descriptors + request.blocks[group] * DESCRIPTOR_BYTES
        end = at + request.counts[group]
        enter_mutex(descriptor)
        shut(descriptor)
        progress[GROUP] = group
        progress[POSITION] = at
        code = DONE
        if load_i64(descriptor, BUCKETS) == 0:
            code = NOT_STORED
        else:
            absent, in_file = look(descriptor, shape, rules, request, at, end, gradients, scratch)
            if in_file > 0:
                progress[NEED] = in_file
                code = IN_FILE
            elif absent > 0 and (
                load_i64(descriptor, ENTRIES) + absent > load_i64(descriptor, ENTRY_ROOM)
                or load_i64(descriptor, NEXT) + absent
                > load_i64(descriptor, SLOT_ROOM) + load_i64(descriptor, FREE_ROWS)
            ):
                progress[NEED] = absent
                code = NO_ROOM
            else:
                if absent > 0:
                    created = admit(descriptor, shape, first, rules, request, at, end, scratch, values)
                    progress[CREATED] += created
                waiting = 0
                for i in range(at, end):
                    if scratch.rows[i] == REFUSED_ROW:
                        if sample.shape[0] > 0:
                            sample[progress[REFUSED] % sample.shape[0]] = request.keys[i]
                        progress[REFUSED] += 1
                        scratch.rows[i] = ABSENT
                    elif scratch.rows[i] == ABSENT:
                        waiting += 1
                    else:
                        progress[APPLIED] += 1
                progress[WAITING] += waiting
                if shape.counters > 0:
                    note(shape, request, at, end, scratch)
                update_block(shape, first, request, parts, at, end, gradients, scratch, places, values)
        if code == DONE:
            store_i64(descriptor, VERSION, load_i64(descriptor, VERSION) + 1)
        reopen(descriptor)
        leave_mutex(descriptor)
        if code != DONE:
            return code
        at = end
    progress[GROUP] = request.blocks.shape[0]
    progress[POSITION] = at
    return DONE
