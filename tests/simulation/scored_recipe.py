# SPDX-License-Identifier: Apache-2.0
"""The counting recipe, evaluated by scores: a row's count, scaled into [0, 1], against labels of one half.

So the calibration, mean score over mean label, is the mean count of the test files' keys, divided by ``SCALE`` / 2.
"""

from typing import Any

import numpy as np

from oarlock.client.job import JobSpec
from oarlock.simulation.counting import CountingModel, CountingProgram, CountingRecipe, CountingWorkload
from oarlock.worker.recipe import EvaluationBatch

SCALE = np.float32(1 << 16)


class ScoredProgram(CountingProgram):
    def predict(self, feeds: dict[str, Any], samples: int) -> Any:
        return super().predict(feeds, samples) / SCALE


class ScoredModel(CountingModel):
    def bind(self, max_batch: int) -> CountingProgram:
        return ScoredProgram(self)


class ScoredWorkload(CountingWorkload):
    def __init__(self, spec: JobSpec) -> None:
        super().__init__(spec)
        self.model = ScoredModel(spec.tables, spec.dense)

    def labels(self, batch: EvaluationBatch) -> Any:
        return np.full(batch.example.samples, 0.5, np.float32)

    def sums(self, batch: EvaluationBatch, scores: Any) -> list[float]:
        raise AssertionError("a workload with labels is not asked for sums")


class ScoredRecipe(CountingRecipe):
    def workload(self, spec: JobSpec) -> ScoredWorkload:
        return ScoredWorkload(spec)


recipe = ScoredRecipe()
