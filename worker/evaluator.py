# SPDX-License-Identifier: Apache-2.0
"""Evaluator: scores the rows of evaluation splits by pulls alone.

Invariant: an evaluation changes nothing on a shard, and a split's sums do not depend on who computes them. One event loop.
"""

import asyncio
import itertools
from collections import deque
from concurrent.futures import Executor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from oarlock.client.client import Client
from oarlock.client.membership import Membership
from oarlock.data.files import files_from_json
from oarlock.data.reader import Reader
from oarlock.data.splits import plan_splits
from oarlock.nn import Program
from oarlock.proto.coordinator_pb2 import EVALUATE, CloseSplitRequest
from oarlock.telemetry.stages import Stages
from oarlock.worker.prepare import Prepared, Preparer
from oarlock.worker.recipe import EvaluationBatch, Workload


class Evaluator:
    """Evaluates splits of the evaluation files, in file order."""

    def __init__(
        self,
        workload: Workload,
        program: Program,
        client: Client,
        member: Membership,
        reader: Reader,
        executor: Executor,
        preparer: Preparer,
    ) -> None:
        self._workload = workload
        self._program = program
        self._client = client
        self._member = member
        self._reader = reader
        self._executor = executor
        self._preparer = preparer
        spec = member.spec
        files = files_from_json(list(spec.evaluation_files))
        self._plan = plan_splits(files, spec.evaluation_rows_per_split) if files else ()
        self.stages = Stages()

    async def _in_thread(self, function: Any, *args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._executor, function, *args)

    async def evaluate(self, split: int) -> None:
        """Score one evaluation split and report its sums."""
        with self.stages.time("evaluate"):
            sums = await self._sums(split)
        request = CloseSplitRequest(header=self._member.header(), work=EVALUATE, split=split, sums=sums.tolist())
        await self._member.call("Coordinator.CloseSplit", request)

    async def _sums(self, split: int) -> NDArray[np.float64]:
        plan = self._plan[split % len(self._plan)]
        rows = await self._in_thread(self._reader.read, plan, list(self._workload.evaluation_columns))
        batches = self._workload.evaluation(rows)
        total = np.zeros(1 + len(self._member.spec.metrics))
        ahead: deque[asyncio.Task[tuple[EvaluationBatch, Prepared]]] = deque()
        async with asyncio.TaskGroup() as group:

            def fetch(most: int) -> None:
                ahead.extend(group.create_task(self._fetch(batch)) for batch in itertools.islice(batches, most))

            fetch(self._member.spec.prefetch)
            while ahead:
                batch, prepared = await ahead.popleft()
                fetch(1)
                # What was just begun leaves before the batch at hand computes.
                await asyncio.sleep(0)
                total += self._workload.sums(batch, self._predict(prepared))
        return total

    async def _fetch(self, batch: EvaluationBatch) -> tuple[EvaluationBatch, Prepared]:
        prepared = await self._in_thread(self._preparer.prepare, batch.example, self._client.routes)
        await self._client.pull(prepared.keys, prepared.rows, dense=prepared.dense)
        return batch, prepared

    def _predict(self, prepared: Prepared) -> NDArray[np.float32]:
        self._program.flat_parameters[:] = prepared.dense
        feeds: dict[str, Any] = dict(prepared.feeds)
        for lookup in self._workload.model.lookups:
            feeds[lookup.name] = (prepared.rows[lookup.table], prepared.inverse[lookup.name])
        return self._program.predict(feeds, prepared.samples)
