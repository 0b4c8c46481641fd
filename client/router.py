# SPDX-License-Identifier: Apache-2.0
"""Router: which shard owns each block, and the order of blocks in which a shard's keys lie side by side.

Invariant: a Routes object never changes; a newer one replaces it whole. It holds a record of each block, whose generation only
grows from one Routes to the next, and all records up to its own generation: a block that it knows a newer record of, by the word
of a shard, may be further, and others may lack what is newer than that.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from oarlock.client.layout import Layout
from oarlock.proto.arrays import pack, unpack
from oarlock.proto.common_pb2 import Member, Placement
from oarlock.proto.errors import Malformed

# Owners travel as int32.
MAX_SHARD = (1 << 31) - 1
MAX_SHARDS = 1 << 16
# Members of a copy set.
MAX_COPIES = 64
# Generations travel as uint64 and are int64 here.
MAX_GENERATION = (1 << 63) - 1


@dataclass(frozen=True)
class ShardAddress:
    """A shard of the placement: its id, where it listens, and the life it was in when placed."""

    id: int
    address: str
    incarnation: int


@dataclass(frozen=True)
class Changes:
    """Records of ``blocks`` int32[n], ascending (``whole``: all of the job's), in a placement of ``generation``.

    ``owners`` int32[n] of shard ids (-1: nobody); ``generations`` int64[n] of the records; ``members`` int32[n, k]: the copy
    sets, owner first, padded with -1. Whoever knows all of generation ``since`` knows all of ``generation`` with them.
    """

    generation: int
    since: int
    whole: bool
    blocks: NDArray[np.int32]
    owners: NDArray[np.int32]
    generations: NDArray[np.int64]
    members: NDArray[np.int32]
    shards: dict[int, ShardAddress]

    def only(self, chosen: NDArray[np.bool_]) -> "Changes":
        """Return some of the records, by bool[n]."""
        parts = (self.blocks[chosen], self.owners[chosen], self.generations[chosen], self.members[chosen])
        return Changes(self.generation, self.since, False, *parts, self.shards)


@dataclass(frozen=True)
class Routes:
    """The placement as it is known: ``owners`` int32[blocks] of shard ids (-1: nobody), and the shards by id.

    ``generations`` int64[blocks]: of each block's record; ``generation``: up to which none is missing.
    ``ranks[t]`` int32[blocks of table t]: a block's position when the table's blocks are sorted by (owner, block).
    ``dense[s]`` int32[d]: the dense blocks of shard s, ascending.
    """

    generation: int
    owners: NDArray[np.int32]
    shards: dict[int, ShardAddress]
    layout: Layout = field(repr=False)
    generations: NDArray[np.int64] = field(repr=False)
    ranks: list[NDArray[np.int32]] = field(repr=False)
    dense: dict[int, NDArray[np.int32]] = field(repr=False)

    def lacks(self, changes: Changes) -> bool:
        """Whether there are records that neither is in ``changes`` nor known here: then all of them have to be asked for."""
        return changes.since > self.generation

    def after(self, changes: Changes, *, complete: bool = True) -> "Routes":
        """Return the routes with what is newer in ``changes``, for each block by itself.

        ``complete``: ``changes`` has all records newer than its ``since``, and all living shards, as the coordinator tells them;
        a shard tells of some. Only then a newer generation is reached, and only if none is missing.
        """
        newer = changes.generations > self.generations[changes.blocks]
        complete = complete and not self.lacks(changes)
        reached = max(self.generation, changes.generation) if complete else self.generation
        shards = self._shards(changes, newer, complete)
        if not newer.any() and reached == self.generation and shards == self.shards:
            return self
        blocks, told = changes.blocks[newer], changes.owners[newer]
        generations = self.generations.copy()
        generations[blocks] = changes.generations[newer]
        moved = blocks[self.owners[blocks] != told]
        owners = self.owners.copy()
        owners[blocks] = told
        if not len(moved):
            return replace(self, generation=reached, generations=generations, shards=shards)
        return make_routes(self.layout, reached, owners, shards, generations=generations, before=self)

    def _shards(self, changes: Changes, newer: NDArray[np.bool_], complete: bool) -> dict[int, ShardAddress]:
        """Return where shards listen: all that are told of, but of one shard's word only those that are news."""
        told = np.unique(changes.owners[newer]).tolist()
        if complete and changes.generation >= self.generation:
            # One that died may still be in records.
            still = np.ones(len(self.owners), np.bool_)
            still[changes.blocks[newer]] = False
            named = np.unique(self.owners[still]).tolist()
            return {**{s: self.shards[s] for s in named if s >= 0}, **changes.shards}
        return {**self.shards, **{s: changes.shards[s] for s in told if s >= 0}}


def make_routes(
    layout: Layout,
    generation: int,
    owners: NDArray[np.int32],
    shards: dict[int, ShardAddress],
    *,
    generations: NDArray[np.int64] | None = None,
    before: Routes | None = None,
) -> Routes:
    """Return the Routes of an owner per block. ``generations`` None: all of ``generation``. ``before``: whose order of blocks is
    taken over where no owner is another one."""
    if generations is None:
        generations = np.full(layout.blocks, generation, np.int64)
    changed = None if before is None else np.flatnonzero(before.owners != owners)
    ranks = []
    for number, (base, table) in enumerate(zip(layout.table_base, layout.tables, strict=True)):
        if before is not None and changed is not None and not _any_within(changed, base, base + table.blocks):
            ranks.append(before.ranks[number])
            continue
        order = np.argsort(owners[base : base + table.blocks], kind="stable")
        rank = np.empty(table.blocks, np.int32)
        rank[order] = np.arange(table.blocks, dtype=np.int32)
        ranks.append(rank)
    if before is not None and changed is not None and not _any_within(changed, layout.dense_base, layout.blocks):
        dense = before.dense
    else:
        dense = _by_owner(owners[layout.dense_base :], layout.dense_base)
    return Routes(generation, owners, shards, layout, generations, ranks, dense)


def _any_within(numbers: NDArray[Any], first: int, end: int) -> bool:
    """Tell whether any of the ascending ``numbers`` is from ``first`` to below ``end``."""
    low, high = np.searchsorted(numbers, (first, end))
    return bool(low < high)


def _by_owner(owners: NDArray[np.int32], base: int) -> dict[int, NDArray[np.int32]]:
    """Return by shard the numbers of its blocks, which count from ``base``."""
    order = np.argsort(owners, kind="stable").astype(np.int32)
    ids, starts = np.unique(owners[order], return_index=True)
    parts = np.split(base + order, starts[1:]) if len(ids) else []
    return {shard: part for shard, part in zip(ids.tolist(), parts, strict=True) if shard >= 0}


def pack_placement(
    generation: int,
    owners: NDArray[np.int32],
    shards: dict[int, ShardAddress],
    *,
    generations: NDArray[np.int64] | None = None,
    members: NDArray[np.int32] | None = None,
) -> Placement:
    """Return the message of a whole placement. ``generations`` None: all of ``generation``; ``members`` None: owners alone."""
    message = Placement(generation=generation, owners=pack(owners), shards=_members(shards))
    if generations is not None:
        message.generations.CopyFrom(pack(generations.astype(np.uint64)))
    if members is not None:
        message.members.CopyFrom(pack(members))
    return message


def pack_changes(changes: Changes) -> Placement:
    """Return the message of some records, or of all."""
    message = pack_placement(
        changes.generation, changes.owners, changes.shards, generations=changes.generations, members=changes.members
    )
    if not changes.whole:
        message.blocks.CopyFrom(pack(changes.blocks))
        message.since = changes.since
    return message


def _members(shards: dict[int, ShardAddress]) -> list[Member]:
    return [Member(id=s.id, address=s.address, incarnation=s.incarnation) for s in shards.values()]


def unpack_placement(layout: Layout, message: Placement) -> Routes:
    """Return the Routes of a whole placement; Malformed where it contradicts itself or the layout."""
    changes = unpack_changes(layout, message)
    if not changes.whole:
        raise Malformed(f"the placement names {len(changes.blocks)} blocks that changed, all of them are wanted")
    return routes_of(layout, changes)


def routes_of(layout: Layout, changes: Changes) -> Routes:
    """Return the Routes of all blocks' records."""
    assert changes.whole, "looked at before"
    return make_routes(layout, changes.generation, changes.owners, changes.shards, generations=changes.generations)


def changes_of(routes: Routes) -> Changes:
    """Return the records of all blocks of a placement without copies."""
    blocks = np.arange(len(routes.owners), dtype=np.int32)
    owners = routes.owners
    return Changes(
        routes.generation, 0, True, blocks, owners, routes.generations, owners[:, None].copy(), routes.shards
    )


def unpack_changes(layout: Layout, message: Placement) -> Changes:
    """Return the records of a placement message, whole or a change; Malformed where it contradicts itself or the layout."""
    owners = unpack(message.owners, np.int32, "placement owners").astype(np.int32)
    if len(message.shards) > MAX_SHARDS:
        raise Malformed(f"the placement names {len(message.shards)} shards, at most {MAX_SHARDS} can be")
    ids = [m.id for m in message.shards]
    if len(set(ids)) != len(ids) or max(ids, default=0) > MAX_SHARD:
        raise Malformed(f"the placement's shards need different numbers from 0 to {MAX_SHARD}")
    shards = {m.id: ShardAddress(m.id, m.address, m.incarnation) for m in message.shards}
    if message.generation > MAX_GENERATION:
        raise Malformed(f"the placement's generation {message.generation} is over {MAX_GENERATION}")
    whole = not message.HasField("blocks")
    if whole:
        if len(owners) != layout.blocks:
            raise Malformed(f"the placement names {len(owners)} blocks, the job has {layout.blocks}")
        blocks, since = np.arange(layout.blocks, dtype=np.int32), 0
    else:
        blocks, since = _changed(layout, message, len(owners)), message.since
    known = np.array([-1, *shards], np.int32)
    _check_known(owners, known)
    generations = _generations(message, len(owners))
    return Changes(
        message.generation, since, whole, blocks, owners, generations, _copy_sets(message, owners, known), shards
    )


def _changed(layout: Layout, message: Placement, owners: int) -> NDArray[np.int32]:
    """Return the blocks that a change tells of."""
    blocks: NDArray[np.int32] = unpack(message.blocks, np.int32, "placement blocks").astype(np.int32)
    if len(blocks) != owners:
        raise Malformed(f"the placement names {owners} owners of {len(blocks)} blocks that changed")
    if len(blocks) and (blocks[0] < 0 or blocks[-1] >= layout.blocks or not (blocks[1:] > blocks[:-1]).all()):
        raise Malformed(f"the blocks that changed are not ascending, from 0 to below {layout.blocks}")
    if message.since > message.generation:
        raise Malformed(f"the placement of generation {message.generation} tells of changes since {message.since}")
    return blocks


def _check_known(named: NDArray[np.int32], known: NDArray[np.int32]) -> None:
    unknown = np.setdiff1d(named, known)
    if len(unknown):
        raise Malformed(f"the placement gives blocks to shard {int(unknown[0])}, which it does not list")


def _generations(message: Placement, blocks: int) -> NDArray[np.int64]:
    if not message.HasField("generations"):
        return np.full(blocks, message.generation, np.int64)
    sent = unpack(message.generations, np.uint64, "placement generations")
    if len(sent) != blocks:
        raise Malformed(f"the placement names {len(sent)} generations of {blocks} blocks")
    if len(sent) and sent.max() > message.generation:
        raise Malformed(f"a block is of generation {sent.max()}, the placement of {message.generation}")
    return sent.astype(np.int64)


def _copy_sets(message: Placement, owners: NDArray[np.int32], known: NDArray[np.int32]) -> NDArray[np.int32]:
    if not message.HasField("members"):
        return owners[:, None].copy()
    members: NDArray[np.int32] = unpack(message.members, np.int32, "placement members", dims=2).astype(np.int32)
    if len(members) != len(owners) or not 1 <= members.shape[1] <= MAX_COPIES:
        raise Malformed(
            f"the placement's copy sets have shape {members.shape}, wanted {len(owners)} of 1 to {MAX_COPIES} members"
        )
    _check_known(members, known)
    if not np.array_equal(members[:, 0], owners):
        raise Malformed("a block's owner is not the first of its copy set")
    if ((members[:, :-1] < 0) & (members[:, 1:] >= 0)).any():
        raise Malformed("a copy set goes on behind its end")
    in_order = np.sort(members, axis=1)
    if ((in_order[:, :-1] == in_order[:, 1:]) & (in_order[:, 1:] >= 0)).any():
        raise Malformed("a copy set names a shard twice")
    return members
