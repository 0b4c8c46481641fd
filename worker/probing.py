# SPDX-License-Identifier: Apache-2.0
"""Probing: which groups of a worker find out what kept rows cost, and the bounds that its caches have because of that.

Invariant: which groups are probes depends on their numbers alone, and a group's gradients, given its rows, not on whether it is
one. ``excess`` is called in whichever thread computes the group, all else on the event loop.
"""

from typing import Any

from oarlock.client.caches import Caches
from oarlock.client.probe import Probe
from oarlock.nn import Lookup, Program
from oarlock.worker.adaptive import AdaptiveBound, Measured, is_probe, relative_excess
from oarlock.worker.compute import scores_with
from oarlock.worker.prepare import Prepared


class Probing:
    """The adaptive bounds of one worker's ``caches``, by table; tables take turns."""

    def __init__(self, caches: Caches, lookups: tuple[Lookup, ...]) -> None:
        self._caches = caches
        self._lookups = lookups
        self.of = {name: AdaptiveBound(c.spec.bound) for name, c in caches.of.items() if c.spec.adaptive}
        self.probes = dict.fromkeys(self.of, 0)
        self._names = list(self.of)
        self._begun = 0
        for name, adaptive in self.of.items():
            caches.bounds[name] = adaptive.bound

    def probe(self, turn: int) -> Probe | None:
        """Return what the group of this number is to be pulled with; None: with the caches, as it is no probe."""
        if not self._names or not is_probe(turn):
            return None
        self._begun += 1
        return Probe(self._caches, self._names[self._begun % len(self._names)])

    def excess(self, program: Program, prepared: Prepared) -> float:
        """Return what a probe's group would lose under the bound, relative to what it loses with its fresh rows."""
        probe = prepared.probe
        assert probe is not None
        stale = probe.stale(prepared.rows[probe.table])
        if stale is None:
            return 0.0
        fresh = scores_with(program, self._lookups, prepared, prepared.rows)
        rows = {**prepared.rows, probe.table: stale}
        return relative_excess(fresh, scores_with(program, self._lookups, prepared, rows))

    def learn(self, probe: Probe, excess: float) -> None:
        """Take in what a probe found."""
        adaptive = self.of[probe.table]
        self.probes[probe.table] += 1
        # The bound may have changed while the group was on its way.
        if probe.bound == adaptive.bound:
            self._caches.bounds[probe.table] = adaptive.step(Measured(excess, probe.saved(adaptive.rungs)))

    def told(self) -> dict[str, dict[str, Any]]:
        """Return what is known of each adaptive bound, as a worker's statistics tell it."""
        return {name: {"probes": self.probes[name], "excess": round(a.excess, 6)} for name, a in self.of.items()}
