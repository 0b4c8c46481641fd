# SPDX-License-Identifier: Apache-2.0
"""Records: of each block its owner, its copy set, and the generation in which that was last changed.

    base      all records of one generation, on disk as one row
    changes   records that are newer than the base, a row for each block; folded into the base once they are many

Invariant: a generation is given once, and what it changes is in the transaction of the store that the caller holds open: it is
on disk before anybody can hear it. A change of a few blocks writes a few rows. The owner of a block is the first of its members,
the rest ascend, -1 where there is none. The coordinator's lock covers it.
"""

from collections.abc import Iterable
from dataclasses import asdict

import numpy as np
from numpy.typing import NDArray

from oarlock.client.router import ShardAddress
from oarlock.cluster.store import Store
from oarlock.proto.arrays import pack
from oarlock.proto.common_pb2 import Member, Placement

# Rows beside the base, from which on they are folded into it; and at least this part of all blocks.
FOLD_ROWS, FOLD_PART = 4096, 4


class Records:
    """``owners`` int32[b], ``generations`` int64[b], ``members`` int32[b, replicas + 2]: one more during a move.

    ``shards``: those that take part and are alive; ``gone``: dead ones that a record still names. ``concerned``: by shard, the
    newest generation in which a record changed that names the shard, or did.
    """

    def __init__(self, blocks: int, replicas: int) -> None:
        self.replicas = replicas
        self.width = replicas + 2
        self.generation = 0
        # Up to which generations were told in other ways than as records.
        self.reserved = 0
        self.owners: NDArray[np.int32] = np.full(blocks, -1, np.int32)
        self.generations: NDArray[np.int64] = np.zeros(blocks, np.int64)
        self.members: NDArray[np.int32] = np.full((blocks, self.width), -1, np.int32)
        self.shards: dict[int, ShardAddress] = {}
        self.gone: dict[int, ShardAddress] = {}
        # How often the list of shards was another one.
        self.listed = 0
        self.concerned: dict[int, int] = {}
        self._rows = 0

    # On disk

    def take_up(self, store: Store) -> None:
        """Load what was recorded; files of before there were copies name owners alone."""
        placed = store.placement()
        if placed is None:
            return
        self.generation, owners, shards = placed
        self.owners = np.frombuffer(owners, np.int32).copy()
        self.generations[:] = self.generation
        self.members[:] = -1
        self.members[:, 0] = self.owners
        generations, members = store.placement_sets()
        if generations is not None and members is not None:
            self.generations = np.frombuffer(generations, np.int64).copy()
            found = np.frombuffer(members, np.int32).reshape(len(self.owners), -1)
            self.members[:, : found.shape[1]] = found[:, : self.width]
        for block, generation, owner, packed in store.records():
            self.generations[block], self.owners[block] = generation, owner
            row = np.frombuffer(packed, np.int32)[: self.width]
            # The job may have had another number of copies then.
            self.members[block] = -1
            self.members[block, : len(row)] = row
            self.generation = max(self.generation, generation)
            self._rows += 1
        self.shards = {s["id"]: ShardAddress(**s) for s in shards}
        self.gone = {}
        self._listed_anew()
        self.concerned = dict.fromkeys(self.shards, self.generation)

    def place(
        self, store: Store, owners: NDArray[np.int32], members: NDArray[np.int32], shards: Iterable[ShardAddress]
    ) -> None:
        """Record all blocks anew, in a new generation."""
        self.generation = self.next
        self.owners, self.members = owners.astype(np.int32), _ordered(owners, members, self.width)
        self.generations = np.full(len(owners), self.generation, np.int64)
        self.shards, self.gone = {s.id: s for s in shards}, {}
        self.concerned = dict.fromkeys(self.shards, self.generation)
        self._listed_anew()
        self._fold(store)

    def clear(self, store: Store) -> None:
        """Record that nobody has any block."""
        self.place(store, np.full_like(self.owners, -1), np.full_like(self.members, -1), ())

    def begin_generation(self, store: Store, generation: int) -> None:
        """Begin a generation, in which no record changes."""
        self.generation = max(generation, self.generation + 1)
        self._fold(store)

    def change(
        self, store: Store, blocks: NDArray[np.int32], owners: NDArray[np.int32], members: NDArray[np.int32]
    ) -> None:
        """Record owners int32[m] and members int32[m, any] of some blocks, in one new generation."""
        if not len(blocks):
            return
        self.generation = self.next
        after = _ordered(owners, members, self.width)
        for shard in np.union1d(self.members[blocks], after).tolist():
            if shard >= 0:
                self.concerned[shard] = self.generation
        self.owners[blocks], self.members[blocks] = owners, after
        self.generations[blocks] = self.generation
        self._rows += len(blocks)
        if self._rows > max(FOLD_ROWS, len(self.owners) // FOLD_PART):
            self._fold(store)
        else:
            store.set_records(
                (int(b), self.generation, int(o), row.tobytes())
                for b, o, row in zip(blocks, owners, after, strict=True)
            )

    def list_shard(self, store: Store, shard: ShardAddress) -> None:
        """Record that a shard takes part."""
        self.shards[shard.id] = shard
        self.concerned.setdefault(shard.id, 0)
        self._listed_anew()
        self._write_list(store)

    def dismiss(self, store: Store, shard: int) -> None:
        """Record that a shard, which no record names, does not take part any more."""
        del self.shards[shard]
        self.concerned.pop(shard, None)
        self._listed_anew()
        self._write_list(store)

    def shard_gone(self, shard: int) -> None:
        """A shard is dead: records may still name it, on disk too, until ``forget``."""
        found = self.shards.pop(shard, None)
        if found is not None:
            self.gone[shard] = found
            self.concerned.pop(shard, None)

    def forget(self, store: Store, shard: int) -> None:
        """Record that a dead shard, which no record names any more, does not take part."""
        del self.gone[shard]
        self.concerned.pop(shard, None)
        self._listed_anew()
        self._write_list(store)

    def _listed_anew(self) -> None:
        self.listed += 1

    def _list(self) -> list[ShardAddress]:
        return [*self.shards.values(), *self.gone.values()]

    def _write_list(self, store: Store) -> None:
        store.set_shards([asdict(s) for s in self._list()])

    def _fold(self, store: Store) -> None:
        shards = [asdict(s) for s in self._list()]
        store.set_placement(self.generation, self.owners.tobytes(), shards)
        store.set_placement_sets(self.generations.tobytes(), self.members.tobytes())
        self._rows = 0

    # Asked

    @property
    def next(self) -> int:
        """The generation of the next change."""
        return max(self.generation, self.reserved) + 1

    def of(self, block: int) -> tuple[int, list[int], int]:
        """Return (owner, members with the owner first, generation) of a block."""
        members = [int(m) for m in self.members[block] if m >= 0]
        return int(self.owners[block]), members, int(self.generations[block])

    def named(self, shard: int) -> NDArray[np.int32]:
        """Return int32[m]: the blocks whose record names a shard."""
        return np.flatnonzero((self.members == shard).any(axis=1)).astype(np.int32)

    def sizes(self) -> NDArray[np.int64]:
        """Return int64[b]: how many members each block has."""
        found: NDArray[np.int64] = np.count_nonzero(self.members >= 0, axis=1)
        return found

    def living(self, block: int) -> list[int]:
        """Return the members of a block that are alive."""
        return [m for m in self.members[block].tolist() if m in self.shards]

    # Told

    def message(self, since: int = 0, blocks: NDArray[np.int32] | None = None) -> Placement:
        """Return all records, or those that changed after generation ``since``, or those of ``blocks``."""
        shards = [Member(id=s.id, address=s.address, incarnation=s.incarnation) for s in self._list()]
        told = Placement(generation=self.generation, shards=shards)
        if blocks is None and since:
            blocks = np.flatnonzero(self.generations > since).astype(np.int32)
            told.since = since
        if blocks is None:
            told.owners.CopyFrom(pack(self.owners))
            generations, members = self.generations, self.members
            if (generations == self.generation).all() and (members[:, 1:] < 0).all():
                return told
        else:
            told.blocks.CopyFrom(pack(blocks))
            told.owners.CopyFrom(pack(self.owners[blocks]))
            generations, members = self.generations[blocks], self.members[blocks]
        told.generations.CopyFrom(pack(generations.astype(np.uint64)))
        told.members.CopyFrom(pack(members))
        return told


def _ordered(owners: NDArray[np.int32], members: NDArray[np.int32], width: int) -> NDArray[np.int32]:
    """Return int32[m, width]: members with the owner first, the rest ascending, -1 behind them."""
    rest = np.where((members == owners[:, None]) | (members < 0), np.iinfo(np.int32).max, members)
    rest.sort(axis=1)
    found = np.full((len(owners), width), -1, np.int32)
    found[:, 0] = owners
    keep = min(width - 1, rest.shape[1])
    found[:, 1 : 1 + keep] = np.where(rest[:, :keep] == np.iinfo(np.int32).max, -1, rest[:, :keep])
    return found
