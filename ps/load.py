# SPDX-License-Identifier: Apache-2.0
"""Load: how busy a shard is and what it may have, as it tells the scaler of a job that has one.

    cpu_seconds      processor time of its process, which may use ``processors``
    pushing_seconds  time in which at least one push was here; one is applied at a time, so this is what limits all
    pushes_seconds   time of all pushes summed, so that its growth is how many are here at a time
    resident_bytes, limit_bytes  what the process has in RAM, and may have (0: not known)

Invariant: seconds only grow. Any thread; a push costs two short locks.
"""

import contextlib
import os
import time
from threading import Lock
from types import TracebackType

from oarlock.telemetry.limits import memory_limit, processors
from oarlock.telemetry.system import memory


class Load:
    """``with load: ...`` is one push."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._pushes = 0
        self._at = 0.0
        self._pushing = self._pushed = 0.0

    def __enter__(self) -> None:
        with self._lock:
            self._pass()
            self._pushes += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            self._pass()
            self._pushes -= 1

    def _pass(self) -> None:
        """Count the time until now."""
        now = time.perf_counter()
        if self._pushes:
            self._pushing += now - self._at
            self._pushed += self._pushes * (now - self._at)
        self._at = now

    def told(self) -> dict[str, float]:
        """Return all of it, JSON-ready."""
        with self._lock:
            self._pass()
            pushing, pushed = self._pushing, self._pushed
        times, resident = os.times(), 0
        with contextlib.suppress(OSError):
            _, resident = memory()
        return {
            "cpu_seconds": times.user + times.system,
            "processors": processors(),
            "pushing_seconds": round(pushing, 6),
            "pushes_seconds": round(pushed, 6),
            "resident_bytes": resident,
            "limit_bytes": memory_limit(),
        }
