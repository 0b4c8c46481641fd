# SPDX-License-Identifier: Apache-2.0
"""Kernels of the row cache (``client/cache.py``): where a key's row is kept, and which row goes when there is no place.

    index   uint64[a power of two, at least twice the places]: 0, or (high 32 bits of mix64(key)) << 32 | place + 1, by linear
            probing from the low ones of these bits
    places  32 bytes each: key | version | level | place before, place behind (+ 1, 0: none) | batch of its last use;
            one that was given back has level GONE
    lists   for each level its first and its last place (+ 1), the one that was used least recently first

``lru`` has one level. Under ``lfu`` a row's level is how often it was used, up to TOP; it begins at 1. After AGE uses for
each place all levels are halved, of two that become one the lower first, so that what was used much long ago goes as well.
The row that goes is the first one of the lowest level, unless this batch has used it: then the new row is not kept.
Every operation takes constant time, but for the halving, which is a small share of the uses before it.
Invariant: a place in use is in the index once and in one list. Kernels only, one thread. Callees in other files are below
``embedding/``, whose digest names the folder of compiled kernels.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from oarlock.embedding.hashing import mix64
from oarlock.embedding.jit import jit
from oarlock.embedding.pointer import (
    Int,
    load_i64,
    load_u32,
    load_u64,
    prefetch,
    store_i64,
    store_u32,
    store_u64,
)
from oarlock.embedding.pull import copy_row
from oarlock.embedding.slab import prefetch_bytes

TOP = 255  # the highest level
AGE = 8
GONE = (1 << 32) - 1
PLACE_BYTES = 32

# Words of a place: key is its uint64 number 0, batch its int64 number 3, the others uint32.
VERSION, LEVEL, BEFORE, BEHIND = range(2, 6)
BATCH_OF = 3

# Words of int64[WORDS]: places that were ever used, 1 + first of those given back (chained by BEHIND), rows kept, number of
# the last batch, uses since the last halving, rows evicted.
USED, FREE, KEPT, BATCH, USES, EVICTED = range(6)
WORDS = 6

TILE = 64  # keys that are looked up together
AHEAD = 16
_LOW = (1 << 32) - 1

# What is wrong with an answer.
FINE = 0
OUTSIDE = 1
TWICE = 2
MISSING = 3


class Memory(NamedTuple):
    """Addresses of the index, places, rows (``row_bytes`` each), lists: int64[levels, 2] and words; and how large they are."""

    where: int
    places: int
    rows: int
    lists: int
    words: int
    mask: int
    capacity: int
    row_bytes: int
    top: int


@jit
def tag_of(key: np.uint64) -> Int:
    return np.int64(mix64(key) >> np.uint64(32))


@jit
def row_of(memory: Memory, place: Int) -> Int:
    return memory.rows + (place - memory.places) // PLACE_BYTES * memory.row_bytes


@jit
def find(memory: Memory, key: np.uint64, tag: Int) -> Int:
    """Return where in the index a key is, or -1."""
    at = tag & memory.mask
    while True:
        entry = load_i64(memory.where, at)
        if entry == 0:
            return np.int64(-1)
        if (entry >> 32) & _LOW == tag and load_u64(memory.places + ((entry & _LOW) - 1) * PLACE_BYTES, 0) == key:
            return np.int64(at)
        at = (at + 1) & memory.mask


@jit
def likely(memory: Memory, tag: Int) -> Int:
    """Return the place + 1 of the first key of this tag, most likely the one that is looked for, or 0."""
    at = tag & memory.mask
    while True:
        entry = load_i64(memory.where, at)
        if entry == 0 or (entry >> 32) & _LOW == tag:
            return entry & _LOW
        at = (at + 1) & memory.mask


@jit
def place_of(memory: Memory, key: np.uint64, guess: Int) -> Int:
    """Return the address of a key's place, 0 if there is none; ``guess`` is what ``likely`` said."""
    if guess == 0:
        return np.int64(0)
    place = memory.places + (guess - 1) * PLACE_BYTES
    if load_u64(place, 0) == key and load_u32(place, LEVEL) != GONE:
        return np.int64(place)
    at = find(memory, key, tag_of(key))
    return np.int64(0) if at < 0 else memory.places + ((load_i64(memory.where, at) & _LOW) - 1) * PLACE_BYTES


@jit
def forget(memory: Memory, at: Int) -> None:
    """Take what is at ``at`` out of the index; entries behind it that it kept from their homes move up."""
    hole: Int = at
    at = (at + 1) & memory.mask
    while True:
        entry = load_i64(memory.where, at)
        if entry == 0:
            break
        home = (entry >> 32) & memory.mask
        if ((at - home) & memory.mask) >= ((at - hole) & memory.mask):
            store_i64(memory.where, hole, entry)
            hole = at
        at = (at + 1) & memory.mask
    store_i64(memory.where, hole, 0)


@jit
def unlink(memory: Memory, place: Int) -> None:
    before = np.int64(load_u32(place, BEFORE))
    behind = np.int64(load_u32(place, BEHIND))
    level = np.int64(load_u32(place, LEVEL))
    if before == 0:
        store_i64(memory.lists, 2 * level, behind)
    else:
        store_u32(memory.places + (before - 1) * PLACE_BYTES, BEHIND, np.uint32(behind))
    if behind == 0:
        store_i64(memory.lists, 2 * level + 1, before)
    else:
        store_u32(memory.places + (behind - 1) * PLACE_BYTES, BEFORE, np.uint32(before))


@jit
def append(memory: Memory, place: Int, level: Int) -> None:
    """Put a place at the end of a level's list, as one that this batch uses."""
    number = (place - memory.places) // PLACE_BYTES + 1
    last = load_i64(memory.lists, 2 * level + 1)
    store_u32(place, LEVEL, np.uint32(level))
    store_u32(place, BEFORE, np.uint32(last))
    store_u32(place, BEHIND, np.uint32(0))
    if last == 0:
        store_i64(memory.lists, 2 * level, number)
    else:
        store_u32(memory.places + (last - 1) * PLACE_BYTES, BEHIND, np.uint32(number))
    store_i64(memory.lists, 2 * level + 1, number)
    store_i64(place, BATCH_OF, load_i64(memory.words, BATCH))
    store_i64(memory.words, USES, load_i64(memory.words, USES) + 1)


@jit
def touch(memory: Memory, place: Int) -> None:
    """Count one more use of a kept row."""
    unlink(memory, place)
    append(memory, place, min(np.int64(load_u32(place, LEVEL)) + 1, memory.top))


@jit
def drop(memory: Memory, place: Int) -> None:
    """Take a row out, and its place back."""
    key = load_u64(place, 0)
    forget(memory, find(memory, key, tag_of(key)))
    unlink(memory, place)
    store_u32(place, LEVEL, np.uint32(GONE))
    store_u32(place, BEHIND, np.uint32(load_i64(memory.words, FREE)))
    store_i64(memory.words, FREE, (place - memory.places) // PLACE_BYTES + 1)
    store_i64(memory.words, KEPT, load_i64(memory.words, KEPT) - 1)


@jit
def first_to_go(memory: Memory) -> Int:
    """Return the place that a new row would take, 0 if this batch has used it or nothing is kept."""
    level = np.int64(0)
    while level < memory.top and load_i64(memory.lists, 2 * level) == 0:
        level += 1
    number = load_i64(memory.lists, 2 * level)
    place = memory.places + (number - 1) * PLACE_BYTES
    if number == 0 or load_i64(place, BATCH_OF) == load_i64(memory.words, BATCH):
        return np.int64(0)
    # Most likely the next ones to go: their lines, and where the first of them is in the index, are asked for in good time.
    behind = np.int64(load_u32(place, BEHIND))
    if behind > 0:
        other = memory.places + (behind - 1) * PLACE_BYTES
        prefetch(memory.where + 8 * (tag_of(load_u64(other, 0)) & memory.mask))
        prefetch(row_of(memory, other))
        behind = np.int64(load_u32(other, BEHIND))
        if behind > 0:
            prefetch(memory.places + (behind - 1) * PLACE_BYTES)
    return np.int64(place)


@jit
def take_place(memory: Memory) -> Int:
    """Return a place for a new row, or 0."""
    number: Int = load_i64(memory.words, FREE)
    if number > 0:
        place = memory.places + (number - 1) * PLACE_BYTES
        store_i64(memory.words, FREE, np.int64(load_u32(place, BEHIND)))
        return np.int64(place)
    used: Int = load_i64(memory.words, USED)
    if used < memory.capacity:
        store_i64(memory.words, USED, used + 1)
        return memory.places + used * PLACE_BYTES
    place = first_to_go(memory)
    if place != 0:
        drop(memory, place)
        store_i64(memory.words, FREE, np.int64(load_u32(place, BEHIND)))
        store_i64(memory.words, EVICTED, load_i64(memory.words, EVICTED) + 1)
    return place


@jit
def enter(memory: Memory, key: np.uint64, place: Int) -> None:
    """Let a place be that of a key that has none."""
    tag = tag_of(key)
    at = tag & memory.mask
    while load_i64(memory.where, at) != 0:
        at = (at + 1) & memory.mask
    store_i64(memory.where, at, (tag << 32) | ((place - memory.places) // PLACE_BYTES + 1))
    store_u64(place, 0, key)
    append(memory, place, min(np.int64(1), memory.top))
    store_i64(memory.words, KEPT, load_i64(memory.words, KEPT) + 1)


@jit
def halve(memory: Memory) -> None:
    """Halve all levels."""
    for place in range(load_i64(memory.words, USED)):
        at = memory.places + place * PLACE_BYTES
        level = np.int64(load_u32(at, LEVEL))
        store_u32(at, LEVEL, np.uint32(level if level == GONE else level >> 1))
    for half in range(memory.top + 1):
        low = 2 * half
        first = np.int64(0)
        last = np.int64(0)
        for old in range(low, min(low + 2, memory.top + 1)):
            head = load_i64(memory.lists, 2 * old)
            if head == 0:
                continue
            if last == 0:
                first = head
            else:
                store_u32(memory.places + (last - 1) * PLACE_BYTES, BEHIND, np.uint32(head))
                store_u32(memory.places + (head - 1) * PLACE_BYTES, BEFORE, np.uint32(last))
            last = load_i64(memory.lists, 2 * old + 1)
        store_i64(memory.lists, 2 * half, first)
        store_i64(memory.lists, 2 * half + 1, last)
    store_i64(memory.words, USES, 0)


@jit
def ask_index(memory: Memory, keys: NDArray[np.uint64], begin: int, end: int) -> None:
    for i in range(begin, min(end, keys.shape[0])):
        prefetch(memory.where + 8 * (tag_of(keys[i]) & memory.mask))


@jit
def ask_neighbours(memory: Memory, place: Int) -> None:
    for word in (BEFORE, BEHIND):
        other = np.int64(load_u32(place, word))
        if other > 0:
            prefetch(memory.places + (other - 1) * PLACE_BYTES)


@jit
def read_kept(memory: Memory, keys: NDArray[np.uint64], versions: NDArray[np.uint32], out: Int) -> None:
    """Write each key's version to versions: uint32[n], 0 where no row is kept, and those rows to their lines at ``out``."""
    n = keys.shape[0]
    ask_index(memory, keys, 0, TILE)
    for begin in range(0, n, TILE):
        end = min(begin + TILE, n)
        ask_index(memory, keys, end, end + TILE)
        for i in range(begin, end):
            guess = likely(memory, tag_of(keys[i]))
            versions[i] = guess
            if guess > 0:
                prefetch(memory.places + (guess - 1) * PLACE_BYTES)
                prefetch_bytes(memory.rows + (guess - 1) * memory.row_bytes, memory.row_bytes)
        for i in range(begin, end):
            place = place_of(memory, keys[i], np.int64(versions[i]))
            versions[i] = np.uint32(0)
            if place != 0:
                versions[i] = load_u32(place, VERSION)
                copy_row(out + i * memory.row_bytes, row_of(memory, place), memory.row_bytes)


@jit
def read_answer(
    kept: NDArray[np.uint32], positions: NDArray[np.int32], came: NDArray[np.int32], fault: NDArray[np.int64]
) -> int:
    """Write to came: int32[n] 1 + the number of each key's row among those that came, or 0; return what is wrong."""
    n = kept.shape[0]
    for i in range(n):
        came[i] = 0
    for j in range(positions.shape[0]):
        at = np.int64(positions[j])
        fault[0] = at
        if at < 0 or at >= n:
            return OUTSIDE
        if came[at] != 0:
            return TWICE
        came[at] = j + 1
    for i in range(n):
        if kept[i] == 0 and came[i] == 0:
            fault[0] = i
            return MISSING
    return FINE


@jit
def take_answer(
    memory: Memory,
    keys: NDArray[np.uint64],
    came: NDArray[np.int32],
    rows: Int,
    versions: NDArray[np.uint32],
    guesses: NDArray[np.int64],
    out: Int,
) -> None:
    """Write the rows that came to their lines at ``out``, and keep them; count a use of every row of the batch that is kept.

    First the rows that have a place, then the new ones, each in order. guesses: int64[n], scratch.
    """
    n = keys.shape[0]
    size = memory.row_bytes
    if memory.top > 0 and load_i64(memory.words, USES) >= AGE * memory.capacity:
        halve(memory)
    store_i64(memory.words, BATCH, load_i64(memory.words, BATCH) + 1)
    fresh: Int = 0
    ask_index(memory, keys, 0, TILE)
    for begin in range(0, n, TILE):
        end = min(begin + TILE, n)
        ask_index(memory, keys, end, end + TILE)
        for i in range(begin, end):
            guesses[i] = likely(memory, tag_of(keys[i]))
            if guesses[i] > 0:
                prefetch(memory.places + (guesses[i] - 1) * PLACE_BYTES)
        for i in range(begin, end):
            if guesses[i] > 0:
                ask_neighbours(memory, memory.places + (guesses[i] - 1) * PLACE_BYTES)
        for i in range(begin, end):
            place = place_of(memory, keys[i], guesses[i])
            number = np.int64(came[i]) - 1
            if number >= 0:
                copy_row(out + i * size, rows + number * size, size)
            if place == 0:
                # The list of new rows lies in ``guesses``, never ahead of what is still to be read there.
                guesses[fresh] = i
                fresh += number >= 0 and versions[number] != 0
            elif number < 0:
                touch(memory, place)
            elif versions[number] == 0:
                drop(memory, place)
            else:
                store_u32(place, VERSION, versions[number])
                copy_row(row_of(memory, place), rows + number * size, size)
                touch(memory, place)
    for k in range(fresh):
        if k + AHEAD < fresh:
            prefetch(memory.where + 8 * (tag_of(keys[guesses[k + AHEAD]]) & memory.mask))
        i = guesses[k]
        number = np.int64(came[i]) - 1
        if find(memory, keys[i], tag_of(keys[i])) >= 0:
            continue  # a key that stands twice in a batch
        place = take_place(memory)
        if place == 0:
            break
        enter(memory, keys[i], place)
        store_u32(place, VERSION, versions[number])
        copy_row(row_of(memory, place), rows + number * size, size)
