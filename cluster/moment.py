# SPDX-License-Identifier: Apache-2.0
"""Moment: what a manifest says of the job, as of the instant at which no push was under way.

Invariant: taken once, under the coordinator's lock; what is counted, closed or found later is not in it. Pure.
"""

from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from oarlock.checkpoint.line import EVENTS, PLAN
from oarlock.checkpoint.manifest import BlockEntry, Manifest
from oarlock.checkpoint.manifest import ClosedSet as ClosedRecord
from oarlock.client.job import JobSpec
from oarlock.cluster.ranks import SIGNATURE
from oarlock.embedding.spec import to_json

if TYPE_CHECKING:
    from oarlock.cluster.coordinator import Coordinator


@dataclass(frozen=True)
class Moment:
    """The job at one instant."""

    run: int
    cut: int
    created: str
    closed: ClosedRecord
    open_splits: tuple[int, ...]
    epoch: int
    step: int
    metrics: dict[str, Any]
    best: dict[str, Any]

    def manifest(self, spec: JobSpec, entries: list[BlockEntry]) -> Manifest:
        """Return the manifest of these blocks."""
        return Manifest(
            job=spec.job,
            run=self.run,
            cut=self.cut,
            created=self.created,
            seed=spec.seed,
            tables=tuple(to_json(t) for t in spec.tables),
            dense=tuple(to_json(d) for d in spec.dense),
            recipe=spec.recipe,
            config=spec.config,
            files=spec.files,
            closed=self.closed,
            open_splits=self.open_splits,
            epoch=self.epoch,
            step=self.step,
            metrics=self.metrics,
            best=self.best,
            blocks=tuple(entries),
        )


def moment_of(c: "Coordinator", cut: int) -> Moment:
    """Return the job as it is now, for cut ``cut``."""
    with c.lock:
        return _moment_of(c, cut)


def _moment_of(c: "Coordinator", cut: int) -> Moment:
    work, best = c.work, c.work.best()
    # What its evaluation found is said of the model of a cut, where there was one.
    found = work.history[-1].metrics if c.cuts.after_epoch and work.history else {}
    return Moment(
        run=c.run,
        cut=cut,
        created=datetime.now(UTC).isoformat(),
        closed=ClosedRecord(work.closed.floor, tuple(sorted(work.closed.above))),
        open_splits=tuple(work.open_splits()),
        epoch=work.epoch,
        step=work.steps,
        metrics={
            **found,
            "history": [asdict(r) for r in work.history],
            # Scores are much for a manifest, and its blocks give them again: those splits are evaluated anew.
            "evaluations": {str(s): v for s, v in work.results.items() if isinstance(v, list)},
            "counted": c.counted(),
            EVENTS: c.events.all,
            PLAN: c.spec.plan(),
            **({SIGNATURE: c.store.fact(SIGNATURE)} if c.spec.ranks else {}),
        },
        best=asdict(best) if best else {},
    )
