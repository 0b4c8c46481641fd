# SPDX-License-Identifier: Apache-2.0
"""A hop: work that goes to another thread where it is long, and is done at once where that is shorter than the way there.

Two hand-overs of the interpreter and two threads to wake cost a few tenths of a millisecond of processor time: a batch of a small
model computes in less. Invariant: the work is done once, and never while a thread is at other work of its kind. One event loop.
"""

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import Executor
from typing import TypeVar

T = TypeVar("T")

# Of how many calls the mean is about.
_MEMORY = 8


class Hop:
    """Calls functions of one kind, in a thread of ``executor`` unless they took less than ``least_seconds`` on the average."""

    def __init__(self, executor: Executor, least_seconds: float) -> None:
        self._executor = executor
        self._least_seconds = least_seconds
        self._seconds = float("inf")
        self._away = 0

    async def call(self, function: Callable[[], T]) -> T:
        """Return ``function()``."""
        if self._seconds < self._least_seconds and not self._away:
            result, seconds = _timed(function)
        else:
            self._away += 1
            try:
                result, seconds = await asyncio.get_running_loop().run_in_executor(self._executor, _timed, function)
            finally:
                self._away -= 1
        known = self._seconds if self._seconds < float("inf") else seconds
        self._seconds = known + (seconds - known) / _MEMORY
        return result


def _timed(function: Callable[[], T]) -> tuple[T, float]:
    begun = time.thread_time()
    result = function()
    return result, time.thread_time() - begun
