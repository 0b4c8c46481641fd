# SPDX-License-Identifier: Apache-2.0
"""What a coordinator lets be observed: its phase, members, work and orders, as one instant of its state.

Invariant: nothing is changed. The coordinator's lock covers the reading, which is short; called from the thread of the page.
"""

from typing import Any

from oarlock.client.job import GATHERING, OVER, STOPPING, TRAINING, WRITING
from oarlock.cluster.coordinator import Coordinator
from oarlock.cluster.orders import Orders
from oarlock.telemetry.registry import Source

PHASES = (GATHERING, TRAINING, WRITING, STOPPING, *OVER)
ROLES = ("shard", "worker")


def coordinator_source(coordinator: Coordinator, orders: Orders) -> Source:
    """Return the source of the metrics of ``coordinator``, whose ``orders`` go to shards."""
    c = coordinator

    def source() -> dict[str, Any]:
        with c.lock:
            work = c.work
            progress = work.progress()
            open_splits = [kind for kind, _ in work.leases]
            lost = [m.role for m in c.members.lost(c.going_back.first_run)]
            found: dict[str, Any] = {
                "oarlock_coordinator_info": {(c.spec.job, c.spec.name, c.spec.recipe, c.spec.mode): 1},
                "oarlock_coordinator_phase": {phase: int(phase == c.phase) for phase in PHASES},
                "oarlock_coordinator_run": c.run,
                "oarlock_coordinator_term": c.term,
                "oarlock_coordinator_generation": c.generation,
                "oarlock_coordinator_placed_shards": len(c.adopted),
                "oarlock_coordinator_members": {role: len(c.members.alive(role)) for role in ROLES},
                "oarlock_coordinator_lost_members": {role: lost.count(role) for role in ROLES},
                "oarlock_coordinator_wanted_members": {"shard": c.scaling.servers, "worker": c.scaling.workers},
                # Of a job without a scaler there is nothing to say.
                "oarlock_coordinator_autoscale_decisions_total": dict(c.autoscaling.counts),
                "oarlock_coordinator_epoch": work.epoch,
                "oarlock_coordinator_epochs": work.epochs,
                "oarlock_coordinator_splits": {"train": work.splits, "evaluate": work.evaluation_splits},
                "oarlock_coordinator_closed_splits": {
                    "train": progress["splits_closed"],
                    "evaluate": progress["evaluated"],
                },
                "oarlock_coordinator_open_splits": {kind: open_splits.count(kind) for kind in ("train", "evaluate")},
                "oarlock_coordinator_groups_total": work.steps,
                "oarlock_coordinator_samples_total": sum(r.samples for r in work.history) + work.samples,
                "oarlock_coordinator_train_seconds_total": sum(r.train_seconds for r in work.history)
                + work.train_seconds,
                "oarlock_coordinator_evaluate_seconds_total": sum(r.evaluate_seconds for r in work.history)
                + work.evaluate_seconds,
                "oarlock_coordinator_orders_total": dict(orders.counts),
                "oarlock_coordinator_checkpoints_total": dict(orders.cutting.counts),
                "oarlock_coordinator_warnings": len(c.warnings),
            }
            if work.history:
                last = work.history[-1]
                found["oarlock_coordinator_epoch_loss"] = last.loss
                # A metric that the evaluation could not tell is None.
                found["oarlock_coordinator_epoch_result"] = {n: v for n, v in last.metrics.items() if v is not None}
        return found

    return source
