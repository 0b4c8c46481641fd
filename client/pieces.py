# SPDX-License-Identifier: Apache-2.0
"""Pieces: a request's blocks cut by owner, each piece small enough for one message.

Invariant: a block is never divided, so all that a group adds to a block travels in one message; keys keep their order.
Pure functions; any thread.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from oarlock.client.layout import Layout
from oarlock.proto.arrays import MAX_MESSAGE_BYTES, Part, pack
from oarlock.proto.errors import OutOfMemory
from oarlock.proto.shard_pb2 import TableKeys

# Room for the envelope beside the arrays.
MESSAGE_BYTES = MAX_MESSAGE_BYTES - (1 << 20)
# A row travels with its key, a block with its number and count.
KEY_BYTES = 8
BLOCK_BYTES = 8


@dataclass(frozen=True)
class Piece:
    """Blocks of one table for one message: numbers within the table, keys per block, where the keys are, and bytes."""

    table: int
    blocks: NDArray[np.int32]
    counts: NDArray[np.int32]
    rows: slice | NDArray[np.int64]
    volume: int

    @property
    def size(self) -> int:
        rows = self.rows
        return rows.stop - rows.start if isinstance(rows, slice) else len(rows)

    def keys(self, keys: NDArray[np.uint64], parts: list[Part] | None = None) -> TableKeys:
        """Return the message of the piece's keys; larger arrays go to ``parts``, as views of ``keys`` where they can."""
        return TableKeys(
            table=self.table,
            keys=pack(keys[self.rows], parts),
            blocks=pack(self.blocks, parts),
            counts=pack(self.counts, parts),
        )


def by_owner(
    table: int,
    blocks: NDArray[np.int32],
    counts: NDArray[np.int32],
    owners: NDArray[np.int32],
    *,
    name: str,
    row_bytes: int,
    wanted: NDArray[np.bool_] | None = None,
    limit: int = MESSAGE_BYTES,
) -> Iterator[tuple[int, Piece]]:
    """Yield (shard, piece) for the blocks (all, or those ``wanted``) of table ``name``, each piece within ``limit`` bytes.

    ``owners`` int32[m] is the owner of each of ``blocks``. Blocks of one owner that lie side by side become one slice of
    the keys; otherwise (after the placement changed) their keys are picked one by one.
    """
    ends = np.cumsum(counts, dtype=np.int64)
    if wanted is None and len(ends):
        runs = _owners_runs(owners)
        if runs is not None and int(ends[-1]) * (row_bytes + KEY_BYTES) + len(ends) * BLOCK_BYTES <= limit:
            # As good as always: keys lie in the order of their owners, and all of them fit.
            at = 0
            for first, last in runs:
                end = int(ends[last - 1])
                size = (end - at) * (row_bytes + KEY_BYTES) + (last - first) * BLOCK_BYTES
                yield int(owners[first]), Piece(table, blocks[first:last], counts[first:last], slice(at, end), size)
                at = end
            return
    starts = ends - counts
    for owner, chosen in _by_owner(owners, wanted):
        volume = counts[chosen].astype(np.int64) * (row_bytes + KEY_BYTES) + BLOCK_BYTES
        whole = int(volume.sum())
        if whole <= limit:
            yield owner, Piece(table, blocks[chosen], counts[chosen], _rows(counts, starts, ends, chosen), whole)
            continue
        worst = int(volume.argmax())
        if volume[worst] > limit:
            raise _too_large(
                f"table {name}, block {int(blocks[chosen[worst]])}",
                int(volume[worst]),
                limit,
                "use smaller batches (batch_rows) or give the table more blocks",
            )
        for run, size in _runs(volume, limit):
            part = chosen[run]
            yield owner, Piece(table, blocks[part], counts[part], _rows(counts, starts, ends, part), size)


def dense_by_owner(
    layout: Layout,
    numbers: NDArray[np.int32],
    owners: NDArray[np.int32],
    *,
    limit: int = MESSAGE_BYTES,
) -> Iterator[tuple[int, NDArray[np.int64], int]]:
    """Yield (shard, positions int64[k] in ``numbers``, bytes) for dense blocks, each piece within ``limit`` bytes."""
    lengths = layout.lengths_of(numbers)
    for owner, chosen in _by_owner(owners, None):
        volume = lengths[chosen] * 4 + BLOCK_BYTES
        worst = int(volume.argmax())
        if volume[worst] > limit:
            name, block = layout.name(int(numbers[chosen[worst]]))
            raise _too_large(
                f"dense parameter {name}, block {block}", int(volume[worst]), limit, "give it a smaller slice"
            )
        for run, size in _runs(volume, limit):
            yield owner, chosen[run], size


def _owners_runs(owners: NDArray[np.int32]) -> list[tuple[int, int]] | None:
    """Return [first, end) of each owner's blocks if those lie side by side, in the order of owners; else None."""
    changes = np.flatnonzero(owners[1:] != owners[:-1])
    if len(changes) and not (owners[changes + 1] > owners[changes]).all():
        return None
    edges = [0, *(changes + 1).tolist(), len(owners)]
    return list(pairwise(edges))


def _by_owner(owners: NDArray[np.int32], wanted: NDArray[np.bool_] | None) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """Yield (owner, positions), ascending in both, of those ``wanted``."""
    chosen = np.arange(len(owners)) if wanted is None else np.flatnonzero(wanted)
    ordered = owners if wanted is None else owners[chosen]
    steps = ordered[1:] - ordered[:-1]
    if (steps < 0).any():
        # Seldom: keys are grouped by owner as they are made distinct.
        order = ordered.argsort(kind="stable")
        chosen, ordered = chosen[order], ordered[order]
        steps = ordered[1:] - ordered[:-1]
    first = 0
    for end in (*(np.flatnonzero(steps) + 1).tolist(), len(ordered)):
        if end > first:
            yield int(ordered[first]), chosen[first:end]
        first = end


def _too_large(what: str, size: int, limit: int, setting: str) -> OutOfMemory:
    return OutOfMemory(f"one batch's part of {what} is {size} bytes, over the {limit} bytes of a message: {setting}")


def _runs(volume: NDArray[np.int64], limit: int) -> Iterator[tuple[slice, int]]:
    """Yield (run, bytes): as few runs of blocks side by side as keep within the limit; no block alone is over it."""
    sums = np.cumsum(volume)
    if len(sums) and sums[-1] <= limit:
        yield slice(0, len(sums)), int(sums[-1])
        return
    first, before = 0, 0
    while first < len(volume):
        last = int(np.searchsorted(sums, before + limit, side="right"))
        yield slice(first, last), int(sums[last - 1]) - before
        first, before = last, int(sums[last - 1])


def _rows(
    counts: NDArray[np.int32], starts: NDArray[np.int64], ends: NDArray[np.int64], part: NDArray[np.int64]
) -> slice | NDArray[np.int64]:
    if part[-1] - part[0] + 1 == len(part):
        return slice(int(starts[part[0]]), int(ends[part[-1]]))
    sizes = counts[part].astype(np.int64)
    within = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    picked: NDArray[np.int64] = np.repeat(starts[part], sizes) + within
    return picked
