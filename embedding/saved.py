# SPDX-License-Identifier: Apache-2.0
"""The memory of what a block's view needs and the block has no more: keys as they were, and the sketch.

Invariant: what was saved never changes; it lives as long as somebody holds this object, or a part of it. Under the block's
mutex, but for ``parts`` once they are taken.
"""

import threading
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from oarlock.embedding.descriptor import SAVED, SAVED_ROOM
from oarlock.embedding.pointer import address_of
from oarlock.embedding.recycled import Recycled

LEAST = 64  # keys of a piece of memory
PUSHES = 4  # pushes as large as the one that needs room, which a piece has room for
PIECE_BYTES = 4 << 20  # but if one push needs more, it has no more than this
SEGMENT_BYTES = 4 << 20
# Kept from one cut to the next: what a large batch saves in its first pushes after a cut, while workers wait for them.
READY_BYTES = 128 << 20

if TYPE_CHECKING:
    from oarlock.embedding.view import TableView

Part = NDArray[np.uint8]


class _Memory:
    """Pieces of memory for what is saved, cut from segments of this process. Any thread."""

    def __init__(self) -> None:
        self._recycled = Recycled(READY_BYTES)
        self._lock = threading.Lock()
        self._segment: Part = np.empty(0, np.uint8)

    def take(self, size: int) -> Part:
        with self._lock:
            if size > len(self._segment):
                self._segment = self._recycled.take(max(size, SEGMENT_BYTES))
            piece, self._segment = self._segment[:size], self._segment[size:]
            return piece

    def warm_one(self, total: int) -> bool:
        return self._recycled.warm_one(SEGMENT_BYTES, total // SEGMENT_BYTES * SEGMENT_BYTES)


_memory = _Memory()


def make_some_ready(most: int) -> bool:
    """Have memory for the first pushes after a view began, which would else wait for the system to find it: one piece.

    ``most``: bytes of all rows; no more than that is ever saved. Return whether there may be more to do.
    """
    return _memory.warm_one(min(most, READY_BYTES))


def make_ready(most: int) -> None:
    """As ``make_some_ready``, all of it at once."""
    while make_some_ready(most):
        pass


class Saved:
    """Keys saved for ``view``, as ``embedding/view_kernels.py`` does, ``pitch`` bytes each.

    ``sketch``: the whole sketch as it was, None while it is unchanged: its first change costs a copy of it.
    """

    def __init__(self, view: "TableView", pitch: int) -> None:
        self.view = view
        self._pitch = pitch
        self._pieces: list[Part] = []
        self.sketch: bytes | None = None
        self.pin: int | None = None  # on the spill file, once the block is in no place any more

    @property
    def nbytes(self) -> int:
        return sum(piece.nbytes for piece in self._pieces) + len(self.sketch or b"")

    def make_room(self, words: NDArray[np.int64], n: int, least: int = 0) -> None:
        """See to it that ``n`` more keys can be saved, or better ``least``; ``words``: the block's descriptor."""
        left = int(words[SAVED_ROOM])
        if left >= max(n, min(least, PIECE_BYTES // self._pitch // 2)):
            return
        # Not for each push anew, yet not much more than it needs: others want warm memory, too.
        room = max(n, min(max(LEAST, PUSHES * n), PIECE_BYTES // self._pitch))
        piece = _memory.take(room * self._pitch).reshape(room, self._pitch)
        self._end_piece(left)
        self._pieces.append(piece)
        words[SAVED], words[SAVED_ROOM] = address_of(piece), room

    def _end_piece(self, left: int) -> None:
        if self._pieces:
            self._pieces[-1] = self._pieces[-1][: len(self._pieces[-1]) - left]

    def parts(self, words: NDArray[np.int64]) -> list[Part]:
        """Return what is saved so far: uint8[n, pitch], in several parts."""
        if not self._pieces:
            return []
        last = self._pieces[-1]
        return [*self._pieces[:-1], last[: len(last) - int(words[SAVED_ROOM])]]
