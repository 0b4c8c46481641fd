# SPDX-License-Identifier: Apache-2.0
"""Kernels of views: what is about to change is stamped and saved, and what did not change since is copied out.

    saved key:   word (uint32) | 4 bytes unused | key (uint64) | weights as stored | state and counters | up to 8 bytes

A table's stamp goes on by one, round 1 to 7, whenever a view begins; a word with another stamp was last changed before
that, 0: long before. So the first change of a key since a view began is known by its stamp, and only that is saved.
Invariant: whoever changes a key, or lets it leave, calls ``mark_changed`` first and has room: until its view is released,
what it was when the view began is either where it was, under an old stamp, or saved. Moving a row (growth, spilling, coming
back) changes nothing and keeps the stamp. Marking is done with the block shut, copying with its mutex held.
"""

import numpy as np
from numpy.typing import NDArray

from oarlock.embedding.content import read_row
from oarlock.embedding.descriptor import (
    BUCKETS,
    CHUNKS,
    COUNT,
    SAVED,
    SAVED_ROOM,
    SAVING,
    SKETCH_SAVED,
    STAMP,
)
from oarlock.embedding.hashing import key_mix
from oarlock.embedding.index import (
    PENDING,
    PLACES,
    SPILLED,
    STAMP_BIT,
    STAMPS,
    USED,
    VALUE,
    WORDS,
    find,
    home,
    line_of,
    place_of,
    record_of,
)
from oarlock.embedding.jit import jit
from oarlock.embedding.pointer import (
    LINE,
    Int,
    load_i64,
    load_u8,
    load_u32,
    load_u64,
    store_i64,
    store_u32,
    store_u64,
)
from oarlock.embedding.pull import copy_row
from oarlock.embedding.slab import Layout, prefetch_bytes, row_at

HEAD = 16  # bytes of a saved key before its weights
BEFORE_KEY = 8  # and before its key: from there on it looks as a record of the spill file does

# What became of a key that a view has: it changed since (and was saved), or was copied, or its row is in the file.
CHANGED, COPIED, IN_FILE = range(3)

# Words of int64[PROGRESS]: rows and waiting keys copied so far, and records listed in this slice.
ROWS_AT, WAITING_AT, FILED_AT = range(3)
PROGRESS = 3


def saved_bytes(shape: Layout) -> int:
    """Return how many bytes a saved key takes."""
    return -(-(HEAD + shape.weight_bytes + shape.side_bytes) // 8) * 8


@jit
def save(descriptor: Int, shape: Layout, entry: Int, word: Int) -> None:
    """Save the key of the word at ``entry`` as it is; there is room."""
    out = load_i64(descriptor, SAVED)
    store_u32(out, 0, np.uint32(word))
    store_u64(out, 1, load_u64(line_of(entry), place_of(entry)))
    if word < PENDING:
        row, side = row_at(load_i64(descriptor, CHUNKS), word & VALUE, shape)
        copy_row(out + HEAD, row, shape.weight_bytes)
        copy_row(out + HEAD + shape.weight_bytes, side, shape.side_bytes)
    store_i64(descriptor, SAVED, out + (HEAD + shape.weight_bytes + shape.side_bytes + 7) // 8 * 8)
    store_i64(descriptor, SAVED_ROOM, load_i64(descriptor, SAVED_ROOM) - 1)


@jit
def mark_changed(descriptor: Int, shape: Layout, entry: Int) -> None:
    """Give the word at ``entry``, which is no spilled row's, the block's stamp; save its key first if that is new to it."""
    word = np.int64(load_u32(entry, 0))
    stamp: Int = load_i64(descriptor, STAMP)
    if word & STAMPS != stamp:
        if load_i64(descriptor, SAVING) != 0:
            save(descriptor, shape, entry, word)
        store_u32(entry, 0, np.uint32((word & ~STAMPS) | stamp))


@jit
def mark_entries(descriptor: Int, shape: Layout, entries: Int, n: Int) -> None:
    """Mark the words that lie at entries: address of int64[n], each once or more."""
    for k in range(n):
        mark_changed(descriptor, shape, load_i64(entries, k))


@jit
def cannot_save(descriptor: Int, n: Int, sketched: bool) -> bool:
    """Tell whether a view of the block needs more room for ``n`` keys, or the sketch, which is about to change."""
    if load_i64(descriptor, SAVING) == 0:
        return False
    return bool(n > load_i64(descriptor, SAVED_ROOM) or (sketched and load_i64(descriptor, SKETCH_SAVED) == 0))


@jit
def count_stale(descriptor: Int, begin: Int, end: Int) -> Int:
    """Return how many rows in memory of buckets begin to end - 1 have another stamp than the block's."""
    buckets: Int = load_i64(descriptor, BUCKETS)
    stamp: Int = load_i64(descriptor, STAMP)
    found = np.int64(0)
    for number in range(begin, end):
        line = buckets + number * LINE
        used = np.int64(load_u8(line, USED))
        for place in range(PLACES):
            word = np.int64(load_u32(line, WORDS + place))
            found += (used >> place) & (word < PENDING) & (word & STAMPS != stamp)
    return found


@jit
def list_unchanged(descriptor: Int, wanted: Int, old: Int, keys: NDArray[np.uint64], words: NDArray[np.uint32]) -> Int:
    """List keys: uint64[n] and words: uint32[n] that do not have the block's stamp, but one that the bits of ``wanted`` name.

    Return how many. Stamps that the bits of ``old`` name become 0.
    """
    buckets: Int = load_i64(descriptor, BUCKETS)
    current: Int = load_i64(descriptor, STAMP)
    found = np.int64(0)
    for number in range(load_i64(descriptor, COUNT)):
        line = buckets + number * LINE
        used = np.int64(load_u8(line, USED))
        for place in range(PLACES):
            word = np.int64(load_u32(line, WORDS + place))
            if (used >> place) & 1 == 0 or word & STAMPS == current:
                continue
            stamp = (word & STAMPS) >> STAMP_BIT
            if (wanted >> stamp) & 1 != 0:
                keys[found] = load_u64(line, place)
                words[found] = np.uint32(word)
                found += 1
            if stamp != 0 and (old >> stamp) & 1 != 0:
                # Pulls may be reading it: what they want of it stays.
                store_u32(line, WORDS + place, np.uint32(word & ~STAMPS))
    return found


@jit
def copy_unchanged(
    descriptor: Int,
    salt: np.uint64,
    shape: Layout,
    keys: NDArray[np.uint64],
    places: NDArray[np.int64],
    begin: Int,
    end: Int,
    entries: NDArray[np.int64],
    progress: NDArray[np.int64],
    out_keys: NDArray[np.uint64],
    weights: Int,
    state: NDArray[np.float32],
    counted: NDArray[np.uint32],
    waiting: NDArray[np.uint64],
    waited: NDArray[np.uint32],
    fates: NDArray[np.uint8],
    filed_keys: NDArray[np.uint64],
    records: NDArray[np.int64],
) -> None:
    """Copy those of keys begin to end - 1 that are unchanged still; tell of each what became of it.

    A row goes to its place of places: int64[n], a waiting key behind the last one. Rows in the file are listed with their
    records instead. entries: scratch of end - begin.
    """
    buckets: Int = load_i64(descriptor, BUCKETS)
    count: Int = load_i64(descriptor, COUNT)
    chunks: Int = load_i64(descriptor, CHUNKS)
    current: Int = load_i64(descriptor, STAMP)
    for i in range(begin, end):
        entry = find(buckets, count, home(buckets, count, key_mix(salt, keys[i])), keys[i])
        entries[i - begin] = entry
        if entry != 0 and np.int64(load_u32(entry, 0)) < PENDING:
            row, side = row_at(chunks, np.int64(load_u32(entry, 0)) & VALUE, shape)
            prefetch_bytes(row, shape.weight_bytes)
            prefetch_bytes(side, max(shape.side_bytes, 1))
    copied = progress[ROWS_AT]
    waits = progress[WAITING_AT]
    in_file = np.int64(0)
    for i in range(begin, end):
        fates[i] = CHANGED
        entry = entries[i - begin]
        if entry == 0:
            continue
        word = np.int64(load_u32(entry, 0))
        if word & STAMPS == current:
            continue
        if word < PENDING:
            row, side = row_at(chunks, word & VALUE, shape)
            place = places[i]
            read_row(row, side, shape, counted.shape[1], place, weights + 4 * place * shape.dim, state, counted)
            out_keys[place] = keys[i]
            copied += 1
            fates[i] = COPIED
        elif word < SPILLED:
            waiting[waits] = keys[i]
            waited[waits] = np.uint32(word & VALUE)
            waits += 1
            fates[i] = COPIED
        else:
            filed_keys[in_file] = keys[i]
            records[in_file] = record_of(word)
            in_file += 1
            fates[i] = IN_FILE
    progress[ROWS_AT] = copied
    progress[WAITING_AT] = waits
    progress[FILED_AT] = in_file
