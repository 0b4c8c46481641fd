# SPDX-License-Identifier: Apache-2.0
"""Ranks and steps of a sync job: which rank trains which group of an epoch at which step.

    rank r of R    takes the splits at positions r, r + R, r + 2 R, ... of the epoch's order, and their groups one after another
    step           counts from 1 through the whole job; an epoch takes as many steps as its longest rank has groups

Invariant: all of it is a pure function of (rows of the planned splits, seed, ranks, batch rows, accumulate), so whoever hosts a
rank finds the same. A rank that is out of data takes part in the epoch's other steps with nothing. One thread.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from oarlock.data.order import split_order
from oarlock.proto.errors import InvalidArgument


@dataclass(frozen=True)
class Unit:
    """What a rank trains at a step: group ``group`` of split ``split``; ``last``: no group of that split follows."""

    split: int
    group: int
    last: bool


class RankPlan:
    """The steps of a job of ``ranks`` ranks; ``rows``: of each planned split."""

    def __init__(
        self, rows: Sequence[int], *, seed: int, ranks: int, epochs: int, batch_rows: int, accumulate: int
    ) -> None:
        if ranks < 1:
            raise InvalidArgument(f"ranks = {ranks}: give an integer >= 1")
        batches = -(-np.asarray(rows, np.int64) // batch_rows)
        self._groups: NDArray[np.int64] = -(-batches // accumulate)
        self._seed = seed
        self._ranks = ranks
        self._epochs = epochs
        # Steps before each epoch, as far as they were asked for.
        self._before = [0]
        self._of_epoch = lru_cache(maxsize=4)(self._ordered)

    def _ordered(self, epoch: int) -> NDArray[np.int64]:
        """Return int64[splits]: the groups of the split at each position of the epoch's order."""
        found: NDArray[np.int64] = self._groups[split_order(self._seed, epoch, len(self._groups))]
        return found

    def steps(self, epoch: int) -> int:
        """Return how many steps an epoch takes."""
        groups = self._of_epoch(epoch)
        return max(int(groups[rank :: self._ranks].sum()) for rank in range(self._ranks))

    def before(self, epoch: int) -> int:
        """Return the steps of all epochs before ``epoch``."""
        while len(self._before) <= epoch:
            self._before.append(self._before[-1] + self.steps(len(self._before) - 1))
        return self._before[epoch]

    @property
    def total(self) -> int:
        """Steps of the whole job."""
        return self.before(self._epochs)

    def units(self, rank: int, epoch: int) -> list[Unit | None]:
        """Return what rank ``rank`` trains at each step of an epoch, from its first one on."""
        groups = self._of_epoch(epoch)
        splits, out = len(self._groups), list[Unit | None]()
        for position in range(rank, splits, self._ranks):
            count = int(groups[position])
            out.extend(Unit(epoch * splits + position, group, group == count - 1) for group in range(count))
        out.extend([None] * (self.steps(epoch) - len(out)))
        return out
