# SPDX-License-Identifier: Apache-2.0
"""Kernels of rows that begin narrow and get their vector later (``embedding/expanding.py``).

Invariant: whether a key gets its vector is a pure function of its row and of the push. Kernels change no block but in
``leave_too``; the caller keeps all others from changing the two tables, so that no lock of a block is needed to look.
Addresses ``narrow`` and ``wide`` are those of the two tables' descriptors; both tables have the same salt and blocks.
"""

import numpy as np
from numpy.typing import NDArray

from oarlock.embedding.admission import ALWAYS, Rules, give_slot
from oarlock.embedding.aim import FAR
from oarlock.embedding.descriptor import (
    BUCKETS,
    CHUNKS,
    COUNT,
    DESCRIPTOR_BYTES,
    ENTRIES,
    ENTRY_ROOM,
    FREE_ROWS,
    NEXT,
    SLOT_ROOM,
)
from oarlock.embedding.hashing import key_mix
from oarlock.embedding.index import PENDING, VALUE, erase, find, home
from oarlock.embedding.jit import jit
from oarlock.embedding.pointer import Int, load_f32, load_i64, load_u32, prefetch, store_f32, store_i64, store_u32
from oarlock.embedding.refusal import poisonous
from oarlock.embedding.request import ABSENT
from oarlock.embedding.slab import Layout, side_at
from oarlock.embedding.view_kernels import mark_changed

# What a push does to a key's vector.
NOT = 0
SURELY = 1
IF_ADMITTED = 2

_NAN = np.uint32(0x7FC00000)


@jit
def aim_both(
    narrow: Int,
    wide: Int,
    salt: np.uint64,
    keys: NDArray[np.uint64],
    blocks: NDArray[np.int32],
    counts: NDArray[np.int32],
    homes: NDArray[np.int64],
    wide_homes: NDArray[np.int64],
) -> None:
    """Write where each key's bucket lies in the two tables; it stays there while nothing is changed."""
    begin = 0
    for group in range(blocks.shape[0]):
        descriptor = narrow + np.int64(blocks[group]) * DESCRIPTOR_BYTES
        other = wide + np.int64(blocks[group]) * DESCRIPTOR_BYTES
        buckets: Int = load_i64(descriptor, BUCKETS)
        count: Int = load_i64(descriptor, COUNT)
        wide_buckets: Int = load_i64(other, BUCKETS)
        wide_count: Int = load_i64(other, COUNT)
        end = begin + counts[group]
        for i in range(begin, end):
            mix = key_mix(salt, keys[i])
            homes[i] = home(buckets, count, mix)
            wide_homes[i] = home(wide_buckets, wide_count, mix)
        begin = end


@jit
def judge(
    narrow: Int,
    wide: Int,
    salt: np.uint64,
    shape: Layout,
    rules: Rules,
    least: float,
    dim: int,
    keys: NDArray[np.uint64],
    blocks: NDArray[np.int32],
    counts: NDArray[np.int32],
    occurrences: NDArray[np.uint32],
    clicks: NDArray[np.float32],
    gradients: Int,
    homes: NDArray[np.int64],
    wide_homes: NDArray[np.int64],
    sides: NDArray[np.int64],
    first_part: Int,
    verdicts: NDArray[np.uint8],
    needs: NDArray[np.int64],
) -> int:
    """Write what a push will do to each key's vector to verdicts: uint8[n]; return how many are not NOT.

    A key has its vector already, or gets it when (shows - clicks) * nonclick + clicks * click is ``least`` or more with what
    this push counts. ``shape``: of narrow rows. gradients: address of float32[n, dim]; their first part goes to address
    ``first_part``, with NaN where any column is refused, so that both parts are. needs: int64[groups] = rows that the wide
    table has no room for, 0 where all have. homes, wide_homes, sides: scratch of n.
    """
    n = keys.shape[0]
    counted = occurrences.shape[0] > 0
    clicked = clicks.shape[0] > 0
    aim_both(narrow, wide, salt, keys, blocks, counts, homes, wide_homes)
    for i in range(min(FAR, n)):
        prefetch(homes[i])
        prefetch(wide_homes[i])
    chosen = 0
    at = 0
    for group in range(blocks.shape[0]):
        end = at + counts[group]
        block = narrow + np.int64(blocks[group]) * DESCRIPTOR_BYTES
        buckets: Int = load_i64(block, BUCKETS)
        count: Int = load_i64(block, COUNT)
        chunks: Int = load_i64(block, CHUNKS)
        for i in range(at, end):
            if i + FAR < n:
                prefetch(homes[i + FAR])
                prefetch(wide_homes[i + FAR])
            entry = find(buckets, count, homes[i], keys[i])
            side: Int = np.int64(ABSENT)
            if entry != 0:
                word = np.int64(load_u32(entry, 0))
                if word < PENDING:
                    side = side_at(chunks, word & VALUE, shape)
                    prefetch(side + 4 * (shape.state_columns + shape.shows))
            sides[i] = side
        other = wide + np.int64(blocks[group]) * DESCRIPTOR_BYTES
        buckets = load_i64(other, BUCKETS)
        count = load_i64(other, COUNT)
        fresh = 0
        for i in range(at, end):
            gradient = gradients + 4 * i * dim
            out = first_part + 4 * i * shape.dim
            for column in range(shape.dim):
                store_u32(out, column, load_u32(gradient, column))
            verdicts[i] = NOT
            if poisonous(gradient, dim, rules.limit):
                store_u32(out, 0, _NAN)
                continue
            # The arithmetic of the push's own counting: what is decided here is what the counters will say.
            shows = np.float32(0)
            clicks_now = np.float32(0)
            if sides[i] != ABSENT:
                counters = sides[i] + 4 * shape.state_columns
                shows = load_f32(counters, shape.shows)
                clicks_now = load_f32(counters, shape.shows + 1)
            shows += np.float32(occurrences[i] if counted else np.uint32(1))
            if clicked:
                clicks_now += clicks[i]
            enough = np.float64(shows - clicks_now) * rules.nonclick + np.float64(clicks_now) * rules.click >= least
            if sides[i] == ABSENT:
                if enough:
                    verdicts[i] = SURELY if rules.kind == ALWAYS else IF_ADMITTED
                    fresh += 1
            elif find(buckets, count, wide_homes[i], keys[i]) != 0:
                verdicts[i] = SURELY
            elif enough:
                verdicts[i] = SURELY
                fresh += 1
            chosen += verdicts[i] != NOT
        fits = load_i64(other, ENTRIES) + fresh <= load_i64(other, ENTRY_ROOM) and load_i64(
            other, NEXT
        ) + fresh <= load_i64(other, SLOT_ROOM) + load_i64(other, FREE_ROWS)
        needs[group] = 0 if fits else fresh
        at = end
    return chosen


@jit
def pack(
    narrow: Int,
    salt: np.uint64,
    width: int,
    dim: int,
    keys: NDArray[np.uint64],
    blocks: NDArray[np.int32],
    counts: NDArray[np.int32],
    gradients: Int,
    verdicts: NDArray[np.uint8],
    out_keys: NDArray[np.uint64],
    out_blocks: NDArray[np.int32],
    out_counts: NDArray[np.int32],
    out_gradients: Int,
) -> tuple[int, int]:
    """Gather, after the push of the first part, the keys whose vectors are pushed too; return how many, in how many blocks.

    ``width``: columns of the first part. Gradients behind it go to out_gradients: address of float32[m, dim - width].
    """
    rest = dim - width
    kept = 0
    groups = 0
    at = 0
    for group in range(blocks.shape[0]):
        end = at + counts[group]
        block = narrow + np.int64(blocks[group]) * DESCRIPTOR_BYTES
        buckets: Int = load_i64(block, BUCKETS)
        count: Int = load_i64(block, COUNT)
        before = kept
        for i in range(at, end):
            if verdicts[i] == NOT:
                continue
            if verdicts[i] == IF_ADMITTED:
                entry = find(buckets, count, home(buckets, count, key_mix(salt, keys[i])), keys[i])
                if entry == 0 or np.int64(load_u32(entry, 0)) >= PENDING:
                    continue
            out_keys[kept] = keys[i]
            gradient = gradients + 4 * (i * dim + width)
            for column in range(rest):
                store_f32(out_gradients + 4 * kept * rest, column, load_f32(gradient, column))
            kept += 1
        if kept > before:
            out_blocks[groups] = blocks[group]
            out_counts[groups] = kept - before
            groups += 1
        at = end
    return kept, groups


@jit
def join(out: Int, n: int, dim: int, width: int, first_part: Int) -> None:
    """Make whole rows float32[n, dim] of first_part: float32[n, width] and of float32[n, dim - width], which lies at the end
    of ``out``."""
    rest = dim - width
    tail = out + 4 * n * width
    # No value lands on one that is still to be read: row i ends at i * dim + dim, what is left begins at or behind that.
    for i in range(n):
        row = out + 4 * i * dim
        source = tail + 4 * i * rest
        for column in range(rest):
            store_f32(row, width + column, load_f32(source, column))
        for column in range(width):
            store_f32(row, column, load_f32(first_part, i * width + column))


@jit
def leave_too(descriptor: Int, salt: np.uint64, shape: Layout, keys: NDArray[np.uint64]) -> int:
    """Evict the rows of keys: uint64[n] from a block that is held and shut, with room for what a view needs;
    return how many there were."""
    buckets: Int = load_i64(descriptor, BUCKETS)
    count: Int = load_i64(descriptor, COUNT)
    left = 0
    for i in range(keys.shape[0]):
        entry = find(buckets, count, home(buckets, count, key_mix(salt, keys[i])), keys[i])
        if entry != 0:
            mark_changed(descriptor, shape, entry)
            slot = np.int64(load_u32(entry, 0)) & VALUE
            erase(entry)
            give_slot(descriptor, shape, slot)
            left += 1
    store_i64(descriptor, ENTRIES, load_i64(descriptor, ENTRIES) - left)
    return left
