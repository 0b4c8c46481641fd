# SPDX-License-Identifier: Apache-2.0
"""A recipe for hybrid jobs that counts in its rows, as counting.py does, and whose dense gradients hang on the dense values
before them and on draws; and what its dense values come to, by plain numpy.

Invariant: ``DenseCourse`` makes the steps one after the other, in one thread, without shards, messages or kernels; its values
after each step are what every dense block of a simulated job must have, to the bit, since no row enters them. One event loop.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from oarlock.client.job import JobSpec
from oarlock.data.columns import Arrays
from oarlock.data.order import row_order
from oarlock.embedding.spec import DenseSpec, TableSpec
from oarlock.simulation.counting import RATE, SGD, ZEROS, CountingModel, CountingProgram, CountingWorkload
from oarlock.simulation.ranked import Values, label_of, steps_of
from oarlock.worker.recipe import Example

CHAIN = 3
DRAWS = 1 << 40


def dense_of(counting: tuple[DenseSpec, ...]) -> tuple[DenseSpec, ...]:
    """Return the dense parameters: those that count, and those whose gradients hang on their values."""
    return (*counting[:2], DenseSpec("chain", (CHAIN,), SGD, ZEROS))


def chain_gradient(values: Values, label: Values, draw: int) -> Values:
    """Return the gradient of a batch's mean loss by the last dense parameter: float32[CHAIN]."""
    n = len(label)
    drawn = (((np.arange(n, dtype=np.int64) * 40503 + draw * 97) >> 3) % 5).astype(np.float32) / np.float32(4)
    error = (values[0] + values[1] * label + values[2] * drawn - label) / np.float32(n)
    out: Values = np.zeros(CHAIN, np.float32)
    for i in range(n):
        out += np.array([error[i], error[i] * label[i], error[i] * drawn[i]], np.float32)
    return out


class MixedModel(CountingModel):
    def __init__(self, tables: tuple[TableSpec, ...], dense: tuple[DenseSpec, ...]) -> None:
        super().__init__(tables, dense[:2])
        self.parameters = dense

    def bind(self, max_batch: int) -> "MixedProgram":
        return MixedProgram(self)


class MixedProgram(CountingProgram):
    def train(self, feeds: dict[str, Any], samples: int, *, seed: int, step: int) -> float:
        loss = super().train(feeds, samples, seed=seed, step=step)
        values = self.flat_parameters[-CHAIN:]
        self.flat_gradients[-CHAIN:] = chain_gradient(values, feeds["label"], seed + step % DRAWS)
        return loss


class MixedWorkload(CountingWorkload):
    def __init__(self, spec: JobSpec) -> None:
        super().__init__(spec)
        self.model = MixedModel(spec.tables, spec.dense)

    def encode(self, rows: Arrays, *, epoch: int, split: int, batch: int) -> Example:
        found = super().encode(rows, epoch=epoch, split=split, batch=batch)
        found.feeds["label"] = label_of(rows["a"], rows["b"])
        return found


class MixedRecipe:
    Config = dict

    def plan(self, config: Any, data: Any, *, epochs: int) -> Any:
        raise NotImplementedError

    def workload(self, spec: JobSpec) -> MixedWorkload:
        return MixedWorkload(spec)


recipe = MixedRecipe()


class DenseCourse:
    """Dense values float32[P] after each step of a job; ``splits``: the raw rows of each planned one."""

    def __init__(self, spec: JobSpec, splits: list[Arrays]) -> None:
        self._spec = spec
        self._splits = splits
        self.before, self.of_steps = steps_of(spec, [len(rows["a"]) for rows in splits])
        self.total = len(self.of_steps)
        self._per_split = spec.dense[1].size // (spec.splits * spec.epochs)
        self.values: list[Values] = [np.zeros(sum(d.size for d in spec.dense), np.float32)]
        for units in self.of_steps:
            self.values.append(self._step(units, self.values[-1]))

    def _step(self, units: list[tuple[int, int, int] | None], values: Values) -> Values:
        total, samples = np.zeros_like(values), 0
        for unit in units:
            if unit is not None:
                part, n = self._part(*unit, values)
                total += part
                samples += n
        total /= np.float32(samples)
        after: Values = values - np.float32(RATE) * total
        return after

    def _part(self, split: int, planned: int, group: int, values: Values) -> tuple[Values, int]:
        """Return what a group adds, and its samples."""
        spec, rows = self._spec, self._splits[planned]
        size = len(rows["a"])
        batches = -(-size // spec.batch_rows)
        order: NDArray[Any] = row_order(spec.seed, split // spec.splits, split, size)
        first, samples, out = group * spec.accumulate, 0, np.zeros_like(values)
        for number in range(first, min(first + spec.accumulate, batches)):
            run = order[number * size // batches : (number + 1) * size // batches]
            found = np.zeros_like(values)
            found[0] = found[1 + split * self._per_split + number] = -1 / RATE
            draw = spec.seed + (split << 32 | number) % DRAWS
            found[-CHAIN:] = chain_gradient(values[-CHAIN:], label_of(rows["a"][run], rows["b"][run]), draw)
            out += found * np.float32(len(run))
            samples += len(run)
        return out, samples
