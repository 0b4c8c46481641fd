# SPDX-License-Identifier: Apache-2.0
"""Recovery: a coordinator's memory made from its stored state, or from a checkpoint that the job goes back to.

Invariant: the number of the term, and of the run, is on disk before anybody hears it. The coordinator's lock covers it.
"""

import json
import logging
import math
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

from oarlock.checkpoint.line import RESTORE
from oarlock.checkpoint.manifest import Manifest
from oarlock.client.closed import ClosedSet
from oarlock.client.job import GATHERING
from oarlock.cluster.clocks import Clocks
from oarlock.cluster.evaluation import Found
from oarlock.cluster.going_back import lost_since
from oarlock.cluster.members import Member
from oarlock.cluster.ranks import SIGNATURE, take_over_signature
from oarlock.cluster.work import EpochResult
from oarlock.embedding.spec import to_json
from oarlock.proto.errors import CorruptCheckpoint, InvalidArgument, SpecMismatch

if TYPE_CHECKING:
    from oarlock.cluster.coordinator import Coordinator

logger = logging.getLogger(__name__)


def take_up(c: "Coordinator") -> None:
    """Load the stored state under a new term."""
    with c.store as store:
        if store.fact("job") not in (None, c.spec.job):
            raise InvalidArgument(f"this state belongs to job {store.fact('job')}, the job file says {c.spec.job}")
        c.term = store.fact("term", 0) + 1
        store.set_fact("job", c.spec.job)
        store.set_fact("term", c.term)
        c.run, c.has_begun = store.fact("run", 1), store.fact("run") is not None
        c.cuts.take_up(store)
        c.events.take_up(store)
        c.phase, c.reason = store.fact("phase", GATHERING), store.fact("reason", "")
        c.restore = store.fact("restore", "")
        c.stop_wanted, c.stop_reason = store.fact("stop", None), store.fact("stop_reason", "")
        closed = store.fact("closed", {"floor": 0, "above": []})
        c.work.closed = ClosedSet(closed["floor"], closed["above"])
        c.work.history = [EpochResult(**e) for e in store.epochs()]
        c.work.epoch = len(c.work.history)
        c.work.results = store.evaluations()
        for name, value in store.fact("counted", {}).items():
            setattr(c.work, name, value)
        c.work.all_touched = c.term > 1
        c.copies.take_up(store)
        c.scaling.take_up(store)
        c.autoscaling.take_up(store)
        c.recoveries.take_up(store, c.run, c.clock())
        c.going_back.take_up(store, c.run)
        if c.term == 1:
            c.losses.begin_run()
        c.going_back.tell(c)
        c.rollbacks.take_up(store)
        for value in store.members():
            c.members.add(Member(**value), c.clock())
        # What they hold is asked before anything is leased anew.
        c.clocks.begin(m.incarnation for m in c.members.alive("worker"))
    c.last_tick = c.judged = c.stopping_since = c.clock()
    logger.info("event=coordinator_open term=%d run=%d phase=%s", c.term, c.run, c.phase)


def go_back(c: "Coordinator", manifest: Manifest | None, path: str) -> None:
    """Begin a new run from a committed checkpoint, whose closed set and results are the manifest's; None: from first values."""
    if manifest is not None:
        _check_fits(c, manifest, path)
    saved = _saved(c, manifest, path) if manifest is not None else _nothing(c)
    by_itself, cut, old_run = c.going_back.due, 0 if manifest is None else manifest.cut, c.run
    with c.store as store:
        c.run = max(c.run, 0 if manifest is None else manifest.run) + 1
        c.going_back.begun(store, c.run, path, cut, lost_since(manifest, c.work.steps, saved.counted))
        c.restore, c.has_begun = path, True
        c.work.closed = ClosedSet() if manifest is None else ClosedSet(manifest.closed.floor, manifest.closed.above)
        c.work.history = saved.history
        c.work.epoch = len(c.work.history)
        c.work.results = saved.evaluations
        for name, value in saved.counted.items():
            setattr(c.work, name, value)
        # Whoever gets them begins with nothing kept of them.
        c.work.given_back += 0 if manifest is None else len(manifest.open_splits)
        c.work.all_touched = True
        c.copies.go_back(store)
        c.scaling.go_back(store, stays=by_itself)
        if not by_itself:
            c.autoscaling.go_back(store)
        c.placed = False
        c.phase, c.reason, c.stop_wanted, c.stop_reason = GATHERING, "", None, ""
        c.work.leases.clear()
        c.clocks = Clocks()
        c.losses.begin_run()
        c.work.failures.clear()
        for member in c.members.all.values():
            if member.state == "alive":
                # Of a job that goes back by itself they come again.
                member.state = "left" if by_itself else "dead"
                store.set_member(member.incarnation, member.record())
        store.clear_evaluations()
        store.clear_epochs()
        for split, sums in c.work.results.items():
            store.set_evaluation(split, sums)
        for result in c.work.history:
            store.set_epoch(result.epoch, asdict(result))
        for name in ("run", "restore", "phase", "reason"):
            store.set_fact(name, getattr(c, name))
        c.cuts.go_back(store, manifest, path)
        c.rollbacks.go_back(store)
        if manifest is not None:
            take_over_signature(store, manifest.metrics.get(SIGNATURE), accept=c.accept_signature)
        c.events.add(
            store,
            RESTORE,
            c.run,
            cut=cut,
            last=c.cuts.last,
            of_run=old_run if manifest is None else manifest.run,
            of_job=c.spec.job if manifest is None else manifest.job,
            path=path,
        )
        store.set_fact("stop", None)
        c.record_work(store)
    c.going_back.tell(c)
    logger.info("event=run_begun run=%d restore=%s", c.run, path)


def _check_fits(c: "Coordinator", manifest: Manifest, path: str) -> None:
    """Refuse a checkpoint of other parameters: its blocks would be missing or of another shape."""
    spec = c.spec
    tables, dense = [to_json(t) for t in spec.tables], [to_json(d) for d in spec.dense]
    mine = {"seed": spec.seed, "tables": tables, "dense": dense}
    # Not as they were written: what a spec did not have yet is as it is by default.
    theirs = {
        "seed": manifest.seed,
        "tables": [to_json(t) for t in manifest.table_specs().values()],
        "dense": [to_json(d) for d in manifest.dense_specs().values()],
    }
    for name, value in mine.items():
        if json.dumps(value, sort_keys=True) != json.dumps(theirs[name], sort_keys=True):
            raise SpecMismatch(f"the checkpoint {path} has another {name} than job {spec.name}", field=name)


@dataclass(frozen=True)
class _Saved:
    """What a manifest says of a job's results."""

    history: list[EpochResult]
    evaluations: dict[int, Found]
    counted: dict[str, Any]


def _nothing(c: "Coordinator") -> _Saved:
    """Return the results of a job that has not begun."""
    return _Saved([], {}, {name: type(value)() for name, value in c.counted().items()})


def _saved(c: "Coordinator", manifest: Manifest, path: str) -> _Saved:
    """Return a manifest's results, which may have come from anywhere; CorruptCheckpoint if they are none of a job like this."""
    try:
        saved = manifest.metrics
        history = [_result(number, each) for number, each in enumerate(saved["history"])]
        evaluations: dict[int, Found] = {
            int(split): [_number(v) for v in found] for split, found in saved["evaluations"].items()
        }
        epochs = max(c.spec.epochs, manifest.epoch + 1)
        if not all(0 <= split < max(1, c.spec.evaluation_splits) * epochs for split in evaluations):
            raise ValueError(f"evaluation splits {sorted(evaluations)[:8]}")
        known = c.counted()
        counted = {name: type(known[name])(_number(value)) for name, value in saved["counted"].items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CorruptCheckpoint(
            f"the checkpoint {path} does not say how far its job was ({type(error).__name__}: {error}): no job goes on from it; "
            "its rows can be taken over into a new job with --warm-start",
        ) from None
    last, closed = c.spec.splits * epochs, max(manifest.closed.floor, *manifest.closed.above, 0)
    if len(history) != manifest.epoch or closed > last:
        raise CorruptCheckpoint(
            f"the checkpoint {path} is of epoch {manifest.epoch} with {len(history)} results, and has splits closed up to "
            f"{closed} of {last}: it is of no job like {c.spec.name}"
        )
    return _Saved(history, evaluations, counted)


def _result(number: int, values: Any) -> EpochResult:
    result = EpochResult(**values)
    if result.epoch != number or not isinstance(result.metrics, dict):
        raise ValueError(f"result {number} is of epoch {result.epoch!r}")
    for field in fields(result):
        if field.name != "metrics":
            _number(getattr(result, field.name))
    for value in result.metrics.values():
        if value is not None:
            _number(value)
    return result


def _number(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{value!r} is no number")
    return value
