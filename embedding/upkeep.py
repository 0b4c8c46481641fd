# SPDX-License-Identifier: Apache-2.0
"""What happens to rows beside pulls and pushes: they leave, come back, are explained, move to the spill file.

Invariant: what leaves is told by a tombstone with the version of the block that it left with; everything here works under
the lock of one block at a time, in bounded slices where it may take long. Callable from any thread.
"""

import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from oarlock.embedding.cold import ColdRows
from oarlock.embedding.content import BlockRows
from oarlock.embedding.descriptor import COUNT, DESCRIPTOR_BYTES, ENTRIES, HAND, ROWS, VERSION
from oarlock.embedding.evict import Sweep, oldest, sweep_buckets
from oarlock.embedding.explain import explain_row
from oarlock.embedding.hashing import blocks_of
from oarlock.embedding.index import PLACES
from oarlock.embedding.pointer import address_of, kernel_array
from oarlock.embedding.spec import TableSpec
from oarlock.embedding.undo import undo_rows
from oarlock.embedding.viewed import Viewed
from oarlock.proto.errors import InvalidArgument

Keys = NDArray[np.uint64]


class Upkeep(Viewed):
    """The stored blocks of a table with all that its policies do. ``evicted`` counts rows since it was made."""

    def __init__(self, spec: TableSpec, *, seed: int, spill_folder: Path | None = None) -> None:
        super().__init__(spec, seed=seed)
        self.evicted = 0
        self._tally = threading.Lock()  # of counters that requests in different blocks share
        self._cold = ColdRows(self, spill_folder) if spec.memory_bytes else None

    def sweep(self, block: int, *, tick: int, buckets: int = 2048) -> tuple[int, bool]:
        """Evict what the table's rules say from the next ``buckets`` buckets of a block's index.

        Return how many rows left, and whether the sweep came to the end of the block. The keys are recorded as tombstones.
        """
        rules = self.spec.eviction
        with self.holding(block) as descriptor:
            self.stored(block)
            words = self.descriptors[block]
            begin = int(words[HAND])
            end = min(begin + max(1, int(buckets)), int(words[COUNT]))
            if self._cold is not None:
                self._cold.bring_back_range(block, begin, end)
            sweep = Sweep(
                rules.age,
                rules.occurrences,
                float(rules.norm) ** 2,
                float(rules.score),
                float(rules.decay),
                float(self.spec.admission.nonclick),
                float(self.spec.admission.click),
            )
            gone = np.empty((end - begin) * PLACES, np.uint64)
            values = np.empty(self.spec.dim, np.float32)
            self.room_to_sweep(block, begin, end)
            with self.shut(block):
                left = sweep_buckets(descriptor, self.layout, sweep, tick, begin, end, address_of(values), gone)
            wrapped = end == int(words[COUNT])
            words[HAND] = 0 if wrapped else end
            self._bury(block, gone[:left])
            words[VERSION] += int(left == 0 and rules.score > 0)  # what stays has decayed
            if self._cold is not None:
                self._cold.spill_for(block, 0)
            return int(left), wrapped

    def _bury(self, block: int, keys: Keys) -> None:
        if len(keys):
            self.descriptors[block, VERSION] += 1
            self.blocks[block].tombstones.record(keys.copy(), int(self.descriptors[block, VERSION]))
            with self._tally:
                self.evicted += len(keys)

    def tombstones(self, block: int, *, since: int = 0) -> tuple[Keys, NDArray[np.int64]] | None:
        """Return the keys that left a block after version ``since``, with versions; None: it remembers no longer so far."""
        with self.holding(block):
            return self.stored(block).tombstones.since(since)

    def forget_tombstones(self, block: int, *, until: int) -> None:
        """Forget what left a block at version ``until`` or before."""
        with self.holding(block):
            self.stored(block).tombstones.forget(until)

    def undo(self, keys: Keys, *, steps: int = 1) -> NDArray[np.int32]:
        """Take back the last ``steps`` updates of each row; return int32[n], how many of them were still kept.

        Counters stay; keys without a row, or of blocks stored elsewhere, give 0.
        """
        if not self.spec.guard.undo:
            raise InvalidArgument(f"table {self.spec.name} keeps no old values: set guard.undo = n")
        if steps < 1:
            raise InvalidArgument(f"steps = {steps}: give 1 or more")
        keys = kernel_array("keys", keys, np.uint64)
        done = np.zeros(len(keys), np.int32)
        for block, where in self._by_block(keys):
            with self.holding(block) as descriptor:
                if block in self.blocks:
                    self.room_to_save(block, len(where))
                    part = np.zeros(len(where), np.int32)
                    with self.shut(block):
                        undo_rows(descriptor, self.salt, self.layout, keys[where], steps, part)
                    done[where] = part
                    self.descriptors[block, VERSION] += int(part.any())
        return done

    def explain(self, key: int, *, tick: int | None = None) -> dict[str, object]:
        """Return everything known of one key: where it is, what its row holds, and how it stands with the policies."""
        return explain_row(self, key, tick)

    def close(self) -> None:
        """Give back what is not memory: the spill file."""
        if self._cold is not None:
            self._cold.close()

    # Inside

    def bring_back(self, block: int, keys: Keys) -> None:
        """Take rows of a block back from the spill file; the caller holds the block."""
        if self._cold is not None:
            self._cold.bring_back(block, keys)

    def _pin_cold(self) -> int | None:
        return self._cold.pin() if self._cold is not None else None

    def _unpin_cold(self, token: int | None) -> None:
        if self._cold is not None:
            self._cold.unpin(token)

    def _forget_cold(self, block: int) -> None:
        if self._cold is not None:
            self._cold.drop(self._cold.spilled_records(block))

    def _with_cold(self, rows: BlockRows, words: NDArray[np.uint32]) -> BlockRows:
        return self._cold.with_cold(rows, words) if self._cold is not None else rows

    def _by_block(self, keys: Keys) -> Iterator[tuple[int, NDArray[np.int64]]]:
        """Yield each stored block that some of keys belong to, with their positions."""
        blocks = np.empty(len(keys), np.int32)
        blocks_of(keys, self.salt, self.bits, blocks)
        for block in np.unique(blocks).tolist():
            if block in self.blocks:
                yield block, np.flatnonzero(blocks == block)

    def _make_room(self, block: int, rows: int) -> None:
        """See to it that a block can take so many more keys and rows."""
        with self.holding(block):
            found = self.stored(block)
            words = self.descriptors[block]
            if self._cold is not None:
                self._cold.spill_for(block, rows)
            most = self._most_rows()
            if most and int(words[ROWS]) + rows > most:
                self._trim(block, int(words[ROWS]) + rows - most + most // 10)
            found.reserve(rows, rows)

    def _most_rows(self) -> int:
        """Return how many rows a block may have under the table's byte budget, 0: no budget."""
        budget = self.spec.eviction.max_bytes
        return max(16, budget // max(1, len(self.blocks)) // self.row_bytes) if budget else 0

    def _trim(self, block: int, rows: int) -> None:
        """Evict the ``rows`` rows of a block that were least recently, or least frequently, updated."""
        words = self.descriptors[block]
        recent = self.spec.eviction.order == "recent"
        column = self.layout.updated if recent else self.layout.occurrences
        self.room_to_save(block, rows)
        with self.shut(block):
            gone = oldest(self.base + block * DESCRIPTOR_BYTES, int(words[ENTRIES]), self.layout, column, rows)
        self._bury(block, gone)
