# SPDX-License-Identifier: Apache-2.0
"""Placement policy: which shard gets which block. Pure functions of their arguments.

Invariant: every block has an owner; within each table the shards' numbers of blocks differ by at most one.
"""

import numpy as np
from numpy.typing import NDArray

from oarlock.client.layout import Layout
from oarlock.proto.errors import InvalidArgument


def balanced(layout: Layout, shards: list[int]) -> NDArray[np.int32]:
    """Return an owner per block, int32[blocks]: tables dealt out in turn, dense blocks to whoever has the fewest bytes.

    Keys are hashed to blocks, so equal numbers of blocks are equal numbers of rows. Each table begins where the last one
    ended, so that many small tables do not all burden the first shard.
    """
    if not shards:
        raise InvalidArgument("a placement needs at least one shard")
    ids = np.array(sorted(shards), np.int32)
    owners = np.full(layout.blocks, -1, np.int32)
    turn = 0
    for base, table in zip(layout.table_base, layout.tables, strict=True):
        owners[base : base + table.blocks] = ids[(turn + np.arange(table.blocks)) % len(ids)]
        turn += table.blocks
    load = np.zeros(len(ids))
    order = sorted(range(len(layout.dense_blocks)), key=lambda i: (-layout.dense_blocks[i].length, i))
    for i in order:
        least = int(load.argmin())
        owners[layout.dense_base + i] = ids[least]
        load[least] += layout.dense_blocks[i].length
    return owners


def sizes_of(layout: Layout) -> NDArray[np.int64]:
    """Return int64[blocks]: what each block weighs at the beginning, when no row is there yet."""
    sizes = np.ones(layout.blocks, np.int64)
    sizes[layout.dense_base :] = layout.dense_lengths
    if layout.dense_base:
        # All blocks of rows will have about as many; as much as the largest dense one.
        sizes[: layout.dense_base] = max(1, int(layout.dense_lengths.max(initial=1)))
    return sizes
