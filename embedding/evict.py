# SPDX-License-Identifier: Apache-2.0
"""Eviction: which rows leave a block, decided row by row.

Invariant: a decision is a pure function of the row, the tick and the rules; rows leave with their index entry and their slot
in one step. Kernels are called with the block shut and room for what a view needs. A sweep looks at a bounded number of
buckets, and which rows these hold is another matter in each copy of the block: so it names the rows that it changed, and copies
do the same to just these.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from oarlock.embedding.admission import give_slot
from oarlock.embedding.descriptor import BUCKETS, CHUNKS, COUNT, ENTRIES
from oarlock.embedding.hashing import key_mix
from oarlock.embedding.index import PENDING, PLACES, USED, VALUE, WORDS, erase, find, home
from oarlock.embedding.jit import jit
from oarlock.embedding.pointer import (
    LINE,
    Int,
    load_f32,
    load_i64,
    load_u8,
    load_u32,
    load_u64,
    prefetch,
    store_f32,
    store_i64,
)
from oarlock.embedding.precision import decode_row
from oarlock.embedding.slab import Layout, side_at, weights_at
from oarlock.embedding.versions import note_left
from oarlock.embedding.view_kernels import mark_changed


class Sweep(NamedTuple):
    """The rules of ``embedding/policy.py`` as kernels take them; ``norm`` is squared; 0 = off."""

    age: int
    occurrences: int
    norm: float
    score: float
    decay: float
    nonclick: float
    click: float


class Swept(NamedTuple):
    """What a slice of a sweep did: how many rows ``left``, and whether it came to the end of the block (``wrapped``).

    gone: uint64[left], the keys of those rows; decayed: uint64[d], those of rows that stay with less shows or clicks than
    before. A slice with neither did nothing to the block.
    """

    left: int
    wrapped: bool
    gone: NDArray[np.uint64]
    decayed: NDArray[np.uint64]


@jit
def squared_norm(row: Int, shape: Layout, values: Int) -> float:
    """Return the sum of a row's squared weights; ``values``: room for float32[dim]."""
    decode_row(row, shape.code, shape.dim, values)
    total = 0.0
    for column in range(shape.dim):
        w = float(load_f32(values, column))
        total += w * w
    return total


@jit
def decay_row(descriptor: Int, shape: Layout, entry: Int, decay: float) -> bool:
    """Let shows and clicks of the row whose index word lies at ``entry`` decay; return whether that changed them."""
    slot = np.int64(load_u32(entry, 0)) & VALUE
    counters = side_at(load_i64(descriptor, CHUNKS), slot, shape) + 4 * shape.state_columns
    shows = load_f32(counters, shape.shows)
    clicks = load_f32(counters, shape.shows + 1)
    fewer = shows * np.float32(decay)
    less = clicks * np.float32(decay)
    if fewer == shows and less == clicks:
        return False
    mark_changed(descriptor, shape, entry)
    store_f32(counters, shape.shows, fewer)
    store_f32(counters, shape.shows + 1, less)
    return True


@jit
def leaves(row: Int, counters: Int, shape: Layout, rules: Sweep, tick: int, values: Int) -> bool:
    """Tell whether a row goes, whose shows and clicks have decayed."""
    # Ticks of workers arrive out of order: a row from the future is new, not old.
    if rules.age > 0 and tick - np.int64(load_u32(counters, shape.updated)) > rules.age:
        return True
    if rules.occurrences > 0 and np.int64(load_u32(counters, shape.occurrences)) < rules.occurrences:
        return True
    if rules.score > 0:
        shows = load_f32(counters, shape.shows)
        clicks = load_f32(counters, shape.shows + 1)
        # In float64, uncompiled as well: newer numpy would keep float32 here.
        score = float(shows - clicks) * rules.nonclick + float(clicks) * rules.click
        if score < rules.score:
            return True
    return rules.norm > 0 and squared_norm(row, shape, values) < rules.norm


@jit
def sweep_buckets(
    descriptor: Int,
    shape: Layout,
    rules: Sweep,
    tick: int,
    begin: int,
    end: int,
    values: Int,
    gone: NDArray[np.uint64],
    decayed: NDArray[np.uint64],
) -> tuple[int, int]:
    """Evict from buckets begin to end - 1 what the rules say; write the keys to gone: uint64[>= 5 (end - begin)].

    Where shows and clicks decay, write the keys of rows that this changed and that stay to decayed, which is as long. Return how
    many left, and how many those are.
    """
    buckets: Int = load_i64(descriptor, BUCKETS)
    chunks: Int = load_i64(descriptor, CHUNKS)
    left = 0
    stay = 0
    for number in range(begin, end):
        line = buckets + number * LINE
        used = np.int64(load_u8(line, USED))
        for place in range(PLACES):
            word = np.int64(load_u32(line, WORDS + place))
            if used & (1 << place) == 0 or word >= PENDING:
                continue
            entry = line + 4 * (WORDS + place)
            slot = word & VALUE
            counters = side_at(chunks, slot, shape) + 4 * shape.state_columns
            fades = rules.score > 0 and decay_row(descriptor, shape, entry, rules.decay)
            if leaves(weights_at(chunks, slot, shape), counters, shape, rules, tick, values):
                mark_changed(descriptor, shape, entry)
                gone[left] = load_u64(line, place)
                left += 1
                note_left(descriptor, shape, counters)
                erase(entry)
                give_slot(descriptor, shape, slot)
            elif fades:
                decayed[stay] = load_u64(line, place)
                stay += 1
    store_i64(descriptor, ENTRIES, load_i64(descriptor, ENTRIES) - left)
    return left, stay


@jit
def find_rows(descriptor: Int, salt: np.uint64, keys: NDArray[np.uint64], entries: NDArray[np.int64]) -> int:
    """Write where keys' index words lie to entries: int64[n]; return -1, or the position of one without a row in memory."""
    buckets: Int = load_i64(descriptor, BUCKETS)
    count: Int = load_i64(descriptor, COUNT)
    for i in range(keys.shape[0]):
        entry = find(buckets, count, home(buckets, count, key_mix(salt, keys[i])), keys[i])
        if entry == 0 or np.int64(load_u32(entry, 0)) >= PENDING:
            return i
        entries[i] = entry
    return -1


@jit
def decay_entries(descriptor: Int, shape: Layout, decay: float, entries: NDArray[np.int64]) -> None:
    """Let shows and clicks decay of the rows whose index words lie at entries: int64[n]."""
    for i in range(entries.shape[0]):
        decay_row(descriptor, shape, entries[i], decay)


@jit
def list_counter(
    descriptor: Int,
    shape: Layout,
    column: int,
    keys: NDArray[np.uint64],
    values: NDArray[np.uint32],
    entries: NDArray[np.int64],
) -> int:
    """Write key, one counter and the address of the index word of every row in memory; return how many."""
    buckets: Int = load_i64(descriptor, BUCKETS)
    chunks: Int = load_i64(descriptor, CHUNKS)
    found = 0
    for number in range(load_i64(descriptor, COUNT)):
        line = buckets + number * LINE
        used = np.int64(load_u8(line, USED))
        for place in range(PLACES):
            word = np.int64(load_u32(line, WORDS + place))
            if used & (1 << place) != 0 and word < PENDING:
                side = side_at(chunks, word & VALUE, shape)
                prefetch(side)
                keys[found] = load_u64(line, place)
                entries[found] = line + 4 * (WORDS + place)
                found += 1
    for i in range(found):
        word = np.int64(load_u32(entries[i], 0))
        values[i] = load_u32(side_at(chunks, word & VALUE, shape), shape.state_columns + column)
    return found


@jit
def evict_entries(descriptor: Int, shape: Layout, entries: NDArray[np.int64]) -> None:
    """Evict the rows whose index words lie at entries: int64[n]."""
    for i in range(entries.shape[0]):
        mark_changed(descriptor, shape, entries[i])
        slot = np.int64(load_u32(entries[i], 0)) & VALUE
        note_left(descriptor, shape, side_at(load_i64(descriptor, CHUNKS), slot, shape) + 4 * shape.state_columns)
        erase(entries[i])
        give_slot(descriptor, shape, slot)
    store_i64(descriptor, ENTRIES, load_i64(descriptor, ENTRIES) - entries.shape[0])


def oldest(descriptor: int, entries: int, shape: Layout, column: int, rows: int) -> NDArray[np.uint64]:
    """Evict the ``rows`` rows of a block with the least value of a counter (equal ones: least key); return their keys."""
    keys = np.empty(entries, np.uint64)
    values = np.empty(entries, np.uint32)
    places = np.empty(entries, np.int64)
    found = int(list_counter(descriptor, shape, column, keys, values, places))
    keys, values, places = keys[:found], values[:found], places[:found]
    rows = min(rows, found)
    if rows == 0:
        return keys[:0]
    # All below the limit go, and of those at it the least keys: the order in the index is not the same on every shard.
    limit = np.partition(values, rows - 1)[rows - 1]
    below = np.flatnonzero(values < limit)
    at = np.flatnonzero(values == limit)
    ties = rows - len(below)
    at = at[np.argpartition(keys[at], ties - 1)[:ties]]
    chosen = np.concatenate([below, at])
    evict_entries(descriptor, shape, places[chosen])
    out: NDArray[np.uint64] = keys[chosen]
    return out
