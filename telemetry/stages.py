# SPDX-License-Identifier: Apache-2.0
"""Stage times: how long a process spent in each named stage of its work.

Invariant: a stage's seconds only grow; entering one costs two clock reads. One thread per Stages object.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Stages:
    """Seconds and entries by stage name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.entries: dict[str, int] = {}

    @contextmanager
    def time(self, stage: str) -> Iterator[None]:
        """Count the body's time to ``stage``."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - begun
            self.entries[stage] = self.entries.get(stage, 0) + 1

    def rounded(self) -> dict[str, float]:
        """Return the seconds to the millisecond, for reports."""
        return {name: round(value, 3) for name, value in self.seconds.items()}
