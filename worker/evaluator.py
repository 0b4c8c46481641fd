# SPDX-License-Identifier: Apache-2.0
"""Evaluator: scores the rows of evaluation splits by pulls alone.

Invariant: an evaluation changes nothing on a shard, and what a split gives does not depend on who computes it. One event loop.
"""

import asyncio
import itertools
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from oarlock.data.files import files_from_json
from oarlock.data.scores import Scores
from oarlock.data.splits import plan_splits
from oarlock.proto.coordinator_pb2 import EVALUATE, CloseSplitRequest
from oarlock.proto.errors import InvalidArgument
from oarlock.telemetry.stages import Stages
from oarlock.worker.compute import predict
from oarlock.worker.prepare import Prepared
from oarlock.worker.recipe import EvaluationBatch, Labelled, Summed
from oarlock.worker.session import Session

# Batches between pull and scores: rows do not change meanwhile, so it costs nothing to pull ahead.
AHEAD = 2


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
        """Score one evaluation split and report what it found: its scores with labels, or the recipe's sums."""
        with self.stages.time("evaluate", split=split):
            request = await self._found(split)
        await self._member.call("Coordinator.CloseSplit", request)

    async def _found(self, split: int) -> CloseSplitRequest:
        workload = self._workload
        request = CloseSplitRequest(work=EVALUATE, split=split)
        if isinstance(workload, Labelled):
            labels, found = workload.labels, Scores()
            await self._score(split, lambda batch, scores: found.add(scores, labels(batch)))
            # A million scores take a while to sort, and heartbeats go on.
            request.scores = await self._session.in_thread(found.to_bytes)
        elif isinstance(workload, Summed):
            sums, total = workload.sums, np.zeros(1 + len(self._member.spec.metrics))
            await self._score(split, lambda batch, scores: np.add(total, sums(batch, scores), out=total))
            request.sums.extend(total.tolist())
        else:
            raise InvalidArgument("the recipe's workload has no labels() and no sums(): it cannot be evaluated")
        return request

    async def _score(self, split: int, take: Callable[[EvaluationBatch, NDArray[np.float32]], Any]) -> None:
        """Give every batch of a split to ``take`` with its scores, in order; these are valid until the next batch."""
        plan = self._plan[split % len(self._plan)]
        rows = await self._session.in_thread(self._session.reader.read, plan, list(self._workload.evaluation_columns))
        batches = self._workload.evaluation(rows)
        ahead: deque[asyncio.Task[tuple[EvaluationBatch, Prepared]]] = deque()
        async with asyncio.TaskGroup() as group:

            def fetch(most: int) -> None:
                ahead.extend(group.create_task(self._fetch(batch, split)) for batch in itertools.islice(batches, most))

            fetch(max(AHEAD, self._member.spec.prefetch))
            while ahead:
                batch, prepared = await ahead.popleft()
                fetch(1)
                # What was just begun leaves before the batch at hand computes.
                await asyncio.sleep(0)
                program = await self._session.borrow()
                try:
                    scored = partial(predict, program, self._workload.model.lookups, prepared)
                    with self.stages.time("predict", split=split):
                        scores = await self._session.compute(scored)
                    take(batch, scores)
                finally:
                    self._session.give_back(program)

    async def _fetch(self, batch: EvaluationBatch, split: int) -> tuple[EvaluationBatch, Prepared]:
        prepared = await self._session.encode(lambda: [batch.example], split=split)
        return batch, await self._session.pull(prepared, split=split)
