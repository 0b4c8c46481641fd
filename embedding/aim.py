# SPDX-License-Identifier: Apache-2.0
"""Aiming: asking for the index lines of keys long before they are looked up, across the borders of blocks.

Where keys belong is worked out for a stage at once, in vector code; each bucket is asked for one by one, between the
look-ups of keys before it, so that the memory has work while the processor computes: 64 requests in a row fill all places
that the processor has for open requests, and everything behind them waits.
Invariant: what is asked for ahead is a hint, taken outside of any lock; what is used was checked inside the block. Hints
are a ring of RING keys, small enough to stay in the first cache. Kernels only; they take
addresses, because handing arrays on to a function counts references, for every stage.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from oarlock.embedding.descriptor import BUCKETS, CHUNKS, COUNT, DESCRIPTOR_BYTES
from oarlock.embedding.hashing import key_mix
from oarlock.embedding.index import home
from oarlock.embedding.jit import jit
from oarlock.embedding.pointer import LINE, Int, address_in, load_i64, load_u32, load_u64, prefetch, store_i64

STAGE = 64  # keys that are looked up together
FAR = 128  # keys that are asked for ahead
RING = 512  # more than lie between the first key in use and the last one asked for
_RING = RING - 1
CHUNK_LINES = 6  # lines of a block's chunk table that are asked for ahead

# Words of the cursor: the key and the group to go on from, the first key behind that group, whether its index was not seen
# yet; then a ring of the index (address and buckets) that each group's hints are for.
AT, AT_GROUP, GROUP_END, FRESH, SEEN = range(5)
CURSOR = SEEN + 2 * RING


class Grouped(NamedTuple):
    """A request's keys as kernels take them, all addresses but ``n`` and ``groups``.

    keys: uint64[n]; blocks: int32[groups], none negative; counts: int32[groups], each 1 or more, n in all.
    """

    n: int
    groups: int
    keys: int
    blocks: int
    counts: int


@jit
def addresses(keys: NDArray[np.uint64], blocks: NDArray[np.int32], counts: NDArray[np.int32]) -> Grouped:
    """Return a request's keys as kernels hand them on; the caller keeps the arrays."""
    return Grouped(keys.shape[0], blocks.shape[0], address_in(keys, 0), address_in(blocks, 0), address_in(counts, 0))


@jit
def in_ring(ring: Int, i: Int) -> Int:
    """Return where item ``i`` lies in the ring at an address; those up to ``lap_end(i)`` - 1 follow it."""
    return ring + 8 * (i & _RING)


@jit
def lap_end(i: Int) -> Int:
    """Return the first item behind ``i`` that lies at a ring's begin."""
    return (i | _RING) + 1


@jit
def write_hints(buckets: Int, count: Int, salt: np.uint64, keys: Int, begin: Int, end: Int, hints: Int) -> None:
    """Write to the ring where keys begin to end - 1, all of one lap, belong. A loop that becomes vector code."""
    window = in_ring(hints, begin)
    first = keys + 8 * begin
    for i in range(end - begin):
        store_i64(window, i, home(buckets, count, key_mix(salt, load_u64(first, i))))


@jit
def ask(hints: Int, i: Int) -> None:
    """Ask for the bucket of key ``i``; where it was not worked out, for one of long ago, which costs nothing."""
    prefetch(load_i64(hints, i & _RING))


@jit
def aim(
    descriptors: Int,
    salt: np.uint64,
    grouped: Grouped,
    cursor: Int,
    limit: Int,
    hints: Int,
) -> None:
    """Write to the ring ``hints`` where keys up to ``limit`` - 1 belong, FAR keys or more before they are looked up.

    cursor: address of int64[CURSOR], set by ``start_aiming``; hints: of int64[RING]. Nobody is inside the blocks, so an index
    may be exchanged for another before its hints are used; ``renew`` finds that out.
    """
    at: Int = load_i64(cursor, AT)
    while at < limit:
        group: Int = load_i64(cursor, AT_GROUP)
        end: Int = load_i64(cursor, GROUP_END)
        descriptor = descriptors + np.int64(load_u32(grouped.blocks, group)) * DESCRIPTOR_BYTES
        buckets: Int = load_i64(descriptor, BUCKETS)
        count: Int = load_i64(descriptor, COUNT)
        if load_i64(cursor, FRESH) != 0:
            store_i64(cursor, SEEN + 2 * (group & _RING), buckets)
            store_i64(cursor, SEEN + 2 * (group & _RING) + 1, count)
            store_i64(cursor, FRESH, 0)
            # The first chunks' addresses: fifteen thousand rows on, they are no longer in the second cache.
            chunks: Int = load_i64(descriptor, CHUNKS)
            for offset in range(0, CHUNK_LINES * LINE, LINE):
                prefetch(chunks + offset)
        elif load_i64(cursor, SEEN + 2 * (group & _RING)) != buckets or (
            load_i64(cursor, SEEN + 2 * (group & _RING) + 1) != count
        ):
            # Hints of one group are for two indexes: none of them counts, even if the first index comes back.
            store_i64(cursor, SEEN + 2 * (group & _RING), -1)
        stop = min(limit, end, lap_end(at))
        write_hints(buckets, count, salt, grouped.keys, at, stop, hints)
        at = stop
        if at == end and group + 1 < grouped.groups:
            store_i64(cursor, AT_GROUP, group + 1)
            store_i64(cursor, GROUP_END, end + np.int64(load_u32(grouped.counts, group + 1)))
            store_i64(cursor, FRESH, 1)
    store_i64(cursor, AT, at)


@jit
def start_aiming(
    descriptors: Int, salt: np.uint64, grouped: Grouped, cursor: Int, group: Int, at: Int, limit: Int, hints: Int
) -> None:
    """Aim at key ``at``, the first of ``group``, and the FAR - 1 behind it, and ask for their buckets."""
    store_i64(cursor, AT, at)
    store_i64(cursor, AT_GROUP, group)
    end = at
    if group < grouped.groups:
        end += np.int64(load_u32(grouped.counts, group))
    store_i64(cursor, GROUP_END, end)
    store_i64(cursor, FRESH, 1)
    first = min(limit, at + FAR)
    aim(descriptors, salt, grouped, cursor, first, hints)
    for i in range(at, first):
        ask(hints, i)


@jit
def renew(
    descriptor: Int, salt: np.uint64, keys: Int, cursor: Int, group: Int, begin: Int, end: Int, hints: Int
) -> None:
    """Make the hints of keys begin to end - 1, all of one lap, right, inside their block."""
    buckets: Int = load_i64(descriptor, BUCKETS)
    count: Int = load_i64(descriptor, COUNT)
    seen = cursor + 8 * (SEEN + 2 * (group & _RING))
    if load_i64(seen, 0) != buckets or load_i64(seen, 1) != count:
        write_hints(buckets, count, salt, keys, begin, end, hints)
