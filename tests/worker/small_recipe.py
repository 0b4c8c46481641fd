# SPDX-License-Identifier: Apache-2.0
"""The counting recipe's data, trained by a real graph: a linear score of three rows of one table, of two lookups.

``batches`` has the raw rows of every batch by (split, batch), in any order. One event loop, or its compute threads.
"""

from typing import Any

import numpy as np
from counting_recipe import COLUMNS, SGD, CountingRecipe, CountingWorkload

from oarlock.client.job import JobSpec
from oarlock.embedding.spec import DenseSpec, Initializer, TableSpec
from oarlock.nn import Linear, Model, binary_cross_entropy, concat, lookup, sigmoid
from oarlock.worker.recipe import Example, Rates

DIM = 2
RATES = Rates(0.5, 0.25)
TABLES = (TableSpec("key", DIM, SGD, Initializer("normal", scale=0.5), 8),)

batches: dict[tuple[int, int], tuple[Any, Any, Any]] = {}


def graph() -> Model:
    logit = Linear(1, name="score")(
        concat([lookup("a", table="key", dim=DIM), lookup("b", table="key", dim=DIM, fields=2)])
    )
    return Model(score=sigmoid(logit), loss=binary_cross_entropy(logit, label="label"), optimizer=SGD)


DENSE: tuple[DenseSpec, ...] = graph().parameters


class SmallWorkload(CountingWorkload):
    columns = evaluation_columns = COLUMNS

    def __init__(self) -> None:
        self.model: Any = graph()

    def encode(self, rows: dict[str, Any], *, epoch: int, split: int, batch: int) -> Example:
        one, other = rows["a"], np.stack([rows["b"], rows["a"] // 2], axis=1)
        label = ((rows["a"] + rows["b"]) % 3 == 0).astype(np.float32)
        batches[split, batch] = one.astype(np.int64), other.astype(np.int64), label
        return Example(len(one), {"a": one, "b": other}, {"label": label})

    def rates(self, done: float) -> Rates:
        return RATES

    def evaluation(self, rows: dict[str, Any]) -> Any:
        return iter(())


class SmallRecipe(CountingRecipe):
    def workload(self, spec: JobSpec) -> Any:
        return SmallWorkload()


recipe = SmallRecipe()
