# SPDX-License-Identifier: Apache-2.0
"""A recipe for sync jobs whose every gradient hangs on the rows before it and on a draw, and what it comes to, by plain numpy.

Invariant: ``Course`` makes the steps one after the other, in one thread, without shards, messages or kernels; its rows and dense
values after each step are what every block of a simulated job must have, to the bit, whatever was killed. First values are zero.
One event loop.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from oarlock.client.job import JobSpec
from oarlock.data.columns import Arrays
from oarlock.data.order import row_order, split_order
from oarlock.embedding.spec import DenseSpec, Initializer, OptimizerSpec, TableSpec
from oarlock.nn.graph import Lookup
from oarlock.simulation.counting import COLUMNS
from oarlock.worker.recipe import EvaluationBatch, Example, Rates

Values = NDArray[np.float32]

DIM, VALUES = 2, 3
ZEROS = Initializer("zeros")
TABLES = (
    TableSpec("key", DIM, OptimizerSpec("adagrad"), ZEROS, 8),
    TableSpec("wide", 1, OptimizerSpec("sgd"), ZEROS, 4),
)
DENSE = (DenseSpec("bias", (VALUES,), OptimizerSpec("sgd"), ZEROS),)
LOOKUPS = (Lookup("a", "key", DIM), Lookup("b", "key", DIM), Lookup("w", "wide", 1))
EPSILON, INITIAL = np.float32(1e-8), np.float32(0.1)


def rates_at(done: float) -> Rates:
    """Return the rates when the part ``done`` of the job's steps is behind."""
    return Rates(0.5 - done / 4, 0.25 - done / 8)


def keys_of(a: NDArray[Any], b: NDArray[Any]) -> dict[str, NDArray[np.uint64]]:
    """Return the keys of samples by lookup."""
    a, b = a.astype(np.uint64), b.astype(np.uint64)
    return {"a": a, "b": b, "w": (a + b) // np.uint64(2)}


def gradients_of(
    rows: dict[str, tuple[Values, NDArray[np.int32]]], dense: Values, label: Values, draw: int
) -> tuple[float, dict[str, Values], Values]:
    """Return the mean loss of a batch, and its gradients by lookup, and of the dense values.

    ``rows``: by lookup, the rows of distinct keys, and which one each sample has.
    """
    (a, of_a), (b, of_b), (w, of_w) = (rows[name] for name in ("a", "b", "w"))
    n = len(label)
    # Some columns are dropped, by a draw that says which batch it is.
    kept = ((np.arange(n * DIM, dtype=np.int64) * 40503 + draw * 97) >> 3) % 3 != 0
    mask = kept.reshape(n, DIM).astype(np.float32)
    left = (a[of_a] + np.float32(0.5)) * mask
    right = b[of_b] - np.float32(0.25)
    score = (left * right)[:, 0] + (left * right)[:, 1] + w[of_w, 0] + dense[0] + dense[1] * label
    error = (score - label) / np.float32(n)
    out = {name: np.zeros_like(rows[name][0]) for name in rows}
    np.add.at(out["a"], of_a, error[:, None] * right * mask)
    np.add.at(out["b"], of_b, error[:, None] * left)
    np.add.at(out["w"], of_w, error[:, None])
    of_dense: Values = np.zeros(VALUES, np.float32)
    for i in range(n):
        of_dense += np.array([error[i], error[i] * label[i], error[i] * error[i]], np.float32)
    return float((np.float32(n) * error * error).sum()), out, of_dense


class RankedModel:
    parameters = DENSE
    lookups = LOOKUPS

    def bind(self, max_batch: int) -> "RankedProgram":
        return RankedProgram()


class RankedProgram:
    def __init__(self) -> None:
        self.flat_parameters = np.zeros(VALUES, np.float32)
        self.flat_gradients = np.zeros(VALUES, np.float32)
        self.row_gradients: dict[str, Values] = {}

    def train(self, feeds: dict[str, Any], samples: int, *, seed: int, step: int) -> float:
        rows = {name: feeds[name] for name in ("a", "b", "w")}
        loss, found, dense = gradients_of(rows, self.flat_parameters, feeds["label"], seed + step % (1 << 40))
        self.row_gradients = found
        self.flat_gradients[:] = dense
        return loss

    def predict(self, feeds: dict[str, Any], samples: int) -> Values:
        rows, inverse = feeds["a"]
        scores: Values = rows[inverse, 0]
        return scores


class RankedWorkload:
    columns = COLUMNS
    evaluation_columns = COLUMNS

    def __init__(self, spec: JobSpec) -> None:
        self.model: Any = RankedModel()
        self.max_samples = max(spec.batch_rows, spec.evaluation_rows_per_split)

    def start(self) -> None:
        pass

    def samples(self, rows: int) -> int:
        return rows

    def encode(self, rows: Arrays, *, epoch: int, split: int, batch: int) -> Example:
        kept = kept_of(rows["a"], rows["b"])
        a, b = rows["a"][kept], rows["b"][kept]
        return Example(len(a), keys_of(a, b), {"label": label_of(a, b)})

    def rates(self, done: float) -> Rates:
        return rates_at(done)

    def evaluation(self, rows: Arrays) -> Iterator[EvaluationBatch]:
        yield EvaluationBatch(Example(len(rows["a"]), keys_of(rows["a"], rows["b"]), {}), None)

    def sums(self, batch: EvaluationBatch, scores: Values) -> list[float]:
        return [float(len(scores)), float(scores.sum(dtype=np.float64))]


def kept_of(a: NDArray[Any], b: NDArray[Any]) -> NDArray[np.bool_]:
    """Return which rows of a batch are good: not all, so that ranks have different numbers of samples, but the first one is."""
    found: NDArray[np.bool_] = (a.astype(np.int64) * 3 + b.astype(np.int64)) % 4 != 2
    found[0] = True
    return found


def label_of(a: NDArray[Any], b: NDArray[Any]) -> Values:
    found: Values = ((a.astype(np.int64) + b.astype(np.int64)) % 3 == 0).astype(np.float32)
    return found


class RankedRecipe:
    Config = dict

    def plan(self, config: Any, data: Any, *, epochs: int) -> Any:
        raise NotImplementedError

    def workload(self, spec: JobSpec) -> RankedWorkload:
        return RankedWorkload(spec)


recipe = RankedRecipe()


class State:
    """Rows by table and key (weights, state), and dense values."""

    def __init__(self) -> None:
        self.key: dict[int, tuple[Values, Values]] = {}
        self.wide: dict[int, Values] = {}
        self.dense: Values = np.zeros(VALUES, np.float32)

    def weights(self, table: str, keys: NDArray[np.uint64]) -> Values:
        """Return the rows of keys, first values for those that are not there."""
        if table == "key":
            none = (np.zeros(DIM, np.float32), None)
            return np.stack([self.key.get(k, none)[0] for k in keys.tolist()])
        zero = np.zeros(1, np.float32)
        return np.stack([self.wide.get(k, zero) for k in keys.tolist()])


Part = tuple[int, dict[str, dict[int, Values]], Values]


Units = list[tuple[int, int, int] | None]


def steps_of(spec: JobSpec, rows: list[int]) -> tuple[list[int], list[Units]]:
    """Return the steps before each epoch, and of each step each rank's (split, planned split, group), None without data.

    ``rows``: of each planned split.
    """
    before, out = [0], list[Units]()
    for epoch in range(spec.epochs):
        order, of_ranks = split_order(spec.seed, epoch, spec.splits).tolist(), []
        for rank in range(spec.ranks):
            mine = []
            for position in range(rank, spec.splits, spec.ranks):
                groups = spec.groups(rows[order[position]])
                mine += [(epoch * spec.splits + position, order[position], group) for group in range(groups)]
            of_ranks.append(mine)
        steps = max(map(len, of_ranks))
        before.append(before[-1] + steps)
        out += [[mine[step] if step < len(mine) else None for mine in of_ranks] for step in range(steps)]
    return before, out


class Course:
    """All steps of a job in ``plan``: the groups of each split, given as its raw rows, by the words of SEMANTICS section 5."""

    def __init__(self, spec: JobSpec, splits: list[Arrays]) -> None:
        self._spec = spec
        self._splits = splits
        self.state = State()
        self.steps = 0
        self.before, self.of_steps = steps_of(spec, [len(rows["a"]) for rows in splits])
        self.total = len(self.of_steps)

    def _batches(self, rows: int) -> int:
        return -(-rows // self._spec.batch_rows)

    def part(self, split: int, planned: int, group: int) -> Part:
        """Return what a group adds on the present state: its samples, gradients by table and key, and dense ones."""
        spec, rows = self._spec, self._splits[planned]
        size = len(rows["a"])
        order = row_order(spec.seed, split // spec.splits, split, size)
        batches, total, dense, samples = self._batches(size), dict[str, dict[int, Values]](), None, 0
        first = group * spec.accumulate
        chosen = range(first, min(first + spec.accumulate, batches))
        for number in chosen:
            run = order[number * size // batches : (number + 1) * size // batches]
            kept = kept_of(rows["a"][run], rows["b"][run])
            a, b = rows["a"][run][kept], rows["b"][run][kept]
            keys = keys_of(a, b)
            # Distinct keys of the group, as a pull gives them; the order of keys is no part of any sum.
            looked = {}
            for lookup in LOOKUPS:
                distinct, inverse = np.unique(keys[lookup.name], return_inverse=True)
                looked[lookup.name] = (distinct, (self.state.weights(lookup.table, distinct), inverse.astype(np.int32)))
            draw = spec.seed + ((split << 32 | first) + number - first) % (1 << 40)
            feeds = {name: of for name, (_, of) in looked.items()}
            _, found, of_dense = gradients_of(feeds, self.state.dense, label_of(a, b), draw)
            one: dict[str, dict[int, Values]] = {}
            for lookup in LOOKUPS:
                of_table = one.setdefault(lookup.table, {})
                for key, gradient in zip(looked[lookup.name][0].tolist(), found[lookup.name], strict=True):
                    of_table[key] = of_table[key] + gradient if key in of_table else gradient
            for table, of_keys in one.items():
                known = total.setdefault(table, {})
                for key, gradient in of_keys.items():
                    scaled = gradient * np.float32(len(a))
                    known[key] = known[key] + scaled if key in known else scaled
            scaled = of_dense * np.float32(len(a))
            dense = scaled if dense is None else dense + scaled
            samples += len(a)
        assert dense is not None
        return samples, total, dense

    def step(self) -> list[Part | None]:
        """Make the next step; return each rank's part of it."""
        units, rates = self.of_steps[self.steps], rates_at(self.steps / self.total)
        parts = [None if unit is None else self.part(*unit) for unit in units]
        weight = np.float32(sum(part[0] for part in parts if part is not None))
        dense: Values = np.zeros(VALUES, np.float32)
        for table in ("key", "wide"):
            total: dict[int, Values] = {}
            for part in (p for p in parts if p is not None):
                for key, gradient in part[1].get(table, {}).items():
                    total[key] = total[key] + gradient if key in total else np.float32(0) + gradient
            for key, gradient in total.items():
                self._update(table, key, gradient / weight, np.float32(rates.rows))
        for part in (p for p in parts if p is not None):
            dense = dense + part[2]
        self.state.dense = self.state.dense - np.float32(rates.dense) * (dense / weight)
        self.steps += 1
        return parts

    def _update(self, table: str, key: int, g: Values, rate: np.float32) -> None:
        if table == "wide":
            self.state.wide[key] = self.state.wide.get(key, np.zeros(1, np.float32)) - rate * g
            return
        w, acc = self.state.key.get(key, (np.zeros(DIM, np.float32), np.full(DIM, INITIAL, np.float32)))
        acc = acc + g * g
        self.state.key[key] = w - rate * g / (np.sqrt(acc) + EPSILON), acc
