# SPDX-License-Identifier: Apache-2.0
"""A model whose every row says of which cut it is. Loaded by conftest under the name ``serving_rig``."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from oarlock.checkpoint.block_file import BlockImage
from oarlock.checkpoint.entry import BlockEntry
from oarlock.checkpoint.manifest import ClosedSet, Manifest
from oarlock.checkpoint.store import open_store
from oarlock.embedding.hashing import blocks_of, table_salt
from oarlock.embedding.spec import DenseSpec, Initializer, OptimizerSpec, TableSpec, to_json
from oarlock.serving.swap import Serving

JOB = "0123456789abcdef0123456789abcdef"
SEED = 42
SPECS = (
    TableSpec("user", 4, OptimizerSpec("adagrad"), Initializer("normal", 0.0, 0.1), blocks=4),
    TableSpec("item", 16, blocks=2, absent="zeros"),
)
ROWS = 200
CREATED = "2026-01-31T12:00:00Z"


def value_of(cut: int, keys: NDArray[np.uint64]) -> NDArray[np.float32]:
    """What the first weight of each key is at a cut."""
    return (1000 * cut + (keys % np.uint64(1000))).astype(np.float32)


class Model:
    """Cuts of one job in ``folder``; ``dense``: whose values say of which cut they are, in place of a bias of zeros."""

    def __init__(
        self,
        folder: Path | str,
        *,
        specs: tuple[TableSpec, ...] = SPECS,
        dense: tuple[DenseSpec, ...] = (),
        job: str = JOB,
        **options: Any,
    ) -> None:
        self.folder = folder
        self.specs = specs
        self.dense = dense or (DenseSpec("bias", (2,), OptimizerSpec("sgd")),)
        self.first = 1.0 if dense else 0.0
        self.job = job
        self.store = open_store(folder, **options)
        self.keys = np.arange(7, 7 + ROWS, dtype=np.uint64)

    def cut(self, number: int, *, run: int = 0, same: Manifest | None = None) -> Manifest:
        """Commit a cut; ``same``: the user table's blocks are those of that cut, unchanged."""
        entries = []
        for spec in self.specs:
            if same is not None and spec.name == "user":
                entries += [entry for entry in same.blocks if entry.name == "user"]
            else:
                entries += [self.store.write_block(number, image) for image in self.images(spec, number)]
        none = np.empty((1, 0), np.float32)
        for spec in self.dense:
            for block in range(spec.blocks):
                length = min(spec.slice, spec.size - block * spec.slice)
                values = np.full((1, length), self.first * number, np.float32)
                image = BlockImage("dense", spec.name, block, number, {}, np.empty(0, np.uint64), values, none)
                entries.append(self.store.write_block(number, image))
        return self.commit(number, entries, run)

    def images(self, spec: TableSpec, cut: int) -> list[BlockImage]:
        number = np.empty(len(self.keys), np.int32)
        blocks_of(self.keys, table_salt(spec.name), spec.blocks.bit_length() - 1, number)
        out = []
        for block in range(spec.blocks):
            keys = self.keys[number == block]
            weights = np.repeat(value_of(cut, keys)[:, None], spec.dim, axis=1)
            out.append(
                BlockImage("rows", spec.name, block, cut, {}, keys, weights, np.zeros((len(keys), 4), np.float32))
            )
        return out

    def commit(self, number: int, entries: list[BlockEntry], run: int = 0) -> Manifest:
        manifest = Manifest(
            job=self.job,
            run=run,
            cut=number,
            created=CREATED,
            seed=SEED,
            tables=tuple(to_json(spec) for spec in self.specs),
            dense=tuple(to_json(spec) for spec in self.dense),
            recipe="none:none",
            config={},
            files=(),
            closed=ClosedSet(),
            open_splits=(),
            epoch=0,
            step=number,
            metrics={},
            best={},
            blocks=tuple(entries),
        )
        self.store.commit(manifest)
        return manifest


def loaded(store: Any) -> Serving:
    """Return what serves the newest cut of a store."""
    serving = Serving(store)
    serving.load()
    return serving


def served(kind: Callable[..., Any], store: Any, predictor: Any = None) -> Iterator[Any]:
    """Yield a server of the class ``kind`` that serves the newest cut of a store; it is closed then. For fixtures."""
    with contextlib.closing(kind(loaded(store), predictor)) as made:
        yield made


def check_under_swaps(serving: Serving, model: Model, last: int, ask: Callable[[], tuple[int, Any, Any]]) -> None:
    """Have three threads ask while cuts 2 to ``last`` take their place; ``ask`` returns an answer's cut, keys and rows."""
    over = threading.Event()
    cuts: set[int] = set()
    wrong: list[int] = []

    def ask_on() -> None:
        while True:
            at_end = over.is_set()
            cut, keys, rows = ask()
            cuts.add(cut)
            if (rows != value_of(cut, keys)[:, None]).any():
                wrong.append(cut)
            if at_end:
                return

    threads = [threading.Thread(target=ask_on) for _ in range(3)]
    for thread in threads:
        thread.start()
    for cut in range(2, last + 1):
        model.cut(cut)
        serving.look()
    over.set()
    for thread in threads:
        thread.join()
    assert not wrong
    # Each asks once after the last swap.
    assert last in cuts
