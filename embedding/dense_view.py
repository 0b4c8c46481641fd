# SPDX-License-Identifier: Apache-2.0
"""Views of dense blocks: their values as they were when the view began, read while pushes go on.

A block is copied whole before its first change since then. Phases count as in ``embedding/stamps.py``, but a block notes its
own, so nothing wears out. Invariant: until it is released, what a block was when the view began is where it was, or copied.
The ledger is changed under the lock of the parameters that it is of; a view is read by one thread at a time.
"""

import threading

import numpy as np
from numpy.typing import NDArray

from oarlock.embedding.dense_block import DenseBlock
from oarlock.proto.errors import InvalidArgument

Values = NDArray[np.float32]
Numbers = NDArray[np.int64]


class DenseLedger:
    """What changed when of ``blocks`` dense blocks, numbered from 0; ``lock`` is held by who calls but for begin and commit."""

    def __init__(self, blocks: int, lock: "threading.Lock") -> None:
        self.lock = lock
        self.rows: dict[int, tuple[Values, int]] = {}  # memory of stored blocks, and how much of it are weights
        self.lives: Numbers = np.zeros(blocks, np.int64)
        self.unsaved: NDArray[np.bool_] = np.zeros(blocks, np.bool_)
        self._changed: Numbers = np.zeros(blocks, np.int64)
        self._known: Numbers = np.zeros(blocks, np.int64)
        self._phase = 0
        self._view: DenseView | None = None

    def store(self, block: int, row: Values, length: int) -> None:
        """Note that a block has a whole new content."""
        self.forget(block)
        self.rows[block] = row, length

    def forget(self, block: int) -> None:
        """Note that a block is not stored any more; a view keeps what it was."""
        if self.unsaved[block] and self._view is not None:
            self._view.saved[block] = self.content(block)
            self.unsaved[block] = False
        self.rows.pop(block, None)
        self.lives[block] += 1
        self._changed[block] = self._phase

    def before_change(self, blocks: Numbers) -> None:
        """Copy what a view needs of blocks: int64[n] that are about to change."""
        if self._phase:
            for block in blocks[self.unsaved[blocks]].tolist():
                assert self._view is not None
                self._view.saved[block] = DenseBlock(*(part.copy() for part in self.content(block)))
                self.unsaved[block] = False
            self._changed[blocks] = self._phase

    def content(self, block: int) -> DenseBlock:
        """Return a stored block itself, which goes on changing."""
        row, length = self.rows[block]
        return DenseBlock(row[:length], row[length:])

    def begin_view(self, number: int) -> "DenseView":
        """Begin view ``number`` of all stored blocks, and end an older one; the caller keeps pushes out meanwhile."""
        if isinstance(number, bool) or not isinstance(number, int) or number < 0:
            raise InvalidArgument(f"view {number!r} of dense blocks: give an integer from 0 on")
        with self.lock:
            self._end_view()
            self._phase += 1
            stored = np.array(sorted(self.rows), np.int64)
            changed = (self._known == 0) | (self._changed >= self._known)
            self._view = DenseView(self, number, self._phase, stored, changed, self.lives.copy())
            self.unsaved[stored] = True
            return self._view

    def _end_view(self) -> None:
        self.unsaved[:] = False
        if self._view is not None:
            self._view.released.update(self._view.blocks.tolist())
            self._view.saved.clear()

    def commit_view(self, number: int) -> bool:
        """Let changes count from view ``number``, which is on disk; False, and nothing is done, if another one began later."""
        with self.lock:
            view = self._view
            if view is None or view.number != number:
                return False
            same = view.blocks[self.lives[view.blocks] == view.lives[view.blocks]]
            self._known[same] = view.phase
            return True


class DenseView:
    """The dense blocks of ``ledger`` as they were when view ``number`` began. Made by ``begin_view``."""

    def __init__(
        self,
        ledger: DenseLedger,
        number: int,
        phase: int,
        blocks: Numbers,
        changed: NDArray[np.bool_],
        lives: Numbers,
    ) -> None:
        self.number, self.phase = number, phase
        self.blocks = blocks
        self.lives = lives
        self.saved: dict[int, DenseBlock] = {}
        self.released: set[int] = set()
        self._changed = changed
        self._ledger = ledger

    def content(self, block: int) -> DenseBlock:
        """Return a block as it was, whether it is still stored here or not."""
        with self._ledger.lock:
            self._check(block)
            if block in self.saved:
                return self.saved[block]
            return DenseBlock(*(part.copy() for part in self._ledger.content(block)))

    def changed(self, block: int) -> bool:
        """Tell whether a block may have changed since the last committed view: if not, what that wrote still holds."""
        with self._ledger.lock:
            self._check(block)
            return bool(self._changed[block])

    def release(self, block: int) -> None:
        """Free what was saved for a block; its view cannot be read any more."""
        with self._ledger.lock:
            self._in_view(block)
            if block not in self.released:
                self.released.add(block)
                self.saved.pop(block, None)
                self._ledger.unsaved[block] = False

    def close(self) -> None:
        """Release all blocks. May be called again."""
        for block in self.blocks.tolist():
            self.release(block)

    def _in_view(self, block: int) -> None:
        at = int(np.searchsorted(self.blocks, block))
        if at == len(self.blocks) or self.blocks[at] != block:
            raise InvalidArgument(f"dense block {block} was not stored here when view {self.number} began")

    def _check(self, block: int) -> None:
        self._in_view(block)
        if block in self.released:
            raise InvalidArgument(f"view {self.number} of dense block {block} was released")
