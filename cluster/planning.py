# SPDX-License-Identifier: Apache-2.0
"""Planning: which shards hold and own which blocks at first, and what has to move when shards come, leave, die or are burdened.

Pure functions of arrays, without a Python loop over blocks. Invariant: a plan carried out whole leaves nothing to plan; carried
out in part, what is left is a part of the same. Every block has an owner at each step, and members are different shards.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from oarlock.client.layout import Layout
from oarlock.cluster.arrangement import Arrangement, Blocks, Crew
from oarlock.cluster.levelling import Bounds
from oarlock.cluster.moves import Moves, carried_out, steps_between
from oarlock.proto.errors import InvalidArgument

__all__ = ["Balance", "Blocks", "Moves", "blocks_of", "carried_out", "place", "plan"]


@dataclass(frozen=True)
class Balance:
    """``starts``: burdens this share over the mean are evened out, down to ``aims``.

    ``slack``: where loads are known, a table's numbers of owned blocks may differ that much from the mean for their sake, and
    so may bytes where there are no copies. With copies, handing over does it.
    """

    starts: float = 0.2
    aims: float = 0.05
    slack: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.aims < self.starts <= 10 or not 0 <= self.slack < 1:
            raise InvalidArgument(f"{self}: give 0 < aims < starts <= 10 and 0 <= slack < 1")


def blocks_of(layout: Layout, sizes: NDArray[np.int64], loads: NDArray[np.float64] | None = None) -> Blocks:
    """Return the Blocks of a job: each table by itself, all dense blocks as one that is balanced by bytes."""
    table = np.full(layout.blocks, len(layout.tables), np.int32)
    for number, (base, spec) in enumerate(zip(layout.table_base, layout.tables, strict=True)):
        table[base : base + spec.blocks] = number
    return Blocks(table, sizes, np.zeros(layout.blocks) if loads is None else loads, (len(layout.tables),))


def place(
    blocks: Blocks, shards: Collection[int], *, replicas: int, hosts: Mapping[int, str] | None = None
) -> NDArray[np.int32]:
    """Return first members int32[b, replicas + 1], the owner first, -1: nobody (there are fewer shards than copies wanted)."""
    crew = Crew(shards, hosts)
    work = Arrangement(blocks, crew, min(replicas + 1, len(crew)), slack=0.0)
    work.deal_owners()
    bounds = Bounds(Balance.starts, Balance.aims)
    work.settle(bounds, bounds, None)
    found = np.full((len(blocks.table), replicas + 1), -1, np.int32)
    found[:, : work.want] = crew.named(work.held)
    return found


def plan(
    blocks: Blocks,
    members: NDArray[np.int32],
    shards: Collection[int],
    *,
    leaving: Collection[int] = (),
    replicas: int,
    hosts: Mapping[int, str] | None = None,
    balance: Balance | None = None,
) -> Moves:
    """Return what to move. ``members`` int32[b, k], the owner first and -1 for nobody, as what is under way will leave them.

    ``shards`` may hold blocks; ``leaving`` live, but should hold none in the end. Members that are neither are dead: their sets
    are completed; blocks whose owner is dead are left alone, since nobody can give them away.
    """
    balance = balance or Balance()
    crew = Crew(set(shards) - set(leaving), hosts)
    alive = np.array(sorted({*crew.ids.tolist(), *leaving}), np.int64)
    rows = np.flatnonzero(np.isin(members[:, 0], alive))
    known = Blocks(blocks.table[rows], blocks.sizes[rows], blocks.loads[rows], blocks.uneven)
    loaded = bool((known.loads > 0).any())
    work = Arrangement(known, crew, min(replicas + 1, len(crew)), slack=balance.slack if loaded else 0.0)
    work.begin(crew.positions(members[rows]))
    bounds = Bounds(balance.starts, balance.aims)
    of_bytes = Bounds(max(balance.slack, balance.starts), balance.aims) if loaded and work.want == 1 else bounds
    work.settle(bounds, of_bytes, known.loads if loaded else None)
    target = crew.named(work.held)
    return steps_between(rows, members[rows], target, known, alive, np.array(sorted(leaving), np.int64))
