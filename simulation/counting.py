# SPDX-License-Identifier: Apache-2.0
"""A recipe that counts: every occurrence of a key adds one to its row, every batch one to a dense value.

Invariant: values start at zero and sgd of ``RATE`` is given a gradient of -1 / ``RATE`` per occurrence, so a push that was lost
or applied twice shows in the rows, which must equal the occurrences in the files: no mark is asked; nor does a gradient pass
for the difference that it makes. With ``trace`` every batch has, in each of a few blocks, a key and a dense element of its own,
so that the values also tell *which* batches were; with ``rough`` it has gradients that compression leaves something out of
(rough.py), too. float32 counts exactly below 2^24. One event loop.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from oarlock.client.job import JobSpec
from oarlock.data.columns import Arrays, ColumnSpec
from oarlock.data.files import files_from_json, list_files
from oarlock.data.splits import plan_splits
from oarlock.embedding.spec import DenseSpec, Initializer, OptimizerSpec, TableSpec
from oarlock.nn.graph import Lookup
from oarlock.simulation import rough
from oarlock.worker.recipe import EvaluationBatch, Example, Plan, Rates

SGD, ZEROS = OptimizerSpec("sgd"), Initializer("zeros")
COLUMNS = (ColumnSpec("a", "key"), ColumnSpec("b", "key"))
NO_KEYS = np.empty(0, np.uint64)
# Of every batch.
LOSS = 0.25
# A power of two, so that nothing is rounded.
RATE = 0.5


@dataclass(frozen=True)
class Config:
    """``blocks`` of the counting table; ``trace`` blocks of the tracing one (0: no trace). ``rough`` goes with a trace alone."""

    blocks: int = 8
    trace: int = 0
    rough: bool = False
    rows_per_split: int = 1024
    evaluation_rows_per_split: int = 1024
    batch_rows: int = 256


def parameters(
    blocks: int, trace: int, batches: int, splits: int = 0
) -> tuple[tuple[TableSpec, ...], tuple[DenseSpec, ...]]:
    """Return tables and dense parameters; ``batches``: how many batches the whole job has at most, if they are traced.

    ``splits``: how many splits the whole job has, if it is rough.
    """
    tables: tuple[TableSpec, ...] = (TableSpec("key", 1, SGD, ZEROS, blocks),)
    dense: tuple[DenseSpec, ...] = (DenseSpec("batches", (1,), SGD, ZEROS),)
    if trace:
        tables += (TableSpec("trace", 1, SGD, ZEROS, trace),)
        dense += (DenseSpec("applied", (batches,), SGD, ZEROS),)
    if splits:
        tables += (TableSpec(rough.TABLE, rough.DIM, SGD, ZEROS, rough.KEYS),)
        dense += (DenseSpec(rough.DENSE, (splits * rough.VALUES,), SGD, ZEROS, slice=rough.VALUES),)
    return tables, dense


def trace_keys(trace: int, batches: int) -> NDArray[np.uint64]:
    """Return uint64[batches, trace]: per batch one key in each block of the tracing table, no key twice."""
    return rough.keys_by_block("trace", trace, batches)


class CountingModel:
    """The counting tables as a model: two lookups of one table, and the trace."""

    def __init__(self, tables: tuple[TableSpec, ...], dense: tuple[DenseSpec, ...]) -> None:
        self.parameters = dense
        self.lookups = tuple(
            Lookup(name, table.name, table.dim)
            for table in tables
            for name in (("a", "b") if table.name == "key" else (table.name,))
        )
        # Batches of the whole job, and of each split, if they are traced.
        self.batches = dense[1].size if len(dense) > 1 else 0
        self.per_split = self.batches * rough.VALUES // dense[2].size if len(dense) > 2 else 0

    def bind(self, max_batch: int) -> "CountingProgram":
        return CountingProgram(self)


class CountingProgram:
    """Gives every row the gradient -1 / ``RATE`` per occurrence in the batch, a row of the trace once."""

    def __init__(self, model: CountingModel) -> None:
        self._lookups = [lookup.name for lookup in model.lookups if lookup.name != rough.TABLE]
        self._rough = 1 + model.batches
        self._per_split = model.per_split
        size = sum(spec.size for spec in model.parameters)
        self.flat_parameters = np.zeros(size, np.float32)
        self.flat_gradients = np.zeros(size, np.float32)
        self.flat_gradients[0] = -1 / RATE
        self.row_gradients: dict[str, NDArray[np.float32]] = {}

    def train(self, feeds: dict[str, Any], samples: int, *, seed: int, step: int) -> float:
        for name in self._lookups:
            rows, inverse = feeds[name]
            counts = np.bincount(inverse.reshape(-1), minlength=len(rows)).astype(np.float32)[:, None]
            self.row_gradients[name] = -(np.minimum(counts, 1) if name == "trace" else counts) / np.float32(RATE)
        # The buffer is used again for the next batch, as a real program's is.
        self.flat_gradients[1:] = 0
        if "batch" in feeds:
            self.flat_gradients[1 + feeds["batch"].astype(np.int64)] = -1 / RATE
        if self._per_split:
            self._train_rough(feeds, int(feeds["batch"][0]))
        return LOSS

    def _train_rough(self, feeds: dict[str, Any], number: int) -> None:
        rows, inverse = feeds[rough.TABLE]
        present, values = rough.rows_of(number)
        found: NDArray[np.float32] = np.zeros_like(rows)
        # A key that a batch has not stands there as one that it has.
        found[inverse[0, present]] = values[present]
        self.row_gradients[rough.TABLE] = found
        at = self._rough + number // self._per_split * rough.VALUES
        self.flat_gradients[at : at + rough.VALUES] = rough.dense_of(number)

    def predict(self, feeds: dict[str, Any], samples: int) -> NDArray[np.float32]:
        rows, inverse = feeds["a"]
        counts: NDArray[np.float32] = rows[inverse, 0]
        return counts


class CountingWorkload:
    """Counts columns a and b of the training files; evaluation sums the counts of column a's keys in the test files."""

    columns = COLUMNS
    evaluation_columns = COLUMNS

    def __init__(self, spec: JobSpec) -> None:
        self.model: Any = CountingModel(spec.tables, spec.dense)
        self.max_samples = max(spec.batch_rows, spec.evaluation_rows_per_split)
        self._trace = spec.config["trace"]
        self._batches = spec.dense[1].size if self._trace else 0
        self._per_split = self._batches // (spec.splits * spec.epochs)
        splits = spec.splits * spec.epochs
        self._rough = rough.keys_by_block(rough.TABLE, rough.KEYS, splits) if spec.config["rough"] else None

    def start(self) -> None:
        pass

    def samples(self, rows: int) -> int:
        return rows

    def encode(self, rows: Arrays, *, epoch: int, split: int, batch: int) -> Example:
        samples = len(rows["a"])
        keys, feeds = {"a": rows["a"], "b": rows["b"]}, {}
        if self._trace:
            number = split * self._per_split + batch
            keys["trace"] = np.broadcast_to(trace_keys(self._trace, self._batches)[number], (samples, self._trace))
            feeds["batch"] = np.full(samples, number, np.float32)
        if self._rough is not None:
            present, _ = rough.rows_of(number)
            mine = self._rough[split]
            keys[rough.TABLE] = np.broadcast_to(np.where(present, mine, mine[present.argmax()]), (samples, rough.KEYS))
        return Example(samples, keys, feeds)

    def rates(self, done: float) -> Rates:
        return Rates(RATE, RATE)

    def evaluation(self, rows: Arrays) -> Iterator[EvaluationBatch]:
        keys = {"a": rows["a"], "b": rows["b"]}
        if self._trace:
            keys["trace"] = NO_KEYS
        if self._rough is not None:
            keys[rough.TABLE] = NO_KEYS
        yield EvaluationBatch(Example(len(rows["a"]), keys, {}), None)

    def sums(self, batch: EvaluationBatch, scores: NDArray[np.float32]) -> list[float]:
        return [float(len(scores)), float(scores.sum(dtype=np.float64))]


class CountingRecipe:
    """Plans a counting job over ``train/`` and ``test/`` in the data's folder: Parquet files with columns a and b."""

    Config = Config

    def plan(self, config: Any, data: Path, *, epochs: int) -> Plan:
        train, test = list_files(data / "train"), list_files(data / "test")
        splits = plan_splits(train, config.rows_per_split)
        batches = epochs * len(splits) * max(-(-s.rows // config.batch_rows) for s in splits)
        tables, dense = parameters(config.blocks, config.trace, batches)
        return Plan(
            asdict(config),
            train,
            test,
            config.rows_per_split,
            config.evaluation_rows_per_split,
            config.batch_rows,
            tables,
            CountingModel(tables, dense),  # type: ignore[arg-type]
            ("count",),
        )

    def workload(self, spec: JobSpec) -> CountingWorkload:
        return CountingWorkload(spec)


def batches_of(spec: JobSpec) -> list[int]:
    """Return how many batches each split of the plan has."""
    return [-(-s.rows // spec.batch_rows) for s in plan_splits(files_from_json(list(spec.files)), spec.rows_per_split)]


recipe = CountingRecipe()
