# SPDX-License-Identifier: Apache-2.0
"""Placement policy: which shard gets which block. Pure functions of their arguments.

Invariant: every block has an owner; within each table the shards' numbers of blocks differ by at most one.
"""

import numpy as np
from numpy.typing import NDArray

from oarlock.client.layout import Layout
from oarlock.proto.errors import InvalidArgument


def balanced(layout: Layout, shards: list[int]) -> NDArray[np.int32]:
    """Return an owner per block, int32[blocks]: tables dealt out in turn, dense blocks to whoever has the fewest bytes.

    Keys are hashed to blocks, so equal numbers of blocks are equal numbers of rows. Each table begins where the last one
    ended, so that many small tables do not all burden the first shard.
    """
    if not shards:
        raise InvalidArgument("a placement needs at least one shard")
    ids = np.array(sorted(shards), np.int32)
    owners = np.full(layout.blocks, -1, np.int32)
    turn = 0
    for base, table in zip(layout.table_base, layout.tables, strict=True):
        owners[base : base + table.blocks] = ids[(turn + np.arange(table.blocks)) % len(ids)]
        turn += table.blocks
    load = np.zeros(len(ids))
    order = sorted(range(len(layout.dense_blocks)), key=lambda i: (-layout.dense_blocks[i].length, i))
    for i in order:
        least = int(load.argmin())
        owners[layout.dense_base + i] = ids[least]
        load[least] += layout.dense_blocks[i].length
    return owners


def with_copies(layout: Layout, owners: NDArray[np.int32], shards: list[int], replicas: int) -> NDArray[np.int32]:
    """Return the copy sets of owners, int32[blocks, replicas + 1]: the owner, and up to ``replicas`` others, as there are.

    Copies of one shard's blocks go round among all others, so that its death burdens them alike.
    """
    ids = np.array(sorted(shards), np.int32)
    members = np.full((len(owners), replicas + 1), -1, np.int32)
    members[:, 0] = owners
    held = np.bincount(np.searchsorted(ids, owners), weights=sizes_of(layout), minlength=len(ids))
    most = min(replicas, len(ids) - 1)
    for shard in range(len(ids)):
        mine = np.flatnonzero(owners == ids[shard])
        others = np.delete(np.arange(len(ids)), shard)
        # Who has least so far gets the first, and so one more than others where it does not come out even.
        others = others[np.argsort(held[others], kind="stable")]
        for copy in range(most):
            turn = (np.arange(len(mine)) + copy) % len(others)
            members[mine, 1 + copy] = ids[others[turn]]
            held += np.bincount(others[turn], weights=sizes_of(layout)[mine], minlength=len(ids))
    return members


def sizes_of(layout: Layout) -> NDArray[np.int64]:
    """Return int64[blocks]: what each block weighs at the beginning, when no row is there yet."""
    sizes = np.ones(layout.blocks, np.int64)
    sizes[layout.dense_base :] = layout.dense_lengths
    if layout.dense_base:
        # All blocks of rows will have about as many; as much as the largest dense one.
        sizes[: layout.dense_base] = max(1, int(layout.dense_lengths.max(initial=1)))
    return sizes


def rebalanced(
    owners: NDArray[np.int32],
    members: NDArray[np.int32],
    sizes: NDArray[np.int64],
    loads: NDArray[np.float64],
    shards: list[int],
    replicas: int,
) -> list[tuple[int, int, int]]:
    """Return moves (block, from, to), after which ``shards`` own equal numbers of blocks, and others nothing.

    Only blocks whose set is complete and whose members all live are to be moved; what else is in the arrays stays.
    """
    ids = sorted(shards)
    if not ids:
        return []
    counts = {int(s): int(n) for s, n in zip(*np.unique(owners, return_counts=True), strict=True)}
    copies = {int(s): int(n) for s, n in zip(*np.unique(members, return_counts=True), strict=True)}
    fair, more = divmod(sum(n for s, n in counts.items() if s >= 0), len(ids))
    moves: list[tuple[int, int, int]] = []
    moved: set[int] = set()

    def most(shard: int) -> int:
        return fair + (ids.index(shard) < more)

    def give(block: int, source: int, among: list[int], held: dict[int, int]) -> None:
        inside = [s for s in among if s in members[block]]
        # A member that becomes the owner has all of it already; a copy is of use only where there is none.
        found = inside if inside and held is counts else [s for s in among if s not in members[block]]
        if found:
            to = min(found, key=lambda s: (held.get(s, 0), s))
            held[to] = held.get(to, 0) + 1
            held[source] -= 1
            moves.append((block, source, to))
            moved.add(block)

    for block in np.flatnonzero(~np.isin(owners, [-1, *ids])).tolist():
        give(block, int(owners[block]), ids, counts)
    for shard in ids:
        for block in np.flatnonzero(owners == shard).tolist():
            if counts.get(shard, 0) <= most(shard):
                break
            give(block, shard, [s for s in ids if counts.get(s, 0) < most(s)], counts)
    total = sum(n for s, n in copies.items() if s >= 0)
    for block in range(len(owners)):
        for member in members[block, 1:].tolist():
            if member < 0 or block in moved:
                continue
            if member not in ids:
                give(block, member, ids, copies)
            elif copies[member] > -(-total // len(ids)):
                give(block, member, [s for s in ids if copies.get(s, 0) < total // len(ids)], copies)
    return moves
