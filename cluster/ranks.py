# SPDX-License-Identifier: Apache-2.0
"""Ranks in the coordinator: they are leased to worker processes, and a worker of another compute signature is refused.

    share      no process hosts more than ceil(R / processes) ranks while others have none; who has more gives some up, and who
               asks is given those that nobody has, the lowest first
    split      belongs to the rank of its position in the epoch; whoever hosts that rank, or did, reports it closed
    signature  under sync: what a worker's sums depend on besides its data; the first one of a job is recorded, another refused

Invariant: a rank that nobody hosts is free for whoever asks. Two hosts of one rank do no harm (S2), so a lease is a matter of
work done once, not of results: a report of a split that is true is taken from anybody. The coordinator's lock covers it.
"""

import json
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from oarlock.client.job import TRAINING, JobSpec
from oarlock.cluster.together import all_done
from oarlock.cluster.work import MAX_FAILURES, Grant, Work
from oarlock.data.files import files_from_json
from oarlock.data.ranks import RankPlan
from oarlock.data.splits import plan_splits
from oarlock.proto.arrays import pack, unpack
from oarlock.proto.errors import InvalidArgument, Malformed, Unavailable
from oarlock.proto.shard_pb2 import RankCommits, RanksRequest

if TYPE_CHECKING:
    from oarlock.cluster.coordinator import Coordinator
    from oarlock.cluster.store import Store

logger = logging.getLogger(__name__)

RANK = "rank"
# Facts: what the job's workers compute with; and what they did until somebody accepted that others do.
SIGNATURE, ACCEPTED = "signature", "signature_before"
MAX_SIGNATURE = 4096


@dataclass
class RankWork(Work):
    """Work whose training splits belong to ranks. ``hosts()``: how many worker processes there are."""

    ranks: int = 1
    hosts: Callable[[], int] = lambda: 1
    # Ranks whose workers were heard to host them: who then hosts one no more has lost what error feedback kept of its split.
    heard: set[tuple[int, int]] = field(default_factory=set)
    # Ranks that were counted as lost with a worker that was never heard again.
    missing: set[int] = field(default_factory=set)

    def grant(self, worker: int, wanted: int) -> Grant:
        """While splits are trained, lease ranks: the answer's splits are all ranks that ``worker`` shall host."""
        if self.finished or self.trained:
            return super().grant(worker, wanted)
        mine = sorted(rank for kind, rank in self.leased_to(worker) if kind == RANK)
        share = -(-self.ranks // max(1, self.hosts()))
        free = [rank for rank in range(self.ranks) if (RANK, rank) not in self.leases]
        found = mine[:share] + free[: max(0, share - len(mine))]
        for rank in found:
            self.leases[RANK, rank] = worker
        # Also none: what it has beyond its share it gives up, and says so with its next question.
        return Grant("train", tuple(sorted(found)), (False,) * len(found))

    def _may_end(self, kind: str, worker: int, split: int) -> None:
        if kind != "train":
            super()._may_end(kind, worker, split)

    def _due(self, kind: str, split: int) -> bool:
        return split < self.ranks if kind == RANK else super()._due(kind, split)

    def claim(self, worker: int, held: set[tuple[str, int]]) -> None:
        """As ``Work.claim``; a rank never ends."""
        super().claim(worker, {(kind, number) for kind, number in held if kind != RANK})
        for kind, rank in held:
            if kind == RANK and self._due(kind, rank) and self.leases.setdefault((RANK, rank), worker) == worker:
                self.heard.add((rank, worker))

    def keep_only(self, worker: int, held: set[tuple[str, int]]) -> None:
        """As ``Work.keep_only``; a rank that was hosted and is no more was given up in the middle of its split."""
        before = {rank for kind, rank in self.leased_to(worker) if kind == RANK and (rank, worker) in self.heard}
        super().keep_only(worker, held)
        self._lost(worker, {rank for rank in before if self.leases.get((RANK, rank)) != worker})

    def _lost(self, worker: int, ranks: set[int]) -> None:
        """Count the splits that these ranks, which the worker hosts no more, may have been in the middle of."""
        self.heard -= {(rank, worker) for rank in ranks}
        if not self.trained:
            self.given_back += len(ranks)

    def release(self, worker: int, kind: str, split: int, reason: str) -> bool:
        """As ``Work.release``; a training split is given back by giving up its rank."""
        if kind == "train":
            rank = split % self.splits % self.ranks
            if self.leases.get((RANK, rank)) == worker:
                del self.leases[RANK, rank]
            if reason:
                self.failures.setdefault((kind, split), {})[worker] = reason
            return len(self.failures.get((kind, split), ())) < MAX_FAILURES
        if kind == RANK and self.leases.get((RANK, split)) == worker:
            self._lost(worker, {split})
        return super().release(worker, kind, split, reason)

    def vanished(self, most: int) -> None:
        """Count what a worker that ended before it could tell after a restart may have hosted: ranks that nobody has."""
        nobodys = {rank for rank in range(self.ranks) if (RANK, rank) not in self.leases}
        if not self.trained:
            self.given_back += len(nobodys - self.missing)
        self.missing = nobodys


def work_of(spec: JobSpec, hosts: Callable[[], int]) -> Work:
    """Return the work of a job."""
    if spec.ranks:
        return RankWork(spec.splits, spec.evaluation_splits, spec.epochs, spec.metrics, ranks=spec.ranks, hosts=hosts)
    return Work(spec.splits, spec.evaluation_splits, spec.epochs, spec.metrics)


def read_ranks(ranks: int, told: list[int]) -> set[tuple[str, int]]:
    """Return what a worker says it hosts."""
    if len(told) > ranks or any(rank >= ranks for rank in told):
        raise InvalidArgument(f"ranks {told[:8]} are held; this job has {ranks}, from 0 on")
    return {(RANK, rank) for rank in told}


def check_signature(c: "Coordinator", text: str) -> None:
    """Record the first worker's compute signature; refuse a worker with another one. Under the coordinator's lock."""
    if c.spec.mode != "sync":
        return
    mine = _read(text)
    # Of this line of the job's history and of all before it: a restore goes on with the same sums.
    known = c.store.fact(SIGNATURE)
    if known is None:
        before = c.store.fact(ACCEPTED)
        differs = sorted(n for n in {*mine, *(before or {})} if mine.get(n) != (before or {}).get(n))
        with c.store as store:
            store.set_fact(SIGNATURE, mine)
            store.set_fact(ACCEPTED, None)
            if before is not None and differs:
                was, now = ({n: each.get(n) for n in differs} for each in (before, mine))
                c.events.add(store, SIGNATURE, c.run, was=was, now=now, step=c.work.steps)
                c.warn(f"workers compute with another {', '.join(differs)} from here on: bits may differ")
        logger.info("event=signature %s", " ".join(f"{name}={value!r}" for name, value in mine.items()))
        return
    for name in sorted({*known, *mine}):
        if known.get(name) != mine.get(name):
            raise InvalidArgument(
                f"the job's workers compute with {name} = {known.get(name)!r}, this one with {mine.get(name)!r}: mode sync "
                "promises equal sums, so let workers of one kind take part, train in another mode, or go on with --resume "
                "--accept-signature, which is recorded: bits may differ from there on",
                part=name,
            )


def take_over_signature(store: "Store", told: object, *, accept: bool) -> None:
    """Begin a run whose workers compute as those of the checkpoint did, or, if that is accepted, as its first worker does.

    ``told``: what the checkpoint says of them, which may be anything. Within a transaction of ``store``.
    """
    known = store.fact(SIGNATURE)
    if known is None and isinstance(told, dict) and told and all(isinstance(v, str) for v in told.values()):
        known = told
    if known is not None:
        store.set_fact(SIGNATURE, None if accept else known)
        store.set_fact(ACCEPTED, known if accept else None)


def _read(text: str) -> dict[str, str]:
    if len(text) > MAX_SIGNATURE:
        raise InvalidArgument(f"a compute signature of {len(text)} bytes, at most {MAX_SIGNATURE}")
    try:
        found = json.loads(text or "{}")
    except (ValueError, RecursionError) as error:
        raise Malformed(f"a compute signature that is no JSON: {error}") from None
    if not isinstance(found, dict) or not found or not all(isinstance(v, str) for v in found.values()):
        raise Malformed(
            "this job's mode is sync: its workers tell what their sums depend on, as a JSON object of texts"
        )
    return found


async def hold_still(c: "Coordinator", cut: int, ordered: Callable[..., Awaitable[Any]]) -> tuple[RankCommits, int]:
    """Have all shards take in no more commits until their views of cut ``cut`` have begun; return those that any of them knows,
    and the step to which all shards come by them.

    All parts of a step that was committed anywhere are staged everywhere, so with these commits all shards come to the same step.
    What the coordinator has recorded by then holds every split that ended before it: a rank reports it before it commits more.
    """
    steps, samples = np.zeros(c.spec.ranks, np.uint64), np.zeros(c.spec.ranks, np.uint64)
    proven, lowest = 0, set[int]()
    shards = list(c.shards.values())
    # One that fails late holds a shard still for a cut that is given up already.
    for reply in await all_done(ordered(s, "Ranks", RanksRequest(hold=cut), c.spec.gate_seconds) for s in shards):
        told = unpack(reply.commits.steps, np.uint64, "commits of ranks")
        of_samples = unpack(reply.commits.samples, np.uint64, "samples of ranks")
        newer = told > steps
        steps[newer], samples[newer] = told[newer], of_samples[newer]
        proven = max(proven, reply.highest)
        if reply.highest:
            lowest.add(reply.lowest)
    # After a restore only blocks know: one at a step proves that all ranks have committed it, and all blocks are there.
    behind = steps < proven
    if behind.any() and lowest != {proven}:
        # Blocks that have not applied it need to know of how many samples it was: who knew is gone, and ranks say it again.
        raise Unavailable(
            f"some blocks are at step {proven} and others are not, and no shard knows the commits of all ranks"
        )
    steps[behind], samples[behind] = proven, 0
    return RankCommits(steps=pack(steps), samples=pack(samples)), int(steps.min())


def cut_step(c: "Coordinator", step: int) -> int:
    """Return the step after which a hybrid job's cut is made, once all shards hold still for it at ``step``. Under the lock.

    Some ranks may have pushed rows of the step after it, and none any of a later one; so it is that step, unless nobody pushes:
    what was begun is then left to whoever is next.
    """
    spec = c.spec
    if c.phase != TRAINING or c.cuts.deserted:
        return step
    rows = [split.rows for split in plan_splits(files_from_json(list(spec.files)), spec.rows_per_split)]
    plan = RankPlan(
        rows,
        seed=spec.seed,
        ranks=spec.ranks,
        epochs=spec.epochs,
        batch_rows=spec.batch_rows,
        accumulate=spec.accumulate,
    )
    return min(step + 1, plan.before(min(c.cuts.epoch + 1, spec.epochs)))
