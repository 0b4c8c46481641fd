# SPDX-License-Identifier: Apache-2.0
"""Pieces: a request's keys cut by owner and packed into messages.

Invariant: a block's keys are never divided, so all that a group adds to a block travels in one message; keys keep their order.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from oarlock.proto.arrays import MAX_MESSAGE_BYTES, pack
from oarlock.proto.errors import OutOfMemory
from oarlock.proto.shard_pb2 import TableKeys

# Room for keys, block numbers and the envelope beside the rows.
MESSAGE_BYTES = MAX_MESSAGE_BYTES - (1 << 20)


@dataclass(frozen=True)
class Piece:
    """Blocks of one table for one message: numbers within the table, keys per block, and where the keys are."""

    table: int
    blocks: NDArray[np.int32]
    counts: NDArray[np.int32]
    rows: slice | NDArray[np.int64]

    @property
    def size(self) -> int:
        return int(self.counts.sum())

    def keys(self, keys: NDArray[np.uint64]) -> TableKeys:
        return TableKeys(
            table=self.table, keys=pack(keys[self.rows]), blocks=pack(self.blocks), counts=pack(self.counts)
        )


def by_owner(
    table: int,
    blocks: NDArray[np.int32],
    counts: NDArray[np.int32],
    owners: NDArray[np.int32],
    *,
    row_bytes: int,
    wanted: NDArray[np.bool_] | None = None,
    limit: int = MESSAGE_BYTES,
) -> Iterator[tuple[int, Piece]]:
    """Yield (shard, piece) for the blocks (all, or those ``wanted``), each piece under ``limit`` bytes.

    ``owners`` int32[m] is the owner of each of ``blocks``. Blocks of one owner that lie side by side become one slice of
    the keys; otherwise (after the placement changed) their keys are picked one by one.
    """
    ends = np.cumsum(counts, dtype=np.int64)
    starts = ends - counts
    for owner in np.unique(owners if wanted is None else owners[wanted]):
        chosen = np.flatnonzero(owners == owner if wanted is None else (owners == owner) & wanted)
        volume = counts[chosen].astype(np.int64) * (row_bytes + 8)
        if volume.max() > limit:
            worst = int(blocks[chosen[volume.argmax()]])
            raise OutOfMemory(
                f"one batch's part of block {worst} is {int(volume.max())} bytes, over the {limit} bytes of a message: "
                f"use smaller batches (batch_rows) or more blocks per table"
            )
        message = np.cumsum(volume) // limit if volume.sum() > limit else np.zeros(len(chosen), np.int64)
        # A block that begins in one message's share ends in the next one's: halve the limit to stay under it.
        if message[-1] > 0:
            message = np.cumsum(volume) // (limit // 2)
        for number in np.unique(message):
            part = chosen[message == number]
            yield int(owner), _piece(table, blocks, counts, starts, ends, part)


def _piece(
    table: int,
    blocks: NDArray[np.int32],
    counts: NDArray[np.int32],
    starts: NDArray[np.int64],
    ends: NDArray[np.int64],
    part: NDArray[np.int64],
) -> Piece:
    rows: slice | NDArray[np.int64]
    if part[-1] - part[0] + 1 == len(part):
        rows = slice(int(starts[part[0]]), int(ends[part[-1]]))
    else:
        sizes = counts[part].astype(np.int64)
        within = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        rows = np.repeat(starts[part], sizes) + within
    return Piece(table, blocks[part], counts[part], rows)
