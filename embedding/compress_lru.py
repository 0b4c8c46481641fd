# SPDX-License-Identifier: Apache-2.0
"""Which slot of a fixed number is a key's, where the key that was used least recently gives up its slot to a new one.

``index``: int32[a power of two, at least twice the slots], 0 or slot + 1, by linear probing from the low bits of mix64(key);
``known``: uint64[slots], each slot's key; ``links``: int32[slots, 2], the slots used next before and next after each, -1 at
the ends; ``state``: int64[STATES]. Invariant: who has a slot depends on the order of calls alone. Kernels, one thread.
"""

import numpy as np
from numpy.typing import NDArray

from oarlock.embedding.hashing import mix64
from oarlock.embedding.jit import jit
from oarlock.embedding.pointer import Int, address_in, prefetch

COUNT = 0  # slots in use, which are the first ones
OLDEST = 1
NEWEST = 2
LOST = 3  # keys that gave up their slots
STATES = 4

_OLDER = 0
_NEWER = 1


@jit
def reset(index: NDArray[np.int32], state: NDArray[np.int64]) -> None:
    """Forget all keys."""
    for place in range(index.shape[0]):
        index[place] = 0
    state[COUNT] = 0
    state[OLDEST] = -1
    state[NEWEST] = -1


@jit
def _place_of(index: NDArray[np.int32], known: NDArray[np.uint64], key: np.uint64) -> Int:
    """Return where in the index a key is, or where it would go."""
    mask = np.uint64(index.shape[0] - 1)
    place = mix64(key) & mask
    while index[place] != 0 and known[index[place] - 1] != key:
        place = (place + np.uint64(1)) & mask
    return np.int64(place)


@jit
def ask_for_place(index: NDArray[np.int32], key: np.uint64) -> None:
    """Have the cache line fetched in which a key's search begins; nothing else happens, as in the two below."""
    prefetch(address_in(index, np.int64(mix64(key) & np.uint64(index.shape[0] - 1)) * 4))


@jit
def ask_for_slot(index: NDArray[np.int32], known: NDArray[np.uint64], links: NDArray[np.int32], key: np.uint64) -> Int:
    """Have the lines of a key's slot fetched, and return it; -1 or another's where its search does not end at once."""
    slot = np.int64(index[mix64(key) & np.uint64(index.shape[0] - 1)]) - 1
    if slot >= 0:
        prefetch(address_in(known, slot * 8))
        prefetch(address_in(links, slot * 8))
    return slot


@jit
def ask_for_neighbours(index: NDArray[np.int32], links: NDArray[np.int32], key: np.uint64) -> None:
    """Have the lines fetched that change as a key is used."""
    slot = np.int64(index[mix64(key) & np.uint64(index.shape[0] - 1)]) - 1
    if slot >= 0:
        for side in range(2):
            if links[slot, side] >= 0:
                prefetch(address_in(links, np.int64(links[slot, side]) * 8))


@jit
def _remove(index: NDArray[np.int32], known: NDArray[np.uint64], key: np.uint64) -> None:
    """Take a key that is there out of the index; those behind it that it kept from their places move up."""
    mask = np.int64(index.shape[0] - 1)
    hole = _place_of(index, known, key)
    place = (hole + 1) & mask
    while index[place] != 0:
        home = np.int64(mix64(known[index[place] - 1]) & np.uint64(mask))
        if ((place - home) & mask) >= ((place - hole) & mask):  # its home is not between the hole and its place
            index[hole] = index[place]
            hole = place
        place = (place + 1) & mask
    index[hole] = 0


@jit
def _unlink(links: NDArray[np.int32], state: NDArray[np.int64], slot: Int) -> None:
    older, newer = links[slot, _OLDER], links[slot, _NEWER]
    if older >= 0:
        links[older, _NEWER] = newer
    else:
        state[OLDEST] = newer
    if newer >= 0:
        links[newer, _OLDER] = older
    else:
        state[NEWEST] = older


@jit
def _append(links: NDArray[np.int32], state: NDArray[np.int64], slot: Int) -> None:
    newest = state[NEWEST]
    links[slot, _OLDER] = np.int32(newest)
    links[slot, _NEWER] = np.int32(-1)
    if newest >= 0:
        links[newest, _NEWER] = np.int32(slot)
    else:
        state[OLDEST] = slot
    state[NEWEST] = slot


@jit
def use(
    index: NDArray[np.int32],
    known: NDArray[np.uint64],
    links: NDArray[np.int32],
    state: NDArray[np.int64],
    key: np.uint64,
) -> tuple[Int, bool]:
    """Return a key's slot, and whether it had it before; it is the one used last now."""
    place = _place_of(index, known, key)
    if index[place] != 0:
        slot = np.int64(index[place]) - 1
        _unlink(links, state, slot)
        _append(links, state, slot)
        return slot, True
    slot = state[COUNT]
    if slot < known.shape[0]:
        state[COUNT] += 1
    else:
        slot = state[OLDEST]
        _unlink(links, state, slot)
        _remove(index, known, known[slot])
        state[LOST] += 1
        place = _place_of(index, known, key)  # which may have moved up
    known[slot] = key
    index[place] = np.int32(slot + 1)
    _append(links, state, slot)
    return slot, False


@jit
def from_oldest(links: NDArray[np.int32], state: NDArray[np.int64], out: NDArray[np.int64]) -> None:
    """Write to out: int64[count] the slots in use, the one used least recently first."""
    slot = state[OLDEST]
    for i in range(out.shape[0]):
        out[i] = slot
        slot = np.int64(links[slot, _NEWER])
