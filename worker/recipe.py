# SPDX-License-Identifier: Apache-2.0
"""What a recipe is to the rest of the system: how a job of it is planned, and the workload that a worker runs.

Invariant: everything that a Workload answers is a pure function of its arguments, the job's spec and the data, so any worker
may continue where another one ended. A recipe is named as ``module:attribute`` and loaded by that name alone.
"""

import difflib
import importlib
import importlib.util
import pkgutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from oarlock.client.job import JobSpec
from oarlock.data.columns import Arrays, ColumnSpec
from oarlock.data.files import DataFile
from oarlock.embedding.spec import TableSpec
from oarlock.nn import Model
from oarlock.proto.errors import NotFound


class Rates(NamedTuple):
    """Learning rates of one group: of the rows, and of the dense parameters."""

    rows: float
    dense: float


@dataclass(frozen=True)
class Example:
    """A batch as the model takes it: raw keys uint64[samples] or uint64[samples, fields] by lookup, other inputs by name."""

    samples: int
    keys: dict[str, NDArray[np.uint64]]
    feeds: dict[str, NDArray[np.float32]]


@dataclass(frozen=True)
class EvaluationBatch:
    """Samples to score, and what ``labels`` or ``sums`` of the workload needs beside the scores."""

    example: Example
    context: Any


@dataclass(frozen=True)
class Plan:
    """How a job of a recipe is cut and configured for the data at hand.

    ``metrics`` names what an evaluation gives; the first one decides which epoch was best. ``transforms``: the fitted
    transforms as JSON, for recipes that have any.
    """

    config: dict[str, Any]
    files: tuple[DataFile, ...]
    evaluation_files: tuple[DataFile, ...]
    rows_per_split: int
    evaluation_rows_per_split: int
    batch_rows: int
    tables: tuple[TableSpec, ...]
    model: Model
    metrics: tuple[str, ...]
    transforms: str = ""


class Workload(Protocol):
    """A recipe at work in one worker. It is evaluated by ``labels`` (see Labelled), or else by ``sums`` (see Summed)."""

    model: Model
    columns: Sequence[ColumnSpec]
    evaluation_columns: Sequence[ColumnSpec]
    max_samples: int

    def start(self) -> None:
        """Load what the recipe needs beside the splits (called once, before ``max_samples`` is read)."""

    def samples(self, rows: int) -> int:
        """Return how many samples ``rows`` raw rows make."""

    def encode(self, rows: Arrays, *, epoch: int, split: int, batch: int) -> Example:
        """Return the batch of some raw rows; its draws are keyed by (seed, epoch, split, batch)."""

    def rates(self, done: float) -> Rates:
        """Return the learning rates when the part ``done`` in [0, 1] of the job's batches is behind."""

    def evaluation(self, rows: Arrays) -> Iterator[EvaluationBatch]:
        """Cut an evaluation split's rows into batches of at most ``max_samples`` samples."""


@runtime_checkable
class Labelled(Protocol):
    """A workload whose model predicts a probability that a label tells: evaluated by the metrics of ``data.scores``.

    The plan's ``metrics`` are some of those then, and ``sums`` is not called.
    """

    def labels(self, batch: EvaluationBatch) -> NDArray[np.float32]:
        """Return the samples' labels: float32[samples] in [0, 1]."""


@runtime_checkable
class Summed(Protocol):
    """A workload that makes its own metrics."""

    def sums(self, batch: EvaluationBatch, scores: NDArray[np.float32]) -> list[float]:
        """Return [weight, metric sums...]: the job's metrics are these, added over all splits, divided by the weight."""


@runtime_checkable
class Predicts(Protocol):
    """A workload whose model also answers people's programs (docs/serving.md). ``start`` is not called for that."""

    inputs: Sequence[ColumnSpec]

    def unlabelled(self, rows: Arrays) -> Example:
        """Return the samples of raw rows, read as ``inputs``: one for each row, in their order, encoded as in an evaluation."""


class Recipe(Protocol):
    """A model, its data and its defaults. ``Config`` is a frozen dataclass of what a user may set.

    Jobs that were made before ``Config`` had a field go on with its default, at which the recipe does what it did without it.
    """

    Config: type

    def plan(self, config: Any, data: Path, *, epochs: int) -> Plan:
        """Return how a job trains on the data in a folder; what the config leaves open is chosen by the data's size."""

    def workload(self, spec: JobSpec) -> Workload:
        """Return the worker's side of a planned job."""


def recipe_name(name: str) -> str:
    """Return ``module:attribute`` for a recipe's name; NotFound suggests a near one."""
    if ":" in name:
        return name
    import oarlock

    found = [m.name for path in oarlock.__path__ for m in pkgutil.iter_modules([f"{path}/recipes"])]
    known = [module for module in found if not module.startswith("_")]
    if name not in known:
        near = difflib.get_close_matches(name, known, 1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise NotFound(f"no recipe {name!r}{hint} There are: {', '.join(known)}, or give module:attribute")
    return f"oarlock.recipes.{name}:recipe"


def load_recipe(name: str) -> Recipe:
    """Return the recipe object that ``module:attribute`` names; NotFound says what is missing."""
    module_name, _, attribute = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise NotFound(f"recipe {name!r}: no module {error.name!r}; is it on PYTHONPATH?") from error
    recipe: Recipe | None = getattr(module, attribute, None)
    if recipe is None:
        raise NotFound(f"recipe {name!r}: module {module_name} has no {attribute!r}")
    return recipe
