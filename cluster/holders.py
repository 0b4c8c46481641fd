# SPDX-License-Identifier: Apache-2.0
"""Holders: which moves are wanted, of the records and the shards that may have blocks.

    short      a set has fewer than ``replicas`` + 1 members: the shard that has least gets a copy
    surplus    a set has more: a member leaves, one of a shard that is to have nothing first
    rest       shards that are to have nothing are drained, and the others come to have equal shares (``plan``)

Invariant: sets that are short come first, and what is wanted of a block is one move at a time. Pure.
"""

from collections.abc import Callable, Iterable

import numpy as np
from numpy.typing import NDArray

from oarlock.cluster.moving import Move
from oarlock.cluster.record import Records

# Wanted at once; the rest is wanted when those are done.
MOST_MOVES = 4096

Plan = Callable[
    [NDArray[np.int32], NDArray[np.int32], NDArray[np.int64], NDArray[np.float64], list[int], int],
    list[tuple[int, int, int]],
]


def wanted(
    records: Records,
    sizes: NDArray[np.int64],
    loads: NDArray[np.float64],
    shards: list[int],
    plan: Plan,
    *,
    waiting: Iterable[int] = (),
) -> list[Move]:
    """Return the moves that are wanted now; ``shards`` may have blocks, ``waiting`` are blocks that wait for an owner."""
    owned = np.isin(records.owners, list(records.shards))
    owned[list(waiting)] = False
    count = records.sizes()
    # No set has more members than there are shards that may be one.
    most = min(records.replicas + 1, len(shards))
    moves = _short(records, sizes, shards, np.flatnonzero(owned & (count < most))[:MOST_MOVES])
    for block in np.flatnonzero(owned & (count > records.replicas + 1))[:MOST_MOVES].tolist():
        moves.append(_surplus(records, shards, block))
    if moves:
        return moves
    owners = np.where(owned, records.owners, -1).astype(np.int32)
    members = np.where(owned[:, None], records.members, -1).astype(np.int32)
    return [Move(*move) for move in plan(owners, members, sizes, loads, shards, records.replicas)[:MOST_MOVES]]


def complete(records: Records, replicas: int) -> NDArray[np.bool_]:
    """Return bool[b]: whether a set has all the members that it is to have, all of them alive."""
    living: NDArray[np.int64] = np.isin(records.members, list(records.shards)).sum(axis=1)
    return living > replicas


def _short(records: Records, sizes: NDArray[np.int64], shards: list[int], blocks: NDArray[np.intp]) -> list[Move]:
    ids = np.array(sorted(shards), np.int32)
    if not len(ids) or not len(blocks):
        return []
    # Members that are nobody are counted at 0, and then not looked at.
    weights = np.bincount((records.members + 1).ravel(), np.repeat(sizes, records.width), minlength=int(ids[-1]) + 2)
    held = weights[ids + 1].astype(np.float64)
    moves = []
    for block in blocks.tolist():
        free = ~np.isin(ids, records.members[block])
        if free.any():
            at = int(np.where(free, held, np.inf).argmin())
            held[at] += sizes[block]
            moves.append(Move(block, -1, int(ids[at])))
    return moves


def _surplus(records: Records, shards: list[int], block: int) -> Move:
    owner, members, _ = records.of(block)
    others = [m for m in members if m != owner]
    return Move(block, min(others, key=lambda m: (m in shards, -m)), -1)
