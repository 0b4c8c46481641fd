# SPDX-License-Identifier: Apache-2.0
"""Autoscaling: a job's scaler at work. What members tell is measured, the scaler decides, and what it decides is recorded as if
somebody had asked for it.

    who asks for other numbers      is heard at once; the scaler begins anew, and with it the cool-down
    a coordinator started again     begins with a whole cool-down, and measures anew
    a dry run                       tells what it would do, and asks for nothing

Invariant: a decision is on disk in the transaction that changes the numbers, so it is told once and by every later life. Called
at every tick, under the coordinator's lock.
"""

import logging
import math
from collections import Counter
from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from oarlock.client.job import GATHERING, OVER, TRAINING
from oarlock.cluster.holders import complete
from oarlock.cluster.measuring import Measuring
from oarlock.cluster.scaler import Decision, Look, State, decide
from oarlock.cluster.scaling import rescale
from oarlock.cluster.store import Store

if TYPE_CHECKING:
    from oarlock.cluster.coordinator import Coordinator

logger = logging.getLogger(__name__)

FACT = "autoscale"
# So many decisions are kept, the newest.
MOST_DECISIONS = 20


class Autoscaling:
    """``decisions``: those that changed something, or would have, oldest first; ``counts``: of this life, (role, direction)."""

    def __init__(self, coordinator: "Coordinator") -> None:
        self._c = coordinator
        spec = coordinator.spec
        # Copies of a block are on different servers.
        least = max(spec.autoscale.servers_least, spec.replicas + 1) if spec.autoscale.servers_most else 1
        self.policy = replace(spec.autoscale, servers_least=least)
        self._measuring = Measuring(self.policy)
        self._state = State()
        self._look: dict[str, Any] | None = None
        # When members are heard next, and when a look was last made.
        self._next = self._looked = -math.inf
        self.decisions: list[dict[str, Any]] = []
        self.counts: Counter[tuple[str, str]] = Counter()

    def take_up(self, store: Store) -> None:
        """Load what was recorded."""
        self.decisions = store.fact(FACT, [])
        if self._c.term > 1:
            # What was decided, or asked for, may have been just now.
            self.asked()

    def go_back(self, store: Store) -> None:
        """A new run begins, with the numbers of the job file."""
        self._state, self._look, self.decisions = State(), None, []
        self._measuring.begin(self._c.clock())
        store.set_fact(FACT, [])

    def asked(self) -> None:
        """Begin anew: somebody asked for other numbers, who may know what the scaler does not."""
        now = self._c.clock()
        self._state, self._look = State(changed_at=now), None
        self._measuring.begin(now)

    def step(self) -> None:
        """Measure; look and decide once there is enough."""
        c, now = self._c, self._c.clock()
        if not self.policy or now < self._next:
            return
        self._next = now + c.spec.heartbeat_seconds
        if c.phase in (GATHERING, *OVER):
            return
        shards = [m for m in c.members.alive("shard") if c.scaling.takes_part(m)]
        workers = [m for m in c.members.alive("worker") if m.incarnation not in c.scaling.leaves]
        moving = not c.copies.at_rest or not bool(complete(c.records, c.spec.replicas).all())
        if moving:
            self._measuring.begin(now)
            if now - self._looked < self.policy.look_seconds:
                return
        elif c.phase != TRAINING or c.work.trained or c.cuts.begun or c.cuts.gate is not None or c.copies.held:
            self._measuring.pause(now)
            return
        else:
            self._measuring.hear([*shards, *workers], now)
            if self._measuring.seconds < self.policy.look_seconds:
                return
        numbers = (c.scaling.servers, c.scaling.workers)
        look = self._measuring.look(shards, workers, numbers, now, moving=moving)
        self._measuring.begin(now)
        self._looked = now
        self._decide(look, now)

    def _decide(self, look: Look, now: float) -> None:
        # By this look alone, whatever came before it and was changed just now.
        patient = replace(self._state, changed_at=-math.inf)
        _, would = decide(replace(self.policy, looks=1), patient, look, now)
        self._state, decision = decide(self.policy, self._state, look, now)
        self._look = {**_figures(look), "created": _time(), "said": decision.explain(), "would": would.explain()}
        if decision.changed:
            self._change(decision)

    def _change(self, decision: Decision) -> None:
        c = self._c
        number = self.decisions[-1]["number"] + 1 if self.decisions else 1
        told = {
            "number": number,
            "before": list(decision.before),
            "servers": decision.servers,
            "workers": decision.workers,
            "reasons": list(decision.reasons),
            "dry_run": self.policy.dry_run,
            "created": _time(),
        }
        # Whoever reads the list meanwhile has the one before.
        decisions = [*self.decisions[1 - MOST_DECISIONS :], told]
        after = (decision.servers, decision.workers)
        with c.store as store:
            store.set_fact(FACT, decisions)
            if not self.policy.dry_run:
                rescale(c, store, *(now if now != was else 0 for was, now in zip(decision.before, after, strict=True)))
        self.decisions = decisions
        c.wake()
        for role, was, now in zip(("shard", "worker"), decision.before, after, strict=True):
            if now != was:
                self.counts[role, "more" if now > was else "fewer"] += 1
        logger.info(
            "event=autoscale servers=%d workers=%d dry_run=%s reasons=%s",
            decision.servers,
            decision.workers,
            self.policy.dry_run,
            "; ".join(decision.reasons),
        )

    def told(self) -> dict[str, Any]:
        """Return what people ask."""
        policy = self.policy
        return {
            "dry_run": policy.dry_run,
            "servers": [policy.servers_least, policy.servers_most] if policy.servers_most else None,
            "workers": [policy.workers_least, policy.workers_most] if policy.workers_most else None,
            "look_seconds": policy.look_seconds,
            # Of the next look.
            "measured_seconds": round(min(self._measuring.seconds, policy.look_seconds), 3),
            "look": self._look,
            "decisions": self.decisions,
        }


def _figures(look: Look) -> dict[str, float | None]:
    """Return a look in few numbers, None for what is none."""
    shards = look.shards
    full = [s.memory_bytes / s.limit_bytes for s in shards if s.limit_bytes > 0]
    found = {
        "memory": max(full) if len(full) == look.servers else math.nan,
        "busy": sum(s.busy for s in shards) / len(shards) if shards else math.nan,
        "waiting": sum(s.waiting for s in shards) / len(shards) if shards else math.nan,
        "samples_per_second": look.samples_per_second if look.working else math.nan,
    }
    return {name: round(value, 4) if math.isfinite(value) else None for name, value in found.items()}


def _time() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
