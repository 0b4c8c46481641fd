# SPDX-License-Identifier: Apache-2.0
"""A push as kernels take it: what it brings, and the scratch memory that it needs.

Invariant: arrays of a Request are of one length and in the form of ``kernel_array``; scratch belongs to one call at a time.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from oarlock.embedding.aim import CURSOR, RING
from oarlock.embedding.pointer import address_of
from oarlock.embedding.pull import FOUND_WORDS, PullScratch

# In place of the address of a key's row.
ABSENT = 0
REFUSED_ROW = -1

UPDATE_ROWS = 64  # rows that an optimizer is called for at once


class Request(NamedTuple):
    """What a push brings beside its keys; addresses but for ``step`` and ``tick``.

    gradients: float32[n, dim]; occurrences: uint32[n], 0 = one of each key; clicks: float32[n], 0 = none; rates: float64[parts].
    """

    gradients: int
    occurrences: int
    clicks: int
    rates: int
    step: int
    tick: int


class Scratch(NamedTuple):
    """Addresses of scratch memory for a push of n keys.

    cursor, hints, late as in ``embedding/aim.py``; rows, sides, undo, cold, stale: int64[n]; values: float32 of one row and
    UPDATE_ROWS more.
    """

    cursor: int
    hints: int
    late: int
    rows: int
    sides: int
    undo: int
    cold: int
    stale: int
    values: int


class Workspace:
    """Scratch memory of one request at a time, which grows to the largest one seen."""

    def __init__(self, blocks: int, dim: int) -> None:
        self.seen: NDArray[np.uint8] = np.zeros(blocks, np.uint8)
        self.fault: NDArray[np.int64] = np.zeros(1, np.int64)
        self.found: NDArray[np.int64] = np.zeros(FOUND_WORDS, np.int64)
        self._values: NDArray[np.float32] = np.empty((UPDATE_ROWS + 1) * dim, np.float32)
        self._cursor: NDArray[np.int64] = np.zeros(CURSOR, np.int64)
        self._hints, self._ring, self._late = (np.zeros(RING, np.int64) for _ in range(3))
        self._room = 0
        self.fit(1)

    def fit(self, n: int) -> None:
        """Make room for a request of ``n`` keys."""
        if n <= self._room:
            return
        self._room = max(256, 1 << (n - 1).bit_length())
        self._rows, self._sides, self._undo, self.cold, self.records, self._stale = (
            np.empty(self._room, np.int64) for _ in range(6)
        )
        self._later: NDArray[np.int64] = np.empty((self._room, 2), np.int64)
        cursor, hints, late = (address_of(a) for a in (self._cursor, self._hints, self._late))
        scratch = self._rows, self._sides, self._undo, self.cold, self._stale
        rows, sides, undo, cold, stale = (address_of(a) for a in scratch)
        self.push = Scratch(cursor, hints, late, rows, sides, undo, cold, stale, address_of(self._values))
        self.pull = PullScratch(
            cursor,
            hints,
            late,
            address_of(self._ring),
            cold,
            address_of(self.records),
            address_of(self._later),
            address_of(self.found),
        )
