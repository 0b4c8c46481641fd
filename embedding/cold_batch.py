# SPDX-License-Identifier: Apache-2.0
"""Rows to and from the spill file for a whole request at once: a few kernel calls and one read or write of the file.

    before a push    list the request's rows that are in the file; read them; give them slots again
    behind a push    choose cold rows of the blocks that are over the budget and pack them; write them; let their words name
                     the records

Between two steps nobody is kept out of the blocks, so each step checks that what the one before saw still holds: a word must
still name the record that was read; a block that changed since its rows were packed (its life, version and index tell) keeps
them, and so it does those that someone else spilled meanwhile. Kernels only; policy is in ``embedding/cold.py``.
"""

import numpy as np
from numpy.typing import NDArray

from oarlock.embedding.admission import give_slot
from oarlock.embedding.aim import Grouped
from oarlock.embedding.cold_kernels import choose_cold, pack_rows, place_row
from oarlock.embedding.descriptor import (
    BUCKETS,
    COUNT,
    DESCRIPTOR_BYTES,
    FREE_ROWS,
    LIFE,
    NEXT,
    ROWS,
    SLOT_ROOM,
    SPILLED_ROWS,
    VERSION,
)
from oarlock.embedding.hashing import block_of_mix, key_mix
from oarlock.embedding.index import PENDING, SPILLED, VALUE, filed, find, home, record_of
from oarlock.embedding.jit import jit
from oarlock.embedding.lock import enter, enter_mutex, leave, leave_mutex, reopen, shut
from oarlock.embedding.pointer import Int, address_in, load_i64, load_u32, load_u64, prefetch, store_i64, store_u32
from oarlock.embedding.slab import Layout

AHEAD = 16  # keys whose buckets are asked for before they are looked up


@jit
def names(word: Int, record: Int) -> bool:
    """Tell whether a word says that its row is in the file, as ``record``."""
    return bool(word >= SPILLED and record_of(word) == record)


@jit
def list_cold(
    descriptors: Int,
    salt: np.uint64,
    grouped: Grouped,
    keys: NDArray[np.uint64],
    records: NDArray[np.int64],
) -> int:
    """Write keys and records of the request's rows that are in the file, in its order; return how many."""
    found = 0
    at = np.int64(0)
    for group in range(grouped.groups):
        descriptor = descriptors + np.int64(load_u32(grouped.blocks, group)) * DESCRIPTOR_BYTES
        end = at + np.int64(load_u32(grouped.counts, group))
        if load_i64(descriptor, SPILLED_ROWS) > 0:
            enter(descriptor)
            buckets: Int = load_i64(descriptor, BUCKETS)
            count: Int = load_i64(descriptor, COUNT)
            last = end if buckets != 0 else at
            for i in range(at, min(at + AHEAD, last)):
                prefetch(home(buckets, count, key_mix(salt, load_u64(grouped.keys, i))))
            for i in range(at, last):
                if i + AHEAD < last:
                    prefetch(home(buckets, count, key_mix(salt, load_u64(grouped.keys, i + AHEAD))))
                key = load_u64(grouped.keys, i)
                entry = find(buckets, count, home(buckets, count, key_mix(salt, key)), key)
                if entry != 0 and np.int64(load_u32(entry, 0)) >= SPILLED:
                    keys[found] = key
                    records[found] = record_of(np.int64(load_u32(entry, 0)))
                    found += 1
            leave(descriptor)
        at = end
    return found


@jit
def ask_ahead(descriptor: Int, salt: np.uint64, bits: int, block: Int, keys: NDArray[np.uint64], begin: int) -> None:
    """Ask for the buckets of the first keys of a block."""
    buckets: Int = load_i64(descriptor, BUCKETS)
    count: Int = load_i64(descriptor, COUNT)
    for i in range(begin, min(begin + AHEAD, keys.shape[0])):
        mix = key_mix(salt, keys[i])
        if block_of_mix(mix, bits) == block:
            prefetch(home(buckets, count, mix))


@jit
def take_back(
    descriptors: Int,
    salt: np.uint64,
    bits: int,
    shape: Layout,
    keys: NDArray[np.uint64],
    records: NDArray[np.int64],
    content: NDArray[np.uint8],
    start: int,
    done: NDArray[np.uint8],
) -> int:
    """Give the rows of keys from number ``start`` on slots again; return where it stopped for want of a slot, or n.

    done[i] = 1: the row is in memory now, and its record dead. Others moved meanwhile, or are gone.
    """
    n = keys.shape[0]
    i = start
    while i < n:
        block = block_of_mix(key_mix(salt, keys[i]), bits)
        descriptor = descriptors + block * DESCRIPTOR_BYTES
        enter_mutex(descriptor)
        shut(descriptor)
        buckets: Int = load_i64(descriptor, BUCKETS)
        count: Int = load_i64(descriptor, COUNT)
        ask_ahead(descriptor, salt, bits, block, keys, i)
        stopped = False
        back = 0
        while i < n and not stopped:
            mix = key_mix(salt, keys[i])
            if block_of_mix(mix, bits) != block:
                break
            if i + AHEAD < n:
                later = key_mix(salt, keys[i + AHEAD])
                if block_of_mix(later, bits) == block:
                    prefetch(home(buckets, count, later))
            entry = find(buckets, count, home(buckets, count, mix), keys[i]) if buckets != 0 else np.int64(0)
            if entry != 0 and names(np.int64(load_u32(entry, 0)), records[i]):
                if (
                    load_i64(descriptor, NEXT) == load_i64(descriptor, SLOT_ROOM)
                    and load_i64(descriptor, FREE_ROWS) == 0
                ):
                    stopped = True
                    break
                place_row(descriptor, shape, entry, address_in(content, i * content.shape[1]), True)
                back += 1
                done[i] = 1
            i += 1
        store_i64(descriptor, SPILLED_ROWS, load_i64(descriptor, SPILLED_ROWS) - back)
        reopen(descriptor)
        leave_mutex(descriptor)
        if stopped:
            return i
    return n


@jit
def pack_cold(
    descriptors: Int,
    shape: Layout,
    blocks: NDArray[np.int32],
    most: int,
    entries: NDArray[np.int64],
    content: NDArray[np.uint8],
    packed: NDArray[np.int64],
) -> int:
    """Pack cold rows of blocks that have more than ``most`` rows in memory, as room allows; return how many.

    packed: int64[blocks, 5] = rows packed, version, buckets and count of the index, and life of the block at that time.
    """
    found = 0
    for b in range(blocks.shape[0]):
        packed[b, 0] = 0
        descriptor = descriptors + np.int64(blocks[b]) * DESCRIPTOR_BYTES
        if load_i64(descriptor, ROWS) <= most or found == entries.shape[0]:
            continue
        enter_mutex(descriptor)
        need = min(load_i64(descriptor, ROWS) - most, entries.shape[0] - found)
        if load_i64(descriptor, BUCKETS) != 0 and need > 0:
            mine = entries[found : found + need]
            n = choose_cold(descriptor, shape, mine)
            pack_rows(descriptor, shape, mine[:n], content[found : found + n])
            packed[b, 0] = n
            packed[b, 1] = load_i64(descriptor, VERSION)
            packed[b, 2] = load_i64(descriptor, BUCKETS)
            packed[b, 3] = load_i64(descriptor, COUNT)
            packed[b, 4] = load_i64(descriptor, LIFE)
            found += n
        leave_mutex(descriptor)
    return found


@jit
def name_records(
    descriptors: Int,
    shape: Layout,
    blocks: NDArray[np.int32],
    packed: NDArray[np.int64],
    entries: NDArray[np.int64],
    records: NDArray[np.int64],
    kept: NDArray[np.uint8],
) -> None:
    """Let the words of packed rows name their records, and take the slots back, in blocks that did not change meanwhile.

    kept[i] = 1: nobody names record i.
    """
    at = 0
    for b in range(blocks.shape[0]):
        n = packed[b, 0]
        if n == 0:
            continue
        descriptor = descriptors + np.int64(blocks[b]) * DESCRIPTOR_BYTES
        enter_mutex(descriptor)
        same = (
            load_i64(descriptor, VERSION) == packed[b, 1]
            and load_i64(descriptor, BUCKETS) == packed[b, 2]
            and load_i64(descriptor, COUNT) == packed[b, 3]
            and load_i64(descriptor, LIFE) == packed[b, 4]
        )
        if same:
            shut(descriptor)
            named = 0
            for i in range(at, at + n):
                word = np.int64(load_u32(entries[i], 0))
                if word < PENDING:
                    give_slot(descriptor, shape, word & VALUE)
                    store_u32(entries[i], 0, filed(word, records[i]))
                    named += 1
                else:
                    kept[i] = 1
            store_i64(descriptor, SPILLED_ROWS, load_i64(descriptor, SPILLED_ROWS) + named)
            reopen(descriptor)
        else:
            for i in range(at, at + n):
                kept[i] = 1
        leave_mutex(descriptor)
        at += n


@jit
def renumber(
    descriptors: Int,
    salt: np.uint64,
    bits: int,
    keys: NDArray[np.uint64],
    old: NDArray[np.int64],
    new: NDArray[np.int64],
    adopted: NDArray[np.uint8],
) -> None:
    """Where a key's word still names record old[i], let it name new[i], and set adopted[i]."""
    for i in range(keys.shape[0]):
        mix = key_mix(salt, keys[i])
        descriptor = descriptors + block_of_mix(mix, bits) * DESCRIPTOR_BYTES
        enter_mutex(descriptor)
        buckets: Int = load_i64(descriptor, BUCKETS)
        if buckets != 0:
            entry = find(buckets, load_i64(descriptor, COUNT), home(buckets, load_i64(descriptor, COUNT), mix), keys[i])
            if entry != 0 and names(np.int64(load_u32(entry, 0)), old[i]):
                # Both records say the same, so a pull may read either.
                store_u32(entry, 0, filed(np.int64(load_u32(entry, 0)), new[i]))
                adopted[i] = 1
        leave_mutex(descriptor)
