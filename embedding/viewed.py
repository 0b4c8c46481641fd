# SPDX-License-Identifier: Apache-2.0
"""A table's views: how they begin, what is saved for them, how they are committed (``embedding/view.py`` reads them).

Invariant: a view begins for each block at one instant, under the block's mutex; who begins one keeps pushes out, if all
blocks are to be of one instant. What cannot be saved for want of memory ends the view of that block, and nothing else.
"""

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from oarlock.embedding.block import Block
from oarlock.embedding.descriptor import (
    COUNT,
    ENTRIES,
    PENDING_KEYS,
    ROWS,
    SAVED,
    SAVED_ROOM,
    SAVING,
    SKETCH_SAVED,
    SPILLED_ROWS,
    STAMP,
    VERSION,
)
from oarlock.embedding.index import STAMP_BIT
from oarlock.embedding.saved import PUSHES, Saved
from oarlock.embedding.spec import TableSpec
from oarlock.embedding.stamps import stamp_of, wears_out
from oarlock.embedding.store import Store
from oarlock.embedding.view import Noted, TableView
from oarlock.embedding.view_kernels import count_stale, list_unchanged, saved_bytes
from oarlock.proto.errors import InvalidArgument

if TYPE_CHECKING:
    from oarlock.embedding.cold import ColdRows

_NO_KEYS: NDArray[np.uint64] = np.zeros(0, np.uint64)
_NO_WORDS: NDArray[np.uint32] = np.zeros(0, np.uint32)


class Viewed(Store):
    """The stored blocks of a table, with views of them."""

    def __init__(self, spec: TableSpec, *, seed: int) -> None:
        super().__init__(spec, seed=seed)
        self._cold: ColdRows | None = None
        self._view: TableView | None = None

    def begin_view(self, number: int) -> TableView:
        """Begin view ``number`` of all stored blocks, and end an older one; the caller keeps pushes out meanwhile."""
        if isinstance(number, bool) or not isinstance(number, int) or number < 0:
            raise InvalidArgument(f"table {self.spec.name}: view {number!r}: give an integer from 0 on")
        with self._lock:
            phase = self.phase + 1
            if self._view is not None:
                self._view.release_retired()
            view = TableView(self, number, phase)
            for block, content in self.blocks.items():
                with self.holding(block) as descriptor:
                    worn = wears_out(content.track, phase)
                    words = self.descriptors[block]
                    if worn:
                        words[STAMP] = 0  # so that none is spared
                        list_unchanged(descriptor, 0, worn, _NO_KEYS, _NO_WORDS)
                    words[STAMP] = stamp_of(phase) << STAMP_BIT
                    words[SAVING], words[SAVED], words[SAVED_ROOM] = 1, 0, 0
                    words[SKETCH_SAVED] = int(content.sketch is None)
                    content.saved = Saved(view, saved_bytes(self.layout))
                    track = content.track
                    rows, waiting = int(words[ROWS]) + int(words[SPILLED_ROWS]), int(words[PENDING_KEYS])
                    view.noted[block] = Noted(content, int(words[VERSION]), rows, waiting, track.known, track.version)
            self.phase = phase
            self._view = view
            return view

    def commit_view(self, number: int) -> bool:
        """Let changes count from view ``number``, which is on disk; False, and nothing is done, if another one began later."""
        with self._lock:
            view = self._view
            if view is None or view.number != number:
                return False
            # What was dropped or replaced is not what is stored here now: nothing becomes known of that.
            for note in view.noted.values():
                note.block.track.known, note.block.track.version = view.phase, note.version
            return True

    def end_saving(self, content: Block, view: TableView) -> None:
        """Free what was saved of a block for ``view``, if anything still is, and what only that keeps; the caller holds it."""
        saved = content.saved
        if saved is not None and saved.view is view:
            content.descriptor[SAVING] = 0
            content.saved = None
            if content.retired:
                self._unpin_cold(saved.pin)
                content.free()

    # What those do who change a block; they hold it.

    def room_to_save(self, block: int, n: int, *, least: int = 0, sketch: bool = False) -> None:
        """See to it that ``n`` more keys of a block can be saved, or better ``least``; ``sketch``: that is to change, too."""
        words, content = self.descriptors[block], self.blocks[block]
        saved = content.saved
        if not words[SAVING] or saved is None:
            return
        try:
            saved.make_room(words, n, least)
            if sketch and not words[SKETCH_SAVED] and content.sketch is not None:
                saved.sketch = content.sketch.export()
                words[SKETCH_SAVED] = 1
        except MemoryError:
            self.end_saving(content, saved.view)

    def room_to_sweep(self, block: int, begin: int = 0, end: int | None = None) -> None:
        """See to it that all rows of buckets begin to end - 1 can be saved."""
        words = self.descriptors[block]
        if words[SAVING]:
            last = int(words[COUNT]) if end is None else end
            self.room_to_save(block, int(count_stale(self.base + block * self.descriptors.strides[0], begin, last)))

    def room_to_push(self, blocks: NDArray[np.int32], counts: NDArray[np.int32], need: int) -> None:
        """Make room to save ``need`` keys of the first block, and those of a request of the others; the caller holds nothing."""
        for i, (block, count) in enumerate(zip(blocks.tolist(), counts.tolist(), strict=True)):
            with self.holding(block):
                if block in self.blocks:
                    # Each of the others would stop a later push at a time of its own.
                    most = min(count, int(self.descriptors[block, ENTRIES]))
                    self.room_to_save(block, need if i == 0 else most, least=PUSHES // 2 * most, sketch=True)
