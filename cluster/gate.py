# SPDX-License-Identifier: Apache-2.0
"""The gate of a cut: which workers still push, and until when they are waited for. Pure.

    announced    with every heartbeat's answer, as the seconds until it shuts: all workers shut at about the same moment
    passed       every worker that may push says that it stands at the gate, or is gone
    late         ``gate_seconds`` after it shut; the cut is given up

Invariant: nobody joins while a gate stands; whoever is given a split before it shuts is waited for, too, and from then on nobody
is given any. So no other worker than those can push. The coordinator's lock covers it.
"""

from collections.abc import Iterable


class Gate:
    """The gate of cut ``cut``, which shuts at ``shuts`` and is waited for until ``ends``; ``workers`` may push."""

    def __init__(self, cut: int, *, shuts: float, ends: float, workers: Iterable[int]) -> None:
        self.cut = cut
        self.shuts = shuts
        self.ends = ends
        self._missing = set(workers)
        self._come: set[int] = set()

    def wait_for(self, worker: int) -> None:
        """A worker is given something to push."""
        if worker not in self._come:
            self._missing.add(worker)

    def come(self, worker: int) -> None:
        """A worker stands at the gate. One that was not asked to pushes nothing either."""
        self._missing.discard(worker)
        self._come.add(worker)

    def gone(self, worker: int) -> None:
        """A worker left, or was struck off: what it has begun is completed by whoever gets its splits."""
        self._missing.discard(worker)
        self._come.discard(worker)

    @property
    def passed(self) -> bool:
        return not self._missing

    @property
    def missing(self) -> list[int]:
        """Return the workers that have not come, ascending."""
        return sorted(self._missing)

    @property
    def workers(self) -> list[int]:
        """Return the workers that stand at the gate, ascending: shards know them by it."""
        return sorted(self._come)
