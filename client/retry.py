# SPDX-License-Identifier: Apache-2.0
"""Retry: send again after a growing, jittered pause, until a deadline.

Invariant: only errors marked retryable are met with another try; the last error is what the caller sees.
"""

import asyncio
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

from oarlock.proto.errors import PSError

T = TypeVar("T")


@dataclass(frozen=True)
class Retry:
    """Pauses start at ``first_seconds``, double up to ``most_seconds``, and are drawn from the upper half of that.

    The deadline is long: who waits for a process that was killed waits for whoever starts it again. What ends the waiting is
    the word of the coordinator that the job is over, or the end of the launcher.
    """

    deadline_seconds: float = 3600.0
    call_seconds: float = 20.0
    first_seconds: float = 0.02
    most_seconds: float = 1.0

    async def run(
        self,
        attempt: Callable[[float], Awaitable[T]],
        *,
        rng: random.Random,
        retryable: Callable[[PSError], bool] = lambda error: error.retryable,
    ) -> T:
        """Return ``await attempt(timeout_seconds)``, tried again while it fails retryably and the deadline allows."""
        clock = asyncio.get_running_loop().time
        end = clock() + self.deadline_seconds
        pause = self.first_seconds
        while True:
            left = end - clock()
            try:
                return await attempt(max(0.001, min(self.call_seconds, left)))
            except PSError as error:
                if not retryable(error):
                    raise
                drawn = pause * (0.5 + rng.random() / 2)
                if clock() + drawn >= end:
                    raise type(error)(
                        f"{error} (given up after {self.deadline_seconds:g} s)", **error.details
                    ) from error
            await asyncio.sleep(drawn)
            pause = min(self.most_seconds, pause * 2)
