# SPDX-License-Identifier: Apache-2.0
"""The index of a block: key -> word. Open addressing over buckets of one cache line each.

    bucket (64 bytes):  key 0 .. key 4 (uint64) | word 0 .. word 4 (uint32) | used | away | heat 0 | heat 1

    word    stamp (bits 27 to 29), and with it: slot of the row, or PENDING + occurrences of a key not yet admitted, or SPILLED
            + record of a row in the file, whose highest bit is in the place of PENDING
    stamp   when the key last changed (``embedding/view_kernels.py``); it goes with the key wherever its row lies
    used    bit i: place i holds a key, so every 64-bit key is an ordinary key
    away    bit i, 0 to 6: a key that belongs here lies in the bucket 1 + i behind this one; bit 7: one lies farther behind
    heat    bits 0 to 4, two for each place, for tables that spill: how often it was asked for lately
            bits 5 to 7 of heat 0, how far those of bit 7 are: less than 16 << n buckets; 7: anywhere

A key belongs to bucket (low 32 bits of its mix) * buckets >> 32, so any number of buckets will do, growth is by a small
factor, and since the order of buckets is that of the low bits, rehashing reads and writes memory in order. A key that finds
its home full goes to one of the next seven buckets if they have a place, and ``away`` tells which, so a search reads hardly any
bucket for nothing, and those that it will most likely read can be asked for at once.
Invariant: a key is in one place, at home or where ``away`` of its home says; erasing leaves away as it is, until the next
rehash. Kernels only: the caller is inside the block (``embedding/lock.py``).
"""

import numpy as np
from numpy.typing import NDArray

from oarlock.embedding.hashing import key_mix
from oarlock.embedding.jit import jit
from oarlock.embedding.pointer import (
    LINE,
    Int,
    bit_length,
    count_ones,
    load_u8,
    load_u32,
    load_u64,
    match_line,
    prefetch,
    store_u8,
    store_u32,
    store_u64,
    trailing_zeros,
)

PLACES = 5
WORDS = 10  # a word's number, counted in uint32 from the bucket's begin
USED = 60
AWAY = 61
HEAT = 62
FULL = (1 << PLACES) - 1
BEYOND = 7  # the bit of ``away`` for all buckets behind the seventh
_REACH = 5  # the lowest of the bits that say how far those are
_ANYWHERE = 7

PENDING = 1 << 30
SPILLED = 1 << 31
STAMP_BIT = 27
STAMPS = 7 << STAMP_BIT
VALUE = (1 << STAMP_BIT) - 1  # the bits of a slot, or of a count
_MORE = 1 << STAMP_BIT  # one more bit of a record's number, _LIFT places further up in its word
_LIFT = 3
RECORD = VALUE | _MORE

# Of 100 places at most so many are used, and growth is to so many hundredths of what is there: a bucket overflows
# seldom enough for searches to end in the first one, and 64 / 5 bytes of a place stay below 18.4 a key.
LOAD = 82
GROWTH = 118

_HALF = np.uint64(32)
_LOW = np.uint64(0xFFFFFFFF)


def entries_of(buckets: int) -> int:
    """Return how many keys ``buckets`` buckets may hold before they grow."""
    return buckets * PLACES * LOAD // 100


@jit
def record_of(word: Int) -> Int:
    """Return the record that a word with SPILLED names."""
    return (word & VALUE) | ((word >> _LIFT) & _MORE)


def records_of(words: NDArray[np.uint32]) -> NDArray[np.int64]:
    """Return the records: int64[n] that words: uint32[n] with SPILLED name."""
    long = words.astype(np.int64)
    out: NDArray[np.int64] = (long & VALUE) | ((long >> _LIFT) & _MORE)
    return out


@jit
def filed(word: Int, record: Int) -> np.uint32:
    """Return the word of a row that is in the file as ``record`` from now on; its stamp is that of ``word``."""
    return np.uint32(SPILLED | (word & STAMPS) | (record & VALUE) | ((record & _MORE) << _LIFT))


@jit
def placed(word: Int, slot: Int) -> np.uint32:
    """Return the word of a row that is in ``slot`` from now on; its stamp is that of ``word``."""
    return np.uint32((word & STAMPS) | slot)


@jit
def home(buckets: Int, count: Int, mix: np.uint64) -> Int:
    """Return the address of the bucket where a key belongs."""
    return buckets + np.int64(((mix & _LOW) * np.uint64(count)) >> _HALF) * LINE


@jit
def find(buckets: Int, count: Int, line: Int, key: np.uint64) -> Int:
    """Return the address of the key's word, 0 if it is not there; ``line`` is its home."""
    found = match_line(line, key) & np.int64(load_u8(line, USED))
    at: Int = line
    away = np.int64(load_u8(line, AWAY))
    while found == 0 and away != 0:
        bit = trailing_zeros(away)
        away &= away - 1
        if bit == BEYOND:
            return _find_beyond(buckets, count, line, key)
        at = _behind(buckets, count, line, bit + 1)
        found = match_line(at, key) & np.int64(load_u8(at, USED))
    if found == 0:
        return np.int64(0)
    return at + 4 * (WORDS + trailing_zeros(found))


@jit
def _behind(buckets: Int, count: Int, line: Int, distance: Int) -> Int:
    """Return the bucket ``distance`` < count behind one, where the last bucket is followed by the first."""
    at = line + distance * LINE
    return at if at < buckets + count * LINE else at - count * LINE


@jit
def _find_beyond(buckets: Int, count: Int, line: Int, key: np.uint64) -> Int:
    reach = np.int64(load_u8(line, HEAT)) >> _REACH
    for distance in range(BEYOND + 1, count if reach == _ANYWHERE else min(count, np.int64(16) << reach)):
        at = _behind(buckets, count, line, distance)
        found = match_line(at, key) & np.int64(load_u8(at, USED))
        if found != 0:
            return at + 4 * (WORDS + trailing_zeros(found))
    return np.int64(0)


@jit
def next_line(buckets: Int, count: Int, line: Int) -> Int:
    """Return the bucket where a key most likely is that is not in its home ``line``: any bucket if it can be nowhere else."""
    bit = trailing_zeros(np.int64(load_u8(line, AWAY)) | (1 << BEYOND))
    at = line + (bit + 1) * LINE
    return at if at < buckets + count * LINE else line


@jit
def ask_away(line: Int) -> None:
    """Ask for the two buckets where a key most likely is that is not in its home ``line``."""
    away = np.int64(load_u8(line, AWAY)) | (1 << BEYOND)
    prefetch(line + (1 + trailing_zeros(away)) * LINE)
    away = (away & (away - 1)) | (1 << BEYOND)
    prefetch(line + (1 + trailing_zeros(away)) * LINE)


@jit
def peek(line: Int, key: np.uint64) -> tuple[Int, bool]:
    """Look for a key in its home bucket only, without a branch: the address of its word, and whether it is there.

    The address is of some word of the bucket when the key is not there.
    """
    found = match_line(line, key) & np.int64(load_u8(line, USED))
    place = trailing_zeros(found | (1 << (PLACES - 1)))
    return line + 4 * (WORDS + place), found != 0


@jit
def insert(buckets: Int, count: Int, line: Int, key: np.uint64, word: np.uint32) -> Int:
    """Put an absent key where there is a place (there is one), best in its home ``line``; return its word's address."""
    at: Int = line
    used = np.int64(load_u8(at, USED))
    if used == FULL:
        away = np.int64(load_u8(line, AWAY))
        distance = _overflow(buckets, count, line, away)
        store_u8(line, AWAY, np.uint8(away | (np.int64(1) << min(distance - 1, BEYOND))))
        if distance > BEYOND:
            heat = np.int64(load_u8(line, HEAT))
            reach = max(heat >> _REACH, min(bit_length(distance >> 4), _ANYWHERE))
            store_u8(line, HEAT, np.uint8((heat & FULL) | (reach << _REACH)))
        at = _behind(buckets, count, line, distance)
        used = np.int64(load_u8(at, USED))
    place = trailing_zeros(~used)
    store_u64(at, place, key)
    store_u32(at, WORDS + place, word)
    store_u8(at, USED, np.uint8(used | (np.int64(1) << place)))
    return at + 4 * (WORDS + place)


@jit
def _overflow(buckets: Int, count: Int, line: Int, away: Int) -> Int:
    """Return how far behind its full home a key goes: where others went already, or to the emptiest of the next seven.

    So that a search has one bucket to look into, and a bucket's own keys find room in it: of 100 keys at a load of 0.76,
    1 is then in neither its home nor the first bucket of ``away``, against 2.4 if each goes to the first free place.
    """
    best = np.int64(0)
    least = np.int64(PLACES)
    for distance in range(1, min(BEYOND, count - 1) + 1):
        held = count_ones(np.int64(load_u8(_behind(buckets, count, line, distance), USED)))
        if held < PLACES and (away >> (distance - 1)) & 1 != 0:
            return distance
        if held < least:
            least = held
            best = np.int64(distance)
    if best == 0:
        best = np.int64(BEYOND + 1)
        while np.int64(load_u8(_behind(buckets, count, line, best), USED)) == FULL:
            best += 1
    return best


@jit
def line_of(entry: Int) -> Int:
    """Return the bucket in which the word at address ``entry`` lies."""
    return entry - entry % LINE


@jit
def place_of(entry: Int) -> Int:
    """Return the place within its bucket of the word at address ``entry``."""
    return (entry % LINE - 4 * WORDS) >> 2


@jit
def erase(entry: Int) -> None:
    """Take the key of the word at address ``entry`` out of the index."""
    line = line_of(entry)
    place = place_of(entry)
    store_u8(line, USED, np.uint8(np.int64(load_u8(line, USED)) & ~(np.int64(1) << place)))
    for plane in range(2):
        store_u8(line, HEAT + plane, np.uint8(np.int64(load_u8(line, HEAT + plane)) & ~(np.int64(1) << place)))


@jit
def warm(entry: Int) -> None:
    """Count one more use of the key of the word at ``entry``, up to 3. Writes only when something changes.

    Pulls run side by side, so a count may get lost: heat is a hint.
    """
    line = line_of(entry)
    bit = np.int64(1) << place_of(entry)
    low = np.int64(load_u8(line, HEAT))
    high = np.int64(load_u8(line, HEAT + 1))
    if low & bit == 0:
        store_u8(line, HEAT, np.uint8(low | bit))
    elif high & bit == 0:
        store_u8(line, HEAT, np.uint8(low & ~bit))
        store_u8(line, HEAT + 1, np.uint8(high | bit))


@jit
def cool(line: Int, place: Int) -> bool:
    """Count one use less; True = it had none left."""
    bit = np.int64(1) << place
    low = np.int64(load_u8(line, HEAT))
    high = np.int64(load_u8(line, HEAT + 1))
    if low & bit != 0:
        store_u8(line, HEAT, np.uint8(low & ~bit))
    elif high & bit != 0:
        store_u8(line, HEAT, np.uint8(low | bit))
        store_u8(line, HEAT + 1, np.uint8(high & ~bit))
    else:
        return True
    return False


@jit
def rehash(old: Int, old_count: Int, salt: np.uint64, buckets: Int, count: Int) -> None:
    """Enter all keys of the old buckets into the empty new ones."""
    for number in range(old_count):
        line = old + number * LINE
        used = np.int64(load_u8(line, USED))
        for place in range(PLACES):
            if used & (1 << place) != 0:
                key = load_u64(line, place)
                start = home(buckets, count, key_mix(salt, key))
                entry = insert(buckets, count, start, key, load_u32(line, WORDS + place))
                for plane in range(2):
                    if np.int64(load_u8(line, HEAT + plane)) & (1 << place) != 0:
                        other = line_of(entry)
                        bits = np.int64(load_u8(other, HEAT + plane)) | (np.int64(1) << place_of(entry))
                        store_u8(other, HEAT + plane, np.uint8(bits))


@jit
def list_entries(buckets: Int, first: Int, last: Int, keys: NDArray[np.uint64], words: NDArray[np.uint32]) -> Int:
    """Write keys: uint64[n] and words: uint32[n] of buckets first to last - 1, in order; return how many."""
    found = 0
    for number in range(first, last):
        line = buckets + number * LINE
        used = np.int64(load_u8(line, USED))
        for place in range(PLACES):
            if used & (1 << place) != 0:
                keys[found] = load_u64(line, place)
                words[found] = load_u32(line, WORDS + place)
                found += 1
    return found
