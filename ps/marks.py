# SPDX-License-Identifier: Apache-2.0
"""Marks: the last group of each open split that each block has applied.

Invariant: a mark only grows, and goes away only when its split is closed. Guarded by the shard's push lock.
Memory: blocks of the job x open splits x 4 bytes.
"""

import numpy as np
from numpy.typing import NDArray

from oarlock.client.closed import ClosedSet


class Marks:
    """One int32 per block and open split: -1 where the block has nothing of the split."""

    def __init__(self, blocks: int) -> None:
        self._blocks = blocks
        self._marks: dict[int, NDArray[np.int32]] = {}

    def missing(self, split: int, group: int, blocks: NDArray[np.int32]) -> NDArray[np.bool_]:
        """Return bool[m]: the blocks that have not applied ``group`` of ``split``."""
        found = self._marks.get(split)
        return np.ones(len(blocks), np.bool_) if found is None else found[blocks] < group

    def open(self, split: int) -> None:
        """Make room for the split's marks, so that nothing can fail between a change and its mark."""
        if split not in self._marks:
            self._marks[split] = np.full(self._blocks, -1, np.int32)

    def record(self, split: int, group: int, blocks: NDArray[np.int32] | int) -> None:
        """Note the group in some blocks, or one, of an open split."""
        self._marks[split][blocks] = group

    def highest(self, split: int) -> int:
        """Return the highest group of ``split`` that any block here has applied, -1 if none."""
        found = self._marks.get(split)
        return -1 if found is None else int(found.max(initial=-1))

    def of_split(self, split: int) -> NDArray[np.int32] | None:
        """Return int32[blocks]: the split's marks, None if no block has any of it."""
        return self._marks.get(split)

    def copy(self) -> dict[int, NDArray[np.int32]]:
        """Return int32[blocks] by open split: all marks as they are now."""
        return {split: marks.copy() for split, marks in self._marks.items()}

    def of_block(self, block: int) -> dict[int, int]:
        return {split: int(marks[block]) for split, marks in self._marks.items() if marks[block] >= 0}

    def restore(self, block: int, marks: dict[int, int]) -> None:
        for split, group in marks.items():
            self.open(split)
            self.record(split, group, np.array([block], np.int32))

    def drop_block(self, block: int) -> None:
        for marks in self._marks.values():
            marks[block] = -1

    def drop_closed(self, closed: ClosedSet) -> None:
        for split in [s for s in self._marks if s in closed]:
            del self._marks[split]

    @property
    def splits(self) -> int:
        return len(self._marks)

    @property
    def nbytes(self) -> int:
        # Asked for by threads without the lock, while pushes open splits: a dict must not grow while it is gone through.
        return sum(m.nbytes for m in list(self._marks.values()))
