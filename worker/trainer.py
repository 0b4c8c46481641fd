# SPDX-License-Identifier: Apache-2.0
"""Trainer: the worker's pipeline. While batch n computes, batch n + 1 is read, encoded and pulled, and n - 1 is pushed.

Invariant: at most ``prefetch`` batches are between the lease and the push; a split is reported closed only after all its groups
were acknowledged. One event loop; reading and encoding run in the one thread of ``executor``.
"""

import asyncio
import contextlib
import logging
from concurrent.futures import Executor
from typing import Any

import numpy as np

from oarlock.client.client import Client
from oarlock.client.membership import Membership
from oarlock.client.push import RowGradients
from oarlock.data.files import files_from_json
from oarlock.data.reader import Reader
from oarlock.data.splits import locate, plan_splits
from oarlock.nn import Program
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
from oarlock.worker.prepare import Prepared, Preparer
from oarlock.worker.recipe import Workload
from oarlock.worker.splits import OpenSplit, read_split

logger = logging.getLogger(__name__)

Fetched = tuple[OpenSplit, int, "asyncio.Task[Prepared]"]


class Trainer:
    """Trains and evaluates what the coordinator leases to this worker, until the job needs no more."""

    def __init__(
        self,
        workload: Workload,
        program: Program,
        client: Client,
        member: Membership,
        reader: Reader,
        executor: Executor,
    ) -> None:
        self._workload = workload
        self._program = program
        self._client = client
        self._member = member
        self._reader = reader
        self._executor = executor
        self._spec = member.spec
        self._plan = plan_splits(files_from_json(list(self._spec.files)), self._spec.rows_per_split)
        self._preparer = Preparer(workload.model, member.layout)
        self._evaluator = Evaluator(workload, program, client, member, reader, executor, self._preparer)
        self._depth = asyncio.Semaphore(self._spec.prefetch)
        self._fetched: asyncio.Queue[Fetched | None] = asyncio.Queue()
        self._open: dict[int, OpenSplit] = {}
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
        async with asyncio.TaskGroup() as group:
            group.create_task(self._lease_and_fetch(group))
            group.create_task(self._compute_and_push(group))
        if self._open:
            await self._member.call(
                "Coordinator.Release", ReleaseRequest(header=self._member.header(), splits=sorted(self._open))
            )

    async def _in_thread(self, function: Any, *args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._executor, function, *args)

    # First half: splits are leased, their batches prepared and pulled

    async def _lease_and_fetch(self, group: asyncio.TaskGroup) -> None:
        active: list[OpenSplit] = []
        while not self._member.stopping.is_set():
            if len(active) < self._spec.open_splits:
                reply = await self._lease(self._spec.open_splits - len(active))
                if reply.work == TRAIN:
                    opened = [self._open_split(s, f) for s, f in zip(reply.splits, reply.fresh, strict=True)]
                    active.extend(await asyncio.gather(*opened))
                elif reply.work == EVALUATE:
                    for split in reply.splits:
                        await self._evaluator.evaluate(split)
                elif reply.work == FINISHED and not active:
                    break
                elif not active:
                    await self._pause(reply.retry_seconds)
            if active:
                await self._fetch(group, active)
        await self._fetched.put(None)

    async def _lease(self, wanted: int) -> LeaseReply:
        with self.stages.time("lease"):
            reply: LeaseReply = await self._member.call(
                "Coordinator.Lease", LeaseRequest(header=self._member.header(), wanted=wanted)
            )
            return reply

    async def _pause(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._member.stopping.wait(), seconds)

    async def _open_split(self, split: int, fresh: bool) -> OpenSplit:
        spec = self._spec
        epoch, plan = locate(split, self._plan, spec.seed)
        columns = list(self._workload.columns)

        def read() -> OpenSplit:
            rows = read_split(self._reader, plan, columns, seed=spec.seed, epoch=epoch, split=split)
            return OpenSplit(split, epoch, rows, plan.rows, spec.batch_rows)

        with self.stages.time("read"):
            opened: OpenSplit = await self._in_thread(read)
        if not fresh:
            # Another worker may have come some way: go on from there.
            opened.scheduled = min(await self._client.next_group(split), opened.groups - 1)
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
        await self._fetched.put((split, number, group.create_task(self._prepare_and_pull(split, number))))

    async def _prepare_and_pull(self, split: OpenSplit, number: int) -> Prepared:
        routes = self._client.routes

        def prepare() -> Prepared:
            example = self._workload.encode(split.batch(number), epoch=split.epoch, split=split.id, batch=number)
            return self._preparer.prepare(example, routes)

        prepared: Prepared = await self._in_thread(prepare)
        await self._client.pull(prepared.keys, prepared.rows, dense=prepared.dense)
        return prepared

    # Second half: batches are computed and their gradients pushed

    async def _compute_and_push(self, group: asyncio.TaskGroup) -> None:
        while (fetched := await self._fetched.get()) is not None:
            split, number, task = fetched
            with self.stages.time("wait_for_pull"):
                prepared = await task
            with self.stages.time("compute"):
                loss = self._compute(prepared)
            split.loss_sum += loss * prepared.samples
            split.losses += prepared.samples
            self.batches += 1
            self.samples += prepared.samples
            if split.pushing is not None:
                with self.stages.time("wait_for_push"):
                    self.refused += (await split.pushing).refused
            with self.stages.time("encode_push"):
                split.pushing = group.create_task(self._push(split, number, prepared))
            self._depth.release()
            if number == split.groups - 1:
                group.create_task(self._close(split))

    def _compute(self, prepared: Prepared) -> float:
        self._program.flat_parameters[:] = prepared.dense
        feeds: dict[str, Any] = dict(prepared.feeds)
        for lookup in self._workload.model.lookups:
            feeds[lookup.name] = (prepared.rows[lookup.table], prepared.inverse[lookup.name])
        return self._program.train(feeds, prepared.samples)

    def _push(self, split: OpenSplit, number: int, prepared: Prepared) -> Any:
        spec = self._spec
        done = (split.id + number / split.groups) / (spec.splits * spec.epochs)
        rates = self._workload.rates(done)
        gradients: dict[str, RowGradients] = {}
        for lookup in self._workload.model.lookups:
            found = self._program.row_gradients[lookup.name]
            known = gradients.get(lookup.table)
            total = found if known is None else np.add(known.gradients, found)
            gradients[lookup.table] = RowGradients(prepared.keys[lookup.table], total, rates.rows)
        return self._client.push(
            split.id, number, gradients, dense=self._program.flat_gradients, dense_rate=rates.dense
        )

    async def _close(self, split: OpenSplit) -> None:
        if split.pushing is not None:
            self.refused += (await split.pushing).refused
        samples = self._workload.samples(split.size)
        # A successor saw only a part of the batches: their mean stands for all.
        loss = split.loss_sum / split.losses * samples
        request = CloseSplitRequest(
            header=self._member.header(), work=TRAIN, split=split.id, samples=samples, loss_sum=loss
        )
        await self._member.call("Coordinator.CloseSplit", request)
        del self._open[split.id]
