# SPDX-License-Identifier: Apache-2.0
"""Staleness of pushes: how many others a shard applied between the pull that fed a push and the push itself.

Invariant: only pushes that changed something are counted, each once. The shard's push lock covers it.
"""

from itertools import accumulate

BUCKETS = 32  # 0, 1, 2 to 3, 4 to 7, ...


class Staleness:
    """A histogram by powers of two, the sum and the most, since the shard began."""

    def __init__(self) -> None:
        self.counts = [0] * BUCKETS
        self.total = 0
        self.most = 0

    def note(self, pushes: int) -> None:
        """Count one push. A number below zero comes of a pull before the shard began anew, and says nothing."""
        if pushes < 0:
            return
        self.counts[min(pushes.bit_length(), BUCKETS - 1)] += 1
        self.total += pushes
        self.most = max(self.most, pushes)

    def summary(self) -> dict[str, float]:
        """Return count, mean, most, and the least power of two minus one that 99 of 100 pushes do not exceed."""
        count = sum(self.counts)
        if not count:
            return {"count": 0}
        upto = accumulate(self.counts)
        bucket = next(bucket for bucket, seen in enumerate(upto) if seen * 100 >= count * 99)
        p99 = min((1 << bucket) - 1, self.most)
        return {"count": count, "mean": round(self.total / count, 3), "most": self.most, "p99_at_most": p99}
