# SPDX-License-Identifier: Apache-2.0
"""The small files of simulated jobs, and what counting them must give.

Invariant: the expected counts come from the files alone. Files are read once; their arrays are shared and not changed.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from oarlock.client.compression import DENSE, WireSpec
from oarlock.client.job import JobSpec
from oarlock.data.columns import Arrays, ColumnSpec
from oarlock.data.files import files_to_json, list_files
from oarlock.data.reader import open_reader
from oarlock.data.splits import SplitPlan, plan_splits
from oarlock.embedding.spec import CacheSpec
from oarlock.simulation import mixed, ranked
from oarlock.simulation.counting import Config, parameters
from oarlock.simulation.faults import (
    GATE_SECONDS,
    HEARTBEAT_SECONDS,
    HYBRID,
    LEASE_SECONDS,
    SYNC,
    TRAIN_ROWS,
    Schedule,
)
from oarlock.simulation.rough import TABLE

JOB = "00112233445566778899aabbccddeeff"
KEYS = 40
TEST_ROWS = 6
TRACE = 4


class CachedReader:
    """Reads every split once."""

    def __init__(self) -> None:
        self._reader = open_reader("arrow")
        self._known: dict[tuple[str, int, int], Arrays] = {}
        self.name = self._reader.name

    def read(self, plan: SplitPlan, columns: Sequence[ColumnSpec]) -> Arrays:
        key = (plan.file.path, plan.first_group, plan.stop_group)
        if key not in self._known:
            self._known[key] = self._reader.read(plan, columns)
        return self._known[key]


class Data:
    """Files in ``folder`` with columns a and b."""

    def __init__(self, folder: Path) -> None:
        rng = np.random.default_rng(7)
        self.folder = folder
        self.reader = CachedReader()
        self.values: dict[str, NDArray[np.int64]] = {}
        for name, rows in (("train", TRAIN_ROWS), ("test", TEST_ROWS)):
            # Few keys, some of them often: batches meet in the same rows.
            self.values[name] = np.minimum(rng.zipf(1.3, (rows, 2)), KEYS) - 1
            table = pa.table({"a": self.values[name][:, 0], "b": self.values[name][:, 1]})
            (folder / name).mkdir(parents=True)
            for part in range(2):
                piece = table.slice(part * rows // 2, rows // 2)
                pq.write_table(piece, folder / name / f"part-{part}.parquet", row_group_size=3)
        self.files = {name: list_files(folder / name) for name in self.values}

    def occurrences(self) -> NDArray[np.int64]:
        """Return how often each key stands in the training files."""
        return np.bincount(self.values["train"].ravel(), minlength=KEYS)

    def expected_metric(self, epoch: int) -> float:
        """Return the evaluation's mean after ``epoch`` + 1 passes: the mean count of column a of the test files."""
        counts = self.occurrences() * (epoch + 1)
        return float(counts[self.values["test"][:, 0]].mean())

    def spec(self, schedule: Schedule) -> JobSpec:
        """Return the job of a schedule."""
        train, test = self.files["train"], self.files["test"]
        plan = plan_splits(train, schedule.rows_per_split)
        batches = schedule.epochs * len(plan) * max(-(-s.rows // schedule.batch_rows) for s in plan)
        rough = bool(schedule.push)
        tables, dense = parameters(8, TRACE, batches, schedule.epochs * len(plan) if rough else 0)
        changes: dict[str, Any] = {}
        if rough:
            wires = (
                WireSpec(push=schedule.push, zstd=schedule.zstd),
                WireSpec(push=schedule.push_dense, zstd=schedule.zstd),
            )
            changes["compression"] = dict(zip((TABLE, DENSE), wires, strict=True))
        recipe, metrics = "oarlock.simulation.counting:recipe", ("count",)
        if schedule.mode == SYNC:
            recipe, tables, dense, metrics = "oarlock.simulation.ranked:recipe", ranked.TABLES, ranked.DENSE, ("mean",)
            changes["ranks"], changes["checkpoint_steps"] = schedule.ranks, schedule.checkpoint_steps
        if schedule.mode == HYBRID:
            recipe, dense = "oarlock.simulation.mixed:recipe", mixed.dense_of(dense)
            changes["ranks"], changes["checkpoint_steps"] = schedule.ranks, schedule.checkpoint_steps
        if schedule.mode == "ssp":
            changes["staleness"] = schedule.staleness
        if schedule.cache_rows:
            counting, *others = tables
            cache = CacheSpec(schedule.cache_rows, schedule.cache_bound, adaptive=schedule.cache_adaptive)
            tables = (replace(counting, cache=cache), *others)
        return JobSpec(
            job=JOB,
            name="simulated",
            seed=schedule.seed,
            recipe=recipe,
            tables=tables,
            dense=dense,
            files=tuple(files_to_json(train)),
            evaluation_files=tuple(files_to_json(test)),
            splits=len(plan),
            evaluation_splits=len(plan_splits(test, 3)),
            rows_per_split=schedule.rows_per_split,
            evaluation_rows_per_split=3,
            batch_rows=schedule.batch_rows,
            epochs=schedule.epochs,
            servers=schedule.shards,
            replicas=min(schedule.replicas, schedule.shards - 1),
            workers=schedule.workers,
            metrics=metrics,
            config=vars(Config(trace=TRACE, rough=rough)),
            mode=schedule.mode,
            checkpoint_epochs=0,
            checkpoint_seconds=schedule.checkpoint_seconds,
            gate_seconds=GATE_SECONDS,
            open_splits=schedule.open_splits,
            prefetch=schedule.prefetch,
            accumulate=schedule.accumulate,
            compute_threads=schedule.compute_threads,
            lease_seconds=LEASE_SECONDS,
            heartbeat_seconds=HEARTBEAT_SECONDS,
            **changes,
        )
