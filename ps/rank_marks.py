# SPDX-License-Identifier: Apache-2.0
"""Marks of jobs with ranks: the step that each block is at (SEMANTICS section 5), of hybrid each dense block.

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


class HybridMarks(RankMarks):
    """Steps of the blocks from ``dense_base`` on, and of all others the last group of each open split."""

    def __init__(self, blocks: int, dense_base: int) -> None:
        super().__init__(blocks)
        self._dense_base = dense_base

    def of_block(self, block: int) -> dict[int, int]:
        return super().of_block(block) if block >= self._dense_base else Marks.of_block(self, block)

    def restore(self, block: int, marks: dict[int, int]) -> None:
        if block >= self._dense_base:
            super().restore(block, marks)
        elif STEP_MARK in marks:
            raise SpecMismatch(
                f"block {block} of the checkpoint, of rows, is at a step: it was written in mode sync; go on from it in that one"
            )
        else:
            Marks.restore(self, block, marks)

    def copy(self) -> dict[int, NDArray[Any]]:
        steps = self.steps.copy()
        steps[: self._dense_base] = -1
        return {**Marks.copy(self), STEP_MARK: steps}

    def drop_block(self, block: int) -> None:
        super().drop_block(block)
        Marks.drop_block(self, block)

    def drop_closed(self, closed: ClosedSet) -> None:
        Marks.drop_closed(self, closed)

    @property
    def nbytes(self) -> int:
        return self.steps.nbytes + sum(marks.nbytes for marks in list(self._marks.values()))
