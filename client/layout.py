# SPDX-License-Identifier: Apache-2.0
"""Layout: the numbering of all blocks of a job, tables first, then dense parameters, each in the order of the spec.

Invariant: a pure function of the specs, so every process numbers alike. Immutable; any thread.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from oarlock.embedding.spec import DenseSpec, TableSpec


@dataclass(frozen=True)
class DenseBlock:
    """A slice of a dense parameter: ``length`` values from ``start`` on, at ``offset`` in the vector of all parameters."""

    parameter: int
    block: int
    start: int
    length: int
    offset: int


class Layout:
    """Block numbers: ``table_base[t] + block`` for rows, ``dense_base + i`` for the i-th entry of ``dense_blocks``.

    ``dense_lengths`` and ``dense_offsets`` int64[d] are those of ``dense_blocks``.
    """

    def __init__(self, tables: tuple[TableSpec, ...], dense: tuple[DenseSpec, ...]) -> None:
        self.tables = tables
        self.dense = dense
        self.table_base: list[int] = []
        total = 0
        for table in tables:
            self.table_base.append(total)
            total += table.blocks
        self.dense_base = total
        self.dense_blocks: list[DenseBlock] = []
        offset = 0
        for p, spec in enumerate(dense):
            for block in range(spec.blocks):
                start = block * spec.slice
                length = min(spec.slice, spec.size - start)
                self.dense_blocks.append(DenseBlock(p, block, start, length, offset + start))
            offset += spec.size
        self.dense_size = offset
        self.dense_lengths: NDArray[np.int64] = np.array([b.length for b in self.dense_blocks], np.int64)
        self.dense_offsets: NDArray[np.int64] = np.array([b.offset for b in self.dense_blocks], np.int64)
        self.blocks = total + len(self.dense_blocks)
        self.table_index = {t.name: i for i, t in enumerate(tables)}

    def lengths_of(self, numbers: NDArray[np.int32]) -> NDArray[np.int64]:
        """Return int64[m]: the values of dense blocks, which are named by their numbers."""
        found: NDArray[np.int64] = self.dense_lengths[numbers - self.dense_base]
        return found

    def name(self, block: int) -> tuple[str, int]:
        """Return (table or parameter, number within it) of block number ``block``."""
        if block >= self.dense_base:
            found = self.dense_blocks[block - self.dense_base]
            return self.dense[found.parameter].name, found.block
        for base, table in zip(reversed(self.table_base), reversed(self.tables), strict=True):
            if block >= base:
                return table.name, block - base
        raise IndexError(block)
