# SPDX-License-Identifier: Apache-2.0
"""Stage times: how long a process spent in each named stage of its work, and, if it is traced, when.

Invariant: a stage's seconds only grow; entering one costs two clock reads and makes no event unless there is a track. A stage
may run beside itself, in tasks or in threads. Any thread.
"""

from contextlib import AbstractContextManager
from threading import Lock
from types import TracebackType

from oarlock.telemetry.trace import Track, now


class Stages:
    """Seconds and entries by stage name; ``track``: where each entry is recorded, None: nowhere."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.entries: dict[str, int] = {}
        self.track: Track | None = None
        self._lock = Lock()

    def time(self, stage: str, **arguments: int | str) -> AbstractContextManager[None]:
        """Count the body's time to ``stage``; ``arguments`` (split, batch) tell its entries apart in a trace."""
        return _Timed(self, stage, arguments)

    def add(self, stage: str, begin: int, end: int, arguments: dict[str, int | str]) -> None:
        """Count what lasted from ``begin`` to ``end``, in nanoseconds of ``trace.now``."""
        with self._lock:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + (end - begin) * 1e-9
            self.entries[stage] = self.entries.get(stage, 0) + 1
        if self.track is not None:
            self.track.complete(stage, begin, end, arguments)

    def rounded(self) -> dict[str, float]:
        """Return the seconds to the millisecond, for reports."""
        return {name: round(value, 3) for name, value in self.seconds.copy().items()}


class _Timed:
    __slots__ = ("_arguments", "_begun", "_stage", "_stages")

    def __init__(self, stages: Stages, stage: str, arguments: dict[str, int | str]) -> None:
        self._stages = stages
        self._stage = stage
        self._arguments = arguments
        self._begun = 0

    def __enter__(self) -> None:
        self._begun = now()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stages.add(self._stage, self._begun, now(), self._arguments)
