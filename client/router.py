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
