# SPDX-License-Identifier: Apache-2.0
"""A backlog: which keys changed and are still to be looked at, as a set.

    noted    keys as they come, repeated ones included, until there are many; then each is kept once
    round    all that was noted up to a moment, each key once; it is gone through in laps before the next one begins

Invariant: a key that was noted after its row changed is in a lap that is taken after that. What is kept is bounded by the keys
that matter to whoever takes them, whatever is noted: a key that does not matter is let go. Any thread notes, one takes.
"""

from collections.abc import Callable
from threading import Lock

import numpy as np
from numpy.typing import NDArray

Keys = NDArray[np.uint64]

# Noted keys, repeated ones included, before each is kept once.
LEAST_NOTED = 1 << 16
_NONE: Keys = np.empty(0, np.uint64)


class Backlog:
    """``matters``: tells of keys: uint64[n] which are there, or are still known to whoever takes them."""

    def __init__(self, matters: Callable[[Keys], NDArray[np.bool_]]) -> None:
        self._matters = matters
        self._lock = Lock()
        self._noted: list[Keys] = []
        self._count, self._most = 0, LEAST_NOTED
        # When the first of what is noted was, and of the round.
        self._noted_at: float | None = None
        self._round_at: float | None = None
        self._round = self._lap = _NONE

    @property
    def waiting(self) -> int:
        """Keys that wait, those that were noted more than once counted as often."""
        return self._count + len(self._round)

    @property
    def oldest(self) -> float | None:
        """When the first of the keys that wait was noted; None: none waits."""
        with self._lock:
            return self._noted_at if self._round_at is None else self._round_at

    def note(self, keys: Keys, now: float) -> None:
        """Note keys: uint64[n], whose rows have changed."""
        if not len(keys):
            return
        with self._lock:
            self._noted.append(keys.copy())
            self._count += len(keys)
            self._noted_at = now if self._noted_at is None else self._noted_at
            if self._count > self._most:
                distinct = np.unique(np.concatenate(self._noted))
                # What is being put in place at the moment is known only afterwards.
                wanted = self._matters(distinct) | np.isin(distinct, self._lap, assume_unique=True)
                self._noted = [distinct[wanted]]
                self._count = len(self._noted[0])
                self._most = max(LEAST_NOTED, 2 * self._count)

    def take(self, most: int) -> tuple[Keys, float]:
        """Return up to ``most`` keys, each once, and when the first of them may have been noted; the lap before is done with."""
        if not len(self._round):
            with self._lock:
                noted, self._noted, self._count, self._most = self._noted, [], 0, LEAST_NOTED
                self._round_at, self._noted_at = self._noted_at, None
            # Whoever notes does not wait for this.
            self._round = np.unique(np.concatenate(noted)) if noted else _NONE
        with self._lock:
            self._lap, self._round = self._round[:most], self._round[most:]
            return self._lap, self._round_at or 0.0

    def done(self) -> None:
        """Say that the lap is where it belongs."""
        with self._lock:
            self._lap = _NONE
            if not len(self._round):
                self._round, self._round_at = _NONE, None
