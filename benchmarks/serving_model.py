# SPDX-License-Identifier: Apache-2.0
"""The model of the serving benchmark: a cut with one table of random keys, written as a job would write it.

Invariant: keys and weights are functions of the seed; ``row_values`` of a key is what the table has: any answer can be checked.
"""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from oarlock.checkpoint.block_file import BlockImage
from oarlock.checkpoint.manifest import ClosedSet, Manifest
from oarlock.checkpoint.store import LocalStore
from oarlock.embedding.hashing import blocks_of, table_salt
from oarlock.embedding.spec import OptimizerSpec, TableSpec, to_json

TABLE = "item"
BLOCKS = 64
_MANY = np.uint64(1 << 20)


def row_values(keys: NDArray[np.uint64], dim: int) -> NDArray[np.float32]:
    """Return float32[n, dim]: the weights of keys."""
    first = (keys % _MANY).astype(np.float32)
    return first[:, None] + np.arange(dim, dtype=np.float32)[None, :] / np.float32(dim)


def write_model(folder: Path, rows: int, dim: int, *, seed: int = 0) -> NDArray[np.uint64]:
    """Write cut 1 with ``rows`` rows of row-wise adagrad; return the keys: uint64[rows]."""
    rng = np.random.default_rng(seed)
    keys = np.unique(rng.integers(0, 1 << 63, rows + rows // 1000 + 16, dtype=np.uint64))
    keys = np.sort(rng.choice(keys, rows, replace=False, shuffle=False))
    number = np.empty(rows, np.int32)
    blocks_of(keys, table_salt(TABLE), BLOCKS.bit_length() - 1, number)
    order = np.argsort(number, kind="stable")
    ends = np.searchsorted(number[order], np.arange(BLOCKS + 1))
    store = LocalStore(folder)
    entries = []
    for block in range(BLOCKS):
        mine = keys[order[ends[block] : ends[block + 1]]]
        state = np.ones((len(mine), 1), np.float32)
        image = BlockImage("rows", TABLE, block, 1, {}, mine, row_values(mine, dim), state)
        entries.append(store.write_block(1, image))
    spec = TableSpec(TABLE, dim, OptimizerSpec("rowwise_adagrad"), blocks=BLOCKS)
    manifest = Manifest(
        job="0" * 32,
        run=0,
        cut=1,
        created="2026-01-01T00:00:00Z",
        seed=seed,
        tables=(to_json(spec),),
        dense=(),
        recipe="none:none",
        config={},
        files=(),
        closed=ClosedSet(),
        open_splits=(),
        epoch=0,
        step=1,
        metrics={},
        best={},
        blocks=tuple(entries),
    )
    store.commit(manifest)
    return keys
