# SPDX-License-Identifier: Apache-2.0
"""A predictor: raw rows of callers to scores, by the transforms and the graph that the model was trained with.

Invariant: the scores are those that training's evaluation gives for the same rows at the same state of the model. Who serves
makes it of a recipe (launch/prediction.py), once: transforms and graph of a job do not change, rows and dense parameters come
with each state. Any thread; what is under way at a time is the batcher's business.
"""

from collections.abc import Callable, Sequence
from threading import Lock
from time import perf_counter
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from oarlock.data.categories import NULL_CATEGORY
from oarlock.data.columns import Arrays, ColumnSpec, codes_of
from oarlock.nn import Model
from oarlock.proto.errors import InvalidArgument
from oarlock.serving.batcher import Batcher
from oarlock.serving.features import RawColumns
from oarlock.serving.scorer import Samples, Scored, Scorer, State
from oarlock.serving.tensors import BYTES, DATATYPES, Tensor, from_raw
from oarlock.telemetry.histogram import Histogram

# Samples of callers that are joined, and what memory of graphs is for.
MAX_BATCH = 1024
# Rows of one request.
MAX_ROWS = 65_536
# Samples of the batches by which a predictor warms up.
SIZES = (1, 2, 8, 32, 128, 512, MAX_BATCH)


class Recipe(NamedTuple):
    """What a predictor is made of: a model, the columns that callers give, and how their arrays become samples."""

    name: str
    model: Model
    columns: tuple[ColumnSpec, ...]
    encode: Callable[[Arrays], Samples]


class Predictor:
    """Predicts by ``recipe``, in as many threads as there are ``scorers``."""

    def __init__(self, recipe: Recipe, *, scorers: int = 1, max_rows: int = MAX_ROWS) -> None:
        self.name = recipe.name
        self.columns = RawColumns(recipe.columns)
        self._specs = recipe.columns
        self.max_rows = max_rows
        self._encode = recipe.encode
        self._scorers = [Scorer(recipe.model, MAX_BATCH) for _ in range(scorers)]
        self.batcher = Batcher(self._scorers)
        self.seconds = Histogram()
        self.samples = 0
        self._lock = Lock()

    def warm_up(self, state: State) -> None:
        """Have every kernel compiled and every buffer touched, before anybody waits for it."""
        for number in (False, True):
            self.columns.read(
                {name: _value(name, "INT64" if number else told) for name, told in self.columns.told().items()}
            )
        for size in SIZES:
            samples = self._encode(_nothing(self._specs, size))
            for scorer in self._scorers:
                scorer.score(state, [samples])

    def predict(self, state: State, arrays: Arrays, rows: int) -> Scored:
        """Return the scores of raw rows, read as ``columns``; InvalidArgument names the row and column that is at fault."""
        if rows > self.max_rows:
            raise InvalidArgument(f"a request has {rows} rows; the limit is {self.max_rows}: ask for them in parts")
        if not rows:
            return Scored(np.empty(0, np.float32), 0)
        begun = perf_counter()
        found = self.batcher.score(state, self._encode(arrays))
        with self._lock:
            self.seconds.observe(perf_counter() - begun)
            self.samples += rows
        return found


def _value(name: str, datatype: str) -> Tensor:
    """Return the tensor of one value, made as it is of a request: a 1."""
    data = b"\1\0\0\0" + b"1" if datatype == BYTES else np.ones(1, DATATYPES[datatype][0]).tobytes()
    return from_raw(name, datatype, (1,), data)


def _nothing(columns: Sequence[ColumnSpec], rows: int) -> Arrays:
    """Return rows in which everything is missing, or zero where nothing can be."""
    out: Arrays = {}
    for column in columns:
        if column.kind == "category":
            out[codes_of(column.name)] = np.full(rows, NULL_CATEGORY)
        elif column.kind == "key":
            out[column.name] = np.zeros(rows, np.uint64)
        else:
            empty: NDArray[np.float32] = np.full(rows, np.nan if column.kind == "number" else 0.0, np.float32)
            out[column.name] = empty
    return out
