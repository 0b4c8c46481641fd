# SPDX-License-Identifier: Apache-2.0
"""The kernels of a frozen table: an index over keys that lie elsewhere, and the look-up of many keys at once.

    entry    tag | row + 1    32 bits; as many bits for the row as its block needs, the others are bits of the key's mix; 0: free
    places   of a block's index, an array of entries: the home of a key is (its mix's low 32 bits) * places >> 32, and a key
             whose home is taken lies in the next free place

    aim      32 keys          where do the keys' entries lie? ask for them
    peek     those before     find the entry with the key's tag, ask for the key and the row that it means
    take     those before     compare the key, copy the row

Invariant: nothing but ``out`` and the scratch is written to, so any number of threads look up at once. A tag decides nothing: the
key itself is compared. Addresses are those of arrays that ``embedding/frozen.py`` keeps alive; nothing here checks bounds, but
every index has a free place, and every entry a row of its block.
"""

import numpy as np

from oarlock.embedding.hashing import block_of_mix, key_mix
from oarlock.embedding.jit import jit
from oarlock.embedding.packed import decode_packed
from oarlock.embedding.pointer import (
    Int,
    load_f32,
    load_i64,
    load_u8,
    load_u32,
    load_u64,
    prefetch,
    store_f32,
    store_i64,
    store_u32,
    store_u64,
)
from oarlock.embedding.precision import FLOAT32, INT8, encode_nearest
from oarlock.embedding.pull import copy_rows
from oarlock.embedding.slab import First, draw_weights, layout, prefetch_bytes

# Words of a block's descriptor, a cache line.
ENTRIES, PLACES, KEYS, ROWS, ROW_BITS = range(5)
BLOCK_WORDS = 8
# Words of a table's: its blocks' descriptors, log2 of how many; then its rows, and what an absent key reads as: so many parts
# of first values, zeros behind them; then what product-quantised rows are made of: their codebook and its parts.
BLOCKS, BLOCK_BITS, SALT, DIM, CODE, ROW_BYTES, ORIGIN, PARTS, ENDS, CONSTANTS, CODEBOOK, STARTS, CODES = range(13)
TABLE_WORDS = 13

LAP = 32
RING = 4 * LAP
# Scratch of a look-up, in words: of each key in the ring its mix, its block's descriptor, its place, and its row's address.
MIXES, DESCRIPTORS, _PLACES, ROWS_FOUND = (8 * RING * n for n in range(4))
SCRATCH_WORDS = 4 * RING

_LOW = np.uint64(0xFFFFFFFF)
_32 = np.uint64(32)
_ONE = np.uint64(1)
# draw_weights asks it of nothing but its type.
_SHAPE = layout(1, 0)


@jit
def home_of(mix: np.uint64, places: Int) -> Int:
    """Return the place of an index at which the search for a mix begins."""
    return np.int64(((mix & _LOW) * np.uint64(places)) >> _32)


@jit
def tag_of(mix: np.uint64, row_bits: Int) -> np.uint64:
    """Return what an entry has of a mix, in the bits above those of the row."""
    return ((mix >> _32) << np.uint64(row_bits)) & _LOW


@jit
def fill_index(keys: Int, count: Int, salt: np.uint64, entries: Int, places: Int, row_bits: Int) -> None:
    """Enter ``count`` distinct keys: uint64[count] at address ``keys`` into entries: uint32[places], zeros, places > count."""
    for row in range(count):
        mix = key_mix(salt, load_u64(keys, row))
        at = home_of(mix, places)
        while load_u32(entries, at) != 0:
            at += 1
            if at == places:
                at = np.int64(0)
        store_u32(entries, at, np.uint32(tag_of(mix, row_bits) | np.uint64(row + 1)))


@jit
def find_from(descriptor: Int, mix: np.uint64, at: Int) -> tuple[Int, Int]:
    """Return (row, place) of the first entry with the mix's tag from place ``at`` on, row -1 if a free place comes first."""
    entries: Int = load_i64(descriptor, ENTRIES)
    places: Int = load_i64(descriptor, PLACES)
    row_bits: Int = load_i64(descriptor, ROW_BITS)
    tag = tag_of(mix, row_bits)
    rows = (_ONE << np.uint64(row_bits)) - _ONE
    while True:
        entry = np.uint64(load_u32(entries, at))
        if entry == np.uint64(0):
            return np.int64(-1), at
        if entry & ~rows == tag:
            return np.int64(entry & rows) - 1, at
        at += 1
        if at == places:
            at = np.int64(0)


@jit
def aim_lap(table: Int, keys: Int, begin: Int, end: Int, scratch: Int) -> None:
    """Work out where the entries of keys begin to end - 1 are to be looked for, and ask for them."""
    salt = load_u64(table, SALT)
    bits: Int = load_i64(table, BLOCK_BITS)
    blocks: Int = load_i64(table, BLOCKS)
    for i in range(begin, end):
        mix = key_mix(salt, load_u64(keys, i))
        descriptor = blocks + block_of_mix(mix, bits) * (8 * BLOCK_WORDS)
        at = home_of(mix, load_i64(descriptor, PLACES))
        prefetch(load_i64(descriptor, ENTRIES) + 4 * at)
        slot = i & (RING - 1)
        store_u64(scratch + MIXES, slot, mix)
        store_i64(scratch + DESCRIPTORS, slot, descriptor)
        store_i64(scratch + _PLACES, slot, at)


@jit
def peek_lap(begin: Int, end: Int, row_bytes: Int, scratch: Int) -> None:
    """Find the likely rows of keys begin to end - 1, and ask for them and for their keys."""
    for i in range(begin, end):
        slot = i & (RING - 1)
        descriptor: Int = load_i64(scratch + DESCRIPTORS, slot)
        mix = load_u64(scratch + MIXES, slot)
        row, at = find_from(descriptor, mix, load_i64(scratch + _PLACES, slot))
        if row >= 0:
            prefetch(load_i64(descriptor, KEYS) + 8 * row)
            prefetch_bytes(load_i64(descriptor, ROWS) + row * row_bytes, row_bytes)
        store_i64(scratch + _PLACES, slot, at)
        store_i64(scratch + ROWS_FOUND, slot, row)


@jit
def settle_lap(keys: Int, begin: Int, end: Int, row_bytes: Int, scratch: Int) -> None:
    """Put the addresses of the rows of keys begin to end - 1 in place of their numbers; 0 for a key that has none."""
    for i in range(begin, end):
        slot = i & (RING - 1)
        row: Int = load_i64(scratch + ROWS_FOUND, slot)
        address = np.int64(0)
        if row >= 0:
            descriptor: Int = load_i64(scratch + DESCRIPTORS, slot)
            lie: Int = load_i64(descriptor, KEYS)
            key = load_u64(keys, i)
            if load_u64(lie, row) != key:
                row = find_beyond(descriptor, load_u64(scratch + MIXES, slot), load_i64(scratch + _PLACES, slot), key)
            if row >= 0:
                address = load_i64(descriptor, ROWS) + row * row_bytes
        store_i64(scratch + ROWS_FOUND, slot, address)


@jit
def find_beyond(descriptor: Int, mix: np.uint64, at: Int, key: np.uint64) -> Int:
    """Return the row of a key whose tag another key has at place ``at``, or -1."""
    keys: Int = load_i64(descriptor, KEYS)
    places: Int = load_i64(descriptor, PLACES)
    while True:
        at += 1
        if at == places:
            at = np.int64(0)
        row, at = find_from(descriptor, mix, at)
        if row < 0 or load_u64(keys, row) == key:
            return row


@jit
def take_lap(table: Int, keys: Int, begin: Int, end: Int, scratch: Int, out: Int) -> Int:
    """Write the rows of keys begin to end - 1, a lap of the ring, to their lines of ``out``; return how many have none."""
    dim: Int = load_i64(table, DIM)
    code: Int = load_i64(table, CODE)
    pitch = 4 * dim
    rows = scratch + ROWS_FOUND + 8 * (begin & (RING - 1))
    n = end - begin
    left: Int = n
    codebook: Int = load_i64(table, CODEBOOK)
    starts: Int = load_i64(table, STARTS)
    codes: Int = load_i64(table, CODES)
    if code == FLOAT32:
        left = copy_rows(rows, n, pitch, out + begin * pitch)
    missing = np.int64(0)
    if left > 0:
        for i in range(n):
            row = load_i64(rows, i)
            line = out + (begin + i) * pitch
            if row == 0:
                first_weights(table, load_u64(keys, begin + i), line)
                missing += 1
            elif code != FLOAT32:
                decode_packed(row, code, dim, codebook, starts, codes, line)
    return missing


@jit
def first_weights(table: Int, key: np.uint64, out: Int) -> None:
    """Write what a key without a row reads as to address ``out``."""
    parts: Int = load_i64(table, PARTS)
    ends: Int = load_i64(table, ENDS)
    drawn = np.int64(0)
    if parts > 0:
        drawn = load_i64(ends, parts - 1)
        first = First(load_u64(table, ORIGIN), parts, ends, load_i64(table, CONSTANTS), 0, 0)
        draw_weights(key, _SHAPE, first, out)
    for column in range(drawn, load_i64(table, DIM)):
        store_f32(out, column, np.float32(0))


@jit
def look_up(table: Int, keys: Int, n: Int, out: Int, scratch: Int) -> Int:
    """Write the weights of keys: uint64[n] to out: float32[n, dim], all by address; return how many keys have no row."""
    row_bytes: Int = load_i64(table, ROW_BYTES)
    missing = np.int64(0)
    laps = (n + LAP - 1) // LAP
    for lap in range(laps + 2):
        if lap < laps:
            aim_lap(table, keys, lap * LAP, min(n, (lap + 1) * LAP), scratch)
        if 1 <= lap <= laps:
            peek_lap((lap - 1) * LAP, min(n, lap * LAP), row_bytes, scratch)
        if lap >= 2:
            begin, end = (lap - 2) * LAP, min(n, (lap - 1) * LAP)
            settle_lap(keys, begin, end, row_bytes, scratch)
            missing += take_lap(table, keys, begin, end, scratch, out)
    return missing


@jit
def store_rows(weights: Int, scales: Int, n: Int, dim: Int, code: Int, row_bytes: Int, out: Int) -> None:
    """Store float32[n, dim] as rows of precision ``code``; scales: float32[n] of int8 rows. Exact for what was stored so."""
    for row in range(n):
        scale = load_f32(scales, row) if code == INT8 else np.float32(0)
        encode_nearest(out + row * row_bytes, code, dim, weights + row * 4 * dim, scale)


@jit
def touch(address: Int, size: Int) -> Int:
    """Read a byte of every page of ``size`` bytes at ``address``, so that all of them are in memory; return their sum."""
    total = np.int64(0)
    for at in range(0, size, 4096):
        total += np.int64(load_u8(address, at))
    return total
