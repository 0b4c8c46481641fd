# SPDX-License-Identifier: Apache-2.0
"""The recipe of `oarlock.benchmarks.chaos`: Wide & Deep on clicks, a table that counts beside it, and ballast.

    fields, layers   Wide & Deep as `recipes/wide_deep.py` has it
    key, batches     the counting table of `simulation/counting.py`, of columns a and b, and how many groups there were
    ballast          as many rows as make a shard large: every group has one of each block, so that it pushes to every block

Invariant: neither the counters nor the ballast touch the model. Rates are powers of two, so that what is counted is exact.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from oarlock.client.job import JobSpec
from oarlock.data.columns import Arrays
from oarlock.embedding.spec import DenseSpec, TableSpec
from oarlock.nn.graph import Lookup
from oarlock.recipes import wide_deep
from oarlock.recipes._click import ClickWorkload
from oarlock.recipes.wide_deep import WideDeepConfig, WideDeepRecipe
from oarlock.simulation.counting import COLUMNS, NO_KEYS, SGD, ZEROS
from oarlock.simulation.rough import keys_by_block
from oarlock.worker.recipe import EvaluationBatch, Example, Plan, Rates

RECIPE = "oarlock.benchmarks.chaos_recipe:recipe"
COUNTED = (Lookup("a", "key", 1), Lookup("b", "key", 1))
BALLAST = "ballast"
# Near what the recipe has for itself.
RATES = Rates(1 / 64, 1 / 1024)
FIELDS = (("user", 2000), ("item", 1000), ("hour", 24), ("place", 60), ("weather", 9))
_WIDTH = 4
FILES, GROUP_ROWS = 4, 1024


@dataclass(frozen=True)
class ChaosConfig(WideDeepConfig):
    """``ballast``: blocks of it (a power of two; 0: none), each of ``ballast_rows`` rows of ``ballast_dim`` values.

    ``pace``: seconds that a worker waits before each batch, so that a small job lasts long enough for something to happen to it.
    """

    OWN_RATES: ClassVar[Rates] = RATES

    layers: tuple[int, ...] = (64, 32)
    dim: int = 8
    ballast: int = 0
    ballast_rows: int = 0
    ballast_dim: int = 1024
    pace: float = 0.0


def write_clicks(folder: Path, *, rows: int, test_rows: int, seed: int) -> None:
    """Write clicks of planted tastes (benchmarks/quality_data.py), with columns a and b to count, as Parquet with a schema."""
    rng = np.random.default_rng(seed)
    total = rows + test_rows
    logit, vectors = np.full(total, -1.0), np.zeros((total, _WIDTH))
    squares = np.zeros(total)
    columns: dict[str, NDArray[np.int64]] = {}
    for name, values in FIELDS:
        share = 1.0 / np.arange(1, values + 1) ** 0.8
        drawn = rng.choice(values, total, p=share / share.sum())
        taste = rng.normal(scale=0.35, size=(values, _WIDTH))
        logit += rng.normal(scale=0.5, size=values)[drawn]
        vectors += taste[drawn]
        squares += np.square(taste[drawn]).sum(axis=1)
        columns[name] = drawn
    logit += 0.5 * (np.square(vectors).sum(axis=1) - squares)
    columns["label"] = (rng.random(total) < 1.0 / (1.0 + np.exp(-logit))).astype(np.int64)
    # A few keys far more often than the others.
    columns |= {name: (20_000 * rng.random(total) ** 3).astype(np.int64) for name in ("a", "b")}
    for part, first, end, files in (("train", 0, rows, FILES), ("test", rows, total, 1)):
        (folder / part).mkdir(parents=True)
        bounds = np.linspace(first, end, files + 1).astype(int).tolist()
        for number, run in enumerate(map(slice, bounds[:-1], bounds[1:])):
            table = pa.table({name: column[run] for name, column in columns.items()})
            pq.write_table(table, folder / part / f"part-{number}.parquet", row_group_size=GROUP_ROWS)
    fields = "".join(f'\n[[fields]]\ncolumn = "{name}"\n' for name, _ in FIELDS)
    schema = f'format = "parquet"\n\n[label]\ncolumn = "label"\n{fields}'
    (folder / "schema.toml").write_text(schema, encoding="utf-8")


class CountedModel:
    """A model with the counters and the ballast beside it."""

    def __init__(self, inner: Any, ballast_dim: int) -> None:
        self.inner = inner
        extra = (Lookup(BALLAST, BALLAST, ballast_dim),) if ballast_dim else ()
        self.lookups = (*inner.lookups, *COUNTED, *extra)
        self.parameters = (*inner.parameters, DenseSpec("batches", (1,), SGD, ZEROS))
        self.tables = {lookup.table: lookup.dim for lookup in self.lookups}

    def bind(self, max_batch: int) -> "CountedProgram":
        return CountedProgram(self, max_batch)


class CountedProgram:
    """Trains the model's program, and gives each counted row -1 / rate for every occurrence."""

    def __init__(self, model: CountedModel, max_batch: int) -> None:
        self._inner = model.inner.bind(max_batch)
        self._size = len(self._inner.flat_parameters)
        self.flat_parameters = np.zeros(self._size + 1, np.float32)
        self.flat_gradients = np.zeros(self._size + 1, np.float32)
        self.row_gradients: dict[str, NDArray[np.float32]] = {}

    def train(self, feeds: dict[str, Any], samples: int, *, seed: int, step: int) -> float:
        own, other = self._parted(feeds)
        self._inner.flat_parameters[:] = self.flat_parameters[: self._size]
        loss: float = self._inner.train(own, samples, seed=seed, step=step)
        self.flat_gradients[: self._size] = self._inner.flat_gradients
        self.flat_gradients[self._size] = -1 / RATES.dense
        self.row_gradients.update(self._inner.row_gradients)
        for name, (rows, inverse) in other.items():
            counts = np.bincount(inverse.reshape(-1), minlength=len(rows)).astype(np.float32)[:, None]
            self.row_gradients[name] = np.broadcast_to(-counts / np.float32(RATES.rows), rows.shape).copy()
        return loss

    def prepare(self) -> None:
        """Take the parameters as they are for predictions: each takes them anyhow."""

    def predict(self, feeds: dict[str, Any], samples: int) -> NDArray[np.float32]:
        self._inner.flat_parameters[:] = self.flat_parameters[: self._size]
        scores: NDArray[np.float32] = self._inner.predict(self._parted(feeds)[0], samples)
        return scores

    @staticmethod
    def _parted(feeds: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        other = {name: feeds[name] for name in ("a", "b", BALLAST) if name in feeds}
        return {name: feed for name, feed in feeds.items() if name not in other}, other


class CountedWorkload:
    """Wide & Deep's workload, with the keys of the counters and of the ballast."""

    def __init__(self, spec: JobSpec, inner: Any) -> None:
        self._inner = inner
        self._config = ChaosConfig(**spec.config)
        self.model: Any = CountedModel(inner.model, self._config.ballast_dim if self._config.ballast else 0)
        self.max_samples = inner.max_samples
        self.evaluation_columns = inner.evaluation_columns
        self.columns = (*inner.columns, *COLUMNS)
        self._per_split = -(-spec.rows_per_split // spec.batch_rows)
        self._ballast: NDArray[np.uint64] = np.empty((0, 0), np.uint64)

    def start(self) -> None:
        if self._config.ballast:
            self._ballast = keys_by_block(BALLAST, self._config.ballast, self._config.ballast_rows)

    def samples(self, rows: int) -> int:
        return rows

    def encode(self, rows: Arrays, *, epoch: int, split: int, batch: int) -> Example:
        time.sleep(self._config.pace)
        own = {name: values for name, values in rows.items() if name not in ("a", "b")}
        found = self._inner.encode(own, epoch=epoch, split=split, batch=batch)
        keys = {**found.keys, "a": rows["a"], "b": rows["b"]}
        if len(self._ballast):
            number = (split * self._per_split + batch) % len(self._ballast)
            keys[BALLAST] = self._ballast[number : number + 1]
        return Example(found.samples, keys, found.feeds)

    def rates(self, done: float) -> Rates:
        return RATES

    def evaluation(self, rows: Arrays) -> Iterator[EvaluationBatch]:
        nothing = dict.fromkeys(("a", "b", BALLAST) if len(self._ballast) else ("a", "b"), NO_KEYS)
        for batch in self._inner.evaluation(rows):
            example = replace(batch.example, keys={**batch.example.keys, **nothing})
            yield replace(batch, example=example)

    def labels(self, batch: EvaluationBatch) -> NDArray[np.float32]:
        labels: NDArray[np.float32] = self._inner.labels(batch)
        return labels


class ChaosRecipe:
    """Plans jobs on a folder that ``write_clicks`` wrote."""

    Config = ChaosConfig

    def plan(self, config: ChaosConfig, data: Path, *, epochs: int) -> Plan:
        inner = WideDeepRecipe().plan(config, data, epochs=epochs)
        tables = (*inner.tables, TableSpec("key", 1, SGD, ZEROS, 16))
        if config.ballast:
            tables += (TableSpec(BALLAST, config.ballast_dim, SGD, ZEROS, config.ballast),)
        model: Any = CountedModel(inner.model, config.ballast_dim if config.ballast else 0)
        return replace(inner, tables=tables, model=model)

    def workload(self, spec: JobSpec) -> CountedWorkload:
        config = ChaosConfig(**spec.config)
        return CountedWorkload(spec, ClickWorkload(spec, config, wide_deep.model))


recipe = ChaosRecipe()
