# SPDX-License-Identifier: Apache-2.0
"""Clocks: how far each worker is under ssp(s), and the minimum that bounds how far ahead a worker may pull. Pure.

Invariant: the minimum never falls, and every active worker has all of its groups below it behind it. A worker that is given
splits while it had none begins at the minimum; one without splits, or that is gone, holds nobody back. A coordinator that was
restarted knows no clock until its worker told it, and raises the minimum only when it knows all. The coordinator's lock
covers it.
"""

from collections.abc import Iterable


class Clocks:
    """Acknowledged groups by worker (incarnation), of those that are active."""

    def __init__(self) -> None:
        self._active: dict[int, int] = {}
        self._minimum = 0
        # Workers of an earlier life of the coordinator that have not said yet how far they are, and what they hold.
        self.unheard: set[int] = set()

    def begin(self, workers: Iterable[int]) -> None:
        """Wait for what these workers have to tell."""
        self.unheard = set(workers)

    @property
    def minimum(self) -> int:
        """Groups that every active worker has behind it."""
        if self._active and not self.unheard:
            self._minimum = max(self._minimum, min(self._active.values()))
        return self._minimum

    def heard(self, worker: int, *, active: bool, acknowledged: int, minimum: int) -> None:
        """Take in a worker's report; ``minimum`` is the highest one that it was told by an earlier life.

        An inactive report ends nothing: it may have been sent before the worker heard of the splits that it was given.
        """
        self.told(worker, minimum)
        self.unheard.discard(worker)
        if active:
            self._active[worker] = max(self._active.get(worker, 0), acknowledged)

    def told(self, worker: int, minimum: int) -> None:
        """Take up the minimum that an earlier life told a worker: it was true then, and so it is now."""
        if worker in self.unheard:
            self._minimum = max(self._minimum, minimum)

    def idle(self, worker: int) -> None:
        """The worker has no splits: nobody waits for it."""
        if worker in self._active:
            # What it has behind it counts until now.
            _ = self.minimum
            del self._active[worker]

    def activate(self, worker: int) -> int:
        """The worker is given splits; return the number of its first group if it had none before."""
        begin = self.minimum
        self._active[worker] = max(self._active.get(worker, 0), begin)
        return begin

    def gone(self, worker: int) -> None:
        """The worker is no member any more."""
        self.idle(worker)
        self.unheard.discard(worker)

    def of_workers(self) -> dict[int, int]:
        """Return how far each active worker is."""
        return dict(self._active)
