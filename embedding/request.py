# SPDX-License-Identifier: Apache-2.0
"""A push as kernels take it: what it brings, and the scratch memory that it needs.

Invariant: arrays of a Request are of one length and in the form of ``kernel_array``; scratch belongs to one call at a time.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from oarlock.embedding.pointer import address_of

# In place of the address of a key's row.
ABSENT = 0
REFUSED_ROW = -1

UPDATE_ROWS = 64  # rows that an optimizer is called for at once


class Request(NamedTuple):
    """What a push brings. occurrences: uint32[n], clicks: float32[n], or both empty: then one occurrence, no click."""

    keys: NDArray[np.uint64]
    blocks: NDArray[np.int32]
    counts: NDArray[np.int32]
    gradients: NDArray[np.float32]
    occurrences: NDArray[np.uint32]
    clicks: NDArray[np.float32]
    rates: NDArray[np.float64]
    step: int
    tick: int


class Scratch(NamedTuple):
    """Room for a push of n keys: mixes uint64[n], the others int64[n]; values float32[>= 64 rows of the table]."""

    mixes: NDArray[np.uint64]
    hints: NDArray[np.int64]
    rows: NDArray[np.int64]
    sides: NDArray[np.int64]
    undo: NDArray[np.int64]
    cold: NDArray[np.int64]
    values: NDArray[np.float32]


class Workspace:
    """Scratch memory of one request at a time, which grows to the largest one seen."""

    def __init__(self, blocks: int, dim: int) -> None:
        self.seen: NDArray[np.uint8] = np.zeros(blocks, np.uint8)
        self.fault: NDArray[np.int64] = np.zeros(1, np.int64)
        self.found: NDArray[np.int64] = np.zeros(2, np.int64)
        self.values: NDArray[np.float32] = np.empty((UPDATE_ROWS + 1) * dim, np.float32)
        self.values_address = address_of(self.values)
        self._room = 0
        self.fit(1)

    def fit(self, n: int) -> None:
        """Make room for a request of ``n`` keys."""
        if n <= self._room:
            return
        room = max(256, 1 << (n - 1).bit_length())
        self.mixes: NDArray[np.uint64] = np.empty(room, np.uint64)
        self.hints, self.undo, self.cold = (np.empty(room, np.int64) for _ in range(3))
        self.records: NDArray[np.int64] = self.undo  # a pull needs no undo
        # The update is given the addresses of both: sides follow rows.
        both: NDArray[np.int64] = np.empty((2, room), np.int64)
        self.rows, self.sides = both
        self.rows_address = address_of(both)
        self.scratch = Scratch(self.mixes, self.hints, self.rows, self.sides, self.undo, self.cold, self.values)
        self._room = room
