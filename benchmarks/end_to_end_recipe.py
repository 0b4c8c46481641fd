# SPDX-License-Identifier: Apache-2.0
"""The recipe of `oarlock.benchmarks.end_to_end`: the recipes' graphs, fed from arrays in memory, rows under row-wise adagrad.

The raw column of a job is the number of a sample; the arrays beside the data files are mapped, so that nothing is decoded in the
timed loop, while dedup, pull, compute and push all are in it. Invariant: a batch is a function of its row numbers.
"""

import itertools
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from oarlock.benchmarks.end_to_end_data import CRITEO, NUMBERS, field_name
from oarlock.client.job import JobSpec
from oarlock.data.columns import Arrays, ColumnSpec
from oarlock.data.files import list_files
from oarlock.data.scaling import Scaling
from oarlock.data.schema_parts import Field, Label, Number, Schema
from oarlock.data.transforms import Fitted
from oarlock.embedding.spec import Initializer, OptimizerSpec, Part, TableSpec
from oarlock.nn import Model
from oarlock.proto.errors import InvalidArgument
from oarlock.recipes import dlrm, ncf, wide_deep
from oarlock.worker.recipe import EvaluationBatch, Example, Plan, Rates

DEEP = {"wdl": (400, 400, 400), "wdl_small": (256, 128, 64)}
MODELS = (*DEEP, "dlrm", "ncf")
NCF_DIM = 40


@dataclass(frozen=True)
class EndToEndConfig:
    """What a job trains: one of MODELS, vectors of ``dim``, batches of ``batch_samples``, matrix products in ``dense_dtype``.

    ``blocks``: of the table of the click models.
    """

    model: str = "wdl"
    dim: int = 16
    batch_samples: int = 2048
    batches_per_split: int = 2
    row_rate: float = 0.02
    dense_rate: float = 0.001
    dense_dtype: str = "float32"
    blocks: int = 64

    def __post_init__(self) -> None:
        if self.model not in MODELS:
            raise InvalidArgument(f"model = {self.model!r}: choose one of {', '.join(MODELS)}")
        for name in ("dim", "batch_samples", "batches_per_split"):
            if getattr(self, name) < 1:
                raise InvalidArgument(f"{name} = {getattr(self, name)}: give an integer >= 1")


def layers(model: str, dim: int) -> list[tuple[int, int]]:
    """Return (inputs, outputs) of every matrix product of the model's graph."""
    if model == "dlrm":
        config = dlrm.DlrmConfig()
        pairs = len(CRITEO) * (len(CRITEO) + 1) // 2
        return _chain(NUMBERS, *config.bottom, dim) + _chain(dim + pairs, *config.top, 1)
    if model == "ncf":
        return [*_chain(*ncf.NcfConfig().layers), (ncf.NcfConfig().factors + ncf.NcfConfig().layers[-1], 1)]
    return [(NUMBERS, 1), *_chain(NUMBERS + len(CRITEO) * dim, *DEEP[model], 1)]


def _chain(*widths: int) -> list[tuple[int, int]]:
    return list(itertools.pairwise(widths))


def build(config: EndToEndConfig) -> tuple[Model, tuple[TableSpec, ...]]:
    """Return the graph of a recipe at the benchmark's shape, and its tables."""
    adagrad, first = OptimizerSpec("rowwise_adagrad", initial=0.0), Initializer("normal", scale=0.05)
    if config.model == "ncf":
        tables = tuple(TableSpec(name, NCF_DIM, adagrad, first) for name in ("user", "item"))
        return ncf.model(ncf.NcfConfig()), tables
    if config.model == "dlrm":
        graph = dlrm.model(dlrm.DlrmConfig(dim=config.dim, dense_dtype=config.dense_dtype), _fitted())
        return graph, (TableSpec("fields", config.dim, adagrad, first, blocks=config.blocks),)
    deep = wide_deep.WideDeepConfig(dim=config.dim, layers=DEEP[config.model], dense_dtype=config.dense_dtype)
    parts = (Part(1, adagrad, Initializer("zeros")), Part(config.dim, adagrad, first))
    return wide_deep.model(deep, _fitted()), (TableSpec("fields", 1 + config.dim, parts=parts, blocks=config.blocks),)


def _fitted() -> Fitted:
    """Return what the graphs read of a schema: how many numbers and fields there are."""
    numbers = tuple(Number(f"I{i + 1}") for i in range(NUMBERS))
    fields = tuple(Field(field_name(i), (field_name(i),)) for i in range(len(CRITEO)))
    schema = Schema("parquet", Label("label"), numbers, fields)
    return Fitted(schema, [Scaling(False, 0.0, 0.0, 1.0)] * NUMBERS, {}, {})


class EndToEndWorkload:
    """One worker's side: row numbers to keys, numbers and labels."""

    columns = (ColumnSpec("row", "key"),)
    evaluation_columns = columns

    def __init__(self, spec: JobSpec) -> None:
        self._config = EndToEndConfig(**spec.config)
        self._folder = Path(spec.files[0]["path"]).parent
        self._rates = Rates(self._config.row_rate, self._config.dense_rate)
        self.model = build(self._config)[0]
        self.max_samples = spec.batch_rows
        self._keys: NDArray[np.uint64]
        self._label: NDArray[np.float32]
        self._numbers: NDArray[np.float32] | None = None

    def start(self) -> None:
        self._keys = self._mapped("keys")
        self._label = self._mapped("label")
        if self._config.model != "ncf":
            self._numbers = self._mapped("numbers")

    def _mapped(self, name: str) -> NDArray[Any]:
        # Not the class memmap: its slices and copies cost more than the arrays' own.
        return np.asarray(np.load(self._folder / f"{name}.npy", mmap_mode="r"))

    def samples(self, rows: int) -> int:
        return rows

    def encode(self, rows: Arrays, *, epoch: int, split: int, batch: int) -> Example:
        chosen = rows["row"].astype(np.intp)
        keys = self._keys.take(chosen, axis=0)
        feeds = {"label": self._label.take(chosen)}
        if self._numbers is None:
            users, items = np.ascontiguousarray(keys[:, 0]), np.ascontiguousarray(keys[:, 1])
            return Example(len(chosen), {"user": users, "item": items}, feeds)
        feeds["numbers"] = self._numbers.take(chosen, axis=0)
        return Example(len(chosen), {"fields": keys}, feeds)

    def rates(self, done: float) -> Rates:
        return self._rates

    def evaluation(self, rows: Arrays) -> Iterator[EvaluationBatch]:
        """Give nothing: the job has no evaluation files."""
        yield from ()


class EndToEndRecipe:
    """Plans jobs on a folder that ``end_to_end_data`` wrote. Nothing is evaluated."""

    Config = EndToEndConfig

    def plan(self, config: EndToEndConfig, data: Path, *, epochs: int) -> Plan:
        graph, tables = build(config)
        return Plan(
            config=asdict(config),
            files=list_files(data),
            evaluation_files=(),
            rows_per_split=config.batch_samples * config.batches_per_split,
            evaluation_rows_per_split=1,
            batch_rows=config.batch_samples,
            tables=tables,
            model=graph,
            metrics=(),
        )

    def workload(self, spec: JobSpec) -> EndToEndWorkload:
        return EndToEndWorkload(spec)


recipe = EndToEndRecipe()
