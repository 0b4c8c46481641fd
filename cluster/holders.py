# SPDX-License-Identifier: Apache-2.0
"""Holders: which moves are wanted, of the records, what is under way, and the shards that may have blocks.

Invariant: what is wanted of a block is one move at a time, and no set gets smaller than the job wants it. Pure.
"""

from collections.abc import Collection, Iterable, Mapping

import numpy as np
from numpy.typing import NDArray

from oarlock.cluster.moving import Move
from oarlock.cluster.planning import Blocks, plan
from oarlock.cluster.record import Records

# Wanted at once; the rest is wanted when those are done.
MOST_MOVES = 4096


def wanted(
    records: Records,
    blocks: Blocks,
    shards: Collection[int],
    *,
    hosts: Mapping[int, str] | None = None,
    under_way: Iterable[Move] = (),
    waiting: Iterable[int] = (),
) -> list[Move]:
    """Return the moves that are wanted now, the most useful first.

    ``shards`` may have blocks, all others that take part are drained. ``waiting``: blocks that wait for an owner; they are left
    alone, and so are those that move.
    """
    if not shards:
        return []
    members, busy = _afterwards(records, under_way)
    members[list(waiting)] = -1
    leaving = set(records.shards) - set(shards)
    moves = plan(blocks, members, shards, leaving=leaving, replicas=records.replicas, hosts=hosts)
    # Of a block the first step; and nobody leaves a set that needs it, though there may be nobody to take its place.
    first = np.zeros(len(moves), np.bool_)
    first[np.unique(moves.block, return_index=True)[1]] = True
    drops = (moves.add < 0) & (moves.owner < 0)
    first &= ~drops | ((members[moves.block] >= 0).sum(axis=1) > records.replicas + 1)
    first &= ~np.isin(moves.block, busy)
    found = moves.some(first).some(slice(0, MOST_MOVES))
    columns = (found.block.tolist(), found.drop.tolist(), found.add.tolist(), found.owner.tolist())
    return [_with_room(records, Move(*each)) for each in zip(*columns, strict=True)]


def complete(records: Records, replicas: int) -> NDArray[np.bool_]:
    """Return bool[b]: whether a set has all the members that it is to have, all of them alive."""
    living: NDArray[np.int64] = np.isin(records.members, list(records.shards)).sum(axis=1)
    return living > replicas


def _with_room(records: Records, move: Move) -> Move:
    """Return a move, or what of it comes first where a set has no room for one more: somebody leaves."""
    owner, members, _ = records.of(move.block)
    if move.to < 0 or len(members) < records.width:
        return move
    heir = move.heir if move.heir in members else -1
    if move.leaves == owner and heir < 0:
        heir = next(m for m in members if m != owner)
    return Move(move.block, move.leaves, -1, heir)


def _afterwards(records: Records, under_way: Iterable[Move]) -> tuple[NDArray[np.int32], list[int]]:
    """Return the members, the owner first, as moves that are under way will leave them; and the blocks of those."""
    members, busy = records.members.copy(), []
    for move in under_way:
        owner, before, _ = records.of(move.block)
        after = [m for m in before if m != owner]
        if move.to >= 0 and move.to not in before:
            after.append(move.to)
        if move.heir in after:
            after.remove(move.heir)
            owner, after = move.heir, [owner, *after]
        if move.leaves in after and len(after) > records.replicas:
            after.remove(move.leaves)
        members[move.block] = -1
        members[move.block, : 1 + len(after)] = [owner, *after][: records.width]
        busy.append(move.block)
    return members, busy
