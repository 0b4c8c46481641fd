# SPDX-License-Identifier: Apache-2.0
"""A view of a table: the content of its blocks as it was when the view began, read while pushes go on.

    begin_view(n)    a stamp goes on; from now on what changes is saved first, once
    content(block)   all of it, changes(block) what changed since the last committed view; as often as wanted
    release(block)   nothing is saved for it any more
    commit_view(n)   it is on disk: the next view's changes count from here

Invariant: what a view gives of a block is what ``export_block`` would have given when the view began, but for the order: rows
are sorted by key. They are copied in slices under the block's mutex, so a push waits for one slice, and a pull for nothing. A
table has one open view, which keeps blocks that are dropped or replaced meanwhile until they are released. Any thread; one
view is read by one thread at a time.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from oarlock.embedding.cold_kernels import split_records
from oarlock.embedding.content import NO_COUNTS, NO_KEYS, BlockRows
from oarlock.embedding.descriptor import ENTRIES
from oarlock.embedding.index import PENDING, SPILLED, STAMP_BIT, VALUE
from oarlock.embedding.lock import enter_mutex, leave_mutex
from oarlock.embedding.pointer import address_of
from oarlock.embedding.saved import Part
from oarlock.embedding.stamps import EVERY, bits_of
from oarlock.embedding.view_kernels import (
    BEFORE_KEY,
    CHANGED,
    FILED_AT,
    PROGRESS,
    ROWS_AT,
    WAITING_AT,
    copy_unchanged,
    list_unchanged,
)
from oarlock.proto.errors import Internal, InvalidArgument

if TYPE_CHECKING:
    from oarlock.embedding.block import Block
    from oarlock.embedding.viewed import Viewed

SLICE = 2048  # keys that are copied before a push may come in

Keys = NDArray[np.uint64]


class Changes(NamedTuple):
    """What came to a block since the last committed view: rows and waiting keys, and gone: uint64[g], keys whose rows left.

    To bring a block up to date: forget rows and waiting counts of gone, then take the rows, and then the waiting keys, each of
    which takes the place of what was there of its key, row or count. A key that left and has a row again is not in gone.
    """

    rows: BlockRows
    gone: Keys


class Noted(NamedTuple):
    """A block when a view began: its memory, its version, how many rows it had and keys that wait, and the phase and version
    of its last committed view."""

    block: "Block"
    version: int
    rows: int
    waiting: int
    known: int
    known_version: int


@contextmanager
def _locked(content: "Block") -> Iterator[None]:
    """Hold a block's mutex, which goes with it when it is dropped or replaced."""
    while True:
        words = content.descriptor
        enter_mutex(address_of(words))
        if content.descriptor is words:
            break
        leave_mutex(address_of(words))
    try:
        yield
    finally:
        leave_mutex(address_of(words))


class TableView:
    """The blocks of ``table`` as they were when its view ``number`` began. Made by ``begin_view``."""

    def __init__(self, table: "Viewed", number: int, phase: int) -> None:
        self.number = number
        self.phase = phase
        self.noted: dict[int, Noted] = {}
        self._table = table

    @property
    def blocks(self) -> NDArray[np.int32]:
        """Return the blocks that were stored when the view began, ascending: int32[m]."""
        return np.array(sorted(self.noted), np.int32)

    def version(self, block: int) -> int:
        """Return how many operations had changed a block when the view began."""
        return self._note(block).version

    def content(self, block: int) -> BlockRows:
        """Return all of a block as it was, whether it is still stored here or not."""
        found = self.read(block, EVERY)
        note = self._note(block)
        self.must_be(block, (len(found.keys), len(found.waiting)), (note.rows, note.waiting))
        return found

    def changes(self, block: int) -> Changes | None:
        """Return what came to a block since the last committed view; None: that is not known, write it whole.

        It is not known of a block that is new here since, or whose tombstones are forgotten, or after six aborted views.
        """
        note = self._note(block)
        if note.known == 0:
            return None
        with self.holding(block) as mine:
            buried = mine.tombstones.since(note.known_version)
        if buried is None:
            return None
        keys, versions = buried
        rows = self.read(block, bits_of(note.known, self.phase))
        return Changes(rows, np.setdiff1d(keys[versions <= note.version], rows.keys))

    def release(self, block: int) -> None:
        """Free what was saved for a block; its view cannot be read any more."""
        content = self._note(block).block
        with _locked(content):
            self._table.end_saving(content, self)

    def close(self) -> None:
        """Release all blocks. May be called again."""
        for block in list(self.noted):
            self.release(block)

    def release_retired(self) -> None:
        """Release the blocks that are in no place any more: nobody else would free them."""
        for block, note in self.noted.items():
            if note.block.retired:
                self.release(block)

    # Inside

    def _note(self, block: int) -> Noted:
        note = self.noted.get(block)
        if note is None:
            raise InvalidArgument(
                f"table {self._table.spec.name}: block {block} was not stored here when view {self.number} began"
            )
        return note

    @contextmanager
    def holding(self, block: int) -> "Iterator[Block]":
        """Keep others from changing a block of the view, wherever it is; InvalidArgument if it cannot be read any more."""
        content = self._note(block).block
        with _locked(content):
            if content.saved is None or content.saved.view is not self:
                raise InvalidArgument(
                    f"table {self._table.spec.name}: view {self.number} of block {block} was released, "
                    "or could not be kept"
                )
            yield content

    def must_be(self, block: int, found: tuple[int, int], expected: tuple[int, int]) -> None:
        """Raise Internal unless as many rows and waiting keys were found as there were."""
        if found != expected:
            raise Internal(
                f"table {self._table.spec.name}, block {block}: view {self.number} has {found[0]} rows and {found[1]} "
                f"waiting keys, not {expected[0]} and {expected[1]}: something changed and was not saved"
            )

    def read(self, block: int, wanted: int, only: Keys | None = None) -> BlockRows:
        """Return the keys of a block whose stamps the bits of ``wanted`` name, or those of them that are among ``only``."""
        note = self._note(block)
        with self.holding(block) as mine:
            words = mine.descriptor
            keys, values = np.empty(int(words[ENTRIES]), np.uint64), np.empty(int(words[ENTRIES]), np.uint32)
            oldest = note.known or self.phase
            old = bits_of(mine.track.floor, oldest)
            found = int(list_unchanged(address_of(words), wanted, old, keys, values))
            mine.track.floor = max(mine.track.floor, oldest)
            before = mine.saved.parts(words) if mine.saved is not None else []
        keys, values = keys[:found], values[:found]
        if only is not None:
            here = np.isin(keys, only)
            keys, values = keys[here], values[here]
        return _Copy(self, block, wanted, only, keys, values, before).run()


class _Copy:
    """One reading of a block: keys: uint64[n] with words: uint32[n] that were unchanged, and what was ``saved`` by then."""

    def __init__(
        self,
        view: TableView,
        block: int,
        wanted: int,
        only: Keys | None,
        keys: Keys,
        words: NDArray[np.uint32],
        saved: list[Part],
    ) -> None:
        self._view, self._table, self._block = view, view._table, block
        self._wanted, self._only = wanted, only
        self._early = sum(map(len, saved))
        are_rows = (words < PENDING) | (words >= SPILLED)
        found, waits = [keys[are_rows]], len(words) - int(np.count_nonzero(are_rows))
        for part in saved:
            mine, kinds, chosen = self._choose(part)
            waits += int(np.count_nonzero(chosen & (kinds >= PENDING)))
            found.append(mine[chosen & (kinds < PENDING)])
        # Each row is written to the place at which a file has it: moving all of them there later would cost as much again.
        self._sorted: Keys = np.sort(np.concatenate(found))
        own = self._sorted if len(self._sorted) == len(found[0]) else np.sort(found[0])
        self._keys: Keys = np.concatenate([own, keys[~are_rows]])
        self._places: NDArray[np.int64] = np.zeros(len(keys), np.int64)
        self._places[: len(own)] = self._places_of(own)
        rows = len(self._sorted)
        self._out = BlockRows(
            np.empty(rows, np.uint64),
            np.empty((rows, self._table.spec.dim), np.float32),
            np.empty((rows, self._table.state_columns), np.float32),
            np.empty((rows, self._table.counters), np.uint32),
            np.empty(waits, np.uint64) if waits else NO_KEYS,
            np.empty(waits, np.uint32) if waits else NO_COUNTS,
        )
        self._fates: NDArray[np.uint8] = np.zeros(len(keys), np.uint8)
        self._progress: NDArray[np.int64] = np.zeros(PROGRESS, np.int64)
        self._entries: NDArray[np.int64] = np.empty(SLICE, np.int64)
        self._records: NDArray[np.int64] = np.empty(SLICE, np.int64)
        self._filed: Keys = np.empty(SLICE, np.uint64)

    def run(self) -> BlockRows:
        view, block, out = self._view, self._block, self._out
        for begin in range(0, len(self._keys), SLICE):
            self._copy_slice(begin, min(begin + SLICE, len(self._keys)))
            os.sched_yield()  # who waits for the block shall get it
        with view.holding(block) as mine:
            assert mine.saved is not None
            saved = mine.saved.parts(mine.descriptor)
            sketch = mine.saved.sketch
            if sketch is None:
                sketch = mine.sketch.export() if mine.sketch is not None else b""
        self._add_saved(saved)
        found = int(self._progress[ROWS_AT]), int(self._progress[WAITING_AT])
        view.must_be(block, found, (len(out.keys), len(out.waiting)))
        return out._replace(sketch=sketch)

    def _copy_slice(self, begin: int, end: int) -> None:
        table, out, cold = self._table, self._out, self._table._cold
        start = self._progress.copy()
        while True:
            # As long as there is a pin, records that words name stay readable.
            token = cold.pin() if cold is not None else None
            try:
                with self._view.holding(self._block) as mine:
                    copy_unchanged(
                        address_of(mine.descriptor),
                        table.salt,
                        table.layout,
                        self._keys,
                        self._places,
                        begin,
                        end,
                        self._entries,
                        self._progress,
                        out.keys,
                        address_of(out.weights),
                        out.state,
                        out.counters,
                        out.waiting,
                        out.waited,
                        self._fates,
                        self._filed,
                        self._records,
                    )
                filed = int(self._progress[FILED_AT])
                if cold is None or filed == 0:
                    return
                if token is not None:
                    self._add_rows(self._filed[:filed], cold.read_of(self._filed[:filed], self._records[:filed]))
                    return
            finally:
                if cold is not None:
                    cold.unpin(token)
            self._progress[:] = start  # the file came to be between the pin and the look

    def _add_rows(self, keys: Keys, records: Part) -> None:
        """Add rows that are given as records of the spill file: uint8[n, bytes], which may be longer than those are."""
        out, places = self._out, self._places_of(keys)
        out.keys[places] = keys
        split_records(records, self._table.layout, places, address_of(out.weights), out.state, out.counters)
        self._progress[ROWS_AT] += len(keys)

    def _places_of(self, keys: Keys) -> NDArray[np.int64]:
        """Return where rows of these keys go."""
        return np.searchsorted(self._sorted, keys)

    def _choose(self, part: Part) -> tuple[Keys, NDArray[np.uint32], NDArray[np.bool_]]:
        """Return the keys: uint64[n] and words: uint32[n] of saved keys, and which of them are wanted: bool[n]."""
        words = np.ascontiguousarray(part[:, :4]).view(np.uint32).reshape(-1)
        keys = np.ascontiguousarray(part[:, BEFORE_KEY : BEFORE_KEY + 8]).view(np.uint64).reshape(-1)
        stamps = (words >> np.uint32(STAMP_BIT)) & np.uint32(7)
        chosen = (np.uint32(self._wanted) >> stamps) & np.uint32(1) != 0
        if self._only is not None:
            chosen &= np.isin(keys, self._only)
        return keys, words, chosen

    def _add_saved(self, saved: list[Part]) -> None:
        """Add what was saved before the keys were listed, and of what was saved later that which no slice has copied."""
        missed = self._keys[self._fates == CHANGED]
        at = 0
        for part in saved:
            keys, words, chosen = self._choose(part)
            late = np.arange(at, at + len(part)) >= self._early
            if late.any():
                chosen &= ~late | np.isin(keys, missed)
            at += len(part)
            waits = np.flatnonzero(chosen & (words >= PENDING))
            rows = np.flatnonzero(chosen & (words < PENDING))
            begin = int(self._progress[WAITING_AT])
            self._out.waiting[begin : begin + len(waits)] = keys[waits]
            self._out.waited[begin : begin + len(waits)] = words[waits] & np.uint32(VALUE)
            self._progress[WAITING_AT] += len(waits)
            if len(rows):
                self._add_rows(keys[rows], np.ascontiguousarray(part[rows, BEFORE_KEY:]))
