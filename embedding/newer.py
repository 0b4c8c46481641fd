# SPDX-License-Identifier: Apache-2.0
"""Which of the rows that a worker keeps are too old: one pass over a request's keys that reads versions, and no weights.

    look     64 keys        find their words, ask for their versions, and for the buckets 128 keys ahead
    judge    64 keys behind compare what the worker keeps

Those that it must get are pulled afterwards like any others, so a row is never older than the version that it is sent with. It
may be newer, or a later life of its key: then the next pull sends it again, or finds it behind by less than it is.
Invariant: nothing is changed but the heat of keys; one block is entered at a time, and blocks that a push is in come last.
"""

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from oarlock.embedding.aim import FAR, RING, STAGE, Grouped, addresses, aim, ask, in_ring, lap_end, renew, start_aiming
from oarlock.embedding.descriptor import BUCKETS, CHUNKS, COUNT, DESCRIPTOR_BYTES, NEXT
from oarlock.embedding.index import PENDING, SPILLED, VALUE, ask_away, find, peek, warm
from oarlock.embedding.jit import jit
from oarlock.embedding.lock import enter, leave, try_enter
from oarlock.embedding.pointer import (
    Int,
    address_in,
    kernel_array,
    load_i64,
    load_u32,
    load_u64,
    prefetch,
    store_i64,
    store_u8,
    store_u32,
)
from oarlock.embedding.pull import ABSENT, FOUND_WORDS, IN_FILE, PUT_OFF, PullScratch, put_off
from oarlock.embedding.slab import Layout, side_at
from oarlock.embedding.versions import is_outdated
from oarlock.proto.errors import InvalidArgument, Malformed

if TYPE_CHECKING:
    from oarlock.embedding.table import Table

_RING = RING - 1


class Judged(NamedTuple):
    """Addresses of what a worker keeps, kept: uint32[n], and of what comes out: versions: uint32[n], wanted: uint8[n]."""

    kept: int
    versions: int
    wanted: int


class Outdated(NamedTuple):
    """The rows of a request that a worker must get: their positions: int32[m], ascending, their versions: uint32[m] (0: no
    row, or one in the spill file), and the request for them."""

    positions: NDArray[np.int32]
    versions: NDArray[np.uint32]
    keys: NDArray[np.uint64]
    blocks: NDArray[np.int32]
    counts: NDArray[np.int32]


class Newer(NamedTuple):
    """What a worker's rows are brought up to date with: positions: int32[m], ascending, in the request, rows: float32[m, dim]
    and their versions: uint32[m]. 0: the worker shall not keep the row."""

    positions: NDArray[np.int32]
    rows: NDArray[np.float32]
    versions: NDArray[np.uint32]


@jit
def look_versions(
    descriptor: Int, shape: Layout, heated: bool, keys: Int, begin: Int, end: Int, late: Int, scratch: PullScratch
) -> Int:
    """Ask for the versions of keys begin to end - 1 of one block; return how many keys are not where most are.

    Those are listed at address late: int64[STAGE], and their next buckets asked for.
    """
    chunks: Int = load_i64(descriptor, CHUNKS)
    odd = np.int64(0)
    last = max(load_i64(descriptor, NEXT) - 1, 0)
    offset = 4 * (shape.state_columns + shape.version)
    hints = in_ring(scratch.hints, begin)
    places = in_ring(scratch.rows, begin)
    first = keys + 8 * begin
    for i in range(end - begin):
        ask(scratch.hints, begin + FAR + i)
        # Without a branch, as in a pull: if the key is not in its home bucket, the version is that of some other row.
        entry, hit = peek(load_i64(hints, i), load_u64(first, i))
        word = np.int64(load_u32(entry, 0))
        plain = hit & (word < PENDING)
        place = side_at(chunks, min(word & VALUE, last), shape) + offset
        store_i64(places, i, place)
        prefetch(place)
        store_i64(late, odd, begin + i)
        odd += not plain
        if heated and plain:
            warm(entry)
    for k in range(odd):
        ask_away(load_i64(scratch.hints, load_i64(late, k) & _RING))
    return odd


@jit
def judge(
    descriptor: Int,
    shape: Layout,
    heated: bool,
    keys: Int,
    begin: Int,
    end: Int,
    late: Int,
    odd: Int,
    bound: Int,
    scratch: PullScratch,
    judged: Judged,
) -> None:
    """Find the ``odd`` keys listed at address ``late``, wherever they are; then judge keys begin to end - 1 of the block."""
    buckets: Int = load_i64(descriptor, BUCKETS)
    count: Int = load_i64(descriptor, COUNT)
    chunks: Int = load_i64(descriptor, CHUNKS)
    offset = 4 * (shape.state_columns + shape.version)
    for k in range(odd):
        i = load_i64(late, k)
        place = np.int64(ABSENT)
        entry = find(buckets, count, load_i64(scratch.hints, i & _RING), load_u64(keys, i))
        if entry != 0:
            word = np.int64(load_u32(entry, 0))
            if word < PENDING:
                place = side_at(chunks, word & VALUE, shape) + offset
            elif word >= SPILLED:
                place = np.int64(IN_FILE)
            if heated:
                warm(entry)
        store_i64(scratch.rows, i & _RING, place)
    places = in_ring(scratch.rows, begin)
    for i in range(end - begin):
        place = load_i64(places, i)
        version = load_u32(place, 0) if place > 0 else np.uint32(0)
        store_u32(judged.versions, begin + i, version)
        store_u8(judged.wanted, begin + i, np.uint8(is_outdated(load_u32(judged.kept, begin + i), version, bound)))


@jit
def judge_groups(
    descriptors: Int,
    salt: np.uint64,
    shape: Layout,
    heated: bool,
    grouped: Grouped,
    begin_group: Int,
    end_group: Int,
    begin: Int,
    limit: Int,
    wait: bool,
    bound: Int,
    scratch: PullScratch,
    judged: Judged,
) -> Int:
    """Serve groups begin_group to end_group - 1, whose keys are ``begin`` to limit - 1; return -1 or a group not stored.

    Groups whose block is taken are listed in scratch.later, unless ``wait`` says to wait for them.
    """
    start_aiming(descriptors, salt, grouped, scratch.cursor, begin_group, begin, limit, scratch.hints)
    at: Int = begin
    for group in range(begin_group, end_group):
        descriptor = descriptors + np.int64(load_u32(grouped.blocks, group)) * DESCRIPTOR_BYTES
        end = at + np.int64(load_u32(grouped.counts, group))
        if not try_enter(descriptor):
            if not wait:
                put_off(scratch, group, at)
                at = end
                start_aiming(descriptors, salt, grouped, scratch.cursor, group + 1, at, limit, scratch.hints)
                continue
            enter(descriptor)
        if load_i64(descriptor, BUCKETS) == 0:
            leave(descriptor)
            return np.int64(group)
        late: Int = scratch.late
        behind: Int = at
        odd = np.int64(0)
        while at < end:
            stop = min(at + STAGE, end, lap_end(at))
            aim(descriptors, salt, grouped, scratch.cursor, min(limit, stop + FAR), scratch.hints)
            renew(descriptor, salt, grouped.keys, scratch.cursor, group, at, stop, scratch.hints)
            # Two lists take turns: that of this stage, and that of the one before.
            other = scratch.late + 8 * STAGE if late == scratch.late else scratch.late
            more = look_versions(descriptor, shape, heated, grouped.keys, at, stop, other, scratch)
            judge(descriptor, shape, heated, grouped.keys, behind, at, late, odd, bound, scratch, judged)
            late = other
            odd = more
            behind = at
            at = stop
        judge(descriptor, shape, heated, grouped.keys, behind, at, late, odd, bound, scratch, judged)
        leave(descriptor)
    return np.int64(-1)


@jit
def judge_rows(
    descriptors: Int,
    salt: np.uint64,
    shape: Layout,
    heated: bool,
    keys: NDArray[np.uint64],
    blocks: NDArray[np.int32],
    counts: NDArray[np.int32],
    kept: NDArray[np.uint32],
    bound: int,
    scratch: PullScratch,
    versions: NDArray[np.uint32],
    wanted: NDArray[np.uint8],
) -> Int:
    """Write each row's version, and 1 where the worker must get it, else 0; return -1, or the group that is not stored."""
    for word in range(FOUND_WORDS):
        store_i64(scratch.found, word, 0)
    grouped = addresses(keys, blocks, counts)
    judged = Judged(address_in(kept, 0), address_in(versions, 0), address_in(wanted, 0))
    missing = judge_groups(
        descriptors, salt, shape, heated, grouped, 0, grouped.groups, 0, grouped.n, False, bound, scratch, judged
    )
    for k in range(load_i64(scratch.found, PUT_OFF)):
        group = load_i64(scratch.later, 2 * k)
        at = load_i64(scratch.later, 2 * k + 1)
        end = at + np.int64(load_u32(grouped.counts, group))
        if missing < 0:
            missing = judge_groups(
                descriptors, salt, shape, heated, grouped, group, group + 1, at, end, True, bound, scratch, judged
            )
    return missing


@jit
def pick(
    keys: NDArray[np.uint64],
    blocks: NDArray[np.int32],
    counts: NDArray[np.int32],
    versions: NDArray[np.uint32],
    wanted: NDArray[np.uint8],
    positions: NDArray[np.int32],
    out_keys: NDArray[np.uint64],
    out_blocks: NDArray[np.int32],
    out_counts: NDArray[np.int32],
) -> tuple[int, int]:
    """Gather the request for the wanted keys, and their versions at the begin of ``versions``; return how many, of how many
    blocks."""
    found = 0
    groups = 0
    at = 0
    for group in range(blocks.shape[0]):
        before = found
        end = at + counts[group]
        for i in range(at, end):
            positions[found] = i
            out_keys[found] = keys[i]
            versions[found] = versions[i]
            found += wanted[i]
        out_blocks[groups] = blocks[group]
        out_counts[groups] = found - before
        groups += found > before
        at = end
    return found, groups


def outdated(
    table: "Table",
    keys: NDArray[np.uint64],
    blocks: NDArray[np.int32],
    counts: NDArray[np.int32],
    kept: NDArray[np.uint32],
    bound: int,
    scratch: PullScratch,
) -> Outdated:
    """Return what of a request, which the table checked, a worker must get that keeps versions kept: uint32[n] of its rows."""
    n = keys.shape[0]
    versions, wanted = np.empty(n, np.uint32), np.empty(n, np.uint8)
    heated = bool(table.spec.memory_bytes)
    base, salt, shape = table.base, table.salt, table.layout
    missing = judge_rows(base, salt, shape, heated, keys, blocks, counts, kept, bound, scratch, versions, wanted)
    if missing >= 0:
        table.stale(int(blocks[missing]))
    positions, out_keys = np.empty(n, np.int32), np.empty(n, np.uint64)
    out_blocks, out_counts = np.empty_like(blocks), np.empty_like(counts)
    m, groups = pick(keys, blocks, counts, versions, wanted, positions, out_keys, out_blocks, out_counts)
    return Outdated(positions[:m], versions[:m], out_keys[:m], out_blocks[:groups], out_counts[:groups])


def check_kept(table: "Table", n: int, kept: NDArray[np.uint32], bound: int) -> NDArray[np.uint32]:
    """Return kept: uint32[n] for kernels; refuse what the table's cache does not allow."""
    name, cache = table.spec.name, table.spec.cache
    if cache is None:
        raise InvalidArgument(f"table {name} keeps no versions of rows: set cache")
    if isinstance(bound, bool) or not isinstance(bound, int) or not 0 <= bound <= cache.bound:
        raise InvalidArgument(f"table {name}: bound = {bound!r}: give an integer from 0 to cache.bound = {cache.bound}")
    kept = kernel_array("versions", kept, np.uint32)
    if kept.shape[0] != n:
        raise Malformed(f"table {name}: {kept.shape[0]} versions for {n} keys")
    return kept
