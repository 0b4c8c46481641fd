# SPDX-License-Identifier: Apache-2.0
"""What recipes that predict clicks have in common: tabular data with a schema, one table of rows, four metrics.

A recipe brings its Config and its graph. The graph has a lookup ``fields`` (a row of every categorical field), a label ``label``
and, if the schema has numbers, a dense input ``numbers``. Invariant: what training and evaluation see of a raw row is
``Fitted.apply`` of it and nothing else.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
from numpy.typing import NDArray

from oarlock.client.job import JobSpec
from oarlock.data.columns import Arrays
from oarlock.data.tabular import tabular_files
from oarlock.data.transforms import Features, Fitted, fit
from oarlock.embedding.spec import OptimizerSpec, TableSpec
from oarlock.nn import DENSE_DTYPES, Model, check_dense_dtype
from oarlock.proto.errors import InvalidArgument
from oarlock.worker.recipe import EvaluationBatch, Example, Plan, Rates

METRICS = ("auc", "logloss", "accuracy", "calibration")
SPLITS_PER_EPOCH = 16
EVALUATION_ROWS = 65_536
MOST_BATCH, LEAST_BATCH, BATCHES_PER_EPOCH = 2048, 128, 256
# Rates of rows and of dense parameters if all have one ``optimizer``: a row's gradient is a part of the batch's mean, which adam
# divides out and sgd does not.
RATES = {"sgd": Rates(0.5, 0.1)}


@dataclass(frozen=True)
class ClickConfig:
    """Settings of every such recipe. ``dense_dtype``: see ``nn.Model``.

    ``batch_samples`` = 0: chosen by the size of the data. ``optimizer``: of all parameters; empty: the recipe's own ones.
    ``row_rate``, ``dense_rate``: None: what suits the optimizer (``RATES``, or ``OWN_RATES`` of the recipe's own ones).
    """

    OWN_RATES: ClassVar[Rates] = Rates(0.01, 0.001)

    dim: int = 16
    batch_samples: int = 0
    optimizer: str = ""
    row_rate: float | None = None
    dense_rate: float | None = None
    final_rate: float = 1.0
    row_scale: float = 0.05
    dense_dtype: str = "float32"

    def __post_init__(self) -> None:
        for name, low in (("dim", 1), ("batch_samples", 0)):
            if getattr(self, name) < low:
                raise InvalidArgument(f"{name} = {getattr(self, name)}: give an integer >= {low}")
        if self.optimizer and self.optimizer not in RATES:
            raise InvalidArgument(f"optimizer = {self.optimizer!r}: give 'sgd', or '' for the recipe's own")
        for name in ("row_rate", "dense_rate", "final_rate", "row_scale"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < float("inf"):
                raise InvalidArgument(f"{name} = {value}: give a finite number >= 0")
        if self.dense_dtype not in DENSE_DTYPES:
            raise InvalidArgument(f"dense_dtype = {self.dense_dtype!r}: give one of {', '.join(DENSE_DTYPES)}")


def check_widths(owner: str, widths: tuple[int, ...]) -> None:
    """Raise InvalidArgument unless these can be the widths of layers."""
    if not widths or any(width < 1 for width in widths):
        raise InvalidArgument(f"{owner} = {list(widths)}: give one width or more, each >= 1")


Config = TypeVar("Config", bound=ClickConfig)


def plan_click(
    config: Config,
    data: Path,
    table: Callable[[Config], TableSpec],
    model: Callable[[Config, Fitted], Model],
) -> Plan:
    """Plan a job on a folder of tabular data: fit the schema's transforms, choose the batch, make the table and the graph."""
    # Before the data are read, which may take minutes.
    check_dense_dtype(config.dense_dtype)
    schema, train, evaluation = tabular_files(data)
    fitted = fit(schema, train)
    rows = sum(file.rows for file in train)
    config = with_rates(replace(config, batch_samples=config.batch_samples or _batch(rows)))
    return Plan(
        config=asdict(config),
        files=train,
        evaluation_files=evaluation,
        rows_per_split=max(1, min(8 * config.batch_samples, rows // SPLITS_PER_EPOCH)),
        evaluation_rows_per_split=EVALUATION_ROWS,
        batch_rows=config.batch_samples,
        tables=(table(config),),
        model=model(config, fitted),
        metrics=METRICS,
        transforms=fitted.to_json(),
    )


def with_rates(config: Config) -> Config:
    """Return the config with the rates that were left open."""
    usual = RATES[config.optimizer] if config.optimizer else config.OWN_RATES
    rows = usual.rows if config.row_rate is None else config.row_rate
    return replace(config, row_rate=rows, dense_rate=usual.dense if config.dense_rate is None else config.dense_rate)


def optimizer_of(config: ClickConfig, own: OptimizerSpec) -> OptimizerSpec:
    """Return the optimizer of a parameter whose recipe has ``own`` for it."""
    return OptimizerSpec(config.optimizer) if config.optimizer else own


def _batch(rows: int) -> int:
    """Return a power of two that gives an epoch ``BATCHES_PER_EPOCH`` batches or more, within bounds."""
    wanted = max(LEAST_BATCH, min(MOST_BATCH, rows // BATCHES_PER_EPOCH))
    return 1 << (wanted.bit_length() - 1)


class ClickWorkload:
    """One worker's side: raw rows to keys, numbers and labels."""

    def __init__(self, spec: JobSpec, config: ClickConfig, model: Callable[[Any, Fitted], Model]) -> None:
        self._config = config = with_rates(config)
        assert config.row_rate is not None
        assert config.dense_rate is not None
        self._rates = Rates(config.row_rate, config.dense_rate)
        self._fitted = Fitted.from_json(spec.transforms)
        self.model = model(config, self._fitted)
        self.columns = self.evaluation_columns = self._fitted.columns
        self.inputs = self._fitted.inputs
        self.max_samples = max(spec.batch_rows, 8192)

    def start(self) -> None:
        """Nothing beside the splits is needed."""

    def samples(self, rows: int) -> int:
        return rows

    def encode(self, rows: Arrays, *, epoch: int, split: int, batch: int) -> Example:
        features = self._fitted.apply(rows)
        return self._example(features, {"label": features.label})

    def unlabelled(self, rows: Arrays) -> Example:
        return self._example(self._fitted.apply(rows, label=False), {})

    def _example(self, features: Features, feeds: dict[str, NDArray[np.float32]]) -> Example:
        if self._fitted.width:
            feeds["numbers"] = features.dense
        return Example(len(features.keys), {"fields": features.keys}, feeds)

    def rates(self, done: float) -> Rates:
        """Go in a straight line to ``final_rate`` times the first rates."""
        factor = 1.0 + (self._config.final_rate - 1.0) * min(1.0, done)
        return Rates(self._rates.rows * factor, self._rates.dense * factor)

    def evaluation(self, rows: Arrays) -> Iterator[EvaluationBatch]:
        n = len(next(iter(rows.values())))
        for begin in range(0, n, self.max_samples):
            part = {name: values[begin : begin + self.max_samples] for name, values in rows.items()}
            example = self.encode(part, epoch=0, split=0, batch=0)
            yield EvaluationBatch(example, example.feeds["label"])

    def labels(self, batch: EvaluationBatch) -> NDArray[np.float32]:
        """Return the labels of a batch, float32[samples], for the exact metrics."""
        labels: NDArray[np.float32] = batch.context
        return labels
