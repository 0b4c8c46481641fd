# SPDX-License-Identifier: Apache-2.0
"""Counts of requests by method: how many, how they failed, their bytes, and how long they took.

Invariant: what is counted only grows; a request is counted once, when it is over. The server's threads count under a lock of
the method's own, which costs less than a microsecond; readers take what is there.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from threading import Lock

from oarlock.proto.errors import PSError


@dataclass
class Count:
    """One method's. ``failures``: by the error's name; ``observer(received, sent, seconds)`` hears of each request."""

    requests: int = 0
    received: int = 0
    sent: int = 0
    seconds: float = 0.0
    failures: dict[str, int] = field(default_factory=dict)
    lock: Lock = field(default_factory=Lock)
    observer: Callable[[int, int, float], None] | None = None

    def add(self, received: int, sent: int, seconds: float, error: PSError | None = None) -> None:
        """Count a request that is over."""
        with self.lock:
            self.requests += 1
            self.received += received
            self.sent += sent
            self.seconds += seconds
            if error is not None:
                name = type(error).__name__
                self.failures[name] = self.failures.get(name, 0) + 1
        if self.observer is not None:
            self.observer(received, sent, seconds)


class Counts:
    """A Count for each method that was asked for."""

    def __init__(self) -> None:
        self._found: dict[str, Count] = {}
        self._lock = Lock()

    def of(self, method: str) -> Count:
        found = self._found.get(method)
        if found is None:
            with self._lock:
                found = self._found.setdefault(method, Count())
        return found

    def all(self) -> dict[str, Count]:
        """Return what there is so far, by method."""
        with self._lock:
            return dict(self._found)
