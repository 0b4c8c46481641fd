# SPDX-License-Identifier: Apache-2.0
"""Losses: how many acknowledged pushes a shard took along whose blocks went back to a cut, as the workers count them.

Each worker that is there is asked, with its heartbeats, until it has answered or is gone. Invariant: what is told is what was
acknowledged to those that answered; ``more`` says that there were others: workers that ended since the cut, whatever they had
pushed, or one that cannot tell all. Nothing is on disk: a coordinator that was started again counts no loss of before. The
coordinator's lock covers it.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from oarlock.proto.arrays import pack
from oarlock.proto.coordinator_pb2 import LossCount, LossQuestion


@dataclass
class Loss:
    """Blocks that went back to ``cut`` in ``generation``, since ``shard`` died; ``waiting``: incarnations that are asked."""

    shard: int
    generation: int
    cut: int
    blocks: NDArray[np.int32] = field(repr=False)
    waiting: set[int]
    pushes: int = 0
    more: bool = False

    @property
    def words(self) -> str:
        """How many pushes: ``at least 12``."""
        return f"{'at least ' if self.more else ''}{self.pushes}"

    def question(self) -> LossQuestion:
        return LossQuestion(generation=self.generation, cut=self.cut, blocks=pack(self.blocks))


class Losses:
    """``counted(loss)`` is called once all that is asked is answered."""

    def __init__(self, counted: Callable[[Loss], None]) -> None:
        self._counted = counted
        self._open: list[Loss] = []
        # Workers that ended, and how many had when a gate opened. Of those before this life nobody knows.
        self._ended = 1
        self._ended_at: dict[int, int] = {}

    def begin_run(self) -> None:
        """All workers of the run before are gone, and nothing of it is asked any more."""
        self._open.clear()
        self._ended_at.clear()
        self._ended = 0

    def opened(self, cut: int, committed: int) -> None:
        """Note that the gate of ``cut`` opened; ``committed``: the newest one that blocks may go back to."""
        # Those between came to nothing.
        self._ended_at = {known: ended for known, ended in self._ended_at.items() if known == committed}
        self._ended_at[cut] = self._ended

    def begin(self, shard: int, generation: int, cut: int, blocks: NDArray[np.int32], workers: Iterable[int]) -> None:
        """Ask ``workers`` (incarnations)."""
        loss = Loss(shard, generation, cut, np.sort(blocks).astype(np.int32), set(workers))
        loss.more = self._ended > (self._ended_at.get(cut, -1) if cut else 0)
        self._open.append(loss)
        self._look()

    def questions(self, worker: int) -> list[LossQuestion]:
        """Return what a worker has not answered yet."""
        return [loss.question() for loss in self._open if worker in loss.waiting]

    def heard(self, worker: int, answers: Iterable[LossCount]) -> None:
        """Take in a worker's answers; those to what it was not asked say nothing."""
        for answer in answers:
            for loss in self._open:
                if loss.generation == answer.generation and worker in loss.waiting:
                    loss.waiting.discard(worker)
                    loss.pushes += answer.pushes
                    loss.more |= answer.more
        self._look()

    def gone(self, worker: int) -> None:
        """A worker ended: what it would have answered nobody knows."""
        self._ended += 1
        for loss in self._open:
            if worker in loss.waiting:
                loss.waiting.discard(worker)
                loss.more = True
        self._look()

    def _look(self) -> None:
        for loss in [loss for loss in self._open if not loss.waiting]:
            self._open.remove(loss)
            self._counted(loss)
