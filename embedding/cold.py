# SPDX-License-Identifier: Apache-2.0
"""Cold rows: a table with a memory budget keeps those that are asked for in memory and the others in a file.

    record:   key (uint64) | weights as stored | state and counters

Each stored block may keep its part of the budget. When a block needs room beyond it, a hand goes round its index once: rows
that nobody asked for since the hand was there last (two bits of heat, ``embedding/index.py``) go to the file in one
write, the others lose some heat. A request brings the rows that it names back, a pull after it has read them.

Invariant: where a row lies never changes what a request returns. A record that a pull may be about to read is pinned, and
records are freed, and the file compacted, only by ``tidy``, outside of any block's lock. The budget is soft: rows that are all
in use stay in memory.
"""

import contextlib
import tempfile
import threading
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from oarlock.embedding.aim import Grouped
from oarlock.embedding.cold_batch import list_cold, name_records, pack_cold, renumber, take_back
from oarlock.embedding.cold_kernels import (
    choose_cold,
    decode_records,
    find_spilled,
    list_spilled,
    pack_rows,
    spill_entries,
    split_records,
    unspill,
)
from oarlock.embedding.content import BlockRows
from oarlock.embedding.descriptor import COUNT, DESCRIPTOR_BYTES, ROWS, SPILLED_ROWS
from oarlock.embedding.hashing import blocks_of
from oarlock.embedding.index import PLACES, RECORD, SPILLED, records_of
from oarlock.embedding.pointer import address_of
from oarlock.embedding.spill_file import SpillFile
from oarlock.proto.errors import CorruptCheckpoint, OutOfMemory, PSError

if TYPE_CHECKING:
    from oarlock.embedding.store import Store

SLACK = 3  # dead records of the file for each live one: moving the live ones costs more than disk
SLOTS_AT_ONCE = 64  # asked for when a row comes back and there is none
LEAST_ROWS = 64  # of a block, whatever the budget
TIDY_RECORDS = 1 << 14  # dead records that are worth a look at the file

Keys = NDArray[np.uint64]
Records = NDArray[np.int64]


class ColdRows:
    """The rows of a table that are in its spill file."""

    def __init__(self, store: "Store", folder: Path | None) -> None:
        shape = store.layout
        self._store = store
        self._shape = shape
        self.record_bytes = 8 + shape.weight_bytes + 4 * (shape.state_columns + shape.counters)
        self._row_bytes = self.record_bytes - 8
        self.file = SpillFile(folder or Path(tempfile.gettempdir()), self.record_bytes, slack=SLACK)
        self._lock = (
            threading.Lock()
        )  # of who writes records that no word names yet, and of who frees what no word names
        self._opening = threading.Lock()
        self._opened = False
        self._dead: deque[NDArray[np.int64]] = deque()
        self._moved: set[int] = set()

    def close(self) -> None:
        self.file.close()

    # Pulls

    def pin(self) -> int | None:
        """Keep all records readable until ``unpin``; None while there is no file."""
        return self.file.pin() if self._opened else None

    def unpin(self, token: int | None) -> None:
        if token is not None:
            self.file.unpin(token)

    def read_weights(self, keys: Keys, where: Records, records: Records, out: NDArray[np.float32]) -> None:
        """Write the weights of keys: uint64[n], in the file as ``records``, to lines where: int64[n] of out: float32[.., dim].

        The rows come back into memory: in training, a push of the same keys follows.
        """
        content = self.read_of(keys, records)
        decode_records(content, self._shape, where, address_of(out))
        # The answer is whole: no memory for its rows, or a block that has just gone, does not matter to it.
        with contextlib.suppress(PSError):
            self._take_back(keys, records, content)

    def read_of(self, keys: Keys, records: Records) -> NDArray[np.uint8]:
        """Return the records, each of which must be that of its key."""
        content = self._read(records)
        wrong = np.flatnonzero(np.ascontiguousarray(content[:, :8]).view(np.uint64).reshape(len(keys)) != keys)
        if len(wrong):
            raise CorruptCheckpoint(
                f"table {self._store.spec.name}: the spill file gives another row for key {int(keys[wrong[0]])}: "
                "restore the job from its last checkpoint",
                table=self._store.spec.name,
            )
        return content

    def _read(self, records: NDArray[np.int64]) -> NDArray[np.uint8]:
        content = np.empty((len(records), self.record_bytes), np.uint8)
        self.file.read(records, content)
        return content

    # Whole pushes; the caller holds nothing.

    def bring_back_request(self, grouped: Grouped) -> None:
        """Take those rows of a request that are in the file back into memory."""
        token = self.pin()
        if token is None:
            return
        store = self._store
        try:
            keys, records = np.empty(grouped.n, np.uint64), np.empty(grouped.n, np.int64)
            found = list_cold(store.base, store.salt, grouped, keys, records)
            if found == 0:
                return
            self._take_back(keys[:found], records[:found], self.read_of(keys[:found], records[:found]))
        finally:
            self.unpin(token)

    def _take_back(self, keys: Keys, records: Records, content: NDArray[np.uint8]) -> None:
        """Give rows that were read slots again, as far as they are still in the file."""
        store, shape = self._store, self._shape
        done = np.zeros(len(keys), np.uint8)
        try:
            at = take_back(store.base, store.salt, store.bits, shape, keys, records, content, 0, done)
            while at < len(keys):
                block = np.empty(1, np.int32)
                blocks_of(keys[at : at + 1], store.salt, store.bits, block)
                with store.holding(int(block[0])):
                    store.stored(int(block[0])).reserve(0, SLOTS_AT_ONCE)
                at = take_back(store.base, store.salt, store.bits, shape, keys, records, content, at, done)
        finally:
            self._dead.append(records[done != 0])

    def spill_over(self, blocks: NDArray[np.int32]) -> None:
        """Let cold rows of those of the blocks that are over their part of the budget go to the file."""
        store = self._store
        most = self._most_rows()
        rows = store.descriptors[blocks, ROWS]
        over = blocks[rows > most + most // 16]
        # Until words name them, records that were just written look dead to ``tidy``. Who cannot be alone leaves it to the next.
        if len(over) == 0 or not self._lock.acquire(blocking=False):
            return
        try:
            self._spill_over(over, most, int((rows[rows > most + most // 16] - most).sum()))
        finally:
            self._lock.release()

    def _spill_over(self, over: NDArray[np.int32], most: int, room: int) -> None:
        store = self._store
        entries = np.empty(room + PLACES, np.int64)
        content = np.empty((room + PLACES, self.record_bytes), np.uint8)
        packed = np.empty((len(over), 5), np.int64)
        found = pack_cold(store.base, self._shape, over, most, entries, content, packed)
        if found == 0:
            return
        records = self._append(address_of(content), found)
        kept = np.zeros(found, np.uint8)
        name_records(store.base, self._shape, over, packed, entries[:found], records, kept)
        if kept.any():
            self._dead.append(records[kept != 0])

    def _most_rows(self) -> int:
        """Return how many rows of a block may be in memory."""
        store = self._store
        return max(LEAST_ROWS, store.spec.memory_bytes // max(1, len(store.blocks)) // self._row_bytes)

    def _append(self, address: int, n: int) -> Records:
        """Write packed rows to the file, and return their records: int64[n]."""
        with self._opening:
            if not self._opened:
                self.file.open()
                self._opened = True
        records = self.file.append(address, n)
        if int(records.max()) > RECORD:
            self.file.free(records)
            raise OutOfMemory(
                f"table {self._store.spec.name}: its spill file holds {RECORD} rows, and no more fit: add shards"
            )
        return records

    # One block; the caller holds it.

    def spill_for(self, block: int, rows: int) -> None:
        """Let cold rows of a block go to the file if ``rows`` more would take it over its part of the budget."""
        store = self._store
        words = store.descriptors[block]
        most = self._most_rows()
        need = int(words[ROWS]) + rows - most
        if need <= 0:
            return
        entries = np.empty(min(int(words[ROWS]), need + most // 16), np.int64)
        descriptor = store.base + block * DESCRIPTOR_BYTES
        found = choose_cold(descriptor, self._shape, entries)
        entries = entries[:found]
        if found == 0:
            return
        content = np.empty((found, self.record_bytes), np.uint8)
        pack_rows(descriptor, self._shape, entries, content)
        records = self._append(address_of(content), found)
        with store.shut(block):
            spill_entries(descriptor, self._shape, entries, records)
        words[SPILLED_ROWS] += found

    def bring_back(self, block: int, keys: Keys, *, hot: bool = True) -> None:
        """Take those of keys: uint64[n] that are in the file back into memory.

        ``hot``: as rows just asked for, and others go in their place; else as ``bring_back_range`` does.
        """
        store = self._store
        entries, records = np.empty(len(keys), np.int64), np.empty(len(keys), np.int64)
        found = find_spilled(store.base + block * DESCRIPTOR_BYTES, store.salt, keys, entries, records)
        entries, first = np.unique(entries[:found], return_index=True)  # a push may name a key twice
        self._bring_back(block, entries, records[first], hot=hot)

    def bring_back_range(self, block: int, begin: int, end: int) -> None:
        """Take the rows of buckets begin to end - 1 back into memory, all of them at once, as cold as they are.

        None goes to the file in their place, as it might be of these buckets too: ``spill_for`` afterwards makes up for it.
        """
        store = self._store
        if store.descriptors[block, SPILLED_ROWS]:
            entries, records = (np.empty((end - begin) * PLACES, np.int64) for _ in range(2))
            found = list_spilled(store.base + block * DESCRIPTOR_BYTES, begin, end, entries, records)
            self._bring_back(block, entries[:found], records[:found], hot=False)

    def _bring_back(self, block: int, entries: Records, records: Records, *, hot: bool) -> None:
        if len(entries) == 0:
            return
        store = self._store
        content = self._read(records)
        if hot:
            self.spill_for(block, len(entries))
        store.blocks[block].reserve(0, len(entries))
        with store.shut(block):
            unspill(store.base + block * DESCRIPTOR_BYTES, self._shape, entries, content, hot)
        store.descriptors[block, SPILLED_ROWS] -= len(entries)
        self._dead.append(records)

    def drop(self, records: Records) -> None:
        """Forget records of a block that is no longer stored."""
        if len(records):
            self._dead.append(records)

    def spilled_records(self, block: int) -> Records:
        """Return the records: int64[n] of all rows of a block that are in the file."""
        words = self._store.descriptors[block]
        if not words[SPILLED_ROWS]:
            return np.empty(0, np.int64)
        entries, records = (np.empty(int(words[SPILLED_ROWS]), np.int64) for _ in range(2))
        descriptor = self._store.base + block * DESCRIPTOR_BYTES
        found = list_spilled(descriptor, 0, int(words[COUNT]), entries, records)
        return records[:found]

    def with_cold(self, rows: BlockRows, words: NDArray[np.uint32]) -> BlockRows:
        """Return a block's rows with those behind them whose index words: uint32[m] say that they are in the file."""
        content = self._read(records_of(words[words >= SPILLED]))
        shape, n = self._shape, len(content)
        keys = np.ascontiguousarray(content[:, :8]).view(np.uint64).reshape(n)
        weights = np.empty((n, shape.dim), np.float32)
        state = np.empty((n, rows.state.shape[1]), np.float32)
        counters = np.empty((n, rows.counters.shape[1]), np.uint32)
        split_records(content, shape, np.arange(len(content)), address_of(weights), state, counters)
        return rows._replace(
            keys=np.concatenate([rows.keys, keys]),
            weights=np.concatenate([rows.weights, weights]),
            state=np.concatenate([rows.state, state]),
            counters=np.concatenate([rows.counters, counters]),
        )

    # Housekeeping; the caller holds nothing.

    def tidy(self) -> None:
        """Free what is dead, and let the file give disk space back; one caller at a time, others go on."""
        if sum(map(len, list(self._dead))) < TIDY_RECORDS or not self._lock.acquire(blocking=False):
            return
        try:
            while self._dead:
                records = self._dead.popleft()
                if self._moved:
                    gone = np.isin(records, np.fromiter(self._moved, np.int64, len(self._moved)))
                    self._moved.difference_update(records[gone].tolist())
                    records = records[~gone]
                if len(records):
                    try:
                        self.file.free(records)
                    except BaseException:
                        self._dead.append(records)
                        raise
            self.file.compact(self._move, segments=1)
        finally:
            self._lock.release()

    def _move(self, old: Records, new: Records, content: NDArray[np.uint8]) -> None:
        """Let the index point to records' new numbers; one that a push took back meanwhile needs none."""
        store = self._store
        keys = np.ascontiguousarray(content[:, :8]).view(np.uint64).reshape(len(old))
        adopted: NDArray[np.uint8] = np.zeros(len(keys), np.uint8)
        renumber(store.base, store.salt, store.bits, keys, old, new, adopted)
        lost = adopted == 0
        if lost.any():
            # Their old numbers are, or will be, in the queue of the dead, but compaction frees them itself.
            self._moved.update(old[lost].tolist())
            self._dead.append(new[lost])
