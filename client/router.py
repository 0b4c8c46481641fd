# SPDX-License-Identifier: Apache-2.0
"""Router: which shard owns each block, and the order of blocks in which a shard's keys lie side by side.

Invariant: one Routes object is one placement generation and never changes; a newer one replaces it whole, an older one never.
"""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from oarlock.client.layout import Layout
from oarlock.proto.arrays import pack, unpack
from oarlock.proto.common_pb2 import Member, Placement
from oarlock.proto.errors import Malformed

# Owners travel as int32.
MAX_SHARD = (1 << 31) - 1
MAX_SHARDS = 1 << 16
# In place of a generation since which records are told: others may have changed as well.
NOTHING_ELSE = 1 << 62


@dataclass(frozen=True)
class ShardAddress:
    """A shard of the placement: its id, where it listens, and the life it was in when placed."""

    id: int
    address: str
    incarnation: int


@dataclass(frozen=True)
class Routes:
    """One generation of the placement: ``owners`` int32[blocks] of shard ids (-1: nobody), and the shards by id.

    ``ranks[t]`` int32[blocks of table t]: a block's position when the table's blocks are sorted by (owner, block).
    ``dense[s]`` int32[d]: the dense blocks of shard s, ascending.
    """

    generation: int
    owners: NDArray[np.int32]
    shards: dict[int, ShardAddress]
    ranks: list[NDArray[np.int32]] = field(repr=False)
    dense: dict[int, NDArray[np.int32]] = field(repr=False)


def make_routes(layout: Layout, generation: int, owners: NDArray[np.int32], shards: dict[int, ShardAddress]) -> Routes:
    """Return the Routes of an owner per block."""
    ranks = []
    for base, table in zip(layout.table_base, layout.tables, strict=True):
        order = np.argsort(owners[base : base + table.blocks], kind="stable")
        rank = np.empty(table.blocks, np.int32)
        rank[order] = np.arange(table.blocks, dtype=np.int32)
        ranks.append(rank)
    numbers = np.arange(layout.dense_base, layout.blocks, dtype=np.int32)
    dense_owners = owners[layout.dense_base :]
    dense = {s: numbers[dense_owners == s] for s in shards if np.any(dense_owners == s)}
    return Routes(generation, owners, shards, ranks, dense)


def pack_placement(generation: int, owners: NDArray[np.int32], shards: dict[int, ShardAddress]) -> Placement:
    """Return the message of a placement."""
    members = [Member(id=s.id, address=s.address, incarnation=s.incarnation) for s in shards.values()]
    return Placement(generation=generation, owners=pack(owners), shards=members)


def unpack_placement(layout: Layout, message: Placement) -> Routes:
    """Return the Routes of a placement message; Malformed where it contradicts the layout."""
    owners = unpack(message.owners, np.int32, "placement owners").astype(np.int32)
    if len(message.shards) > MAX_SHARDS:
        raise Malformed(f"the placement names {len(message.shards)} shards, at most {MAX_SHARDS} can be")
    ids = [m.id for m in message.shards]
    if len(set(ids)) != len(ids) or max(ids, default=0) > MAX_SHARD:
        raise Malformed(f"the placement's shards need different numbers from 0 to {MAX_SHARD}")
    shards = {m.id: ShardAddress(m.id, m.address, m.incarnation) for m in message.shards}
    if len(owners) != layout.blocks:
        raise Malformed(f"the placement names {len(owners)} blocks, the job has {layout.blocks}")
    unknown = np.setdiff1d(owners, np.array([-1, *shards], np.int32))
    if len(unknown):
        raise Malformed(f"the placement gives blocks to shard {int(unknown[0])}, which it does not list")
    return make_routes(layout, message.generation, owners, shards)


@dataclass(frozen=True)
class Records:
    """Records of blocks ``numbers`` int32[n], ascending: ``owners`` int32[n], ``generations`` int64[n], ``members`` int32[n, k].

    ``whole``: of all blocks; else of those that changed since generation ``since``. ``shards`` by id.
    """

    generation: int
    whole: bool
    since: int
    numbers: NDArray[np.int32]
    owners: NDArray[np.int32]
    generations: NDArray[np.int64]
    members: NDArray[np.int32]
    shards: dict[int, ShardAddress]

    def only(self, chosen: NDArray[np.bool_]) -> "Records":
        """Return some of them."""
        parts = (self.numbers[chosen], self.owners[chosen], self.generations[chosen], self.members[chosen])
        return Records(self.generation, False, self.since, *parts, self.shards)


def records_of(routes: Routes) -> Records:
    """Return the records of a placement without copies."""
    numbers = np.arange(len(routes.owners), dtype=np.int32)
    generations = np.full(len(numbers), routes.generation, np.int64)
    owners = routes.owners
    return Records(routes.generation, True, 0, numbers, owners, generations, owners[:, None], routes.shards)


def read_records(layout: Layout, message: Placement) -> Records:
    """Return the records that a placement message tells; Malformed where it contradicts itself or the layout."""
    if len(message.shards) > MAX_SHARDS:
        raise Malformed(f"the placement names {len(message.shards)} shards, at most {MAX_SHARDS} can be")
    ids = [m.id for m in message.shards]
    if len(set(ids)) != len(ids) or max(ids, default=0) > MAX_SHARD:
        raise Malformed(f"the placement's shards need different numbers from 0 to {MAX_SHARD}")
    shards = {m.id: ShardAddress(m.id, m.address, m.incarnation) for m in message.shards}
    owners = unpack(message.owners, np.int32, "placement owners").astype(np.int32)
    whole = not message.HasField("blocks")
    if whole:
        numbers = np.arange(layout.blocks, dtype=np.int32)
    else:
        numbers = unpack(message.blocks, np.int32, "placement blocks").astype(np.int32)
        if len(numbers) and not (numbers[0] >= 0 and numbers[-1] < layout.blocks and (np.diff(numbers) > 0).all()):
            raise Malformed(f"a placement's blocks must ascend from 0 to {layout.blocks - 1}")
    if len(owners) != len(numbers):
        raise Malformed(f"the placement names {len(owners)} owners of {len(numbers)} blocks")
    generations = np.full(len(numbers), message.generation, np.int64)
    if message.HasField("generations"):
        told = unpack(message.generations, np.uint64, "placement generations")
        if len(told) != len(numbers) or (len(told) and int(told.max()) > message.generation):
            raise Malformed(
                f"the placement of generation {message.generation} has records of later ones, or not one per block"
            )
        generations = told.astype(np.int64)
    members = owners[:, None]
    if message.HasField("members"):
        members = unpack(message.members, np.int32, "placement members", dims=2).astype(np.int32)
        if len(members) != len(numbers) or not members.shape[1] or not (members[:, 0] == owners).all():
            raise Malformed("a placement's copy sets need one line per block, the owner first")
        ordered = np.sort(members, axis=1)
        if ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any():
            raise Malformed("a placement's copy set names a shard twice")
    unknown = np.setdiff1d(members, np.array([-1, *shards], np.int32))
    if len(unknown):
        raise Malformed(f"the placement gives blocks to shard {int(unknown[0])}, which it does not list")
    return Records(message.generation, whole, message.since, numbers, owners, generations, members, shards)
