# SPDX-License-Identifier: Apache-2.0
"""Open-addressing index, one per block: key -> slot.

    entry (16 bytes):  key | slot + 1      0 in the second word = empty, so every 64-bit key is an ordinary key

Linear probing from the low bits of the key's mix; capacity is a power of two and at most 3/4 full. Invariant: a slot,
once given out, is the key's until the block is dropped; growing moves entries, never rows. A table's blocks are one
int64[blocks, FIELDS] of descriptors, so one call covers a whole request. Kernels only: the caller holds the table's
lock, has checked the request with check_groups, and has made room for inserts.
"""

import numpy as np
from numpy.typing import NDArray

from oarlock.embedding.hashing import block_of_mix, key_mix
from oarlock.embedding.jit import jit
from oarlock.embedding.pointer import Int, load_u64, prefetch, store_u64
from oarlock.embedding.slab import Layout, read_row, row_address, start_row, write_row

# Columns of a descriptor. ENTRIES = 0: the block is not stored here.
ENTRIES = 0  # address of the entries
MASK = 1  # capacity - 1
ROWS = 2  # rows in use = next slot
CHUNKS = 3  # address of the table of chunk addresses
ROOM = 4  # rows that fit before index or slab must grow
FIELDS = 8  # one cache line; the rest is spare

ENTRY_BYTES = 16
AHEAD = 16  # entries asked for before they are used

# What check_groups and check_keys found; the place of the fault comes beside it.
FINE = 0
BAD_COUNT = 1
OUT_OF_RANGE = 2
REPEATED_BLOCK = 3
NOT_STORED = 4
WRONG_SUM = 5
WRONG_BLOCK = 6
REPEATED_KEY = 7

_ONE = np.uint64(1)
_EMPTY = np.uint64(0)


@jit
def check_groups(
    descriptors: NDArray[np.int64],
    n: int,
    blocks: NDArray[np.int32],
    counts: NDArray[np.int32],
    seen: NDArray[np.uint8],
    fault: NDArray[np.int64],
) -> int:
    """Check how a request is grouped; return FINE or a code, with the group's number in fault[0].

    ``seen``: uint8[blocks of the table], zero before and after.
    """
    code = FINE
    total = np.int64(0)
    done = 0
    for group in range(blocks.shape[0]):
        block = np.int64(blocks[group])
        fault[0] = group
        if block < 0 or block >= descriptors.shape[0]:
            code = OUT_OF_RANGE
        elif counts[group] <= 0:
            code = BAD_COUNT
        elif seen[block] != 0:
            code = REPEATED_BLOCK
        elif descriptors[block, ENTRIES] == 0:
            code = NOT_STORED
        if code != FINE:
            break
        seen[block] = 1
        done += 1
        total += counts[group]
    for group in range(done):
        seen[blocks[group]] = 0
    if code == FINE and total != n:
        fault[0] = total
        return WRONG_SUM
    return code


@jit
def check_keys(
    salt: np.uint64,
    bits: int,
    keys: NDArray[np.uint64],
    blocks: NDArray[np.int32],
    counts: NDArray[np.int32],
    places: NDArray[np.int32],
    fault: NDArray[np.int64],
) -> int:
    """Check that each key hashes to its group's block and, if ``places`` is not empty, that no key comes twice.

    ``places``: int32[power of two > n] of zeros, used up. Returns FINE or a code, with the key's position in fault[0].
    """
    unique = places.shape[0] > 0
    mask = np.uint64(max(places.shape[0], 1) - 1)
    begin = 0
    for group in range(blocks.shape[0]):
        end = begin + counts[group]
        for i in range(begin, end):
            mix = key_mix(salt, keys[i])
            fault[0] = i
            if block_of_mix(mix, bits) != blocks[group]:
                return WRONG_BLOCK
            if unique:
                place = mix & mask
                while places[place] != 0:
                    if keys[places[place] - 1] == keys[i]:
                        return REPEATED_KEY
                    place = (place + _ONE) & mask
                places[place] = i + 1
        begin = end
    return FINE


@jit
def crowded(
    descriptors: NDArray[np.int64], blocks: NDArray[np.int32], counts: NDArray[np.int32], out: NDArray[np.int32]
) -> int:
    """List in out: int32[m] the groups whose block has no room if every key of it is new; return how many."""
    found = 0
    for group in range(blocks.shape[0]):
        block = blocks[group]
        if descriptors[block, ROWS] + counts[group] > descriptors[block, ROOM]:
            out[found] = group
            found += 1
    return found


@jit
def aim(
    descriptors: NDArray[np.int64],
    salt: np.uint64,
    keys: NDArray[np.uint64],
    blocks: NDArray[np.int32],
    counts: NDArray[np.int32],
    addresses: NDArray[np.int64],
) -> None:
    """Write the address of the entry where each key's probing starts."""
    begin = 0
    for group in range(blocks.shape[0]):
        block = blocks[group]
        entries = descriptors[block, ENTRIES]
        mask = np.uint64(descriptors[block, MASK])
        end = begin + counts[group]
        for i in range(begin, end):
            addresses[i] = entries + np.int64(key_mix(salt, keys[i]) & mask) * ENTRY_BYTES
        begin = end


@jit
def probe(entries: Int, mask: Int, entry: Int, key: np.uint64) -> Int:
    """Return the address of the key's entry, or of the empty entry where it would go; start at address ``entry``."""
    end = entries + (mask + 1) * ENTRY_BYTES
    while load_u64(entry, 1) != _EMPTY and load_u64(entry, 0) != key:
        entry += ENTRY_BYTES
        if entry == end:
            entry = entries
    return entry


@jit
def find_rows(
    descriptors: NDArray[np.int64],
    salt: np.uint64,
    shape: Layout,
    keys: NDArray[np.uint64],
    blocks: NDArray[np.int32],
    counts: NDArray[np.int32],
    addresses: NDArray[np.int64],
) -> int:
    """Write the row address of each key to addresses: int64[n], 0 when absent; return how many are present."""
    aim(descriptors, salt, keys, blocks, counts, addresses)
    n = keys.shape[0]
    present = 0
    begin = 0
    for group in range(blocks.shape[0]):
        block = blocks[group]
        entries = descriptors[block, ENTRIES]
        mask = descriptors[block, MASK]
        chunks = descriptors[block, CHUNKS]
        end = begin + counts[group]
        for i in range(begin, end):
            if i + AHEAD < n:
                prefetch(addresses[i + AHEAD])
            word = load_u64(probe(entries, mask, addresses[i], keys[i]), 1)
            if word == _EMPTY:
                addresses[i] = 0
            else:
                addresses[i] = row_address(chunks, np.int64(word - _ONE), shape)
                present += 1
        begin = end
    return present


@jit
def create_rows(
    descriptors: NDArray[np.int64],
    salt: np.uint64,
    shape: Layout,
    keys: NDArray[np.uint64],
    blocks: NDArray[np.int32],
    counts: NDArray[np.int32],
    refused: NDArray[np.uint8],
    start: np.uint64,
    first: NDArray[np.float64],
    state: NDArray[np.float32],
    addresses: NDArray[np.int64],
) -> int:
    """As find_rows, but create absent rows at their first value; return how many. Refused keys get address 0."""
    aim(descriptors, salt, keys, blocks, counts, addresses)
    n = keys.shape[0]
    created = 0
    begin = 0
    for group in range(blocks.shape[0]):
        block = blocks[group]
        entries = descriptors[block, ENTRIES]
        mask = descriptors[block, MASK]
        chunks = descriptors[block, CHUNKS]
        rows = descriptors[block, ROWS]
        end = begin + counts[group]
        for i in range(begin, end):
            if i + AHEAD < n:
                prefetch(addresses[i + AHEAD])
            if refused[i] != 0:
                addresses[i] = 0
                continue
            entry = probe(entries, mask, addresses[i], keys[i])
            word = load_u64(entry, 1)
            if word == _EMPTY:
                row = row_address(chunks, rows, shape)
                rows += 1
                created += 1
                store_u64(entry, 0, keys[i])
                store_u64(entry, 1, np.uint64(rows))
                start_row(row, shape, start, keys[i], first, state)
                addresses[i] = row
            else:
                addresses[i] = row_address(chunks, np.int64(word - _ONE), shape)
        descriptors[block, ROWS] = rows
        begin = end
    return created


@jit
def rehash(salt: np.uint64, old: NDArray[np.uint64], entries: Int, mask: Int) -> None:
    """Enter all entries of old: uint64[capacity, 2] into the empty index at ``entries``."""
    for i in range(old.shape[0]):
        if old[i, 1] != _EMPTY:
            key = old[i, 0]
            entry: Int = entries + np.int64(key_mix(salt, key) & np.uint64(mask)) * ENTRY_BYTES
            entry = probe(entries, mask, entry, key)
            store_u64(entry, 0, key)
            store_u64(entry, 1, old[i, 1])


@jit
def export_rows(
    entries: NDArray[np.uint64],
    chunks: int,
    shape: Layout,
    keys: NDArray[np.uint64],
    weights: NDArray[np.float32],
    state: NDArray[np.float32],
) -> None:
    """Copy all rows of entries: uint64[capacity, 2] to keys: uint64[r], weights and state, in order of slots."""
    for i in range(entries.shape[0]):
        if entries[i, 1] != _EMPTY:
            slot = np.int64(entries[i, 1] - _ONE)
            keys[slot] = entries[i, 0]
            read_row(row_address(chunks, slot, shape), shape, slot, weights, state)


@jit
def import_rows(
    descriptor: NDArray[np.int64],
    salt: np.uint64,
    shape: Layout,
    keys: NDArray[np.uint64],
    weights: NDArray[np.float32],
    state: NDArray[np.float32],
) -> int:
    """Fill an empty block with room: slot i = key i. Return -1, or the position of the first key that came before."""
    entries = descriptor[ENTRIES]
    mask = descriptor[MASK]
    for i in range(keys.shape[0]):
        key = keys[i]
        entry: Int = entries + np.int64(key_mix(salt, key) & np.uint64(mask)) * ENTRY_BYTES
        entry = probe(entries, mask, entry, key)
        if load_u64(entry, 1) != _EMPTY:
            return i
        store_u64(entry, 0, key)
        store_u64(entry, 1, np.uint64(i + 1))
        write_row(row_address(descriptor[CHUNKS], i, shape), shape, i, weights, state)
    descriptor[ROWS] = keys.shape[0]
    return -1
