# SPDX-License-Identifier: Apache-2.0
"""Blocks that come and go: made with first values, of a warm start, or of what a checkpoint has of them.

Invariant: all that an order wants made is made, or nothing. The push lock is held throughout.
"""

from collections.abc import Callable, Mapping
from typing import Any

from oarlock.checkpoint.block_file import BlockImage
from oarlock.checkpoint.manifest import Manifest
from oarlock.checkpoint.store import CheckpointStore, open_checkpoint
from oarlock.checkpoint.writing import read_blocks
from oarlock.client.layout import Layout
from oarlock.embedding.content import BlockRows
from oarlock.embedding.dense import DenseBlock as DenseContent
from oarlock.embedding.spec import DenseSpec, TableSpec
from oarlock.embedding.store import keeps
from oarlock.proto.errors import InvalidArgument, SpecMismatch
from oarlock.ps.shard import Shard
from oarlock.ps.warm import warm_up


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


def create_all(shard: Shard, numbers: list[int], restore: str, options: Mapping[str, Any] | None) -> None:
    """Create the blocks, all or none of them; from the checkpoint ``restore``, if there is one.

    ``options``: of its file system.
    """
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
            drop(shard, number)
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


def drop(shard: Shard, number: int) -> None:
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
