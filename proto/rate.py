# SPDX-License-Identifier: Apache-2.0
"""RateLimit: so many requests per second, and a second's worth of them at once.

Invariant: in any time t at most ``(1 + t) * per_second`` requests are let in. A constant number of operations each; any thread.
"""

import time
from collections.abc import Callable
from threading import Lock


class RateLimit:
    """Lets ``per_second`` requests in, on average; 0: all."""

    def __init__(self, per_second: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_second = per_second
        self._clock = clock
        self._lock = Lock()
        self._most = max(1.0, per_second)
        self._left = self._most
        self._since = clock()

    def enter(self) -> bool:
        """Take one request in; False if that is one too many."""
        if not self._per_second:
            return True
        with self._lock:
            now = self._clock()
            self._left = min(self._most, self._left + (now - self._since) * self._per_second)
            self._since = now
            if self._left < 1.0:
                return False
            self._left -= 1.0
            return True
