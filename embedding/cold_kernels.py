# SPDX-License-Identifier: Apache-2.0
"""Kernels that move rows between a block's memory and records of the spill file (``embedding/cold.py``).

Invariant: a record holds all of a row but its place, its word keeps its stamp; going out and coming back changes no bit of
them. The caller holds the
block's mutex; where words of the index change, the block is shut.
"""

import numpy as np
from numpy.typing import NDArray

from oarlock.embedding.admission import give_slot, take_slot
from oarlock.embedding.content import read_row
from oarlock.embedding.descriptor import BUCKETS, CHUNKS, COUNT, HAND_OF_HEAT
from oarlock.embedding.hashing import key_mix
from oarlock.embedding.index import (
    HEAT,
    PENDING,
    PLACES,
    SPILLED,
    USED,
    VALUE,
    WORDS,
    cool,
    filed,
    find,
    home,
    line_of,
    place_of,
    placed,
    record_of,
)
from oarlock.embedding.jit import jit
from oarlock.embedding.pointer import (
    LINE,
    Int,
    address_in,
    copy,
    load_i64,
    load_u8,
    load_u32,
    load_u64,
    prefetch,
    store_i64,
    store_u8,
    store_u32,
    store_u64,
)
from oarlock.embedding.precision import decode_row
from oarlock.embedding.slab import Layout, prefetch_bytes, row_at

AHEAD = 12  # rows asked for before they are packed


@jit
def choose_cold(descriptor: Int, shape: Layout, entries: NDArray[np.int64]) -> int:
    """Go round the index once from where the hand stands, cooling every row; list in entries: int64[n] the words of rows
    that had no heat left, until it is full; return how many."""
    buckets: Int = load_i64(descriptor, BUCKETS)
    count: Int = load_i64(descriptor, COUNT)
    number: Int = load_i64(descriptor, HAND_OF_HEAT)
    found = 0
    for _ in range(count):
        if number >= count:
            number = np.int64(0)
        line = buckets + number * LINE
        used = np.int64(load_u8(line, USED))
        if found + PLACES > entries.shape[0]:
            break
        for place in range(PLACES):
            if used & (1 << place) != 0 and np.int64(load_u32(line, WORDS + place)) < PENDING and cool(line, place):
                entries[found] = line + 4 * (WORDS + place)
                found += 1
        number += 1
    store_i64(descriptor, HAND_OF_HEAT, number)
    return found


@jit
def pack_rows(descriptor: Int, shape: Layout, entries: NDArray[np.int64], out: NDArray[np.uint8]) -> None:
    """Write the rows whose index words lie at entries: int64[n] to out: uint8[n, record bytes]."""
    chunks: Int = load_i64(descriptor, CHUNKS)
    side_bytes = 4 * (shape.state_columns + shape.counters)
    n = entries.shape[0]
    for i in range(n):
        if i + AHEAD < n:
            row, side = row_at(chunks, np.int64(load_u32(entries[i + AHEAD], 0)) & VALUE, shape)
            prefetch_bytes(row, shape.weight_bytes)
            prefetch(side)
        slot = np.int64(load_u32(entries[i], 0)) & VALUE
        record = address_in(out, i * out.shape[1])
        store_u64(record, 0, load_u64(line_of(entries[i]), place_of(entries[i])))
        row, side = row_at(chunks, slot, shape)
        copy(record + 8, row, shape.weight_bytes)
        copy(record + 8 + shape.weight_bytes, side, side_bytes)


@jit
def spill_entries(descriptor: Int, shape: Layout, entries: NDArray[np.int64], records: NDArray[np.int64]) -> None:
    """Let the words at entries: int64[n] name records instead of slots, and take the slots back."""
    for i in range(entries.shape[0]):
        word = np.int64(load_u32(entries[i], 0))
        give_slot(descriptor, shape, word & VALUE)
        store_u32(entries[i], 0, filed(word, records[i]))


@jit
def find_spilled(
    descriptor: Int,
    salt: np.uint64,
    keys: NDArray[np.uint64],
    entries: NDArray[np.int64],
    records: NDArray[np.int64],
) -> int:
    """List words and records of those of keys that are in the file; return how many. A key given twice is listed twice."""
    buckets: Int = load_i64(descriptor, BUCKETS)
    count: Int = load_i64(descriptor, COUNT)
    found = 0
    for i in range(keys.shape[0]):
        entry = find(buckets, count, home(buckets, count, key_mix(salt, keys[i])), keys[i])
        if entry == 0 or np.int64(load_u32(entry, 0)) < SPILLED:
            continue
        entries[found] = entry
        records[found] = record_of(np.int64(load_u32(entry, 0)))
        found += 1
    return found


@jit
def list_spilled(descriptor: Int, begin: int, end: int, entries: NDArray[np.int64], records: NDArray[np.int64]) -> int:
    """List words and records of the rows of buckets begin to end - 1 that are in the file; return how many."""
    buckets: Int = load_i64(descriptor, BUCKETS)
    found = 0
    for number in range(begin, end):
        line = buckets + number * LINE
        used = np.int64(load_u8(line, USED))
        for place in range(PLACES):
            word = np.int64(load_u32(line, WORDS + place))
            if used & (1 << place) != 0 and word >= SPILLED:
                entries[found] = line + 4 * (WORDS + place)
                records[found] = record_of(word)
                found += 1
    return found


@jit
def place_row(descriptor: Int, shape: Layout, entry: Int, record: Int, hot: bool) -> None:
    """Give the row of the record at an address a slot again, and let its word name that; there is a slot."""
    slot = take_slot(descriptor, shape)
    row, side = row_at(load_i64(descriptor, CHUNKS), slot, shape)
    copy(row, record + 8, shape.weight_bytes)
    copy(side, record + 8 + shape.weight_bytes, 4 * (shape.state_columns + shape.counters))
    store_u32(entry, 0, placed(np.int64(load_u32(entry, 0)), slot))
    line = line_of(entry)
    for plane in range(2 if hot else 0):
        bits = np.int64(load_u8(line, HEAT + plane)) | (np.int64(1) << place_of(entry))
        store_u8(line, HEAT + plane, np.uint8(bits))


@jit
def unspill(descriptor: Int, shape: Layout, entries: NDArray[np.int64], content: NDArray[np.uint8], hot: bool) -> None:
    """Give the rows of content: uint8[n, record bytes] slots again; there is room. ``hot``: as rows just asked for."""
    for i in range(entries.shape[0]):
        place_row(descriptor, shape, entries[i], address_in(content, i * content.shape[1]), hot)


@jit
def decode_records(content: NDArray[np.uint8], shape: Layout, where: NDArray[np.int64], out: Int) -> None:
    """Write the weights of content: uint8[n, record bytes] to lines where: int64[n] of float32[.., dim] at ``out``."""
    for i in range(where.shape[0]):
        decode_row(address_in(content, i * content.shape[1]) + 8, shape.code, shape.dim, out + 4 * where[i] * shape.dim)


@jit
def split_records(
    content: NDArray[np.uint8],
    shape: Layout,
    places: NDArray[np.int64],
    weights: Int,
    state: NDArray[np.float32],
    counters: NDArray[np.uint32],
) -> None:
    """Take records apart, each to its place of places: int64[n] in weights: float32[m, dim] at an address, state and counters."""
    for i in range(content.shape[0]):
        row, place = address_in(content, i * content.shape[1]) + 8, places[i]
        out = weights + 4 * place * shape.dim
        read_row(row, row + shape.weight_bytes, shape, counters.shape[1], place, out, state, counters)
