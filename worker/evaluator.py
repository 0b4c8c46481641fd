# SPDX-License-Identifier: Apache-2.0
"""Evaluator: scores the rows of evaluation splits by pulls alone.

Invariant: an evaluation changes nothing on a shard, and a split's sums do not depend on who computes them. One event loop.
"""

import asyncio
import itertools
from collections import deque

import numpy as np
from numpy.typing import NDArray

from oarlock.data.files import files_from_json
from oarlock.data.splits import plan_splits
from oarlock.proto.coordinator_pb2 import EVALUATE, CloseSplitRequest
from oarlock.telemetry.stages import Stages
from oarlock.worker.prepare import Prepared
from oarlock.worker.recipe import EvaluationBatch
from oarlock.worker.session import Session


class Evaluator:
    """Evaluates splits of the evaluation files, in file order."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._workload = session.workload
        self._member = session.member
        spec = session.member.spec
        files = files_from_json(list(spec.evaluation_files))
        self._plan = plan_splits(files, spec.evaluation_rows_per_split) if files else ()
        self.stages = Stages()

    async def evaluate(self, split: int) -> None:
        """Score one evaluation split and report its sums."""
        with self.stages.time("evaluate"):
            sums = await self._sums(split)
        request = CloseSplitRequest(work=EVALUATE, split=split, sums=sums.tolist())
        await self._member.call("Coordinator.CloseSplit", request)

    async def _sums(self, split: int) -> NDArray[np.float64]:
        plan = self._plan[split % len(self._plan)]
        rows = await self._session.in_thread(self._session.reader.read, plan, list(self._workload.evaluation_columns))
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
                scores = self._session.program.predict(self._session.load(prepared), prepared.samples)
                total += self._workload.sums(batch, scores)
        return total

    async def _fetch(self, batch: EvaluationBatch) -> tuple[EvaluationBatch, Prepared]:
        return batch, await self._session.pull(await self._session.encode(lambda: batch.example))
