# SPDX-License-Identifier: Apache-2.0
"""Warm-up: compile, or load from the cache, every kernel that a shard calls, before it takes part in a job.

Invariant: after it no request compiles anything, because the kernels' types do not depend on a table's spec.
"""

import numpy as np
from numpy.typing import NDArray

from oarlock.embedding.dense import DenseParameter
from oarlock.embedding.keys import KeySorter
from oarlock.embedding.lookup import rows_from, rows_of
from oarlock.embedding.make import AnyTable, make_table
from oarlock.embedding.optimizers import OPTIMIZERS
from oarlock.embedding.policy import Guard
from oarlock.embedding.spec import INITIALIZERS, DenseSpec, Eviction, Initializer, OptimizerSpec, Part, TableSpec


def warm_up() -> None:
    """Push, pull, export and import a few rows under every optimizer and initializer, and rows that expand and leave."""
    for optimizer in OPTIMIZERS:
        for kind in INITIALIZERS:
            initializer = Initializer(kind)
            _use(make_table(TableSpec("warm_up", 2, OptimizerSpec(optimizer), initializer, blocks=2), seed=0))
            dense = DenseParameter(DenseSpec("warm_up", (4,), OptimizerSpec(optimizer), initializer), seed=0)
            dense.adopt(0)
            dense.push_block(0, np.ones(4, np.float32), rate=0.1)
            dense.pull_block(0, np.empty(4, np.float32))
    parts = (Part(1), Part(1))
    _use(make_table(TableSpec("warm_up", 2, parts=parts, blocks=2, eviction=Eviction(age=1), expand_score=0.1), seed=0))
    _look(np.arange(64, dtype=np.uint64))


def _use(table: AnyTable) -> None:
    table.adopt(0)
    table.adopt(1)
    found = KeySorter().build(np.arange(64, dtype=np.uint64), table.salt, table.bits, np.arange(2, dtype=np.int32))
    rows = np.empty((len(found.keys), 2), np.float32)
    table.check(found.keys, found.blocks, found.counts, unique=True)
    table.push(found.keys, found.blocks, found.counts, np.ones_like(rows), rate=0.1)
    table.pull(found.keys, found.blocks, found.counts, rows)
    content = table.export_block(0)
    table.import_block(0, content)
    table.sweep(0, tick=9)


def _look(keys: NDArray[np.uint64]) -> None:
    """Ask for rows as people's tools do; they ask in the middle of a job, where compiling would cost the lease."""
    table = make_table(TableSpec("warm_up", 2, blocks=1, guard=Guard(undo=1)), seed=0)
    table.adopt(0)
    whole = np.array([[0], [len(keys)]], np.int32)
    table.push(keys, whole[0], whole[1], np.ones((len(keys), 2), np.float32), rate=0.1)
    table.explain(0)
    table.explain(1 << 63)
    rows_of(table, 0, keys)
    rows_from(table, 0, 0, 1)
    table.undo(keys)
