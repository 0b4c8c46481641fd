# SPDX-License-Identifier: Apache-2.0
"""Histogram: how many values fell under each bound, and their sum.

Invariant: a count only grows, and the number of values is the sum of the counts, so what a reader sees in the middle of
an observation agrees with itself. One writer at a time (one thread, or the lock that its owner holds anyway); any reader.
"""

from bisect import bisect_left
from collections.abc import Sequence

# What a pull or a push takes, from a table in the cache to a shard that is away.
SECONDS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


class Histogram:
    """Counts of values at most ``bounds[i]`` and above the bound before; the last count is of those above all."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: Sequence[float] = SECONDS) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(self.bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        """Count one value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value
