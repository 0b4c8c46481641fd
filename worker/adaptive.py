# SPDX-License-Identifier: Apache-2.0
"""The adaptive bound of a row cache: how many updates a kept row may lack, by what that was measured to cost and to save.

    probe      a group's scores with rows that lack up to the bound, beside those with fresh rows, of the same samples
    excess     the log loss that the former would have above the latter, relative to it, were labels as the latter say
    a rung up  the excess to be expected there is below TOLERANCE, and rows would be saved that now come
    down       the mean excess is above TOLERANCE; a rung that failed is tried again after twice as many probes each time

Labels that are drawn in thought, as fresh rows say, are those of all draws at once: with the real ones the same mean needs
some two hundred times as many samples. Rows that lack twice as many updates are off by up to twice as much, and the
excess grows with the square of that: so a higher bound's is known before it is tried.
Invariant: the bound is a pure function of what was measured, in that order: no clock, no draws. It never exceeds ``highest``.
"""

import math
from bisect import bisect_right
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

LADDER = (0, 1, 2, 3, 5, 10, 20, 30, 50, 100)
START = 1  # the first bound; at 0 nothing would be learnt
LOOK = 4  # probes at a bound before it may change, and from one look at them to the next
WINDOW = 32  # probes after which those before are forgotten: rows change less and less
# Of jobs with fixed bounds the AUC was lower by a tenth of the excess (docs/cache.md): this is 0.0004.
TOLERANCE = 0.004
SURE_UP, SURE_DOWN = 2.0, 1.0  # standard errors of the mean
LEAST_GAIN = 0.01  # of all rows asked for
PATIENCE = 16  # probes below a rung that failed, before it is tried again


class Measured(NamedTuple):
    """What a probe found: the excess, and the share of rows that would be saved on each rung of the ladder."""

    excess: float
    saved: tuple[float, ...]


def ladder(highest: int) -> tuple[int, ...]:
    """Return the bounds that may be chosen, ascending; the last one is ``highest``."""
    return (*LADDER[: bisect_right(LADDER, highest - 1)], highest)


def relative_excess(fresh: NDArray[np.float32], stale: NDArray[np.float32]) -> float:
    """Return the mean of KL(fresh || stale) over the mean entropy of fresh: float32[n], as a number from 0 to 1.

    Scores that are no probabilities are taken for logits. 1 if either of them is not finite.
    """
    p, q = fresh.astype(np.float64), stale.astype(np.float64)
    if not (np.isfinite(p).all() and np.isfinite(q).all()):
        return 1.0
    if min(p.min(), q.min()) < 0 or max(p.max(), q.max()) > 1:
        p, q = (1 / (1 + np.exp(-scores.clip(-30, 30))) for scores in (p, q))
    p, q = (scores.clip(1e-7, 1 - 1e-7) for scores in (p, q))
    entropy = -np.mean(p * np.log(p) + (1 - p) * np.log(1 - p))
    excess = np.mean(p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q)))
    return float(min(1.0, max(0.0, excess / entropy)))


class AdaptiveBound:
    """Climbs the ladder of one table's cache; ``bound`` is the present one, ``excess`` its mean excess."""

    def __init__(self, highest: int) -> None:
        self.rungs = ladder(highest)
        self._at = min(START, len(self.rungs) - 1)
        # Of the rung that failed: which, how often in a row, and how many probes there were since.
        self._failed, self._failures, self._since = len(self.rungs), 0, 0
        self.excess = 0.0
        self._begin()

    @property
    def bound(self) -> int:
        return self.rungs[self._at]

    def _begin(self) -> None:
        self._excesses: list[float] = []
        self._saved = np.zeros(len(self.rungs))

    def step(self, measured: Measured) -> int:
        """Take in one probe at the present bound; return the bound from now on."""
        if len(self._excesses) == WINDOW:
            self._begin()
        self._since += 1
        self._excesses.append(measured.excess)
        self._saved += measured.saved
        n = len(self._excesses)
        self.excess = math.fsum(self._excesses) / n
        if n % LOOK:
            return self.bound
        error = math.sqrt(math.fsum((x - self.excess) ** 2 for x in self._excesses) / (n - 1) / n)
        if self._at and self.excess - SURE_DOWN * error > TOLERANCE:
            self._failures = self._failures + 1 if self._failed == self._at else 1
            self._failed, self._since = self._at, 0
            self._at -= 1
            self._begin()
        elif self._worth_more(n) and (self.excess + SURE_UP * error) * self._growth() < TOLERANCE:
            self._at += 1
            self._begin()
        return self.bound

    def _worth_more(self, n: int) -> bool:
        if self._at + 1 == len(self.rungs):
            return False
        barred = self._at + 1 == self._failed and self._since < PATIENCE << self._failures
        return not barred and bool((self._saved[self._at + 1] - self._saved[self._at]) / n >= LEAST_GAIN)

    def _growth(self) -> float:
        """Return how many times the excess is to be expected on the next rung; with bound 0 there is none to judge by."""
        return (self.rungs[self._at + 1] / max(self.bound, 1)) ** 2


def is_probe(turn: int) -> bool:
    """Tell whether a worker's group number ``turn`` is one: 1 in 4 of the first, of those that follow fewer, at last 1 in 32."""
    every = min(32, max(4, 1 << (turn >> 4).bit_length()))
    return turn % every == every - 1
