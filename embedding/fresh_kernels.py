# SPDX-License-Identifier: Apache-2.0
"""The kernels of a fresh table: those of a frozen one, where one thread changes rows while others look them up.

    a block's clock    even: nobody changes it; odd: somebody does, for a lap of 64 keys at most
    a look-up          notes the clocks of 32 keys, copies their rows as from a frozen table, looks at the clocks again, and takes
                       those keys once more whose block was changed meanwhile
    a row that leaves  the last row takes its place, and index entries behind its own move up, so nothing is left of it

Invariant: what a look-up returns of a key is one state of its row, whole. A look-up takes no lock and writes to nothing but
``out`` and its scratch; one thread at a time changes a block. Rows and index of a block have a fixed room: whatever a look-up
reads while they are changed lies within them. Addresses are those of arrays that ``embedding/fresh.py`` keeps alive.
"""

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from numba import types
from numba.extending import intrinsic
from numpy.typing import NDArray

from oarlock.embedding.frozen_kernels import (
    BLOCK_BITS,
    BLOCK_WORDS,
    BLOCKS,
    CODE,
    DESCRIPTORS,
    DIM,
    ENTRIES,
    KEYS,
    LAP,
    MIXES,
    PLACES,
    RING,
    ROW_BITS,
    ROW_BYTES,
    ROWS,
    ROWS_FOUND,
    SALT,
    SCRATCH_WORDS,
    aim_lap,
    find_from,
    first_weights,
    home_of,
    peek_lap,
    settle_lap,
    tag_of,
    take_lap,
)
from oarlock.embedding.hashing import block_of_mix, key_mix
from oarlock.embedding.jit import jit
from oarlock.embedding.lock import SPINS, atomic_add, yield_processor
from oarlock.embedding.pointer import (
    Int,
    address_in,
    copy,
    load_i64,
    load_u32,
    load_u64,
    store_i64,
    store_u8,
    store_u32,
    store_u64,
)
from oarlock.embedding.precision import decode_row

# Words of a block's descriptor behind those of a frozen one: the address of its clock; behind that how many rows there are.
CLOCK, ROOM = 5, 6
CLOCK_WORDS = 8
COUNT = 1
# Scratch of a look-up, in words: the clocks of the keys in the ring lie behind what a frozen table needs.
_CLOCKS = 8 * SCRATCH_WORDS
FRESH_SCRATCH_WORDS = SCRATCH_WORDS + RING
# Keys that are changed before look-ups may come in between.
CHANGE_LAP = 64


def _fence(typing: Any) -> Any:
    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        builder.fence("acq_rel")
        return context.get_dummy_value()

    return types.void(), code


# What is before it is read and written before what is behind it; where no code is compiled there is nothing to keep in order.
fence: Callable[[], None] = (lambda: None) if numba.config.DISABLE_JIT else intrinsic(_fence)


@jit
def find_key(descriptor: Int, mix: np.uint64, key: np.uint64) -> tuple[Int, Int]:
    """Return (row, place of its entry) of a key; row -1 if it has none, with the free place where its entry would go."""
    keys: Int = load_i64(descriptor, KEYS)
    places: Int = load_i64(descriptor, PLACES)
    row, at = find_from(descriptor, mix, home_of(mix, places))
    while row >= 0 and load_u64(keys, row) != key:
        at += 1
        if at == places:
            at = np.int64(0)
        row, at = find_from(descriptor, mix, at)
    return row, at


@jit
def note_clocks(begin: Int, end: Int, scratch: Int) -> None:
    """Note what the clocks of the blocks of keys begin to end - 1 say, before anything of these blocks is read."""
    for i in range(begin, end):
        slot = i & (RING - 1)
        descriptor: Int = load_i64(scratch + DESCRIPTORS, slot)
        store_i64(scratch + _CLOCKS, slot, load_i64(load_i64(descriptor, CLOCK), 0))
    fence()


@jit
def take_one(table: Int, key: np.uint64, descriptor: Int, mix: np.uint64, out: Int) -> Int:
    """Write the row of a key to address ``out`` while nobody changes its block; return 1 if it has none."""
    clock: Int = load_i64(descriptor, CLOCK)
    code: Int = load_i64(table, CODE)
    dim: Int = load_i64(table, DIM)
    tries = 0
    while True:
        before = atomic_add(clock, 0)
        if before & 1 == 0:
            row, _ = find_key(descriptor, mix, key)
            if row < 0:
                first_weights(table, key, out)
            else:
                decode_row(load_i64(descriptor, ROWS) + row * load_i64(table, ROW_BYTES), code, dim, out)
            fence()
            if atomic_add(clock, 0) == before:
                return np.int64(row < 0)
        tries += 1
        if tries >= SPINS:
            yield_processor()


@jit
def check_lap(table: Int, keys: Int, begin: Int, end: Int, scratch: Int, out: Int) -> Int:
    """Take those of keys begin to end - 1 again whose block was changed; return how many more of them have no row than before."""
    fence()
    pitch = 4 * load_i64(table, DIM)
    more = np.int64(0)
    for i in range(begin, end):
        slot = i & (RING - 1)
        descriptor: Int = load_i64(scratch + DESCRIPTORS, slot)
        noted: Int = load_i64(scratch + _CLOCKS, slot)
        if noted & 1 != 0 or load_i64(load_i64(descriptor, CLOCK), 0) != noted:
            mix = load_u64(scratch + MIXES, slot)
            more += take_one(table, load_u64(keys, i), descriptor, mix, out + i * pitch)
            more -= load_i64(scratch + ROWS_FOUND, slot) == 0
    return more


@jit
def look_up_fresh(table: Int, keys: Int, n: Int, out: Int, scratch: Int) -> Int:
    """Write the weights of keys: uint64[n] to out: float32[n, dim], all by address; return how many keys have no row."""
    row_bytes: Int = load_i64(table, ROW_BYTES)
    missing = np.int64(0)
    laps = (n + LAP - 1) // LAP
    for lap in range(laps + 2):
        if lap < laps:
            aim_lap(table, keys, lap * LAP, min(n, (lap + 1) * LAP), scratch)
            note_clocks(lap * LAP, min(n, (lap + 1) * LAP), scratch)
        if 1 <= lap <= laps:
            peek_lap((lap - 1) * LAP, min(n, lap * LAP), row_bytes, scratch)
        if lap >= 2:
            begin, end = (lap - 2) * LAP, min(n, (lap - 1) * LAP)
            settle_lap(keys, begin, end, row_bytes, scratch)
            missing += take_lap(table, keys, begin, end, scratch, out)
            missing += check_lap(table, keys, begin, end, scratch, out)
    return missing


@jit
def find_fresh(table: Int, keys: Int, n: Int, out: Int, present: Int) -> None:
    """Write the weights of keys: uint64[n] to out: float32[n, dim], and which of them have a row to present: uint8[n]."""
    salt = load_u64(table, SALT)
    bits: Int = load_i64(table, BLOCK_BITS)
    blocks: Int = load_i64(table, BLOCKS)
    pitch = 4 * load_i64(table, DIM)
    for i in range(n):
        key = load_u64(keys, i)
        mix = key_mix(salt, key)
        descriptor = blocks + block_of_mix(mix, bits) * (8 * BLOCK_WORDS)
        store_u8(present, i, np.uint8(take_one(table, key, descriptor, mix, out + i * pitch) == 0))


@jit
def write_row(descriptor: Int, salt: np.uint64, key: np.uint64, row: Int, row_bytes: Int) -> bool:
    """Write the row at address ``row`` for a key; False, and nothing is done, if it is new and there is no room."""
    clock: Int = load_i64(descriptor, CLOCK)
    rows: Int = load_i64(descriptor, ROWS)
    mix = key_mix(salt, key)
    at, place = find_key(descriptor, mix, key)
    if at < 0:
        at = load_i64(clock, COUNT)
        if at == load_i64(descriptor, ROOM):
            return False
        store_u64(load_i64(descriptor, KEYS), at, key)
        tag = tag_of(mix, load_i64(descriptor, ROW_BITS))
        store_u32(load_i64(descriptor, ENTRIES), place, np.uint32(tag | np.uint64(at + 1)))
        store_i64(clock, COUNT, at + 1)
    copy(rows + at * row_bytes, row, row_bytes)
    return True


@jit
def take_out(descriptor: Int, salt: np.uint64, place: Int) -> None:
    """Free a place of the index; entries behind it that belong at it or before it move up."""
    entries: Int = load_i64(descriptor, ENTRIES)
    places: Int = load_i64(descriptor, PLACES)
    keys: Int = load_i64(descriptor, KEYS)
    rows = (np.uint64(1) << np.uint64(load_i64(descriptor, ROW_BITS))) - np.uint64(1)
    hole: Int = place
    at: Int = place
    while True:
        at += 1
        if at == places:
            at = np.int64(0)
        entry = np.uint64(load_u32(entries, at))
        if entry == np.uint64(0):
            break
        home = home_of(key_mix(salt, load_u64(keys, np.int64(entry & rows) - 1)), places)
        # Whether its home is behind the hole on the way to where it lies.
        between = hole < home <= at if hole <= at else home > hole or home <= at
        if not between:
            store_u32(entries, hole, np.uint32(entry))
            hole = at
    store_u32(entries, hole, np.uint32(0))


@jit
def remove_row(descriptor: Int, salt: np.uint64, key: np.uint64, row_bytes: Int) -> bool:
    """Let a key's row go; False if it has none."""
    clock: Int = load_i64(descriptor, CLOCK)
    keys: Int = load_i64(descriptor, KEYS)
    rows: Int = load_i64(descriptor, ROWS)
    row, place = find_key(descriptor, key_mix(salt, key), key)
    if row < 0:
        return False
    take_out(descriptor, salt, place)
    last: Int = load_i64(clock, COUNT) - 1
    if row != last:
        moved = load_u64(keys, last)
        mix = key_mix(salt, moved)
        _, at = find_key(descriptor, mix, moved)
        tag = tag_of(mix, load_i64(descriptor, ROW_BITS))
        store_u32(load_i64(descriptor, ENTRIES), at, np.uint32(tag | np.uint64(row + 1)))
        store_u64(keys, row, moved)
        copy(rows + row * row_bytes, rows + last * row_bytes, row_bytes)
    store_i64(clock, COUNT, last)
    return True


@jit
def change_rows(
    table: Int, descriptor: Int, gone: Int, leave: Int, keys: Int, rows: Int, begin: Int, end: Int, row_bytes: Int
) -> Int:
    """Let rows of gone: uint64[leave] go; then write rows begin to end - 1 of rows: uint8[n, row_bytes] for keys: uint64[n].

    Return the first row that is not written, as there is no room for it; ``end`` if all are.
    """
    salt = load_u64(table, SALT)
    clock: Int = load_i64(descriptor, CLOCK)
    for first in range(0, leave, CHANGE_LAP):
        atomic_add(clock, 1)
        for i in range(first, min(leave, first + CHANGE_LAP)):
            remove_row(descriptor, salt, load_u64(gone, i), row_bytes)
        atomic_add(clock, 1)
    at: Int = begin
    room = True
    while room and at < end:
        atomic_add(clock, 1)
        stop = min(end, at + CHANGE_LAP)
        while room and at < stop:
            room = write_row(descriptor, salt, load_u64(keys, at), rows + at * row_bytes, row_bytes)
            at += room
        atomic_add(clock, 1)
    return at


@jit
def change_blocks(
    table: Int,
    blocks: NDArray[np.int32],
    counts: NDArray[np.int32],
    keys: NDArray[np.uint64],
    rows: NDArray[np.uint8],
    gone_counts: NDArray[np.int32],
    gone: NDArray[np.uint64],
    progress: NDArray[np.int64],
) -> Int:
    """Change blocks one after the other: rows of gone leave, then rows are written. progress: int64[3], where to go on.

    Those are the block, the first row that is not written, and the first gone key that is left. Return the position of a block
    that has no room for that row, -1 if all is done. A block that is begun has its gone keys behind it.
    """
    descriptors: Int = load_i64(table, BLOCKS)
    row_bytes: Int = load_i64(table, ROW_BYTES)
    group = progress[0]
    at = progress[1]
    buried = progress[2]
    begin = np.int64(0)
    left = np.int64(0)
    for i in range(group):
        begin += counts[i]
        left += gone_counts[i]
    while group < blocks.shape[0]:
        end = begin + counts[group]
        leave = left + gone_counts[group] - buried
        descriptor = descriptors + np.int64(blocks[group]) * (8 * BLOCK_WORDS)
        at = change_rows(
            table,
            descriptor,
            address_in(gone, 8 * buried),
            leave,
            address_in(keys, 0),
            address_in(rows, 0),
            at,
            end,
            row_bytes,
        )
        buried += leave
        if at < end:
            progress[0] = group
            progress[1] = at
            progress[2] = buried
            return group
        begin = end
        left = buried
        group += 1
    return np.int64(-1)


@jit
def stray(table: Int, blocks: NDArray[np.int32], counts: NDArray[np.int32], keys: NDArray[np.uint64]) -> Int:
    """Return the position of the first of keys, which are grouped by block, that is of another block; -1 if none is."""
    salt = load_u64(table, SALT)
    bits: Int = load_i64(table, BLOCK_BITS)
    at = 0
    for group in range(blocks.shape[0]):
        for i in range(at, at + counts[group]):
            if block_of_mix(key_mix(salt, keys[i]), bits) != blocks[group]:
                return np.int64(i)
        at += counts[group]
    return np.int64(-1)
