# SPDX-License-Identifier: Apache-2.0
"""Parts of pushes: copies that outlive their message, and those of steps, staged by rank until they are added up.

Invariant: what several parts add up to depends on the parts and their ranks alone, not on the order in which they came, nor on
which other blocks are here; of a block there is at most one part of each rank, all of the step after the one that it is at. No
array of a part is ever changed. The shard's push lock covers what is staged.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from oarlock.client.layout import Layout
from oarlock.client.push import reads_occurrences
from oarlock.embedding.hashing import table_salt
from oarlock.embedding.keys import KeySorter, merge
from oarlock.ps.request import DensePush, Keys, RowPush


def along(chosen: NDArray[np.bool_], parts: list[RowPush]) -> Iterator[tuple[RowPush, NDArray[np.bool_]]]:
    """Yield each part with its own run of ``chosen``, which has one entry for each block of each part."""
    at = 0
    for part in parts:
        yield part, chosen[at : at + len(part.keys.numbers)]
        at += len(part.keys.numbers)


def copied(part: RowPush) -> RowPush:
    """Return a part that outlives its message."""
    keys = part.keys
    own = Keys(keys.table, keys.keys.copy(), keys.blocks.copy(), keys.counts.copy(), keys.numbers.copy())
    return RowPush(own, part.gradients.copy(), part.rate, part.occurrences.copy(), part.clicks.copy())


def only(part: DensePush, chosen: NDArray[np.bool_], lengths: NDArray[np.int64]) -> DensePush:
    """Return the chosen blocks of a part, in memory of their own."""
    gradients = part.gradients[np.repeat(chosen, lengths)].copy()
    taken = lengths[chosen]
    return DensePush(part.numbers[chosen], gradients, np.cumsum(taken) - taken, part.rate)


def lengths_in(part: DensePush) -> NDArray[np.int64]:
    """Return int64[m]: the values of each of a part's blocks."""
    return np.diff(part.starts, append=len(part.gradients))


class StagedParts:
    """Parts of the next step of blocks, by rank: in the order in which they came; ``have`` bool[ranks, blocks]: of which."""

    def __init__(self, layout: Layout, ranks: int) -> None:
        self._layout = layout
        self._sorter = KeySorter()
        self._salts = [table_salt(table.name) for table in layout.tables]
        # Of which tables a policy asks how often keys came.
        self._counts = [reads_occurrences(table) for table in layout.tables]
        self._orders = [np.arange(table.blocks, dtype=np.int32) for table in layout.tables]
        self.rows: list[list[RowPush]] = [[] for _ in range(ranks)]
        self.dense: list[list[DensePush]] = [[] for _ in range(ranks)]
        self.have: NDArray[np.bool_] = np.zeros((ranks, layout.blocks), np.bool_)

    @property
    def nbytes(self) -> int:
        rows = sum(p.gradients.nbytes + p.keys.keys.nbytes for parts in self.rows for p in parts)
        return rows + sum(p.gradients.nbytes for parts in self.dense for p in parts)

    def add(self, rank: int, rows: Sequence[RowPush], dense: Sequence[DensePush]) -> None:
        """Stage parts, none of whose blocks has one of the rank. They outlive their message."""
        self.rows[rank].extend(rows)
        self.dense[rank].extend(dense)
        for part in rows:
            self.have[rank, part.keys.numbers] = True
        for each in dense:
            self.have[rank, each.numbers] = True

    def forget(self, going: NDArray[np.bool_]) -> None:
        """Drop the parts of some blocks: bool[blocks of the job]."""
        for rank in range(len(self.rows)):
            if self.rows[rank]:
                self.rows[rank] = [
                    part.only(stays) for part in self.rows[rank] if (stays := ~going[part.keys.numbers]).any()
                ]
            if self.dense[rank]:
                self.dense[rank] = list(_dense_of(self.dense[rank], ~going))
        self.have[:, going] = False

    def of_block(self, number: int) -> dict[int, tuple[tuple[RowPush, ...], tuple[DensePush, ...]]]:
        """Return by rank the part of one block: one of rows, or one of dense values."""
        wanted = np.zeros(self.have.shape[1], np.bool_)
        wanted[number] = True
        found = {}
        for rank in np.flatnonzero(self.have[:, number]).tolist():
            rows = tuple(p.only(some) for p in self.rows[rank] if (some := wanted[p.keys.numbers]).any())
            found[rank] = (rows, tuple(_dense_of(self.dense[rank], wanted)))
        return found

    def sum_rows(self, table: int, going: NDArray[np.bool_], samples: np.float32) -> RowPush | None:
        """Return the update that all ranks' parts of some blocks of a table make, for ``samples`` of all ranks; None: none."""
        parts = []
        for part in (p for rank in self.rows for p in rank if p.keys.table == table):
            some = going[part.keys.numbers]
            if some.any():
                parts.append(part.only(some))
        if not parts:
            return None
        spec = self._layout.tables[table]
        keys = np.concatenate([p.keys.keys for p in parts])
        found = self._sorter.build(keys, self._salts[table], spec.blocks.bit_length() - 1, self._orders[table])
        gradients: NDArray[np.float32] = np.empty((len(found.keys), spec.dim), np.float32)
        merge(np.concatenate([p.gradients for p in parts]), found.inverse, gradients)
        if samples:
            gradients /= samples
        numbers = self._layout.table_base[table] + found.blocks
        occurrences = np.empty(0, np.uint32)
        if self._counts[table]:
            occurrences = _occurrences_of(parts, found.inverse, len(found.keys))
        clicks = _clicks_of(parts, found.inverse, len(found.keys))
        whole = Keys(table, found.keys, found.blocks, found.counts, numbers)
        return RowPush(whole, gradients, parts[0].rate, occurrences, clicks)

    def sum_dense(self, going: NDArray[np.bool_], samples: np.float32) -> DensePush | None:
        """Return the update that all ranks' parts of some dense blocks make; None: none."""
        parts = [part for rank in self.dense for part in _dense_of(rank, going)]
        if not parts:
            return None
        numbers = np.unique(np.concatenate([p.numbers for p in parts])).astype(np.int32)
        lengths = self._layout.lengths_of(numbers)
        starts = np.cumsum(lengths) - lengths
        values: NDArray[np.float32] = np.zeros(int(lengths.sum()), np.float32)
        for part in parts:
            if np.array_equal(part.numbers, numbers):
                values += part.gradients
                continue
            sizes = lengths_in(part)
            begins = np.repeat(starts[np.searchsorted(numbers, part.numbers)] - part.starts, sizes)
            values[begins + np.arange(len(part.gradients))] += part.gradients
        if samples:
            values /= samples
        return DensePush(numbers, values, starts, parts[0].rate)


def _dense_of(parts: list[DensePush], wanted: NDArray[np.bool_]) -> Iterator[DensePush]:
    """Yield of each part the wanted blocks."""
    for part in parts:
        some = wanted[part.numbers]
        if some.all():
            yield part
        elif some.any():
            yield only(part, some, lengths_in(part))


def _occurrences_of(parts: list[RowPush], inverse: NDArray[np.int32], keys: int) -> NDArray[np.uint32]:
    # A part without any has each of its keys once, whatever parts of other blocks say.
    given = [p.occurrences if len(p.occurrences) else np.ones(len(p.keys.keys), np.uint32) for p in parts]
    # Integers below 2^53 in float64.
    return np.bincount(inverse, np.concatenate(given), minlength=keys).astype(np.uint32)


def _clicks_of(parts: list[RowPush], inverse: NDArray[np.int32], keys: int) -> NDArray[np.float32]:
    if not any(len(p.clicks) for p in parts):
        return np.empty(0, np.float32)
    given = [p.clicks if len(p.clicks) else np.zeros(len(p.keys.keys), np.float32) for p in parts]
    out: NDArray[np.float32] = np.empty((keys, 1), np.float32)
    merge(np.concatenate(given)[:, None], inverse, out)
    return out[:, 0]
