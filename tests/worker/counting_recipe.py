# SPDX-License-Identifier: Apache-2.0
"""A recipe that counts: every occurrence of a key adds one to its row, every batch one to a dense value.

Rows start at zero, and sgd of rate 1 is given a gradient of -1 per occurrence. So what was lost or doubled shows in the rows,
which must equal the occurrences in the files. Two lookups share the table. One event loop; ``seen`` is the test's to clear.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from oarlock.client.job import JobSpec
from oarlock.data.columns import ColumnSpec
from oarlock.data.files import list_files
from oarlock.embedding.spec import DenseSpec, Initializer, OptimizerSpec, TableSpec
from oarlock.nn.graph import Lookup
from oarlock.worker.recipe import EvaluationBatch, Example, Plan, Rates

SGD, ZEROS = OptimizerSpec("sgd"), Initializer("zeros")
TABLES = (TableSpec("key", 1, SGD, ZEROS, 8),)
DENSE = (DenseSpec("batches", (1,), SGD, ZEROS),)
COLUMNS = (ColumnSpec("a", "key"), ColumnSpec("b", "key"))
EVALUATION_BATCH = 5

seen: list[tuple[str, int, int]] = []
# (seed, step) of every batch that was trained.
draws: list[tuple[int, int]] = []
# A key whose gradient is not a number, and one that encode() cannot bear.
poison: set[int] = set()
bomb: set[int] = set()


class CountingProgram:
    def __init__(self) -> None:
        self.flat_parameters = np.zeros(1, np.float32)
        self.flat_gradients = np.full(1, -1, np.float32)
        self.row_gradients: dict[str, Any] = {}

    def train(self, feeds: dict[str, Any], samples: int, *, seed: int, step: int) -> float:
        draws.append((seed, step))
        bad = feeds["bad"]
        for name in ("a", "b"):
            rows, inverse = feeds[name]
            found = -np.bincount(inverse, minlength=len(rows)).astype(np.float32)[:, None]
            found[inverse[bad[:, "ab".index(name)] > 0]] = np.nan
            self.row_gradients[name] = found
        return 0.25

    def predict(self, feeds: dict[str, Any], samples: int) -> Any:
        rows, inverse = feeds["a"]
        return rows[inverse, 0]


class CountingModel:
    lookups = (Lookup("a", "key", 1), Lookup("b", "key", 1))
    parameters = DENSE

    def bind(self, max_batch: int) -> CountingProgram:
        return CountingProgram()


class CountingWorkload:
    columns = COLUMNS
    evaluation_columns = COLUMNS
    max_samples = 64
    model = CountingModel()

    def start(self) -> None:
        pass

    def samples(self, rows: int) -> int:
        return rows

    def encode(self, rows: dict[str, Any], *, epoch: int, split: int, batch: int) -> Example:
        if bomb & set(rows["a"].tolist()):
            raise ValueError("this key cannot be encoded")
        seen.append(("encode", split, batch))
        both = np.stack([rows["a"], rows["b"]], axis=1)
        bad = np.isin(both, np.array(sorted(poison), np.uint64)).astype(np.float32)
        return Example(len(both), {"a": rows["a"], "b": rows["b"]}, {"bad": bad})

    def rates(self, done: float) -> Rates:
        return Rates(1.0, 1.0)

    def evaluation(self, rows: dict[str, Any]) -> Iterator[EvaluationBatch]:
        for first in range(0, len(rows["a"]), EVALUATION_BATCH):
            run = slice(first, first + EVALUATION_BATCH)
            keys = {"a": rows["a"][run], "b": rows["b"][run]}
            yield EvaluationBatch(Example(len(keys["a"]), keys, {}), None)

    def sums(self, batch: EvaluationBatch, scores: Any) -> list[float]:
        return [float(len(scores)), float(scores.sum(dtype=np.float64))]


class CountingRecipe:
    Config = dict

    def plan(self, config: Any, data: Path, *, epochs: int) -> Plan:
        model: Any = CountingModel()
        return Plan({}, list_files(data / "train"), list_files(data / "test"), 16, 8, 4, TABLES, model, ("count",))

    def workload(self, spec: JobSpec) -> CountingWorkload:
        return CountingWorkload()


recipe = CountingRecipe()
