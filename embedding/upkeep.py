# SPDX-License-Identifier: Apache-2.0
"""What happens to rows beside pulls and pushes: they leave, come back, are explained, move to the spill file.

Invariant: what leaves is told by a tombstone with the version of the block that it left with; everything here works under
the lock of one block at a time, in bounded slices where it may take long; what fails has changed nothing. Callable from any
thread.
"""

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from oarlock.embedding.cold import ColdRows
from oarlock.embedding.content import BlockRows
from oarlock.embedding.descriptor import COUNT, DESCRIPTOR_BYTES, ENTRIES, HAND, ROWS, VERSION
from oarlock.embedding.evict import Sweep, Swept, decay_entries, evict_entries, find_rows, oldest, sweep_buckets
from oarlock.embedding.explain import explain_row
from oarlock.embedding.hashing import blocks_of
from oarlock.embedding.index import PLACES
from oarlock.embedding.live import Live
from oarlock.embedding.pointer import address_of, kernel_array
from oarlock.embedding.spec import TableSpec
from oarlock.embedding.undo import undo_rows
from oarlock.proto.errors import InvalidArgument, Malformed, PSError

LEAST_ROWS = 16  # of a block, however small the table's byte budget is

Keys = NDArray[np.uint64]


class Upkeep(Live):
    """The stored blocks of a table with all that its policies do. ``evicted`` counts rows since it was made."""

    def __init__(self, spec: TableSpec, *, seed: int, spill_folder: Path | None = None) -> None:
        super().__init__(spec, seed=seed)
        self.evicted = 0
        self._tally = threading.Lock()  # of counters that requests in different blocks share
        self._cold = ColdRows(self, spill_folder) if spec.memory_bytes else None

    def sweep(self, block: int, *, tick: int, buckets: int = 2048) -> Swept:
        """Evict what the table's rules say from the next ``buckets`` buckets of a block's index, and let what stays decay.

        The keys that left are recorded as tombstones. With what this returns, ``replay_sweep`` does the same to a copy.
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
            decayed = np.empty_like(gone) if rules.score else gone[:0]
            values = np.empty(self.spec.dim, np.float32)
            self.room_to_sweep(block, begin, end)
            with self.shut(block):
                left, stay = sweep_buckets(
                    descriptor, self.layout, sweep, tick, begin, end, address_of(values), gone, decayed
                )
            wrapped = end == int(words[COUNT])
            words[HAND] = 0 if wrapped else end
            done = Swept(int(left), wrapped, gone[:left].copy(), decayed[:stay].copy())
            self._swept(block, done.gone, done.decayed)
            return done

    def replay_sweep(self, block: int, gone: Keys, decayed: Keys) -> None:
        """Do to a copy of a block what a sweep did to its owner's: gone: uint64[g] leave, decayed: uint64[d] decay.

        Malformed, and nothing is changed, unless each key is named once and has a row: the block is then no copy.
        """
        gone, decayed = kernel_array("gone", gone, np.uint64), kernel_array("decayed", decayed, np.uint64)
        where = f"table {self.spec.name}, block {block}"
        if len(decayed) and not self.spec.eviction.score:
            raise Malformed(f"{where}: {len(decayed)} rows shall decay, but the table's eviction has no score")
        keys = np.concatenate([gone, decayed])
        entries = np.empty(len(keys), np.int64)
        with self.holding(block) as descriptor:
            self.stored(block)
            if self._cold is not None:
                self._cold.bring_back(block, keys, hot=False)
            missing = int(find_rows(descriptor, self.salt, keys, entries))
            if missing >= 0:
                raise Malformed(
                    f"{where}: key {int(keys[missing])} was swept, but has no row here: copy the block anew"
                )
            if len(np.unique(entries)) < len(entries):
                raise Malformed(f"{where}: a key comes twice in a sweep")
            self.room_to_save(block, len(keys))
            with self.shut(block):
                decay_entries(descriptor, self.layout, float(self.spec.eviction.decay), entries[len(gone) :])
                evict_entries(descriptor, self.layout, entries[: len(gone)])
            self._swept(block, gone, decayed)

    def _swept(self, block: int, gone: Keys, decayed: Keys) -> None:
        """Record what a slice of a sweep did to a block that is held: one operation, if it did anything."""
        self._bury(block, gone)
        self.descriptors[block, VERSION] += int(len(gone) == 0 and len(decayed) > 0)
        # The sweep is done, and a copy will be told so: it must not fail now.
        self._spill_if_possible(block)

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

    def _keep_budget(self, block: int) -> None:
        # Blocks that come, many of them one after the other when a job is restored, must not all stay in memory.
        with self.holding(block):
            if block in self.blocks:
                self._spill_if_possible(block)

    def _spill_if_possible(self, block: int) -> None:
        """Let a block that is held keep to its part of the budget; if the disk is full, that waits for a push to say so."""
        if self._cold is not None:
            with contextlib.suppress(PSError, OSError, MemoryError):
                self._cold.spill_for(block, 0)

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
            if self._cold is not None:
                self._cold.spill_for(block, rows)
            found.reserve(rows, rows)

    def _most_rows(self) -> int:
        """Return how many rows a block may have under the table's byte budget, 0: no budget.

        The block's own part: what other blocks are stored here differs between the shards that have a copy of it.
        """
        budget = self.spec.eviction.max_bytes
        return max(LEAST_ROWS, budget // self.spec.blocks // self.row_bytes) if budget else 0

    def _make_way(self, block: int, rows: int, keys: int) -> None:
        """Evict what must go before a block may have so many more ``rows``, and a tenth of it, for a push of so many ``keys``.

        Memory for all of the keys comes first, as rows of theirs may go, too: the push that follows shall not fail for want
        of it.
        """
        with self.holding(block):
            found, most = self.stored(block), self._most_rows()
            have = int(self.descriptors[block, ROWS])
            go = min(have, have + rows - most + most // 10)
            found.reserve(keys, max(0, keys - go))
            self._trim(block, go)

    def _trim(self, block: int, rows: int) -> None:
        """Evict the ``rows`` rows of a block that were least recently, or least frequently, updated."""
        words = self.descriptors[block]
        recent = self.spec.eviction.order == "recent"
        column = self.layout.updated if recent else self.layout.occurrences
        self.room_to_save(block, rows)
        with self.shut(block):
            gone = oldest(self.base + block * DESCRIPTOR_BYTES, int(words[ENTRIES]), self.layout, column, rows)
        self._bury(block, gone)
