# SPDX-License-Identifier: Apache-2.0
"""Trainer: the worker's pipeline. While batch n computes, batch n + 1 is read, encoded and pulled, and n - 1 is pushed.

Invariant: at most ``prefetch`` batches are between the pull and the push, and at most twice ``open_splits`` pushes in flight; a
split is reported closed only after all its groups were acknowledged. One event loop; reading and encoding run in the one
thread of ``executor``.
"""

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from oarlock.client.push import PushCounts, RowGradients, reads_occurrences
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
from oarlock.telemetry.histogram import Histogram
from oarlock.telemetry.stages import Stages
from oarlock.worker.blame import Blame
from oarlock.worker.clock import WorkerClock
from oarlock.worker.evaluator import Evaluator
from oarlock.worker.prepare import Prepared
from oarlock.worker.recipe import Example
from oarlock.worker.session import Session
from oarlock.worker.splits import OpenSplit, read_split

logger = logging.getLogger(__name__)

Fetched = tuple[OpenSplit, int, int, "asyncio.Task[Prepared]"]


class Trainer:
    """Trains and evaluates what the coordinator leases to this worker, until the job needs no more."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._workload = session.workload
        self._member = session.member
        self._spec = session.member.spec
        self._counted = {table.name for table in self._spec.tables if reads_occurrences(table)}
        self._plan = plan_splits(files_from_json(list(self._spec.files)), self._spec.rows_per_split)
        self._evaluator = Evaluator(session)
        # Batches between the lease and the push, and those of them whose rows are pulled: one more is encoded.
        self._depth = asyncio.Semaphore(self._spec.prefetch + 1)
        self._pulled = asyncio.Semaphore(self._spec.prefetch)
        self._fetched: asyncio.Queue[Fetched | None] = asyncio.Queue()
        # Splits of few batches would otherwise pile up behind a slow shard: only pushes of one split wait for each other.
        self._in_flight = asyncio.Semaphore(2 * self._spec.open_splits)
        self._clock = WorkerClock(session.member)
        self._blame = Blame()
        session.member.about = self._about
        # Splits that were leased and are being read, and those that are trained.
        self._opening: set[int] = set()
        self._open: dict[int, OpenSplit] = {}
        # Groups of open splits that were acknowledged, and of all; the job's step when this worker came.
        self._ahead: Counter[int] = Counter()
        self._acknowledged = 0
        self._joined_at = session.member.step
        self._evaluations: list[int] = []
        self._questions = 0
        self._asking = False
        self.stages = Stages()
        self.pull_seconds = Histogram()
        self.push_seconds = Histogram()
        self.batches = 0
        self.samples = 0
        self.refused = 0

    def stats(self) -> dict[str, Any]:
        """Return what this worker counted, for the heartbeat."""
        return {
            "batches": self.batches,
            "samples": self.samples,
            "refused": self.refused,
            "open_splits": sorted(self._open),
            "stages": {**self.stages.rounded(), **self._evaluator.stages.rounded()},
        }

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
            group.create_task(self._compute_and_push(group))
        if self._open or self._evaluations:
            request = ReleaseRequest(splits=sorted(self._open), evaluations=self._evaluations)
            await self._member.call("Coordinator.Release", request)

    # First half: splits are leased, their batches prepared and pulled

    async def _lease_and_fetch(self, group: asyncio.TaskGroup) -> None:
        active: list[OpenSplit] = []
        clock = asyncio.get_running_loop().time
        ask_at = clock()
        while not self._member.stopping.is_set():
            # With work at hand, a coordinator that has no more is not asked again before every batch.
            if len(active) < self._spec.open_splits and (not active or clock() >= ask_at):
                reply = await self._lease(self._spec.open_splits - len(active))
                ask_at = clock() + reply.retry_seconds
                if reply.work == TRAIN:
                    ask_at = clock()
                    active.extend(await self._open_splits(reply))
                elif reply.work == EVALUATE:
                    await self._evaluate(reply)
                elif reply.work == FINISHED and not active:
                    break
                elif not active:
                    await self._pause(reply.retry_seconds)
            if active:
                await self._fetch(group, active)
        await self._fetched.put(None)

    async def _lease(self, wanted: int) -> LeaseReply:
        with self.stages.time("lease"):
            self._questions += 1
            request = LeaseRequest(wanted=wanted, number=self._questions)
            self._about(request)
            self._asking = True
            reply: LeaseReply = await self._member.call("Coordinator.Lease", request)
            self._asking = False
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
            return OpenSplit(split, epoch, rows, plan.rows, spec.batch_rows)

        with self.stages.time("read"):
            opened = await self._session.in_thread(read)
        if not fresh:
            # Another worker may have come some way: go on from there.
            opened.scheduled = min(await self._session.client.next_group(split), opened.groups - 1)
        self._open[split] = opened
        self._opening.discard(split)
        return opened

    async def _fetch(self, group: asyncio.TaskGroup, active: list[OpenSplit]) -> None:
        """Schedule the next batch of the first active split, which then goes to the end of the line."""
        await self._depth.acquire()
        split = active.pop(0)
        number = split.scheduled
        split.scheduled += 1
        if split.scheduled < split.groups:
            active.append(split)

        def encode() -> Example:
            return self._workload.encode(split.batch(number), epoch=split.epoch, split=split.id, batch=number)

        turn = self._clock.number()
        fetching = group.create_task(self._blame.of(TRAIN, split.id, self._fetched_batch(encode, turn)))
        await self._fetched.put((split, number, turn, fetching))

    async def _fetched_batch(self, encode: Callable[[], Example], turn: int) -> Prepared:
        """Encoding runs ahead; the pull waits for its turn, so that what is computed on is no older than it has to be."""
        prepared = await self._session.encode(encode)
        await self._pulled.acquire()
        await self._clock.may_pull(turn)
        begun = time.perf_counter()
        await self._session.pull(prepared, self._clock.on_wire(turn))
        self.pull_seconds.observe(time.perf_counter() - begun)
        return prepared

    # Second half: batches are computed and their gradients pushed

    async def _compute_and_push(self, group: asyncio.TaskGroup) -> None:
        while (fetched := await self._fetched.get()) is not None:
            split, number, turn, task = fetched
            with self.stages.time("wait_for_pull"):
                prepared = await task
            with self.stages.time("compute"):
                feeds = self._session.load(prepared)
                # A number of this batch alone, the same when another worker trains it again.
                draw = split.id << 32 | number
                loss = self._session.program.train(feeds, prepared.samples, seed=self._spec.seed, step=draw)
            split.loss_sum += loss * prepared.samples
            split.losses += prepared.samples
            self.batches += 1
            self.samples += prepared.samples
            with self.stages.time("wait_for_push"):
                if split.pushing is not None:
                    await split.pushing
                await self._in_flight.acquire()
            with self.stages.time("encode_push"):
                split.pushing = group.create_task(self._push(split, number, turn, prepared))
            split.pushing.add_done_callback(partial(self._pushed, split.id, turn, time.perf_counter()))
            self._depth.release()
            self._pulled.release()
            if number == split.groups - 1:
                group.create_task(self._close(split))
            # Everything above may have been at hand: let the push leave before the next batch computes.
            await asyncio.sleep(0)

    def _pushed(self, split: int, turn: int, begun: float, push: "asyncio.Task[PushCounts]") -> None:
        self._in_flight.release()
        if push.cancelled():
            return
        error = push.exception()
        if error is not None:
            self._blame.note(TRAIN, split, error)
            return
        self.push_seconds.observe(time.perf_counter() - begun)
        self.refused += push.result().refused
        self._ahead[split] += 1
        self._acknowledged += 1
        self._clock.acknowledged(turn)

    def _push(self, split: OpenSplit, number: int, turn: int, prepared: Prepared) -> Any:
        spec, program = self._spec, self._session.program
        done = (split.id + number / split.groups) / (spec.splits * spec.epochs)
        rates = self._workload.rates(done)
        gradients: dict[str, RowGradients] = {}
        for lookup in self._workload.model.lookups:
            found = program.row_gradients[lookup.name]
            known = gradients.get(lookup.table)
            total = found if known is None else np.add(known.gradients, found)
            keys = prepared.keys[lookup.table]
            counted = keys.occurrences().view(np.uint32) if lookup.table in self._counted else None
            gradients[lookup.table] = RowGradients(keys, total, rates.rows, counted)
        return self._session.client.push(
            split.id,
            number,
            gradients,
            dense=program.flat_gradients,
            dense_rate=rates.dense,
            step=self._step(),
            number=self._clock.on_wire(turn),
            seen=prepared.seen,
        )

    def _step(self) -> int:
        """Return the groups that all workers have trained, as far as known here.

        The coordinator tells it with a heartbeat, now and then. What this worker did itself it knows at once: a worker that is
        alone always knows the step, so that its results do not depend on when heartbeats come.
        """
        return max(self._member.step + self._ahead.total(), self._joined_at + self._acknowledged)

    async def _close(self, split: OpenSplit) -> None:
        if split.pushing is not None:
            await split.pushing
        # From here on the coordinator may count them: no group is counted twice.
        del self._ahead[split.id]
        samples = self._workload.samples(split.size)
        # A successor saw only a part of the batches: their mean stands for all.
        loss = split.loss_sum / split.losses * samples
        request = CloseSplitRequest(work=TRAIN, split=split.id, samples=samples, loss_sum=loss, groups=split.groups)
        await self._blame.of(TRAIN, split.id, self._member.call("Coordinator.CloseSplit", request))
        del self._open[split.id]
