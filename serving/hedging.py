# SPDX-License-Identifier: Apache-2.0
"""When a second server is asked the same: after the time in which 19 of 20 answers came, and for a share of all requests.

Invariant: of n requests at most ``share`` * n + BURST are hedged, so that servers which are all slow are not asked twice as much.
Not for several threads at once: who uses it has a lock (fleet.py).
"""

import numpy as np
from numpy.typing import NDArray

from oarlock.proto.errors import InvalidArgument

SHARE = 0.1
BURST = 10.0
QUANTILE = 0.95
LEAST_SECONDS = 0.001
# Before there are so many answers to tell by, and what is taken then.
FEW = 20
FIRST_SECONDS = 0.1
# Answers that are told by, and after how many of them the time is computed anew.
KEPT = 256
ANEW = 16


class _Recent:
    """The last answers to requests of about one size."""

    def __init__(self) -> None:
        self._seconds: NDArray[np.float64] = np.zeros(KEPT)
        self._count = 0
        self.quantile = FIRST_SECONDS

    def add(self, seconds: float) -> None:
        self._seconds[self._count % KEPT] = seconds
        self._count += 1
        if self._count >= FEW and (self._count == FEW or self._count % ANEW == 0):
            found = float(np.quantile(self._seconds[: self._count], QUANTILE))
            self.quantile = max(LEAST_SECONDS, found)


class Hedging:
    """``share``: of requests that may be hedged; 0: none."""

    def __init__(self, share: float = SHARE) -> None:
        if not 0 <= share <= 1:
            raise InvalidArgument(f"hedge_share = {share}: give a share of requests, from 0 to 1")
        self._share = share
        self._tokens = BURST if share else 0.0
        # By size, since a request of many keys takes longer.
        self._recent: dict[int, _Recent] = {}

    def seconds(self, size: int) -> float:
        """Return how long an answer to a request of ``size`` keys is waited for before another server is asked."""
        found = self._recent.get(size.bit_length() // 3)
        return FIRST_SECONDS if found is None else found.quantile

    def began(self) -> None:
        """Take note of a request."""
        self._tokens = min(BURST, self._tokens + self._share)

    def answered(self, size: int, seconds: float) -> None:
        """Take note of how long an answer took, or was waited for in vain while another server gave it."""
        self._recent.setdefault(size.bit_length() // 3, _Recent()).add(seconds)

    def spend(self) -> bool:
        """Tell whether one more request may be hedged; it is then."""
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True
