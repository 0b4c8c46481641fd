# SPDX-License-Identifier: Apache-2.0
"""Marks of a sync job: the step that each block is at (SEMANTICS section 5).

Invariant: as ``Marks``, whose place it takes, a mark only grows; it goes away with its block alone. In a checkpoint it is the
mark of a split that no job has. Guarded by the shard's push lock.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from oarlock.client.closed import MAX_SPLIT, ClosedSet
from oarlock.proto.errors import SpecMismatch
from oarlock.ps.marks import Marks

STEP_MARK = MAX_SPLIT


class RankMarks(Marks):
    """``steps`` int64[blocks of the job]: of those that are not here 0."""

    def __init__(self, blocks: int) -> None:
        super().__init__(blocks)
        self.steps: NDArray[np.int64] = np.zeros(blocks, np.int64)

    def of_block(self, block: int) -> dict[int, int]:
        return {STEP_MARK: int(self.steps[block])}

    def restore(self, block: int, marks: dict[int, int]) -> None:
        if list(marks) != [STEP_MARK]:
            raise SpecMismatch(
                f"block {block} of the checkpoint is at no step: it was written in another mode; go on from it in that one"
            )
        self.steps[block] = marks[STEP_MARK]

    def copy(self) -> dict[int, NDArray[Any]]:
        return {STEP_MARK: self.steps.copy()}

    def drop_block(self, block: int) -> None:
        self.steps[block] = 0

    def drop_closed(self, closed: ClosedSet) -> None:
        """A step is no split: nothing ends with one."""

    @property
    def nbytes(self) -> int:
        return self.steps.nbytes
