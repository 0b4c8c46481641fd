# SPDX-License-Identifier: Apache-2.0
"""Phases in a trace: which phase a job was in, and in which epoch, as events of the coordinator's own row.

Invariant: they follow each other without a gap. A change is noticed by looking, before and after every order and at every judging
of leases: nothing that a member waits for is recorded. Used by one event loop.
"""

from oarlock.cluster.coordinator import Coordinator
from oarlock.telemetry.trace import Track, now


class Phases:
    """Looks at the coordinator's phase, and records the one before once it is over."""

    def __init__(self, coordinator: Coordinator, track: Track | None) -> None:
        self._coordinator = coordinator
        self._track = track
        self._begun = now()
        self._seen = self._now()

    def _now(self) -> tuple[str, int]:
        # With the lock: an epoch ends on another thread, which changes the one after the other.
        with self._coordinator.lock:
            return self._coordinator.phase, self._coordinator.work.epoch

    def look(self) -> None:
        """Record the phase that is over, if one is."""
        if self._track is not None and self._now() != self._seen:
            self.end()

    def end(self) -> None:
        """Record the phase up to now, also if it goes on."""
        if self._track is not None:
            (phase, epoch), at = self._seen, now()
            self._track.complete("phase", self._begun, at, {"epoch": epoch}, name=phase)
            self._begun, self._seen = at, self._now()
