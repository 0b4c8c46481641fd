# SPDX-License-Identifier: Apache-2.0
"""Live images: all that later operations on a block depend on, for a copy of it on another shard that goes on with its owner.

    record    key (uint64) | weights as stored | state and counters | the undo ring's old values, zeros where there are none

A content (``embedding/content.py``) is what training has made of a block, and what checkpoints keep. A copy that shall stay the
same to the bit also needs what only later operations show: old values that an undo gives back, and the highest version of a
row that left. It needs no slots, no index and no hands of a clock: what an operation does to a block follows from this image
and the operation alone, or the operation names its rows (``Swept``).

Invariant: a block made by ``import_live`` of what ``export_live`` gave is taken by every push, undo and replayed sweep to the
same rows, bit for bit, the same version and the same tombstones as the block it was made of; tombstones of before the copy are
not known to it. A Malformed image changes nothing. Values that are not finite are no fault: the owner has them, and refusing
would leave the block without a copy. Any thread.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from oarlock.embedding.block import Block
from oarlock.embedding.content import NO_COUNTS, NO_KEYS
from oarlock.embedding.descriptor import (
    BUCKETS,
    CHUNKS,
    COUNT,
    ENTRIES,
    LEFT,
    NEXT,
    PENDING_KEYS,
    ROWS,
    SPILLED_ROWS,
    VERSION,
)
from oarlock.embedding.hashing import key_mix
from oarlock.embedding.index import PENDING, SPILLED, VALUE, find, home, insert, list_entries, records_of
from oarlock.embedding.jit import jit
from oarlock.embedding.pointer import (
    Int,
    address_in,
    copy,
    kernel_array,
    load_i64,
    load_u32,
    load_u64,
    store_i64,
    store_u64,
)
from oarlock.embedding.slab import Layout, row_at, undo_at
from oarlock.embedding.versions import MOST
from oarlock.embedding.viewed import Viewed
from oarlock.proto.errors import Malformed

Records = NDArray[np.uint8]

# Contents of one block that are in no place yet, one for each table below: each is placed, or freed.
Filled = tuple[Block, ...]

NO_RECORDS: Records = np.zeros((0, 0), np.uint8)


class LiveBlock(NamedTuple):
    """A block as a copy needs it, all of one instant.

    records: uint8[r, ``live_bytes``], its rows in any order; waiting: uint64[p], keys that are not admitted yet, and waited:
    uint32[p], how often they have come; sketch: the state of its sketch, empty if it has none; ``left``: the highest version of
    a row that was evicted; ``version``: how many operations had changed it; others: uint8[w, bytes], of rows that begin with
    their first part alone, those other parts that are there (``embedding/expanding.py``).
    """

    records: Records
    waiting: NDArray[np.uint64] = NO_KEYS
    waited: NDArray[np.uint32] = NO_COUNTS
    sketch: bytes = b""
    left: int = 0
    version: int = 0
    others: Records = NO_RECORDS


def keys_of(records: Records) -> NDArray[np.uint64]:
    """Return the keys: uint64[r] of records."""
    return np.ascontiguousarray(records[:, :8]).view(np.uint64).reshape(len(records))


@jit
def pack_records(
    descriptor: Int, shape: Layout, keys: NDArray[np.uint64], words: NDArray[np.uint32], out: NDArray[np.uint8]
) -> int:
    """Copy the rows of those entries that are in memory to lines 0, 1, ... of zeros: uint8[n, bytes]; return how many.

    The entries of other keys are put behind in keys and words, in any order.
    """
    chunks: Int = load_i64(descriptor, CHUNKS)
    old_bytes = shape.weight_bytes + 4 * shape.state_columns
    at = 0
    for i in range(keys.shape[0]):
        word = np.int64(words[i])
        if word >= PENDING:
            continue
        row, side = row_at(chunks, word & VALUE, shape)
        record = address_in(out, at * out.shape[1])
        store_u64(record, 0, keys[i])
        copy(record + 8, row, shape.weight_bytes)
        copy(record + 8 + shape.weight_bytes, side, shape.side_bytes)
        if shape.undo > 0:
            ring = np.int64(load_u32(side, shape.state_columns + shape.recorded))
            old = undo_at(chunks, word & VALUE, shape)
            begin = record + 8 + shape.weight_bytes + shape.side_bytes
            for back in range(1, (ring >> 16) + 1):
                offset = ((ring & 0xFFFF) - back) % shape.undo * old_bytes
                copy(begin + offset, old + offset, old_bytes)
        keys[i], keys[at] = keys[at], keys[i]
        words[i], words[at] = words[at], words[i]
        at += 1
    return at


@jit
def unpack_records(descriptor: Int, salt: np.uint64, shape: Layout, records: NDArray[np.uint8]) -> int:
    """Fill an empty block with room: slot i = record i. Return -1, or the position of the first key that came before."""
    buckets: Int = load_i64(descriptor, BUCKETS)
    count: Int = load_i64(descriptor, COUNT)
    chunks: Int = load_i64(descriptor, CHUNKS)
    for i in range(records.shape[0]):
        record = address_in(records, i * records.shape[1])
        key = load_u64(record, 0)
        line = home(buckets, count, key_mix(salt, key))
        if find(buckets, count, line, key) != 0:
            return i
        insert(buckets, count, line, key, np.uint32(i))
        row, side = row_at(chunks, np.int64(i), shape)
        copy(row, record + 8, shape.weight_bytes)
        copy(side, record + 8 + shape.weight_bytes, shape.side_bytes)
        if shape.undo > 0:
            begin = record + 8 + shape.weight_bytes + shape.side_bytes
            copy(undo_at(chunks, np.int64(i), shape), begin, shape.undo_pitch)
    for word in (ENTRIES, ROWS, NEXT):
        store_i64(descriptor, word, np.int64(records.shape[0]))
    return -1


class Live(Viewed):
    """The stored blocks of a table, whose copies can be made elsewhere."""

    @property
    def live_bytes(self) -> tuple[int, int]:
        """Return the bytes of one of a LiveBlock's records, and of one of its others: there are none here."""
        return 8 + self.layout.weight_bytes + self.layout.side_bytes + self.layout.undo_pitch, 0

    def export_live(self, block: int) -> LiveBlock:
        """Return a copy of all that operations on a stored block depend on, all of one instant."""
        self.stored(block)
        with self.holding(block) as descriptor:
            found = self.stored(block)
            words = self.descriptors[block]
            keys, values = np.empty(int(words[ENTRIES]), np.uint64), np.empty(int(words[ENTRIES]), np.uint32)
            list_entries(int(words[BUCKETS]), 0, int(words[COUNT]), keys, values)
            records = np.zeros((int(words[ROWS]) + int(words[SPILLED_ROWS]), self.live_bytes[0]), np.uint8)
            waiting, waited = NO_KEYS, NO_COUNTS
            rows = int(pack_records(descriptor, self.layout, keys, values, records))
            keys, values = keys[rows:], values[rows:]
            if self._cold is not None and words[SPILLED_ROWS]:
                # Where rows spill there is no undo: the file's records are as long.
                filed = values >= SPILLED
                records[rows:] = self._cold.read_of(keys[filed], records_of(values[filed]))
            if words[PENDING_KEYS]:
                waits = values < SPILLED
                waiting, waited = keys[waits], values[waits] & np.uint32(VALUE)
            sketch = found.sketch.export() if found.sketch is not None else b""
            return LiveBlock(records, waiting, waited, sketch, int(words[LEFT]), int(words[VERSION]))

    def import_live(self, block: int, live: LiveBlock, *, version: int | None = None) -> None:
        """Store a block that is the one that ``live`` was made of, replacing what was there; a Malformed one changes nothing.

        ``version``: its version from now on, that of ``live`` unless given.
        """
        self.place_live(block, self.fill_live(block, live, version=version))

    def place_live(self, block: int, filled: Filled) -> None:
        """Store what ``fill_live`` has made, replacing what was there."""
        with self._lock:
            self._place(block, filled[0])
        self._keep_budget(block)

    def fill_live(self, block: int, live: LiveBlock, *, version: int | None = None) -> Filled:
        """Return a block made of an image, in no place yet: for ``place_live``, or to be freed. Nothing stored is changed."""
        return (self._filled_live(block, live, version),)

    def _filled_live(self, block: int, live: LiveBlock, version: int | None) -> Block:
        self._in_range(block)
        where = f"table {self.spec.name}, block {block}"
        records = kernel_array("records", live.records, np.uint8, 2)
        size = self.live_bytes[0]
        if records.shape[1] != size and records.size:
            raise Malformed(f"{where}: records of {records.shape[1]} bytes where {size} were expected")
        if len(live.others):
            raise Malformed(f"{where}: rows with parts of their own, but the table's have one part")
        if not 0 <= live.left <= (MOST if self.layout.version >= 0 else 0):
            raise Malformed(f"{where}: left = {live.left} is no version of a row of this table")
        records = records if records.size else np.zeros((0, size), np.uint8)
        keys = keys_of(records)
        waiting, waited = self._checked_keys(block, keys, live.waiting, live.waited)
        self._check_rings(where, records)
        number = live.version if version is None else version
        fresh = self._built(
            block,
            keys,
            lambda line: unpack_records(line, self.salt, self.layout, records),
            waiting,
            waited,
            live.sketch,
            number,
        )
        fresh.descriptor[LEFT] = live.left
        return fresh

    def _check_rings(self, where: str, records: Records) -> None:
        """Raise Malformed unless each undo ring is one: kernels take its words for places."""
        shape = self.layout
        if shape.undo:
            at = 8 + shape.weight_bytes + 4 * (shape.state_columns + shape.recorded)
            rings = np.ascontiguousarray(records[:, at : at + 4]).view(np.uint32)
            if ((rings >> 16 > shape.undo) | ((rings & np.uint32(0xFFFF)) >= shape.undo)).any():
                raise Malformed(f"{where}: an undo ring of more than {shape.undo} old values")
