# SPDX-License-Identifier: Apache-2.0
"""The adaptive bound of a row cache: how many updates a kept row may lack, by what that was measured to cost and to save.

    probe      a group's loss with rows that lack up to the bound, beside that with fresh rows, of the same samples
    excess     (stale - fresh) / fresh; its mean over the probes at one bound, give or take CONFIDENCE standard errors
    a rung up  all of that is below TOLERANCE, and a higher bound would save rows that now come
    down       all of it is above TOLERANCE; the rung that failed is tried again after twice as many probes each time

Invariant: the bound is a pure function of what was measured, in that order: no clock, no draws. It never exceeds ``highest``.
"""

import math
from bisect import bisect_right
from typing import NamedTuple

LADDER = (0, 1, 2, 3, 5, 10, 20, 30, 50, 100)
START = 1  # the first bound; at 0 nothing would be learnt
LOOK = 4  # probes at a bound before it may change, and between one look at them and the next
CONFIDENCE = 2.0
TOLERANCE = 0.005
LEAST_GAIN = 0.01  # of all rows asked for
PATIENCE = 16  # probes below a rung that failed, before it is tried again


class Measured(NamedTuple):
    """What a probe found: the relative excess, and the share of rows that would be saved on each rung of the ladder."""

    excess: float
    saved: tuple[float, ...]


def ladder(highest: int) -> tuple[int, ...]:
    """Return the bounds that may be chosen, ascending; the last one is ``highest``."""
    return (*LADDER[: bisect_right(LADDER, highest - 1)], highest)


class AdaptiveBound:
    """Climbs the ladder of one table's cache; ``bound`` is the present one."""

    def __init__(self, highest: int) -> None:
        self.rungs = ladder(highest)
        self._at = min(START, len(self.rungs) - 1)
        # Of the rung that failed: which, how often in a row, and how many probes there were since.
        self._failed, self._failures, self._since = len(self.rungs), 0, 0
        self._begin()

    @property
    def bound(self) -> int:
        return self.rungs[self._at]

    @property
    def excess(self) -> float:
        """Return the mean excess at the present bound, 0 before the first probe."""
        return self._mean

    def _begin(self) -> None:
        self._probes, self._mean, self._squares = 0, 0.0, 0.0
        self._saved: list[float] = [0.0] * len(self.rungs)

    def step(self, measured: Measured) -> int:
        """Take in one probe at the present bound; return the bound from now on."""
        self._probes += 1
        self._since += 1
        off = measured.excess - self._mean
        self._mean += off / self._probes
        self._squares += off * (measured.excess - self._mean)
        self._saved = [old + new for old, new in zip(self._saved, measured.saved, strict=True)]
        if self._probes % LOOK:
            return self.bound
        error = CONFIDENCE * math.sqrt(self._squares / (self._probes - 1) / self._probes)
        if self._mean - error > TOLERANCE and self._at:
            self._fail()
        elif self._mean + error < TOLERANCE and self._may_climb():
            self._at += 1
            self._begin()
        return self.bound

    def _fail(self) -> None:
        self._failures = self._failures + 1 if self._failed == self._at else 1
        self._failed, self._since = self._at, 0
        self._at -= 1
        self._begin()

    def _may_climb(self) -> bool:
        if self._at + 1 == len(self.rungs):
            return False
        gain = (self._saved[self._at + 1] - self._saved[self._at]) / self._probes
        barred = self._at + 1 == self._failed and self._since < PATIENCE << self._failures
        return gain >= LEAST_GAIN and not barred


def is_probe(turn: int) -> bool:
    """Tell whether a worker's group number ``turn`` is one: a fourth of the first, less of those that follow, 1 in 32 at last."""
    every = min(32, max(4, 1 << (turn >> 4).bit_length()))
    return turn % every == every - 1
