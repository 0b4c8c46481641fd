# SPDX-License-Identifier: Apache-2.0
"""A recipe whose every row tells how often it was updated: in its weights, in each column of its state, and in its counters.

Every gradient is one. What a batch has is a function of its number alone: keys of which there is one in every block, keys that
come often, keys that come in some stretches of batches and are evicted between them, and keys of its own, which are never
admitted. In the table with an admission no key comes twice in a batch. Evaluation is of nothing. One event loop.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from oarlock.client.job import JobSpec
from oarlock.data.files import list_files
from oarlock.embedding.spec import Admission, DenseSpec, Eviction, Initializer, OptimizerSpec, TableSpec
from oarlock.nn.graph import Lookup
from oarlock.simulation.counting import COLUMNS
from oarlock.simulation.rough import keys_by_block
from oarlock.worker.recipe import EvaluationBatch, Example, Plan, Rates

BLOCKS, DIM, ADMITTED = 8, 2, 3
ADAM = OptimizerSpec("adam", beta1=0.999, beta2=0.9995)
ADAGRAD = OptimizerSpec("adagrad", initial=0.5)
ZEROS = Initializer("zeros")
RATE = 1 / 64
TABLES = (
    TableSpec(
        "grown",
        DIM,
        ADAM,
        ZEROS,
        BLOCKS,
        usage=True,
        admission=Admission("count", occurrences=ADMITTED),
        eviction=Eviction(age=80),
    ),
    TableSpec("plain", DIM, ADAGRAD, ZEROS, BLOCKS, usage=True),
)
DENSE = (DenseSpec("bias", (4,), ADAM, slice=2), DenseSpec("scale", (3,), ADAGRAD))
LOOKUPS = tuple(Lookup(f"in_{table.name}", table.name, DIM) for table in TABLES)
ROWS_PER_SPLIT, BATCH_ROWS, BATCHES = 256, 32, 8
FIELDS = 2
FIRST_OFTEN, OFTEN, OFTEN_IN_BATCH = 1 << 16, 100, 20
STRETCH, STRETCHES, IN_STRETCH = 20, 8, 6
ALONE_IN_PLAIN = 10
FIRST_IN_STRETCHES, FIRST_ALONE = 1 << 20, 1 << 30


def number_of(split: int, batch: int) -> int:
    return split * BATCHES + batch


@lru_cache(maxsize=8192)
def lasting(number: int) -> NDArray[np.uint64]:
    """Return the keys of a batch that come too often to be evicted, in both tables: one of every block first."""
    often = np.random.default_rng([7, number]).choice(OFTEN, OFTEN_IN_BATCH, replace=False).astype(np.uint64)
    return np.concatenate([ANCHORS, often + np.uint64(FIRST_OFTEN)])


def passing(number: int) -> NDArray[np.uint64]:
    """Return the keys of a batch that come in its stretch of batches, and not in the next ones."""
    first = FIRST_IN_STRETCHES + number // STRETCH % STRETCHES * IN_STRETCH
    return np.arange(first, first + IN_STRETCH, dtype=np.uint64)


def alone(number: int) -> NDArray[np.uint64]:
    """Return the keys that a batch alone has: as many as fill it. The plain table gets a few of them: rows that never change."""
    many = FIELDS * BATCH_ROWS - len(lasting(number)) - IN_STRETCH
    return np.arange(many, dtype=np.uint64) + np.uint64(FIRST_ALONE + number * FIELDS * BATCH_ROWS)


def whose(key: int) -> int:
    """Return the batch that alone has a key."""
    return (key - FIRST_ALONE) // (FIELDS * BATCH_ROWS)


# One key in each block of either table.
ANCHORS = np.unique(np.concatenate([keys_by_block(table.name, BLOCKS, 1)[0] for table in TABLES]))


class StateProgram:
    def __init__(self) -> None:
        size = sum(spec.size for spec in DENSE)
        self.flat_parameters = np.zeros(size, np.float32)
        self.flat_gradients = np.ones(size, np.float32)
        self.row_gradients: dict[str, Any] = {}

    def train(self, feeds: dict[str, Any], samples: int, *, seed: int, step: int) -> float:
        self.row_gradients = {lookup.name: np.ones_like(feeds[lookup.name][0]) for lookup in LOOKUPS}
        return 0.5

    def predict(self, feeds: dict[str, Any], samples: int) -> Any:
        return np.zeros(samples, np.float32)


class StateModel:
    lookups = LOOKUPS
    parameters = DENSE

    def bind(self, max_batch: int) -> StateProgram:
        return StateProgram()


class StateWorkload:
    columns = evaluation_columns = COLUMNS
    max_samples = BATCH_ROWS
    model = StateModel()

    def start(self) -> None:
        pass

    def samples(self, rows: int) -> int:
        return rows

    def encode(self, rows: dict[str, Any], *, epoch: int, split: int, batch: int) -> Example:
        number, samples = number_of(split, batch), len(rows["a"])
        grown, plain = np.concatenate([lasting(number), passing(number), alone(number)]), lasting(number)
        plain = np.concatenate([plain, alone(number)[:ALONE_IN_PLAIN]])
        keys = {"in_grown": grown.reshape(samples, FIELDS), "in_plain": np.broadcast_to(plain, (samples, len(plain)))}
        return Example(samples, keys, {})

    def rates(self, done: float) -> Rates:
        return Rates(RATE, RATE)

    def evaluation(self, rows: dict[str, Any]) -> Iterator[EvaluationBatch]:
        return iter(())


@dataclass(frozen=True)
class Config:
    """There is nothing to be chosen."""


class StateRecipe:
    Config = Config

    def plan(self, config: Any, data: Path, *, epochs: int) -> Plan:
        files: Any = list_files(data / "train")
        model: Any = StateModel()
        return Plan({}, files, (), ROWS_PER_SPLIT, 1, BATCH_ROWS, TABLES, model, ())

    def workload(self, spec: JobSpec) -> StateWorkload:
        return StateWorkload()


recipe = StateRecipe()
