# SPDX-License-Identifier: Apache-2.0
"""How many pushes to each block were acknowledged to this worker, so that what a dead shard took along can be counted.

    note      a shard answered for blocks of a push
    opened    the gate of a cut opened: what was acknowledged before is in that cut
    moved     blocks have another owner now: what is acknowledged from here on is not the one's before
    since     pushes to some blocks from a cut until they got the owner of a generation

Invariant: a push counts once for each block that it was acknowledged for, whoever answered, and however often it was sent.
Arrays of the job's blocks, a few of them. One event loop.
"""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from oarlock.proto.arrays import unpack
from oarlock.proto.coordinator_pb2 import LossCount, LossQuestion
from oarlock.proto.errors import Malformed

Numbers = NDArray[np.int32]
Longs = NDArray[np.int64]


class Acknowledged:
    """Counts for ``blocks`` blocks, from 0."""

    def __init__(self, blocks: int) -> None:
        self._counts: Longs = np.zeros(blocks, np.int64)
        # As they were when blocks got the owner that they have, and in which generation that was.
        self._before: Longs = np.zeros(blocks, np.int64)
        self._generations: Longs = np.full(blocks, -1, np.int64)
        # As they were when gates opened, and the newest cut that is committed.
        self._at: dict[int, Longs] = {}
        self._committed = 0
        # What was asked and is answered, by generation.
        self.answers: dict[int, LossCount] = {}

    def note(self, blocks: Numbers, moved: Numbers) -> None:
        """Note an answer for ``blocks`` int32[m], each once, but for the ``moved`` ones among them."""
        self._counts[blocks] += 1
        if len(moved):
            self._counts[np.unique(moved)] -= 1

    def opened(self, cut: int) -> None:
        """Note that pushes go on after a cut."""
        self._at[cut] = self._counts.copy()
        # One that came to nothing is never committed; of the one before it may not be known yet that it is.
        kept = {self._committed, *sorted(self._at)[-2:]}
        self._at = {known: counts for known, counts in self._at.items() if known in kept}

    def committed(self, cut: int) -> None:
        """Forget what came before the newest cut that is committed."""
        self._committed = cut
        for older in [known for known in self._at if known < cut]:
            del self._at[older]

    def moved(self, blocks: Numbers, generations: Longs) -> None:
        """Note that ``blocks`` int32[m] have another owner, since these ``generations`` int64[m]."""
        self._before[blocks] = self._counts[blocks]
        self._generations[blocks] = generations

    def asked(self, questions: Iterable[LossQuestion]) -> None:
        """Have ``answers`` be those to ``questions``, as far as this worker can answer by now. Malformed."""
        known, self.answers = self.answers, {}
        for question in questions:
            generation = question.generation
            blocks: Numbers = unpack(question.blocks, np.int32, "blocks that went back").astype(np.int32)
            if len(blocks) and (blocks.min() < 0 or blocks.max() >= len(self._counts)):
                raise Malformed(f"a loss of blocks {blocks.min()} to {blocks.max()}: the job has {len(self._counts)}")
            if generation in known:
                self.answers[generation] = known[generation]
            elif (found := self.since(question.cut, blocks, generation)) is not None:
                self.answers[generation] = LossCount(generation=generation, pushes=found[0], more=not found[1])

    def since(self, cut: int, blocks: Numbers, generation: int) -> tuple[int, bool] | None:
        """Return the pushes to ``blocks`` int32[m] from ``cut`` until the owners of ``generation``, and whether these are all.

        None: this worker does not know of those owners yet. A worker that joined after the cut has counted from 0.
        """
        generations = self._generations[blocks]
        if (generations < generation).any():
            return None
        begun = self._at[cut][blocks] if cut in self._at else np.int64(0)
        # Of those that moved on already, what came after is in the count, too: it is not told.
        exact = generations == generation
        counted = np.where(exact, self._before[blocks] - begun, 0)
        return int(counted.sum()), bool(exact.all())
