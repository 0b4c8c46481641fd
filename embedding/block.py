# SPDX-License-Identifier: Apache-2.0
"""One block's memory: its index entries and its chunks of rows, and how they grow.

Invariant: the block's descriptor always holds the addresses of arrays that this object keeps alive; rows never move.
Used by ``embedding/table.py`` under the table's lock.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from oarlock.embedding.index import CHUNKS, ENTRIES, FIELDS, MASK, ROOM, ROWS, export_rows, import_rows, rehash
from oarlock.embedding.pointer import LINE, address_of
from oarlock.embedding.slab import Layout, chunk_rows
from oarlock.proto.errors import OutOfMemory

FIRST_CAPACITY = 16


def rows_of_capacity(capacity: int) -> int:
    """Return how many rows an index of ``capacity`` entries holds before it grows."""
    return capacity * 3 // 4


class BlockRows(NamedTuple):
    """A block's content: keys: uint64[r], weights: float32[r, dim], state: float32[r, state_columns]."""

    keys: NDArray[np.uint64]
    weights: NDArray[np.float32]
    state: NDArray[np.float32]


class Block:
    """A growing set of rows; kernels see it through ``descriptor``: int64[FIELDS] (``embedding/index.py``)."""

    def __init__(self, shape: Layout, salt: np.uint64) -> None:
        self._shape = shape
        self._salt = salt
        self._entries: NDArray[np.uint64] = np.zeros((FIRST_CAPACITY, 2), np.uint64)
        self._chunks: list[NDArray[Any]] = []
        self._table: NDArray[np.int64] = np.zeros(4, np.int64)
        self._slab_rows = 0
        self.descriptor: NDArray[np.int64] = np.zeros(FIELDS, np.int64)
        self._publish()

    def _publish(self) -> None:
        self.descriptor[ENTRIES] = address_of(self._entries)
        self.descriptor[MASK] = self._entries.shape[0] - 1
        self.descriptor[CHUNKS] = address_of(self._table)
        self.descriptor[ROOM] = min(rows_of_capacity(self._entries.shape[0]), self._slab_rows)

    @property
    def rows(self) -> int:
        return int(self.descriptor[ROWS])

    @property
    def nbytes(self) -> int:
        """Return the bytes allocated, including those not yet used."""
        return self._entries.nbytes + self._table.nbytes + sum(chunk.nbytes for chunk in self._chunks)

    def move_descriptor(self, line: NDArray[np.int64]) -> None:
        """Keep the descriptor in ``line`` from now on, where kernels look for it."""
        line[:] = self.descriptor
        self.descriptor = line

    def reserve(self, rows: int) -> None:
        """Make room for ``rows`` rows in all; OutOfMemory leaves the block as it was, usable."""
        try:
            self._grow_slab(rows)
            self._grow_index(rows)
        except MemoryError:
            raise OutOfMemory(f"no memory for {rows} rows of {self._shape.row_bytes} bytes in one block") from None
        finally:
            self._publish()

    def _grow_slab(self, rows: int) -> None:
        while self._slab_rows < rows:
            number = len(self._chunks)
            count = chunk_rows(self._shape, number)
            chunk = np.empty(count * self._shape.row_bytes + LINE, np.uint8)
            if number == self._table.shape[0]:
                self._table = np.concatenate([self._table, np.zeros(number, np.int64)])
            self._table[number] = -(-address_of(chunk) // LINE) * LINE
            self._chunks.append(chunk)
            self._slab_rows += count

    def _grow_index(self, rows: int) -> None:
        capacity = self._entries.shape[0]
        while rows_of_capacity(capacity) < rows:
            capacity *= 2
        if capacity > self._entries.shape[0]:
            entries = np.zeros((capacity, 2), np.uint64)
            rehash(self._salt, self._entries, address_of(entries), capacity - 1)
            self._entries = entries

    def export(self) -> BlockRows:
        """Return a copy of all rows in order of creation."""
        rows = self.rows
        out = BlockRows(
            np.empty(rows, np.uint64),
            np.empty((rows, self._shape.dim), np.float32),
            np.empty((rows, self._shape.state_columns), np.float32),
        )
        export_rows(self._entries, int(self.descriptor[CHUNKS]), self._shape, *out)
        return out

    def fill(self, content: BlockRows) -> int:
        """Fill this empty block; return -1, or the position of a key that comes twice (the block is then useless)."""
        self.reserve(content.keys.shape[0])
        return int(import_rows(self.descriptor, self._salt, self._shape, *content))
