# SPDX-License-Identifier: Apache-2.0
"""Admission: which absent keys get a row, decided inside the push kernel.

| kind        | an absent key of a push gets its row                                                          |
|-------------|-----------------------------------------------------------------------------------------------|
| always      | at once                                                                                       |
| count       | with its n-th occurrence, counted exactly: until then the index keeps the count in place of a slot |
| sketch      | with its n-th occurrence as a sliding sketch counts (``embedding/sketch.py``): never later, seldom earlier |
| probability | by a draw from (job seed, table, key, step): chance p for each occurrence                     |
| score       | for sure if (shows - clicks) * nonclick + clicks * click of the push is >= 1, else with that chance |

Invariant: a decision is a pure function of the block's content and the request; a key that is not admitted loses its
gradient and reads as absent. Kernels only, under the block's lock.
"""

from typing import NamedTuple

import numpy as np

from oarlock.embedding.descriptor import (
    BUCKETS,
    CHUNKS,
    COUNT,
    ENTRIES,
    FREE,
    FREE_ROWS,
    NEXT,
    PENDING_KEYS,
    ROWS,
    SKETCH,
    STAMP,
)
from oarlock.embedding.hashing import GOLDEN, key_mix, mix64
from oarlock.embedding.index import PENDING, VALUE, find, home, insert
from oarlock.embedding.initial import stream
from oarlock.embedding.jit import jit
from oarlock.embedding.pointer import Int, load_f32, load_i64, load_u32, load_u64, store_i64, store_u32
from oarlock.embedding.request import ABSENT, Request, Scratch
from oarlock.embedding.sketch import count_key
from oarlock.embedding.slab import First, Layout, side_at, start_row, undo_at, weights_at
from oarlock.embedding.update_row import powers
from oarlock.embedding.versions import first_version

# Ids of kernels, not of files.
ALWAYS, BY_COUNT, BY_SKETCH, BY_CHANCE, BY_SCORE = range(5)

_DROP = np.uint64(11)
_UNIT = 2.0**-53


class Rules(NamedTuple):
    """What a push must know of a table's policies.

    ``limit``: bits of the least gradient value that is refused. ``heated``: the table spills, so uses are counted. ``most``:
    rows that a block may have before some must go, 0: any number.
    """

    kind: int
    needed: int
    chance: float
    nonclick: float
    click: float
    limit: np.uint32
    heated: bool
    most: int


@jit
def draw(first: First, key: np.uint64, step: Int) -> float:
    """Return a number in [0, 1) that depends on (job seed, table, key, step) alone."""
    x = mix64(stream(first.origin, key) ^ mix64(np.uint64(step) + GOLDEN))
    return float(np.int64(x >> _DROP)) * _UNIT


@jit
def take_slot(descriptor: Int, shape: Layout) -> Int:
    """Return a slot for a new row; the caller made sure that there is one."""
    chain = load_i64(descriptor, FREE)
    store_i64(descriptor, ROWS, load_i64(descriptor, ROWS) + 1)
    if chain == 0:
        slot: Int = load_i64(descriptor, NEXT)
        store_i64(descriptor, NEXT, slot + 1)
        return slot
    slot = chain - 1
    store_i64(descriptor, FREE, np.int64(load_u32(weights_at(load_i64(descriptor, CHUNKS), slot, shape), 0)))
    store_i64(descriptor, FREE_ROWS, load_i64(descriptor, FREE_ROWS) - 1)
    return slot


@jit
def give_slot(descriptor: Int, shape: Layout, slot: Int) -> None:
    """Take a row's slot back."""
    store_u32(weights_at(load_i64(descriptor, CHUNKS), slot, shape), 0, np.uint32(load_i64(descriptor, FREE)))
    store_i64(descriptor, FREE, slot + 1)
    store_i64(descriptor, FREE_ROWS, load_i64(descriptor, FREE_ROWS) + 1)
    store_i64(descriptor, ROWS, load_i64(descriptor, ROWS) - 1)


@jit
def admitted(
    descriptor: Int,
    first: First,
    rules: Rules,
    mix: np.uint64,
    key: np.uint64,
    before: Int,
    amount: Int,
    click: float,
    step: Int,
) -> tuple[bool, Int]:
    """Return whether a key gets its row now, and how often it has come in all; ``before``: how often till now."""
    if rules.kind == ALWAYS:
        return True, amount
    if rules.kind == BY_COUNT:
        count = min(before + amount, VALUE)
        return count >= rules.needed, count
    if rules.kind == BY_SKETCH:
        count = count_key(load_i64(descriptor, SKETCH), mix, amount)
        return count >= rules.needed, count
    if rules.kind == BY_CHANCE:
        # One draw for all of the push's occurrences, with the chance that at least one of them is lucky.
        missed, _ = powers(1.0 - rules.chance, 1.0, amount)
        return draw(first, key, step) < 1.0 - missed, amount
    score = (amount - click) * rules.nonclick + click * rules.click
    return score >= 1.0 or draw(first, key, step) < score, amount


@jit
def create(
    descriptor: Int, shape: Layout, first: First, key: np.uint64, slot: Int, values: Int
) -> tuple[Int, Int, Int]:
    """Start a row in ``slot``; return the addresses of its weights, side and undo ring."""
    chunks: Int = load_i64(descriptor, CHUNKS)
    row = weights_at(chunks, slot, shape)
    side = side_at(chunks, slot, shape)
    start_row(row, side, key, shape, first, values)
    return row, side, undo_at(chunks, slot, shape)


@jit
def admit(
    descriptor: Int,
    salt: np.uint64,
    shape: Layout,
    first: First,
    rules: Rules,
    keys: Int,
    request: Request,
    at: Int,
    end: Int,
    scratch: Scratch,
) -> int:
    """Create the rows of those absent keys at to end - 1 that are admitted, and fill in where they are; return how many."""
    buckets: Int = load_i64(descriptor, BUCKETS)
    count: Int = load_i64(descriptor, COUNT)
    stamp: Int = load_i64(descriptor, STAMP)
    created = 0
    for i in range(at, end):
        if load_i64(scratch.rows, i) != ABSENT:
            continue
        key = load_u64(keys, i)
        mix = key_mix(salt, key)
        line = home(buckets, count, mix)
        entry = find(buckets, count, line, key)
        before = np.int64(0)
        if entry != 0:
            word = np.int64(load_u32(entry, 0))
            if word < PENDING:
                # The same key came before in this request.
                chunks: Int = load_i64(descriptor, CHUNKS)
                store_i64(scratch.rows, i, weights_at(chunks, word & VALUE, shape))
                store_i64(scratch.sides, i, side_at(chunks, word & VALUE, shape))
                store_i64(scratch.undo, i, undo_at(chunks, word & VALUE, shape))
                continue
            before = word & VALUE
        amount = np.int64(load_u32(request.occurrences, i)) if request.occurrences != 0 else np.int64(1)
        click = float(load_f32(request.clicks, i)) if request.clicks != 0 else 0.0
        yes, total = admitted(descriptor, first, rules, mix, key, before, amount, click, request.step)
        if yes:
            slot = take_slot(descriptor, shape)
            if entry == 0:
                insert(buckets, count, line, key, np.uint32(slot | stamp))
                store_i64(descriptor, ENTRIES, load_i64(descriptor, ENTRIES) + 1)
            else:
                store_u32(entry, 0, np.uint32(slot | stamp))
                store_i64(descriptor, PENDING_KEYS, load_i64(descriptor, PENDING_KEYS) - 1)
            row, side, undo = create(descriptor, shape, first, key, slot, scratch.values)
            store_i64(scratch.rows, i, row)
            store_i64(scratch.sides, i, side)
            store_i64(scratch.undo, i, undo)
            if shape.occurrences >= 0:
                # What came before; this push's occurrences are added like those of any row.
                store_u32(side + 4 * shape.state_columns, shape.occurrences, np.uint32(max(total - amount, 0)))
            if shape.version >= 0:
                store_u32(side + 4 * shape.state_columns, shape.version, first_version(descriptor, shape))
            created += 1
        elif rules.kind == BY_COUNT:
            waits = np.uint32(PENDING | total | stamp)
            if entry == 0:
                insert(buckets, count, line, key, waits)
                store_i64(descriptor, ENTRIES, load_i64(descriptor, ENTRIES) + 1)
                store_i64(descriptor, PENDING_KEYS, load_i64(descriptor, PENDING_KEYS) + 1)
            else:
                store_u32(entry, 0, waits)
    return created
