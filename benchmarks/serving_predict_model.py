# SPDX-License-Identifier: Apache-2.0
"""The DLRM of the benchmark of predictions: a job's folder with one cut, of random rows and dense values; raw rows to ask with.

Invariant: folder and requests are functions of the seed. 13 numbers and 26 categories, as the Criteo data have; every category's
values have rows.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from oarlock.checkpoint.block_file import BlockImage
from oarlock.checkpoint.line import PLAN
from oarlock.checkpoint.manifest import ClosedSet, Manifest
from oarlock.checkpoint.store import LocalStore
from oarlock.client.job import JobSpec
from oarlock.data.transforms import Fitted
from oarlock.embedding.hashing import blocks_of, table_salt
from oarlock.embedding.spec import to_json
from oarlock.launch.config import run_config
from oarlock.launch.folder import create
from oarlock.serving.features import RawColumns
from oarlock.serving.tensors import Tensor

NUMBERS, FIELDS, TRAINED = 13, 26, 20_000
MODEL = "dlrm"
_SCHEMA = 'format = "parquet"\n[label]\ncolumn = "label"\n'


def raw_rows(count: int, values: int, rng: np.random.Generator) -> list[Tensor]:
    """Return ``count`` raw rows whose categories have ``values`` values each."""
    numbers = [Tensor(f"n{i}", "FP32", (count,), rng.lognormal(1, 1, count).astype(np.float32)) for i in range(NUMBERS)]
    fields = [Tensor(f"c{i}", "INT64", (count,), rng.integers(0, values, count)) for i in range(FIELDS)]
    return [*numbers, *fields]


def write_job(folder: Path, rows: int, *, seed: int = 0) -> JobSpec:
    """Write the folder of a DLRM job of about ``rows`` rows, with cut 1; return its spec."""
    rng, values = np.random.default_rng(seed), max(1, rows // FIELDS)
    data = folder / "data"
    data.mkdir(parents=True)
    schema = [_SCHEMA, *(f'[[numbers]]\ncolumn = "n{i}"\nlog = true\n' for i in range(NUMBERS))]
    schema += [f'[[fields]]\ncolumn = "c{i}"\n' for i in range(FIELDS)]
    (data / "schema.toml").write_text("".join(schema), encoding="utf-8")
    table = {tensor.name: tensor.values for tensor in raw_rows(TRAINED, values, rng)}
    pq.write_table(pa.table({**table, "label": rng.integers(0, 2, TRAINED)}), data / "train.parquet")
    job = folder / "job"
    spec = create(job, "predictions", run_config({"recipe": MODEL, "data": str(data), "seed": seed}))
    _write_cut(job, spec, _keys(Fitted.from_json(spec.transforms), values), rng)
    return spec


def _keys(fitted: Fitted, values: int) -> Any:
    """Return uint64[rows]: the keys of all values of all fields."""
    each = np.arange(values)
    tensors = {f"c{i}": Tensor(f"c{i}", "INT64", (values,), each) for i in range(FIELDS)}
    tensors |= {f"n{i}": Tensor(f"n{i}", "FP32", (values,), np.ones(values, np.float32)) for i in range(NUMBERS)}
    arrays, _ = RawColumns(fitted.inputs).read(tensors)
    return np.unique(fitted.apply(arrays, label=False).keys)


def _write_cut(job: Path, spec: JobSpec, keys: Any, rng: np.random.Generator) -> None:
    store, entries = LocalStore(job / "checkpoints"), []
    (table,) = spec.tables
    number = np.empty(len(keys), np.int32)
    blocks_of(keys, table_salt(table.name), table.blocks.bit_length() - 1, number)
    for block in range(table.blocks):
        mine = keys[number == block]
        weights = rng.normal(0, 0.05, (len(mine), table.dim)).astype(np.float32)
        image = BlockImage(
            "rows", table.name, block, 1, {}, mine, weights, np.zeros((len(mine), table.dim), np.float32)
        )
        entries.append(store.write_block(1, image))
    none = np.empty(0, np.uint64)
    for dense in spec.dense:
        limit = np.float32(np.sqrt(6 / sum(dense.shape)))
        flat = rng.uniform(-limit, limit, dense.size).astype(np.float32)
        for block in range(dense.blocks):
            part = flat[block * dense.slice : (block + 1) * dense.slice][None, :]
            image = BlockImage("dense", dense.name, block, 1, {}, none, part, np.empty((1, 0), np.float32))
            entries.append(store.write_block(1, image))
    store.commit(
        Manifest(
            job=spec.job,
            run=0,
            cut=1,
            created="2026-01-01T00:00:00Z",
            seed=spec.seed,
            tables=tuple(to_json(each) for each in spec.tables),
            dense=tuple(to_json(each) for each in spec.dense),
            recipe=spec.recipe,
            config=spec.config,
            files=spec.files,
            closed=ClosedSet(),
            open_splits=(),
            epoch=0,
            step=1,
            metrics={PLAN: spec.plan()},
            best={},
            blocks=tuple(entries),
        )
    )
