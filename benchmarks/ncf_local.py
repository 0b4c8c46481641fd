# SPDX-License-Identifier: Apache-2.0
"""NCF on one thread without a cluster: the recipe's batches, the program and the tables, called one after the other.

What a worker and a shard compute together, without client, messages, threads or waiting: the bound that the rest is measured
against. Invariant: the same kernels, batches and parameters as in a job. One thread.
"""

import time
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from oarlock.client.job import JobSpec
from oarlock.client.layout import Layout
from oarlock.data.columns import Arrays
from oarlock.data.files import files_from_json
from oarlock.data.reader import open_reader
from oarlock.data.splits import SplitPlan, locate, plan_splits
from oarlock.embedding.dense import DenseParameter
from oarlock.embedding.keys import KeySorter
from oarlock.embedding.table import Table
from oarlock.worker.recipe import load_recipe
from oarlock.worker.splits import OpenSplit, read_split

PARTS = ("encode", "dedup", "pull", "compute", "push")
SPLITS_READ = 8


class LocalNcf:
    """``start()``, then ``run(batches)`` again and again; the batches of a few splits go round."""

    def __init__(self, spec: JobSpec) -> None:
        self._spec = spec
        self._workload = load_recipe(spec.recipe).workload(spec)
        self._layout = Layout(spec.tables, spec.dense)
        self._tables = {t.name: Table(t, seed=spec.seed) for t in spec.tables}
        self._dense = [DenseParameter(d, seed=spec.seed) for d in spec.dense]
        self._sorter = KeySorter()
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self.batches = 0

    def start(self) -> None:
        """Load the data and create the parameters."""
        self._workload.start()
        self._program = self._workload.model.bind(self._workload.max_samples)
        for table in self._tables.values():
            for block in range(table.spec.blocks):
                table.adopt(block)
        for slice_ in self._layout.dense_blocks:
            self._dense[slice_.parameter].adopt(slice_.block)
        self._ranks = {t.name: np.arange(t.blocks, dtype=np.int32) for t in self._spec.tables}
        splits = plan_splits(files_from_json(list(self._spec.files)), self._spec.rows_per_split)
        self._splits = [self._read(s, splits) for s in range(min(SPLITS_READ, len(splits)))]
        self._forever = self._batches()

    def _read(self, split: int, plans: tuple[SplitPlan, ...]) -> OpenSplit:
        epoch, plan = locate(split, plans, self._spec.seed)
        reader = open_reader(self._spec.reader)
        rows = read_split(reader, plan, list(self._workload.columns), seed=self._spec.seed, epoch=epoch, split=split)
        return OpenSplit(split, epoch, rows, plan.rows, self._spec.batch_rows)

    def _batches(self) -> Iterator[tuple[Arrays, int, int]]:
        while True:
            for split in self._splits:
                yield from ((split.batch(g), split.id, g) for g in range(split.groups))

    def run(self, batches: int) -> int:
        """Train ``batches`` batches; return their samples."""
        clock = time.perf_counter
        seconds = self.seconds
        samples = 0
        rates = self._workload.rates(0.0)
        program = self._program
        lookups = self._workload.model.lookups
        for _ in range(batches):
            raw, split, group = next(self._forever)
            t0 = clock()
            example = self._workload.encode(raw, epoch=0, split=split, batch=group)
            t1 = clock()
            keys = {
                name: self._sorter.build(example.keys[name], table.salt, table.bits, self._ranks[name])
                for name, table in self._tables.items()
            }
            t2 = clock()
            rows: dict[str, NDArray[np.float32]] = {}
            for name, table in self._tables.items():
                found = keys[name]
                rows[name] = np.empty((len(found.keys), table.spec.dim), np.float32)
                table.pull(found.keys, found.blocks, found.counts, rows[name])
            for block in self._layout.dense_blocks:
                out = program.flat_parameters[block.offset : block.offset + block.length]
                self._dense[block.parameter].pull_block(block.block, out)
            t3 = clock()
            feeds = {**example.feeds, **{k.name: (rows[k.table], keys[k.table].inverse) for k in lookups}}
            program.train(feeds, example.samples)
            t4 = clock()
            for k in lookups:
                found = keys[k.table]
                gradients = program.row_gradients[k.name]
                self._tables[k.table].push(found.keys, found.blocks, found.counts, gradients, rate=rates.rows)
            for block in self._layout.dense_blocks:
                gradient = program.flat_gradients[block.offset : block.offset + block.length]
                self._dense[block.parameter].push_block(block.block, gradient, rate=rates.dense)
            t5 = clock()
            for part, spent in zip(PARTS, (t1 - t0, t2 - t1, t3 - t2, t4 - t3, t5 - t4), strict=True):
                seconds[part] += spent
            samples += example.samples
        self.batches += batches
        return samples

    def forget_times(self) -> None:
        """Begin to count anew, after a warm-up."""
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self.batches = 0

    def parts(self) -> dict[str, float]:
        """Return the mean microseconds per batch of each part."""
        return {part: round(spent / self.batches * 1e6, 1) for part, spent in self.seconds.items()}
