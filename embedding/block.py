# SPDX-License-Identifier: Apache-2.0
"""One block's memory: its index and its chunks of rows, and how they grow.

Invariant: the block's descriptor holds the addresses of memory that this object keeps alive; rows never move; growing
builds the new index beside the old one while pulls go on, and shuts the block only to exchange two addresses. The caller
holds the block's mutex (``embedding/lock.py``) for everything but construction.
"""

import numpy as np
from numpy.typing import NDArray

from oarlock.embedding.descriptor import (
    BUCKETS,
    CHUNKS,
    COUNT,
    ENTRIES,
    ENTRY_ROOM,
    FIELDS,
    FREE_ROWS,
    NEXT,
    ROWS,
    SKETCH,
    SLOT_ROOM,
)
from oarlock.embedding.index import GROWTH, VALUE, entries_of, rehash
from oarlock.embedding.lock import reopen, shut
from oarlock.embedding.memory import Arena, IndexMemory, touch
from oarlock.embedding.pointer import LINE, address_of
from oarlock.embedding.saved import Saved
from oarlock.embedding.sketch import Sketch
from oarlock.embedding.slab import Layout, chunk_bytes, chunk_rows
from oarlock.embedding.stamps import Track
from oarlock.embedding.tombstones import Tombstones
from oarlock.proto.errors import OutOfMemory

FIRST_BUCKETS = 4
MOST_SLOTS = VALUE + 1


class Block:
    """A growing set of rows; kernels see it through ``descriptor``: int64[FIELDS] (``embedding/descriptor.py``)."""

    def __init__(
        self,
        shape: Layout,
        salt: np.uint64,
        arena: Arena,
        indexes: IndexMemory,
        sketch: Sketch | None = None,
    ) -> None:
        self._shape = shape
        self._salt = salt
        self._arena = arena
        self._indexes = indexes
        self._chunks: list[tuple[int, int]] = []
        self._table: NDArray[np.int64] = np.zeros(8, np.int64)
        self.descriptor: NDArray[np.int64] = np.zeros(FIELDS, np.int64)
        self.descriptor[BUCKETS] = indexes.take(FIRST_BUCKETS * LINE)
        self.descriptor[COUNT] = FIRST_BUCKETS
        self.descriptor[ENTRY_ROOM] = entries_of(FIRST_BUCKETS)
        self.descriptor[CHUNKS] = address_of(self._table)
        self.sketch = sketch
        if sketch is not None:
            self.descriptor[SKETCH] = sketch.address
        self.tombstones = Tombstones()
        self.track = Track()
        self.saved: Saved | None = None
        self.retired = False  # it is in no place any more

    @property
    def rows(self) -> int:
        return int(self.descriptor[ROWS])

    @property
    def nbytes(self) -> int:
        """Return the bytes allocated, including those not yet used."""
        index = int(self.descriptor[COUNT]) * LINE
        sketch = self.sketch.nbytes if self.sketch is not None else 0
        saved = self.saved.nbytes if self.saved is not None else 0
        return index + self._table.nbytes + sum(size for _, size in self._chunks) + sketch + saved

    def move_descriptor(self, line: NDArray[np.int64]) -> None:
        """Keep the descriptor in ``line`` from now on, where kernels look for it; the lock there stays."""
        line[BUCKETS:] = self.descriptor[BUCKETS:]
        self.descriptor = line

    def reserve(self, entries: int, rows: int) -> None:
        """Make room for so many more keys and so many more rows; OutOfMemory leaves the block as it was, usable."""
        try:
            self._grow_slab(rows)
            self._grow_index(entries)
        except MemoryError:
            raise OutOfMemory(
                f"no memory for {rows} more rows in a block of {self.rows}: add shards, or give the table an eviction "
                "rule or a memory budget"
            ) from None

    def _grow_slab(self, rows: int) -> None:
        have = int(self.descriptor[SLOT_ROOM])
        free = have - int(self.descriptor[NEXT]) + int(self.descriptor[FREE_ROWS])
        while free < rows:
            number = len(self._chunks)
            count = chunk_rows(self._shape, number)
            if have + count > MOST_SLOTS:
                raise OutOfMemory(f"a block holds {have} rows, and no more fit: give the table more blocks")
            size = chunk_bytes(self._shape, count)
            if number == self._table.shape[0]:
                self._lengthen()
            address = self._arena.take(size)
            # The system gives a page when it is first written to, which may take milliseconds: not while the block is shut.
            touch(address, size)
            self._chunks.append((address, size))
            self._table[number] = address
            have += count
            free += count
            self.descriptor[SLOT_ROOM] = have

    def _lengthen(self) -> None:
        old = self._table  # alive until no pull can look at it
        table = np.concatenate([old, np.zeros_like(old)])
        self._exchange((CHUNKS, address_of(table)))
        self._table = table

    def _grow_index(self, entries: int) -> None:
        need = int(self.descriptor[ENTRIES]) + entries
        buckets = int(self.descriptor[COUNT])
        if need <= int(self.descriptor[ENTRY_ROOM]):
            return
        before = int(self.descriptor[BUCKETS]), buckets
        while entries_of(buckets) < need:
            buckets = buckets * GROWTH // 100 + 1
        address = self._indexes.take(buckets * LINE)
        rehash(*before, self._salt, address, buckets)
        self._exchange((BUCKETS, address), (COUNT, buckets))
        self._indexes.give_back(before[0], before[1] * LINE)
        self.descriptor[ENTRY_ROOM] = entries_of(buckets)

    def _exchange(self, *words: tuple[int, int]) -> None:
        lock = address_of(self.descriptor)
        shut(lock)
        try:
            for word, value in words:
                self.descriptor[word] = value
        finally:
            reopen(lock)

    def free(self) -> None:
        """Give all memory back; nobody is inside the block any more."""
        self.saved = None
        for address, size in self._chunks:
            self._arena.give_back(address, size)
        self._chunks.clear()
        self._indexes.give_back(int(self.descriptor[BUCKETS]), int(self.descriptor[COUNT]) * LINE)
