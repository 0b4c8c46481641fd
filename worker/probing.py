# SPDX-License-Identifier: Apache-2.0
"""Probing: which groups of a worker find out what kept rows cost, and the bounds that its caches have because of that.

Invariant: which groups are probes depends on their numbers alone, and a group's gradients, given its rows, not on whether it is
one. ``stale_loss`` is called in whichever thread computes the group, all else on the event loop.
"""

import math
from typing import Any

from oarlock.client.caches import Caches
from oarlock.client.probe import Probe
from oarlock.nn import Lookup, Program
from oarlock.worker.adaptive import AdaptiveBound, Measured, is_probe
from oarlock.worker.compute import loss_of
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

    def stale_loss(self, program: Program, prepared: Prepared, *, seed: int, draw: int) -> float | None:
        """Return the sum of losses of a probe's group under the bound; None if its rows would have been the fresh ones."""
        probe = prepared.probe
        assert probe is not None
        stale = probe.stale(prepared.rows[probe.table])
        if stale is None:
            return None
        rows = {**prepared.rows, probe.table: stale}
        return loss_of(program, self._lookups, prepared, rows, seed=seed, draw=draw)

    def learn(self, probe: Probe, fresh: float, stale: float | None) -> None:
        """Take in what a probe found: the sums of losses with fresh rows and with stale ones."""
        adaptive = self.of[probe.table]
        self.probes[probe.table] += 1
        # The bound may have changed while the group was on its way.
        if probe.bound != adaptive.bound or not math.isfinite(fresh) or fresh <= 0:
            return
        excess = 0.0 if stale is None else (stale - fresh) / fresh
        # One batch that went astray shall not outweigh all others.
        excess = min(1.0, max(-1.0, excess)) if math.isfinite(excess) else 1.0
        self._caches.bounds[probe.table] = adaptive.step(Measured(excess, probe.saved(adaptive.rungs)))

    def told(self) -> dict[str, dict[str, Any]]:
        """Return what is known of each adaptive bound, as a worker's statistics tell it."""
        return {name: {"probes": self.probes[name], "excess": round(a.excess, 6)} for name, a in self.of.items()}
