# SPDX-License-Identifier: Apache-2.0
"""Trainer: the worker's pipeline. While batch n computes, batch n + 1 is read, encoded and pulled, and n - 1 is pushed.

Invariant: at most ``prefetch`` batches are between the pull and the push, and at most twice ``open_splits`` pushes in flight; a
split is reported closed only after all its groups were acknowledged. One event loop; reading and encoding run in the one
thread of ``executor``.
"""

import asyncio
import contextlib
import logging
from typing import Any

import numpy as np

from oarlock.client.push import PushCounts, RowGradients
from oarlock.data.files import files_from_json
from oarlock.data.splits import locate, plan_splits
from oarlock.proto.coordinator_pb2 import (
    EVALUATE,
    FINISHED,
    TRAIN,
    CloseSplitRequest,
    LeaseReply,
    LeaseRequest,
    ReleaseRequest,
)
from oarlock.telemetry.stages import Stages
from oarlock.worker.evaluator import Evaluator
from oarlock.worker.prepare import Prepared
from oarlock.worker.recipe import Example
from oarlock.worker.session import Session
from oarlock.worker.splits import OpenSplit, read_split

logger = logging.getLogger(__name__)

Fetched = tuple[OpenSplit, int, "asyncio.Task[Prepared]"]


class Trainer:
    """Trains and evaluates what the coordinator leases to this worker, until the job needs no more."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._workload = session.workload
        self._member = session.member
        self._spec = session.member.spec
        self._plan = plan_splits(files_from_json(list(self._spec.files)), self._spec.rows_per_split)
        self._evaluator = Evaluator(session)
        # Batches between the lease and the push, and those of them whose rows are pulled: one more is encoded.
        self._depth = asyncio.Semaphore(self._spec.prefetch + 1)
        self._pulled = asyncio.Semaphore(self._spec.prefetch)
        self._fetched: asyncio.Queue[Fetched | None] = asyncio.Queue()
        # Splits of few batches would otherwise pile up behind a slow shard: only pushes of one split wait for each other.
        self._in_flight = asyncio.Semaphore(2 * self._spec.open_splits)
        self._open: dict[int, OpenSplit] = {}
        self._evaluations: list[int] = []
        self._questions = 0
        self.stages = Stages()
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

    async def run(self) -> None:
        """Work until the job needs no more, or is to stop; give back what is unfinished then."""
        working = asyncio.ensure_future(self._work())
        over = asyncio.ensure_future(self._member.over.wait())
        try:
            await asyncio.wait([working, over], return_when=asyncio.FIRST_COMPLETED)
            if working.done():
                working.result()
        finally:
            # Once the job is over nobody waits for a push any more, and the shard that it waits for may be gone.
            working.cancel()
            over.cancel()
            await asyncio.gather(working, over, return_exceptions=True)

    async def _work(self) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(self._lease_and_fetch(group))
            group.create_task(self._compute_and_push(group))
        if self._open or self._evaluations:
            request = ReleaseRequest(
                header=self._member.header(), splits=sorted(self._open), evaluations=self._evaluations
            )
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
            request = LeaseRequest(
                header=self._member.header(),
                wanted=wanted,
                number=self._questions,
                held=sorted(self._open),
                evaluations=self._evaluations,
            )
            reply: LeaseReply = await self._member.call("Coordinator.Lease", request)
            return reply

    async def _pause(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._member.stopping.wait(), seconds)

    async def _open_splits(self, reply: LeaseReply) -> list[OpenSplit]:
        async with asyncio.TaskGroup() as opening:
            tasks = [
                opening.create_task(self._open_split(split, fresh))
                for split, fresh in zip(reply.splits, reply.fresh, strict=True)
            ]
        return [task.result() for task in tasks]

    async def _evaluate(self, reply: LeaseReply) -> None:
        self._evaluations = list(reply.splits)
        while self._evaluations and not self._member.stopping.is_set():
            await self._evaluator.evaluate(self._evaluations[0])
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

        await self._fetched.put((split, number, group.create_task(self._session.fetch(encode, self._pulled))))

    # Second half: batches are computed and their gradients pushed

    async def _compute_and_push(self, group: asyncio.TaskGroup) -> None:
        while (fetched := await self._fetched.get()) is not None:
            split, number, task = fetched
            with self.stages.time("wait_for_pull"):
                prepared = await task
            with self.stages.time("compute"):
                loss = self._session.program.train(self._session.load(prepared), prepared.samples)
            split.loss_sum += loss * prepared.samples
            split.losses += prepared.samples
            self.batches += 1
            self.samples += prepared.samples
            with self.stages.time("wait_for_push"):
                if split.pushing is not None:
                    await split.pushing
                await self._in_flight.acquire()
            with self.stages.time("encode_push"):
                split.pushing = group.create_task(self._push(split, number, prepared))
            split.pushing.add_done_callback(self._pushed)
            self._depth.release()
            self._pulled.release()
            if number == split.groups - 1:
                group.create_task(self._close(split))
            # Everything above may have been at hand: let the push leave before the next batch computes.
            await asyncio.sleep(0)

    def _pushed(self, push: "asyncio.Task[PushCounts]") -> None:
        self._in_flight.release()
        if not push.cancelled() and push.exception() is None:
            self.refused += push.result().refused

    def _push(self, split: OpenSplit, number: int, prepared: Prepared) -> Any:
        spec, program = self._spec, self._session.program
        done = (split.id + number / split.groups) / (spec.splits * spec.epochs)
        rates = self._workload.rates(done)
        gradients: dict[str, RowGradients] = {}
        for lookup in self._workload.model.lookups:
            found = program.row_gradients[lookup.name]
            known = gradients.get(lookup.table)
            total = found if known is None else np.add(known.gradients, found)
            gradients[lookup.table] = RowGradients(prepared.keys[lookup.table], total, rates.rows)
        return self._session.client.push(
            split.id, number, gradients, dense=program.flat_gradients, dense_rate=rates.dense
        )

    async def _close(self, split: OpenSplit) -> None:
        if split.pushing is not None:
            await split.pushing
        samples = self._workload.samples(split.size)
        # A successor saw only a part of the batches: their mean stands for all.
        loss = split.loss_sum / split.losses * samples
        request = CloseSplitRequest(
            header=self._member.header(), work=TRAIN, split=split.id, samples=samples, loss_sum=loss
        )
        await self._member.call("Coordinator.CloseSplit", request)
        del self._open[split.id]
