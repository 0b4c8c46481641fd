# SPDX-License-Identifier: Apache-2.0
"""The counting recipe's data, trained by a graph with dropout, hidden layers and momentum: what it learns hangs on every draw,
and on the order of every sum. Rates fall with the steps; some rows are dropped, so that batches have different numbers of
samples.
"""

from typing import Any

import numpy as np
from counting_recipe import COLUMNS, CountingRecipe, CountingWorkload

from oarlock.client.job import JobSpec
from oarlock.data.scores import METRICS
from oarlock.embedding.policy import Admission, Eviction
from oarlock.embedding.spec import DenseSpec, Initializer, OptimizerSpec, TableSpec
from oarlock.nn import Linear, Model, binary_cross_entropy, concat, dropout, lookup, sigmoid
from oarlock.worker.recipe import EvaluationBatch, Example, Rates

DIM = 4
TABLES = (
    TableSpec("key", DIM, OptimizerSpec("adagrad"), Initializer("normal", scale=0.5), 8),
    TableSpec(
        "wide",
        1,
        OptimizerSpec("adam"),
        Initializer("zeros"),
        4,
        admission=Admission("count", occurrences=2),
        eviction=Eviction(age=9),
    ),
)
METRIC = "logloss"
assert METRIC in METRICS


def graph() -> Model:
    deep = concat([lookup("a", table="key", dim=DIM), lookup("b", table="key", dim=DIM, fields=2)])
    hidden = dropout(Linear(16, activation="relu", name="h")(deep), 0.3)
    logit = Linear(1, name="score")(concat([hidden, lookup("w", table="wide", dim=1)]))
    return Model(
        score=sigmoid(logit),
        loss=binary_cross_entropy(logit, label="label"),
        optimizer=OptimizerSpec("adam"),
    )


DENSE: tuple[DenseSpec, ...] = graph().parameters


class RankWorkload(CountingWorkload):
    columns = evaluation_columns = COLUMNS

    def __init__(self) -> None:
        self.model: Any = graph()

    def encode(self, rows: dict[str, Any], *, epoch: int, split: int, batch: int) -> Example:
        # A bad row is dropped inside its batch.
        kept = rows["a"] % 11 != 0
        one, two = rows["a"][kept], rows["b"][kept]
        label = ((one + two) % 3 == 0).astype(np.float32)
        keys = {"a": one, "b": np.stack([two, one // 2], axis=1), "w": two // 3}
        return Example(len(one), keys, {"label": label})

    def rates(self, done: float) -> Rates:
        return Rates(0.1 * (1 - done / 2), 0.02 * (1 - done / 2))

    def evaluation(self, rows: dict[str, Any]) -> Any:
        example = self.encode(rows, epoch=0, split=0, batch=0)
        yield EvaluationBatch(example, example.feeds["label"])

    def labels(self, batch: EvaluationBatch) -> Any:
        return batch.context


class RankRecipe(CountingRecipe):
    def workload(self, spec: JobSpec) -> Any:
        return RankWorkload()


recipe = RankRecipe()
