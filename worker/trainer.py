# SPDX-License-Identifier: Apache-2.0
"""Trainer: what the coordinator leases to this worker is read, given to the pipeline group by group, and reported closed.

Invariant: a split is reported closed only after all its groups were acknowledged. One event loop; reading runs in the session's
thread.
"""

import asyncio
import contextlib
import logging
from typing import Any

from oarlock.client.caches import Caches
from oarlock.data.files import files_from_json
from oarlock.data.splits import locate, plan_splits
from oarlock.proto.coordinator_pb2 import (
    EVALUATE,
    FINISHED,
    TRAIN,
    CloseSplitRequest,
    HeartbeatRequest,
    LeaseReply,
    LeaseRequest,
    ReleaseRequest,
)
from oarlock.proto.errors import PSError
from oarlock.telemetry.stages import Stages
from oarlock.worker.blame import Blame
from oarlock.worker.clock import WorkerClock
from oarlock.worker.evaluator import Evaluator
from oarlock.worker.pipeline import Pipeline
from oarlock.worker.progress import Progress
from oarlock.worker.session import Session
from oarlock.worker.splits import OpenSplit, read_split

logger = logging.getLogger(__name__)

# Another split is opened when the open ones have so many groups left, which last as long as a lease and the disk may take; but
# not before the last part of one: who opens early takes from those who have nothing.
LEAD_GROUPS, LEAD_PART = 8, 4
# The coordinator hears of no more splits of one worker.
MOST_OPEN_SPLITS = 64


class Trainer:
    """Trains and evaluates what the coordinator leases to this worker, until the job needs no more."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._workload = session.workload
        self._member = session.member
        self._spec = session.member.spec
        self._plan = plan_splits(files_from_json(list(self._spec.files)), self._spec.rows_per_split)
        self._evaluator = Evaluator(session)
        self._clock = WorkerClock(session.member)
        self._blame = Blame()
        self.progress = Progress(session.member)
        self._pipeline = Pipeline(session, self._clock, self._blame, self.progress, lambda split: self._close(split))
        session.member.about = self._about
        # Splits that were leased and are being read, and those that are trained.
        self._opening: set[int] = set()
        self._open: dict[int, OpenSplit] = {}
        self._evaluations: list[int] = []
        self._questions = 0
        self._asking = False

    def stats(self) -> dict[str, Any]:
        """Return what this worker counted, for the heartbeat."""
        done = self.progress
        return {
            "batches": done.batches,
            "samples": done.samples,
            "refused": done.refused,
            # Of most jobs there is nothing to say here.
            **({"residuals_lost": done.residuals_lost} if done.residuals_lost else {}),
            "open_splits": sorted(self._open),
            "stages": {**done.stages.rounded(), **self._evaluator.stages.rounded()},
            **({"caches": self.told_of_caches()} if self.caches.of else {}),
        }

    @property
    def caches(self) -> Caches:
        return self._session.caches

    def told_of_caches(self) -> dict[str, dict[str, Any]]:
        """Return what each cache holds and has done, and what its bound was found by, if that is adaptive."""
        probing = self._session.probing.told()
        return {name: {**told, **probing.get(name, {})} for name, told in self.caches.told().items()}

    @property
    def evaluation_stages(self) -> Stages:
        return self._evaluator.stages

    @property
    def held_splits(self) -> int:
        """How many splits are being read or trained."""
        return len(self._opening) + len(self._open)

    async def run(self) -> None:
        """Work until the job needs no more, or is to stop; give back what is unfinished then."""
        working = asyncio.ensure_future(self._work())
        over = asyncio.ensure_future(self._member.over.wait())
        try:
            await asyncio.wait([working, over], return_when=asyncio.FIRST_COMPLETED)
            if working.done():
                working.result()
        except Exception:
            await self._tell_blame()
            raise
        finally:
            # Once the job is over nobody waits for a push any more, and the shard that it waits for may be gone.
            working.cancel()
            over.cancel()
            await asyncio.gather(working, over, return_exceptions=True)

    async def _tell_blame(self) -> None:
        """Give the split back that was at fault, with the reason. Not being heard is no harm: another worker meets it, too."""
        request, member = self._blame.release, self._member
        if request is not None:
            request.header.CopyFrom(member.header())
            with contextlib.suppress(PSError):
                await member.transport.call(member.coordinator, "Coordinator.Release", request, timeout_seconds=2.0)

    async def _work(self) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(self._lease_and_fetch(group))
            group.create_task(self._pipeline.run(group))
        if self._open or self._evaluations:
            request = ReleaseRequest(splits=sorted(self._open), evaluations=self._evaluations)
            await self._member.call("Coordinator.Release", request)

    async def _lease_and_fetch(self, group: asyncio.TaskGroup) -> None:
        active: list[OpenSplit] = []
        # Opened before their turn, so that nobody waits for a lease and for the disk when a split comes to its end.
        ahead: list[OpenSplit] = []
        opening: asyncio.Task[tuple[LeaseReply, list[OpenSplit]]] | None = None
        clock = asyncio.get_running_loop().time
        ask_at = clock()
        while not self._member.stopping.is_set():
            while ahead and len(active) < self._spec.open_splits:
                active.append(ahead.pop(0))
            # With work at hand, a coordinator that has no more is not asked again before every batch.
            if opening is None and not ahead and (not active or clock() >= ask_at):
                wanted = self._wanted(active)
                opening = group.create_task(self._lease_and_open(wanted)) if wanted else None
            if opening is not None and (opening.done() or not active):
                reply, opened = await opening
                opening = None
                ask_at = clock() + (0.0 if reply.work == TRAIN else reply.retry_seconds)
                ahead.extend(opened)
                if reply.work == EVALUATE:
                    await self._evaluate(reply)
                elif reply.work == FINISHED and not active:
                    break
                elif reply.work != TRAIN and not active:
                    await self._pause(reply.retry_seconds)
                continue
            if active:
                # The first one's next group; it then goes to the end of the line.
                split = active.pop(0)
                await self._pipeline.take_in(group, split)
                if split.scheduled < split.groups:
                    active.append(split)
        await self._pipeline.end()

    def _wanted(self, active: list[OpenSplit]) -> int:
        """Return how many splits to ask for: those that lack now, or one of those that soon will."""
        lack = self._spec.open_splits - len(active)
        left = sum(split.groups - split.scheduled for split in active)
        most = max((split.groups for split in active), default=0)
        soon = left <= min(LEAD_GROUPS, most // LEAD_PART) and self._spec.open_splits < MOST_OPEN_SPLITS
        return max(lack, int(soon))

    async def _lease_and_open(self, wanted: int) -> tuple[LeaseReply, list[OpenSplit]]:
        reply = await self._lease(wanted)
        return reply, await self._open_splits(reply) if reply.work == TRAIN else []

    async def _lease(self, wanted: int) -> LeaseReply:
        with self.progress.stages.time("lease"):
            self._questions += 1
            request = LeaseRequest(wanted=wanted, number=self._questions)
            self._about(request)
            self._asking = True
            reply: LeaseReply = await self._member.call("Coordinator.Lease", request)
            self._asking = False
        self._member.gate.hear(reply.opened, reply.gate, reply.gate_seconds)
        if reply.work == TRAIN:
            self._opening.update(reply.splits)
            if not request.clock.active:
                self._clock.begin(reply.minimum)
        return reply

    def _about(self, request: HeartbeatRequest | LeaseRequest) -> None:
        """Say what this worker holds, and how far it is."""
        held = sorted(self._opening.union(self._open))
        request.held.extend(held)
        request.evaluations.extend(self._evaluations)
        request.clock.CopyFrom(self._clock.message(active=bool(held)))
        if isinstance(request, HeartbeatRequest):
            request.asking = self._asking

    async def _pause(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._member.stopping.wait(), seconds)

    async def _open_splits(self, reply: LeaseReply) -> list[OpenSplit]:
        async with asyncio.TaskGroup() as opening:
            tasks = [
                opening.create_task(self._blame.of(TRAIN, split, self._open_split(split, fresh)))
                for split, fresh in zip(reply.splits, reply.fresh, strict=True)
            ]
        return [task.result() for task in tasks]

    async def _evaluate(self, reply: LeaseReply) -> None:
        self._evaluations = list(reply.splits)
        while self._evaluations and not self._member.stopping.is_set():
            split = self._evaluations[0]
            await self._blame.of(EVALUATE, split, self._evaluator.evaluate(split))
            del self._evaluations[0]

    async def _open_split(self, split: int, fresh: bool) -> OpenSplit:
        spec = self._spec
        epoch, plan = locate(split, self._plan, spec.seed)
        columns = list(self._workload.columns)

        def read() -> OpenSplit:
            rows = read_split(self._session.reader, plan, columns, seed=spec.seed, epoch=epoch, split=split)
            return OpenSplit(split, epoch, rows, plan.rows, spec.batch_rows, spec.accumulate)

        with self.progress.stages.time("read", split=split):
            opened = await self._session.in_thread(read)
        opened.feedback = self._session.client.new_feedback()
        if not fresh:
            # Another worker may have come some way: go on from there.
            opened.scheduled = min(await self._session.client.next_group(split), opened.groups - 1)
        self._open[split] = opened
        self._opening.discard(split)
        return opened

    async def _close(self, split: OpenSplit) -> None:
        if split.pushed is not None:
            await split.pushed.wait()
        self.progress.closes(split.id)
        samples = self._workload.samples(split.size)
        # A successor saw only a part of the batches: their mean stands for all.
        loss = split.loss_sum / split.losses * samples
        request = CloseSplitRequest(work=TRAIN, split=split.id, samples=samples, loss_sum=loss, groups=split.groups)
        with self.progress.stages.time("close", split=split.id):
            await self._blame.of(TRAIN, split.id, self._member.call("Coordinator.CloseSplit", request))
        if split.feedback is not None:
            self.progress.residuals_lost += split.feedback.lost
        del self._open[split.id]
