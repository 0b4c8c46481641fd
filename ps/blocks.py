# SPDX-License-Identifier: Apache-2.0
"""Blocks that come and go: adopted by a placement, loaded from a checkpoint.

Invariant: a block is owned only after its content is whole, and an order that fails leaves the shard as it was, ready for the
same order again. Orders come from the coordinator, any thread; the push lock is held throughout.
"""

import logging
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from oarlock.checkpoint.block_file import BlockImage
from oarlock.checkpoint.manifest import Manifest
from oarlock.checkpoint.store import CheckpointStore, open_checkpoint
from oarlock.checkpoint.writing import read_blocks
from oarlock.client.closed import ClosedSet
from oarlock.client.layout import Layout
from oarlock.client.router import Routes
from oarlock.embedding.content import BlockRows
from oarlock.embedding.dense import DenseBlock as DenseContent
from oarlock.embedding.spec import DenseSpec, TableSpec
from oarlock.embedding.store import keeps
from oarlock.proto.errors import InvalidArgument, SpecMismatch
from oarlock.ps.shard import Shard
from oarlock.ps.warm import warm_up

logger = logging.getLogger(__name__)


def adopt(
    shard: Shard, me: int, routes: Routes, closed: ClosedSet, restore: str, *, options: Mapping[str, Any] | None = None
) -> None:
    """Own what ``routes`` gives shard ``me``; new blocks come from the checkpoint ``restore``.

    Without one they begin with what the job's warm start takes over, or with first values.
    ``options``: of the checkpoint's file system.
    """
    with shard.push_lock:
        if routes.generation < shard.generation:
            raise InvalidArgument(f"generation {routes.generation} is older than this shard's {shard.generation}")
        if routes.generation == shard.generation:
            return
        wanted = routes.owners == me
        _create_all(shard, np.flatnonzero(wanted & ~shard.owned).tolist(), restore, options)
        for number in np.flatnonzero(shard.owned & ~wanted).tolist():
            _drop(shard, number)
        if restore:
            # A restore replaces the closed set: splits closed in the abandoned history are open again.
            shard.closed = ClosedSet()
        shard.closed.merge(closed)
        shard.marks.drop_closed(shard.closed)
        shard.owned = wanted
        shard.generation = routes.generation
    logger.info(
        "event=adopted generation=%d blocks=%d rows=%d",
        routes.generation,
        int(wanted.sum()),
        sum(t.rows for t in shard.tables),
    )


class Images:
    """The block images of one checkpoint."""

    def __init__(self, store: CheckpointStore, manifest: Manifest) -> None:
        self._store = store
        self._manifest = manifest

    def check(self, layout: Layout) -> None:
        """Raise SpecMismatch unless the checkpoint's blocks fit into this job's tables and dense parameters."""
        saved: dict[str, TableSpec | DenseSpec] = {**self._manifest.table_specs(), **self._manifest.dense_specs()}
        wanted_specs: list[TableSpec | DenseSpec] = [*layout.tables, *layout.dense]
        for spec in wanted_specs:
            found, wanted = saved.get(spec.name), form_of(spec)
            if found is None or form_of(found) != wanted:
                raise SpecMismatch(
                    f"{spec.name}: the checkpoint has {form_of(found) if found else 'nothing of that name'}, this job wants "
                    f"{wanted}: restore it into a job with the same tables and dense parameters",
                    table=spec.name,
                )

    def load(self, layout: Layout, numbers: list[int], use: Callable[[int, BlockImage], None]) -> None:
        """Give the images of blocks to ``use``, several at a time; each is let go after that."""
        wanted = {("dense" if n >= layout.dense_base else "rows", *layout.name(n)): n for n in numbers}
        entries = [e for e in self._manifest.blocks if (e.kind, e.name, e.block) in wanted]
        read_blocks(
            self._store,
            self._manifest,
            entries,
            lambda entry, image: use(wanted[entry.kind, entry.name, entry.block], image),
        )


def form_of(spec: TableSpec | DenseSpec) -> str:
    """Return what a block's content depends on; an optimizer's constants and a policy's thresholds may change."""
    if isinstance(spec, DenseSpec):
        return f"a dense parameter of shape {spec.shape} in blocks of {spec.slice} under {spec.optimizer.name}"
    parts = " and ".join(f"{part.width} under {part.optimizer.name}" for part in spec.parts)
    said = [f"a table of dim {spec.dim} in {spec.blocks} blocks" + ("" if parts else f" under {spec.optimizer.name}")]
    if parts:
        said.append(f"in parts of {parts}")
    if spec.dtype != "float32":
        said.append(f"stored as {spec.dtype}")
    kept = keeps(spec)
    counters = (
        (kept.occurrences, "occurrences"),
        (kept.updated, "steps of last updates"),
        (kept.score, "shows and clicks"),
        (kept.version, "versions of rows"),
    )
    names = ", ".join(name for wanted, name in counters if wanted)
    if names:
        said.append(f"keeping {names}")
    if spec.expand_score:
        said.append("whose rows expand")
    admission = spec.admission
    if admission.kind == "count":
        said.append("that counts the keys it does not admit")
    if admission.kind == "sketch":
        said.append(
            f"that sketches the keys it does not admit, {admission.capacity} in each of {admission.windows} windows"
        )
    return ", ".join(said)


def _create_all(shard: Shard, numbers: list[int], restore: str, options: Mapping[str, Any] | None) -> None:
    """Create the blocks, all or none of them."""
    if not numbers:
        # What the run began from may be collected by now.
        return
    layout = shard.layout
    created: list[int] = []
    try:
        for number in numbers:
            _create(shard, number)
            created.append(number)
        if restore:
            images = Images(*open_checkpoint(restore, options=options))
            images.check(layout)
            marks: dict[int, dict[int, int]] = {}

            def use(number: int, image: BlockImage) -> None:
                _fill(shard, number, image)
                marks[number] = dict(image.marks)

            images.load(layout, numbers, use)
            # By one thread: splits that several blocks have marks of share an array.
            for number, of in marks.items():
                shard.marks.restore(number, of)
        elif shard.warm_start:
            warm_up(shard, numbers, shard.warm_start, shard.seed)
    except BaseException as error:
        for number in created:
            _drop(shard, number)
        if isinstance(error, OSError):
            raise InvalidArgument(
                f"the checkpoint {restore or shard.warm_start.path} cannot be read: {error}"
            ) from error
        raise


def _create(shard: Shard, number: int) -> None:
    layout = shard.layout
    if number >= layout.dense_base:
        found = layout.dense_blocks[number - layout.dense_base]
        shard.dense[found.parameter].adopt(found.block)
    else:
        name, local = layout.name(number)
        shard.tables[layout.table_index[name]].adopt(local)


def _fill(shard: Shard, number: int, image: BlockImage) -> None:
    layout = shard.layout
    if number >= layout.dense_base:
        found = layout.dense_blocks[number - layout.dense_base]
        content = DenseContent(image.weights[0], image.state[0])
        shard.dense[found.parameter].import_block(found.block, content)
        shard.dense_sequence[number - layout.dense_base] = image.seq
    else:
        name, local = layout.name(number)
        rows = BlockRows(
            image.keys,
            image.weights,
            image.state,
            image.counters,
            image.waiting,
            image.waited,
            image.sketch,
        )
        shard.tables[layout.table_index[name]].import_block(local, rows, version=image.seq)


def _drop(shard: Shard, number: int) -> None:
    layout = shard.layout
    if shard.staged is not None:
        shard.staged.drop(number)
    shard.marks.drop_block(number)
    if number >= layout.dense_base:
        shard.dense_sequence[number - layout.dense_base] = 0
        found = layout.dense_blocks[number - layout.dense_base]
        shard.dense[found.parameter].drop(found.block)
    else:
        name, local = layout.name(number)
        shard.tables[layout.table_index[name]].drop(local)
