# SPDX-License-Identifier: Apache-2.0
"""Arrangement: which shards hold and own each block, while it is brought to where it should be. Planning's working memory.

Invariant: members of a set are different shards; ``owner`` is one of them, or nobody yet. Shards are positions, not ids.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from oarlock.cluster.dealing import Ints, apart, deal, deal_anywhere, partners, quota, turns_of
from oarlock.cluster.levelling import Bounds, Floats, Limits, Ranges, even_owners, level_held, level_owners
from oarlock.proto.errors import InvalidArgument

# So many tables are balanced each by itself; the smallest beyond them together.
MOST_TABLES = 512
# Of each one, what was done by the next is put right.
PASSES = 4
# Looks at one table until its numbers are right.
ITERATIONS = 24
# Takers that are looked at each time, once most is done.
LOOKS = 8


@dataclass(frozen=True)
class Blocks:
    """What is known of all blocks. ``table`` int32[b]: balanced by number among themselves; ``sizes`` int64[b], bytes.

    ``loads`` float64[b]: keys asked for and pushed per second, or whatever owners are busy with; all 0: not known. ``uneven``:
    "tables" whose blocks are of different size, as slices of dense parameters are, which are balanced by bytes instead.
    """

    table: NDArray[np.int32]
    sizes: NDArray[np.int64]
    loads: NDArray[np.float64]
    uneven: tuple[int, ...] = ()


class Crew:
    """Shards that may hold blocks, as positions: those of one host side by side. Without hosts each has one of its own."""

    def __init__(self, shards: Collection[int], hosts: Mapping[int, str] | None) -> None:
        if not shards:
            raise InvalidArgument("a placement needs at least one shard")
        named = hosts or {}
        ordered = sorted(set(shards), key=lambda s: (named.get(s, ""), s))
        names = [named.get(s, "") for s in ordered]
        self.ids: Ints = np.array(ordered, np.int64)
        self.host: Ints = np.unique(names, return_inverse=True)[1].astype(np.int64)
        if self.host[-1] == 0:
            self.host = np.arange(len(ordered), dtype=np.int64)
        self._order = np.argsort(self.ids)

    def __len__(self) -> int:
        return len(self.ids)

    def positions(self, members: NDArray[np.int32]) -> Ints:
        """Return the positions of shards, -1 for those that are not of the crew."""
        at = np.minimum(np.searchsorted(self.ids, members, sorter=self._order), len(self.ids) - 1)
        found: Ints = np.where(self.ids[self._order[at]] == members, self._order[at], -1)
        return found

    def named(self, positions: Ints) -> NDArray[np.int32]:
        return np.where(positions >= 0, self.ids[positions], -1).astype(np.int32)


class Arrangement:
    """A placement on its way to where it should be: ``held`` int64[b, want] and ``owner`` int64[b], positions, -1: nobody."""

    def __init__(self, blocks: Blocks, crew: Crew, want: int, *, slack: float) -> None:
        self.host, self.shards, self.want = crew.host, len(crew), want
        self.sizes = blocks.sizes.astype(np.float64)
        # Where nothing has a size yet, one block is as large as another.
        self.weight: Floats = self.sizes if self.sizes.any() else np.ones(len(self.sizes))
        self.held: Ints = np.full((len(self.sizes), want), -1, np.int64)
        self.owner: Ints = np.full(len(self.sizes), -1, np.int64)
        self.level: Floats = np.zeros(self.shards)
        numbers, inverse, count = np.unique(blocks.table, return_inverse=True, return_counts=True)
        # Tables of one block each, and the smallest of very many, are balanced together, as blocks that differ in size.
        small = count == 1
        small[np.argsort(-count, kind="stable")[MOST_TABLES:]] = True
        small &= ~np.isin(numbers, blocks.uneven)
        of = np.where(small, len(numbers), np.arange(len(numbers)))
        self.table: Ints = of[inverse]
        self.uneven = {int(i) for i in np.flatnonzero(np.isin(numbers, blocks.uneven))}
        self.loose = self.uneven | {len(numbers)}
        count = np.bincount(self.table, minlength=len(numbers) + 1)
        loose = np.isin(np.arange(len(count)), sorted(self.loose))

        def ranges(each: int, slack: float) -> Ranges:
            total = count * each
            least = np.floor(total / self.shards * (1 - slack)).astype(np.int64)
            most = np.minimum(np.ceil(total / self.shards * (1 + slack)).astype(np.int64), count)
            return Ranges(self.table, np.where(loose, 0, least), np.where(loose, count, most))

        self.holding, self.owning = ranges(want, slack if want == 1 else 0.0), ranges(1, slack)

    def deal_owners(self) -> None:
        """Give every block an owner: as many of each table to every shard, the remainders to whoever has the fewest bytes."""
        for table, rows in self.tables():
            if table in self.loose:
                self.spread(rows, 1)
            else:
                none = np.zeros(self.shards, np.int64)
                numbers = quota(
                    none, len(rows), int(self.owning.least[table]), int(self.owning.most[table]), self.level
                )
                places = np.repeat(np.arange(self.shards), numbers)
                self.held[rows, 0] = places[np.argsort(turns_of(places), kind="stable")]
            self.level += np.bincount(self.held[rows, 0], self.weight[rows], self.shards)
        self.owner = self.held[:, 0].copy()

    def tables(self) -> list[tuple[int, Ints]]:
        """Return (number, blocks) of every table."""
        order = np.argsort(self.table, kind="stable")
        ends = np.cumsum(np.bincount(self.table))
        return [(t, rows) for t, rows in enumerate(np.split(order, ends[:-1])) if len(rows)]

    def begin(self, members: Ints) -> None:
        """Take over what there is, int64[b, k]; of sets that are too large those members stay that hold least."""
        self.owner = members[:, 0].copy()
        count = np.bincount(members[members >= 0], minlength=self.shards)
        over = np.maximum(count - -(-self.want * len(members) // self.shards), 0)
        surplus = (members >= 0).sum(axis=1, keepdims=True) > self.want
        rank = np.where(surplus, over[members] * members.shape[1], 0)
        # Of copies alike another one each time; the owner stays.
        turned = (np.arange(members.shape[1]) + np.arange(len(members))[:, None]) % members.shape[1]
        rank = rank + np.where(surplus & (np.arange(members.shape[1]) > 0), turned, 0)
        order = np.argsort(np.where(members >= 0, rank, np.iinfo(np.int64).max), axis=1, kind="stable")
        kept = np.take_along_axis(members, order, axis=1)[:, : self.want]
        self.held[:, : kept.shape[1]] = kept
        gone = ~(self.held == self.owner[:, None]).any(axis=1)
        self.owner[gone] = -1

    def _burden(self, weight: Floats) -> Floats:
        flat = self.held.reshape(-1)
        return np.bincount(flat[flat >= 0], np.repeat(weight, self.want)[flat >= 0], self.shards).astype(np.float64)

    def settle(self, bounds: Bounds, of_bytes: Bounds, loads: Floats | None) -> None:
        """Bring everything to where it should be, and look again until that changes nothing."""
        for _ in range(PASSES):
            before = owner_first(self.held, self.owner)
            self.level = self._burden(self.weight)
            self.complete()
            self.level_bytes(of_bytes)
            self.choose_owners(bounds, self.weight if loads is None else loads)
            if loads is not None and self.want == 1:
                self.level_loads(bounds, of_bytes, loads)
            self.held = owner_first(self.held, self.owner)
            if np.array_equal(self.held, before):
                break

    def complete(self) -> None:
        """Give every block all its members, and every shard its number of each table's blocks."""
        turn = 0
        for table, rows in self.tables():
            if table in self.loose:
                self.spread(rows, self.want)
            else:
                for iteration in range(ITERATIONS):
                    if not self._even(rows, table, turn, iteration):
                        break
            turn += -(-len(rows) // self.shards)
        if (self.held < 0).any():
            self.spread(np.arange(len(self.held)), self.want)

    def spread(self, rows: Ints, want: int) -> None:
        """Give ``rows`` the members that they lack, up to ``want``: the largest block to the shard with the fewest bytes."""
        level = np.bincount(self.held[rows].clip(0).reshape(-1), (self.held[rows] >= 0).reshape(-1), self.shards) * 0.0
        flat = self.held[rows].reshape(-1)
        level += np.bincount(flat[flat >= 0], np.repeat(self.weight[rows], self.want)[flat >= 0], self.shards)
        for column in range(want):
            lacking = rows[(self.held[rows] >= 0).sum(axis=1) <= column]
            lacking = lacking[np.argsort(-self.weight[lacking], kind="stable")]
            step = max(self.shards, -(-len(lacking) // MOST_TABLES))
            for start in range(0, len(lacking), step):
                some = lacking[start : start + step]
                found = deal_anywhere(self.held[some], self.host, level)
                self.held[some, np.argmax(self.held[some] < 0, axis=1)] = found
                level += np.bincount(found, self.weight[some], self.shards)

    def _even(self, rows: Ints, table: int, turn: int, iteration: int) -> bool:
        """Bring a table nearer to its numbers, at most one member of each block at a time; return whether anything changed."""
        held = self.held[rows]
        count = np.bincount(held[held >= 0], minlength=self.shards)
        least, most = int(self.holding.least[table]), int(self.holding.most[table])
        wanted = quota(count, self.want * len(rows), least, most, self.level)
        lacking = (held < 0).any(axis=1)
        # One lacking member each, and of complete sets those that shards with too many give away: by chance, so that owners and
        # copies of all others are among them.
        entry = np.flatnonzero((held.reshape(-1) >= 0) & ~np.repeat(lacking, self.want))
        entry = entry[count[held.reshape(-1)[entry]] > wanted[held.reshape(-1)[entry]]]
        if iteration:
            # What is left needs a closer look: only what somebody with room may take.
            entry = entry[self._takers(held, entry, wanted - count, iteration)]
        mixed = (entry // self.want + iteration) * 2654435761 + (entry % self.want) * 0x9E3779B1
        entry = entry[np.argsort((mixed >> 7) & 0xFFFFFF, kind="stable")]
        entry = entry[turns_of(entry // self.want) == 0]
        shard = held.reshape(-1)[entry]
        entry = entry[turns_of(shard) < (count - wanted)[shard]]
        at = np.concatenate([np.flatnonzero(lacking) * self.want + np.argmax(held[lacking] < 0, axis=1), entry])
        if not len(at):
            return False
        source = held.reshape(-1)[at]
        beside = held[at // self.want]
        beside[np.arange(len(at)), at % self.want] = -1
        room = np.maximum(wanted - count, 0)
        by = np.where(self.owner[rows[at // self.want]] >= 0, self.owner[rows[at // self.want]], 0)
        turns = turn + turns_of(by) + (at % self.want - 1) * (len(self.host) // (int(self.host[-1]) + 1))
        found = deal(beside, room, self.host, partners(by, turns, self.host))
        if iteration >= 2:
            # No place within the numbers: anywhere, and other blocks make good for it.
            stuck = np.flatnonzero((found < 0) & (source < 0))
            found[stuck] = deal_anywhere(beside[stuck], self.host, self.level)
        done = found >= 0
        at, found, source = at[done], found[done], source[done]
        self.held[rows[at // self.want], at % self.want] = found
        owned = (self.owner[rows[at // self.want]] == source) & (source >= 0)
        self.owner[rows[at // self.want][owned]] = found[owned]
        moved = self.weight[rows[at // self.want]]
        self.level = self.level + np.bincount(found, moved, self.shards)
        self.level -= np.bincount(source[source >= 0], moved[source >= 0], self.shards)
        return True

    def _takers(self, held: Ints, entry: Ints, room: Ints, iteration: int) -> NDArray[np.bool_]:
        """Return bool[m]: that one of a few shards with room may take over the entry of ``held``."""
        beside = held[entry // self.want]
        beside[np.arange(len(entry)), entry % self.want] = -1
        found = np.zeros(len(entry), np.bool_)
        for shard in np.roll(np.flatnonzero(room > 0), iteration * LOOKS)[:LOOKS]:
            found |= apart(beside, np.full(len(entry), shard), self.host)
        return found

    def level_bytes(self, bounds: Bounds) -> None:
        """Even out bytes: of dense blocks and the like among themselves, then of everything by moving the others."""
        for table, rows in self.tables():
            if table in self.uneven:
                self._level(rows, bounds, self.weight, self._ranges(self.holding, rows), both=True)
        rows = np.arange(len(self.held))
        self._level(rows, bounds, self.weight, self._ranges(self.holding, rows, fixed=True), both=True)

    def level_loads(self, bounds: Bounds, of_bytes: Bounds, loads: Floats) -> None:
        """Even out the loads of blocks without copies, as far as bytes stay even."""
        rows = np.arange(len(self.held))
        burden = self._burden(self.weight)
        room = burden.mean() * (1 + of_bytes.starts) - burden
        spare = burden - burden.mean() * (1 - of_bytes.starts)
        self._level(rows, bounds, loads, self._ranges(self.holding, rows, fixed=True), room=room, spare=spare)

    def _ranges(self, of: Ranges, rows: Ints, *, fixed: bool = False) -> Ranges:
        """Return the ranges for ``rows`` alone. ``fixed``: blocks that are balanced among themselves stay where they are."""
        most = of.most.copy()
        most[sorted(self.uneven)] = 0 if fixed else most[sorted(self.uneven)]
        return Ranges(self.table[rows], of.least, most)

    def _level(
        self,
        rows: Ints,
        bounds: Bounds,
        weight: Floats,
        ranges: Ranges,
        *,
        both: bool = False,
        room: Floats | None = None,
        spare: Floats | None = None,
    ) -> None:
        before = self.held[rows]
        everything = np.full(self.shards, np.inf)
        limits = Limits(self.weight[rows], everything if room is None else room, everything if spare is None else spare)
        after = level_held(before, weight[rows], ranges, self.host, bounds, limits, both=both)
        lost = ~(after == self.owner[rows][:, None]).any(axis=1) & (self.owner[rows] >= 0)
        came = np.argmax(before != after, axis=1)
        self.held[rows] = after
        self.owner[rows[lost]] = after[lost, came[lost]]

    def choose_owners(self, bounds: Bounds, weight: Floats) -> None:
        """Let a member own each block whose owner leaves, then hand over until numbers and ``weight`` are even."""
        nobody = np.flatnonzero(self.owner < 0)
        self.owner[nobody] = self.held[nobody, 0]
        if self.want == 1:
            return
        self.owner = even_owners(self.held, self.owner, self.owning, self.shards)
        for table, rows in self.tables():
            if table in self.uneven:
                some = self._ranges(self.owning, rows)
                self.owner[rows] = level_owners(
                    self.held[rows], self.owner[rows], self.weight[rows], some, self.shards, bounds
                )
        some = self._ranges(self.owning, np.arange(len(self.held)), fixed=True)
        self.owner = level_owners(self.held, self.owner, weight, some, self.shards, bounds)


def owner_first(held: Ints, owner: Ints) -> Ints:
    """Return ``held`` with the owner before the others, and nobody last."""
    order = np.argsort(np.where(held < 0, 2, held != owner[:, None]), axis=1, kind="stable")
    return np.take_along_axis(held, order, axis=1)
