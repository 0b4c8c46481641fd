# SPDX-License-Identifier: Apache-2.0
"""Warm-up: compile, or load from the cache, every kernel that a shard calls, before it takes part in a job.

Invariant: after it no request compiles anything, because the kernels' types do not depend on a table's spec.
"""

import contextlib
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from oarlock.embedding.changed import changed_rows
from oarlock.embedding.cold_batch import renumber
from oarlock.embedding.compress import Compression, Draw, RowCodec
from oarlock.embedding.compress_residuals import Residuals
from oarlock.embedding.dense import DenseParameter
from oarlock.embedding.dense_group import DenseGroup
from oarlock.embedding.frozen import stored_rows
from oarlock.embedding.keys import KeySorter, merge
from oarlock.embedding.lookup import rows_from, rows_of
from oarlock.embedding.make import make_table
from oarlock.embedding.optimizers import OPTIMIZERS
from oarlock.embedding.pointer import address_of
from oarlock.embedding.policy import Admission, CacheSpec, Eviction, Guard
from oarlock.embedding.spec import DenseSpec, OptimizerSpec, Part, TableSpec
from oarlock.embedding.spill_file import SpillFile
from oarlock.embedding.table import Table
from oarlock.proto.errors import PSError

# Which table a policy is on does not matter to kernels, nor how strict it is: these have each of them once.
_POLICIES: tuple[dict[str, Any], ...] = (
    {"admission": Admission("count", occurrences=3), "dtype": "bfloat16", "cache": CacheSpec(1)},
    {"admission": Admission("sketch", occurrences=3, capacity=100), "dtype": "int8"},
    {"eviction": Eviction(max_bytes=1)},
    {"parts": (Part(1), Part(1)), "eviction": Eviction(age=1), "expand_score": 0.1},
)


def warm_up() -> None:
    """Push, pull, export, import, sweep and explain a few rows under every optimizer and policy."""
    for optimizer in OPTIMIZERS:
        _use(TableSpec("warm_up", 2, OptimizerSpec(optimizer), blocks=2))
        dense = DenseParameter(DenseSpec("warm_up", (4,), OptimizerSpec(optimizer)), seed=0)
        dense.adopt(0)
        dense.push_block(0, np.ones(4, np.float32), rate=0.1)
        dense.pull_block(0, np.empty(4, np.float32))
    group = DenseGroup((DenseSpec("warm_up", (4,)),), seed=0)
    group.parameters[0].adopt(0)
    first = np.zeros(1, np.int64)
    group.push(first, first, np.ones(4, np.float32), rate=0.1)
    group.pull(first, np.empty(4, np.float32))
    for policy in _POLICIES:
        _use(TableSpec("warm_up", 2, blocks=2, **policy))
    # Where no file can be made no table can spill, and one that has to says so when it comes to it.
    with contextlib.suppress(PSError):
        _use(TableSpec("warm_up", 2, blocks=2, memory_bytes=1))
        _move_records()
    _look(np.arange(64, dtype=np.uint64))
    warm_up_compression()


def _use(spec: TableSpec) -> None:
    table = make_table(spec, seed=0)
    try:
        for block in range(spec.blocks):
            table.adopt(block)
        view = table.begin_view(1)
        # New rows; others that make them cold; the first ones again; the others without a pull before, until the first are
        # cold once more.
        for begin, pulled in ((0, True), (200, True), (0, True), (200, False), *[(200, True)] * 3):
            keys = np.arange(begin, begin + 200, dtype=np.uint64)
            found = KeySorter().build(keys, table.salt, table.bits, np.arange(spec.blocks, dtype=np.int32))
            rows = np.empty((len(found.keys), spec.dim), np.float32)
            table.check(found.keys, found.blocks, found.counts, unique=True)
            if pulled and spec.cache is not None:
                table.pull_newer(found.keys, found.blocks, found.counts, np.zeros(len(found.keys), np.uint32), bound=0)
            if pulled:
                table.pull(found.keys, found.blocks, found.counts, rows)
            gradients = np.empty_like(rows)
            # As a shard adds up the parts of a step under sync.
            merge(np.ones((len(keys), spec.dim), np.float32), found.inverse, gradients)
            table.push(found.keys, found.blocks, found.counts, gradients, rate=0.1)
            # As for processes that serve them.
            changed_rows(table, found.keys, found.blocks, found.counts)
            stored_rows(table.spec, rows, np.zeros((len(rows), table.state_columns), np.float32))
            view.content(0)
            table.commit_view(1)
            view = table.begin_view(1)
            view.changes(0)
        for key in (*range(0, 400, 40), 1 << 63):  # some of them are in a file
            table.explain(key)
        table.import_block(0, table.export_block(0))
        table.import_live(0, table.export_live(0))
        swept = table.sweep(1, tick=9)
        table.replay_sweep(0, swept.gone[:0], swept.decayed[:0])
        table.drop(1)
    finally:
        table.close()


def _move_records() -> None:
    """Free records of a spill file, and give one a new number, as a job does after hours only."""
    content = np.zeros((2, 8), np.uint8)
    with SpillFile(Path(tempfile.gettempdir()), 8, limit_bytes=1 << 20, segment_bytes=1 << 16) as file:
        file.free(file.append(address_of(content), 2))
    table = Table(TableSpec("warm_up", 2, blocks=1), seed=0)
    table.adopt(0)
    none: NDArray[np.int64] = np.empty(0, np.int64)
    renumber(table.base, table.salt, table.bits, none.view(np.uint64), none, none, np.empty(0, np.uint8))


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


def warm_up_compression() -> None:
    """Send a row, with what an earlier one left out, and read it; which codec it is of does not matter to kernels."""
    key, row = np.zeros(1, np.uint64), np.ones((1, 2), np.float32)
    codec = RowCodec(Compression("int8", rounding="stochastic"), dim=2)
    out = np.empty(codec.size(1), np.uint8)
    draw = Draw(key, np.uint64(0), 0)
    codec.encode(row, out, draw)
    codec.decode(out, np.empty_like(row))
    residuals = Residuals(codec, max_bytes=1 << 10)
    residuals.encode(key, row, out, draw)
    residuals.drain()
    # How long such a row is only a kernel knows.
    RowCodec(Compression("topk", k=1), dim=2)
