# SPDX-License-Identifier: Apache-2.0
"""Status: all that people ask a coordinator about, JSON-ready. A pure view; the coordinator's lock covers it."""

from collections import Counter
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from oarlock import __version__
from oarlock.client.compression import feedback_of
from oarlock.cluster.holders import complete

if TYPE_CHECKING:
    from oarlock.cluster.coordinator import Coordinator


def status_of(c: "Coordinator") -> dict[str, Any]:
    """Return the job's state: phase and reason, progress, history, members with their counters, warnings, placement."""
    best = c.work.best()
    return {
        "job": c.spec.job,
        "name": c.spec.name,
        "version": __version__,
        "recipe": c.spec.recipe,
        "seed": c.spec.seed,
        "mode": c.spec.mode,
        "ranks": c.spec.ranks,
        "phase": c.phase,
        "reason": c.reason,
        "run": c.run,
        "term": c.term,
        "generation": c.generation,
        "servers": c.scaling.servers,
        "workers": c.scaling.workers,
        # Where the coordinator's page of metrics is, if it has one; members tell theirs among their counters.
        "metrics": c.metrics_address,
        **c.work.progress(),
        # Splits whose worker ended, or gave them back, with what error feedback had kept of them; of other jobs nothing is said.
        **({"residual_splits_lost": c.work.given_back} if feedback_of(c.spec.compression) else {}),
        # In which forms values travel, where the job says so.
        **(
            {"compression": {name: asdict(wire) for name, wire in c.spec.compression.items()}}
            if c.spec.compression
            else {}
        ),
        "best": asdict(best) if best else None,
        "history": [asdict(r) for r in c.work.history],
        "checkpoints": c.cuts.checkpoints,
        "cut": c.cuts.told(),
        "events": c.events.all,
        "rollback": c.rollbacks.told(),
        "digest": c.live_digest.found,
        "warnings": c.warnings,
        "members": [{**m.record(), "stats": m.stats} for m in c.members.all.values() if m.state == "alive"],
        "lost": [m.record() for m in c.members.lost(c.going_back.first_run)],
        "reader": "+".join(sorted({m.reader for m in c.members.all.values() if m.reader and m.run == c.run})),
        "blocks": {str(s): int((c.records.owners == s).sum()) for s in sorted(c.shards)},
        **copies_of(c),
    }


def copies_of(c: "Coordinator") -> dict[str, Any]:
    """Return the state of copy sets: how many lack a member, what moves, who leaves, and the history of recoveries."""
    moving, records = c.copies.moving, c.records
    stages = Counter(flight.stage for flight in moving.flights.values())
    return {
        "replicas": c.spec.replicas,
        "incomplete": int((~complete(records, c.spec.replicas)).sum()) if c.shards else 0,
        "ownerless": len(c.copies.promotion.blocks),
        "copies": {str(s): len(records.named(s)) for s in sorted(c.shards)},
        "moving": {
            "left": moving.left,
            "under_way": len(moving.flights),
            "closed": len(moving.closed),
            **stages,
            # Whether nothing is under way, nor wanted, nor looked for.
            "at_rest": c.copies.at_rest,
        },
        # By how much the shard that has most is above the mean.
        "uneven": {name: round(over, 3) for name, over in c.copies.burdens.over(records).items()},
        "scale": c.scaling.told(),
        **({"autoscale": c.autoscaling.told()} if c.autoscaling.policy else {}),
        "recoveries": c.recoveries.told(),
    }
