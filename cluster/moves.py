# SPDX-License-Identifier: Apache-2.0
"""Moves: the steps from one placement to another, in the order in which they are worth it. Pure array functions.

Invariant: carried out one by one, no step leaves a block without owner or with more than one member above what it had or gets.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from oarlock.cluster.arrangement import Blocks
from oarlock.cluster.dealing import Ints, turns_of

# Why a block moves, the most useful first.
INCOMPLETE, DRAINED, SURPLUS, BALANCE = range(4)
REASONS = ("incomplete set", "shard leaves", "surplus copy", "balance")


@dataclass(frozen=True)
class Moves:
    """Steps, the most useful first; those of one block stand in the order in which they have to be done.

    ``block``; ``add``: shard that gets a full copy; ``owner``: member (or who was just added) that takes over; ``drop``: member
    that leaves, last of all; int32[m] each, -1: nobody. ``bytes`` int64[m]: what is copied. ``reason`` int8[m]: see REASONS.
    """

    block: NDArray[np.int32]
    add: NDArray[np.int32]
    owner: NDArray[np.int32]
    drop: NDArray[np.int32]
    bytes: NDArray[np.int64]
    reason: NDArray[np.int8]

    def __len__(self) -> int:
        return len(self.block)

    def some(self, chosen: slice | NDArray[np.bool_]) -> "Moves":
        return Moves(**{name: values[chosen] for name, values in vars(self).items()})


def carried_out(members: NDArray[np.int32], moves: Moves) -> NDArray[np.int32]:
    """Return the members int32[b, k] after ``moves``; ``k`` is as large as it was, or as the largest set now."""
    turns = turns_of(moves.block.astype(np.int64))
    most = int(turns.max(initial=-1)) + 1
    found = np.hstack([members, np.full((len(members), most), -1, np.int32)])
    for turn in range(most):
        now = moves.some(turns == turn)
        sets = np.hstack([found[now.block], now.add[:, None]])
        owner = np.where(now.owner >= 0, now.owner, sets[:, 0])
        sets[(sets == now.drop[:, None]) & (sets >= 0)] = -1
        order = np.argsort(np.where(sets < 0, 2, sets != owner[:, None]), axis=1, kind="stable")
        found[now.block] = np.take_along_axis(sets, order, axis=1)[:, : found.shape[1]]
    wide = max(members.shape[1], int((found >= 0).sum(axis=1).max(initial=0)))
    return found[:, :wide]


def steps_between(
    rows: Ints, members: NDArray[np.int32], target: NDArray[np.int32], blocks: Blocks, alive: Ints, leaving: Ints
) -> Moves:
    """Return the steps from ``members`` to ``target``, both int32[r, ...], of blocks ``rows``."""
    changed = np.flatnonzero(
        (members[:, 0] != target[:, 0])
        | ((target >= 0) & ~(target[:, :, None] == members[:, None, :]).any(axis=2)).any(axis=1)
        | ((members >= 0) & ~(members[:, :, None] == target[:, None, :]).any(axis=2)).any(axis=1)
    )
    old, new = members[changed], target[changed]
    add = np.where((new[:, :, None] == old[:, None, :]).any(axis=2), -1, new)
    drop = np.where((old[:, :, None] == new[:, None, :]).any(axis=2), -1, old)
    wide = max(old.shape[1], new.shape[1])
    add = np.pad(add, ((0, 0), (0, wide - add.shape[1])), constant_values=-1)
    drop = np.pad(drop, ((0, 0), (0, wide - drop.shape[1])), constant_values=-1)
    # Who is added stands first. Who leaves does so in the last steps, the owner in the very last, after it was followed.
    add = np.take_along_axis(add, np.argsort(add < 0, axis=1, kind="stable"), axis=1)
    was = (drop == old[:, :1]).astype(np.int64)
    drop = np.take_along_axis(drop, np.argsort(np.where(drop < 0, 2, was), axis=1, kind="stable"), axis=1)
    adds, drops = (add >= 0).sum(axis=1), (drop >= 0).sum(axis=1)
    steps = np.maximum(np.maximum(adds, drops), 1)
    shift = np.maximum(steps - drops, 0)
    at = np.arange(wide)[None, :] - shift[:, None]
    drop = np.where(at >= 0, np.take_along_axis(drop, at.clip(0), axis=1), -1)
    owner = np.full_like(add, -1)
    hands = np.flatnonzero(old[:, 0] != new[:, 0])
    owner[hands, steps[hands] - 1] = new[hands, 0]

    living = np.isin(old, alive) & ~np.isin(old, leaving)
    lacks = (new >= 0).sum(axis=1) > (np.isin(old, alive)).sum(axis=1)
    drained = np.isin(old, leaving).any(axis=1)
    reason = np.select([lacks, drained, adds < drops], [INCOMPLETE, DRAINED, SURPLUS], BALANCE)
    row, step = np.nonzero(np.arange(wide)[None, :] < steps[:, None])
    # Sets with the fewest living members before others, then those of much use: hand-overs, which cost nothing, and high loads.
    takes = np.where(add[:, 0] >= 0, add[:, 0], new[:, 0]).astype(np.int64)
    load = blocks.loads[changed] / np.maximum(np.where(adds > 0, blocks.sizes[changed], 1), 1)
    order = np.lexsort((np.arange(len(changed)), -load, adds > 0, np.where(lacks, living.sum(axis=1), 0), reason))
    # Receivers take turns, or all would wait for one.
    order = order[np.lexsort((np.arange(len(order)), turns_of(takes[order]), reason[order]))]
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order))
    by = np.lexsort((step, rank[row]))
    row, step = row[by], step[by]
    added = add[row, step].astype(np.int32)
    return Moves(
        block=rows[changed[row]].astype(np.int32),
        add=added,
        owner=owner[row, step].astype(np.int32),
        drop=drop[row, step].astype(np.int32),
        bytes=np.where(added >= 0, blocks.sizes[changed[row]], 0),
        reason=reason[row].astype(np.int8),
    )
