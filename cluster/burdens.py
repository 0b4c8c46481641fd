# SPDX-License-Identifier: Apache-2.0
"""Burdens: what each block weighs and how busy its owner is with it, of what shards tell of their tables.

    bytes    of a table on a shard, shared out among the blocks that it holds of it; of dense slices by their length
    load     rows of a table asked for and pushed, per second, shared out among the blocks that the shard owns of it

Who told of a table's load before a block moved and who does afterwards say more about the block than either: what is believed of
blocks is scaled to what is measured of their owner, not dealt out anew. Invariant: where anything is not told, what was known
stays. Pure: time comes in as ``now``. The coordinator's lock covers it.
"""

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from oarlock.client.layout import Layout
from oarlock.cluster.members import Member
from oarlock.cluster.placement import sizes_of
from oarlock.cluster.planning import Balance, Blocks, blocks_of
from oarlock.cluster.record import Records

Floats = NDArray[np.float64]

# Of a shard's load of a table so much is shared out evenly: what was believed of single blocks is forgotten in time.
FORGOTTEN = 0.1
MOST_BYTES = 1 << 60


class Burdens:
    """``sizes`` int64[b], bytes; ``loads`` float64[b], rows per second, all 0 as long as they are not known."""

    def __init__(self, layout: Layout, every_seconds: float) -> None:
        self._layout = layout
        self._every = every_seconds
        self._at: float | None = None
        self.sizes = sizes_of(layout)
        self.loads: Floats = np.zeros(layout.blocks)
        self._table = blocks_of(layout, self.sizes).table
        # Slices of dense parameters are as large as they are long.
        self._weight: Floats = np.ones(layout.blocks)
        self._weight[layout.dense_base :] = layout.dense_lengths
        # When rows were counted last, by the incarnations of shards, and who owned what then.
        self._counted: dict[int, Floats] = {}
        self._counted_at = 0.0
        self._owners: NDArray[np.int32] = np.full(layout.blocks, -1, np.int32)

    def blocks(self) -> Blocks:
        """Return what is known, as the planner takes it."""
        return blocks_of(self._layout, self.sizes, self.loads)

    def due(self, now: float) -> bool:
        """Return whether it is time to look again; the first time is the interval after this was asked first."""
        if not self._every:
            return False
        due = self._at is not None and now >= self._at
        if due or self._at is None:
            self._at = now + self._every
        return due

    def look(self, records: Records, shards: Mapping[int, Member], now: float) -> bool:
        """Take in what ``shards``, by id, have told; return whether all that take part have."""
        ids = sorted(records.shards)
        told = [self._told(shards.get(s), records.shards[s].incarnation) for s in ids]
        found = [each for each in told if each is not None]
        if not ids or len(found) < len(ids):
            return False
        at = _positions(np.array(ids, np.int32), records.members)
        self._weigh(at, np.array([each[0] for each in found]))
        incarnations = [records.shards[s].incarnation for s in ids]
        self._count(at[:, 0], records, incarnations, np.array([each[1] for each in found]), now)
        return True

    def uneven(self, records: Records) -> bool:
        """Return whether a shard has so much more than the mean that the planner would do something about it."""
        return any(over > Balance.starts for over in self.over(records).values())

    def over(self, records: Records) -> dict[str, float]:
        """Return by how much, as a share of the mean, the shard that has most is above it: of bytes, and of load."""
        ids = np.array(sorted(records.shards), np.int32)
        at = _positions(ids, records.members)
        held = np.bincount(at[at >= 0], np.broadcast_to(self.sizes[:, None], at.shape)[at >= 0], len(ids))
        owned = np.bincount(at[at[:, 0] >= 0, 0], self.loads[at[:, 0] >= 0], len(ids))
        return {
            name: float(found.max() / found.mean() - 1) if len(found) and found.mean() > 0 else 0.0
            for name, found in (("bytes", held), ("load", owned))
        }

    def _told(self, member: Member | None, incarnation: int) -> tuple[list[float], list[float]] | None:
        """Return what a shard said: bytes by table, those of dense parameters last, and rows served by table."""
        if member is None or member.incarnation != incarnation:
            return None
        names = [t.name for t in self._layout.tables]
        tables, served = member.stats.get("table_bytes"), member.stats.get("table_served")
        if not isinstance(tables, dict) or not isinstance(served, dict):
            return None
        heavy = [_number(tables.get(name)) for name in names]
        rows = [_number(served.get(name)) for name in names]
        heavy.append(max(_number(member.stats.get("bytes")) - sum(heavy), 0.0))
        return (heavy, rows) if all(map(math.isfinite, (*heavy, *rows))) else None

    def _weigh(self, at: NDArray[np.int64], heavy: Floats) -> None:
        """Share out bytes float64[shards, tables + 1] among the blocks, which are on the shards ``at``."""
        shards, tables = heavy.shape
        here = at >= 0
        cell = at * tables + self._table[:, None]
        weight = np.broadcast_to(self._weight[:, None], at.shape)
        held = np.bincount(cell[here], weight[here], shards * tables)
        unit = heavy.reshape(-1) / np.maximum(held, 1)
        mine = np.where(here, unit[np.where(here, cell, 0)], 0).sum(axis=1) / np.maximum(here.sum(axis=1), 1)
        known = here.any(axis=1)
        found = np.clip(mine * self._weight, 1, MOST_BYTES).astype(np.int64)
        self.sizes = np.where(known, found, self.sizes)

    def _count(
        self, at: NDArray[np.int64], records: Records, incarnations: list[int], rows: Floats, now: float
    ) -> None:
        """Scale what is believed of blocks to the rows float64[shards, tables] of their owners, whose position is ``at``."""
        before, seconds = self._counted, now - self._counted_at
        last = np.array([before.get(i, np.full(rows.shape[1], np.nan)) for i in incarnations])
        # A shard between whose counts blocks came or went was busy with others, too.
        moved = self._owners != records.owners
        ids = np.array(sorted(records.shards), np.int32)
        torn = np.isin(ids, np.union1d(self._owners[moved], records.owners[moved]))
        self._counted = dict(zip(incarnations, rows, strict=True))
        self._counted_at, self._owners = now, records.owners.copy()
        if seconds <= 0:
            return
        rate = (rows - last) / seconds
        usable = np.isfinite(rate) & (rate >= 0) & ~torn[:, None]
        tables = rows.shape[1]
        mine = np.flatnonzero((at >= 0) & (self._table < tables))
        cell = at[mine] * tables + self._table[mine]
        believed = np.bincount(cell, self.loads[mine], rows.size)
        even = (np.where(usable, rate, 0).reshape(-1) / np.maximum(np.bincount(cell, minlength=rows.size), 1))[cell]
        scale = np.where(usable, rate, 0).reshape(-1)[cell] / np.where(believed > 0, believed, 1)[cell]
        scaled = np.where(believed[cell] > 0, self.loads[mine] * scale, even)
        found = (1 - FORGOTTEN) * scaled + FORGOTTEN * even
        self.loads[mine] = np.where(usable.reshape(-1)[cell], found, self.loads[mine])


def _positions(ids: NDArray[np.int32], members: NDArray[np.int32]) -> NDArray[np.int64]:
    """Return int64[b, k]: the positions of members among ``ids``, ascending, -1 for whoever is not one of them."""
    if not len(ids):
        return np.full(members.shape, -1, np.int64)
    at = np.minimum(np.searchsorted(ids, members), len(ids) - 1)
    found: NDArray[np.int64] = np.where(ids[at] == members, at, -1)
    return found


def _number(value: object) -> float:
    """Return what a member said as a number, not a number if it is none."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= MOST_BYTES:
        return math.nan
    return float(value)
