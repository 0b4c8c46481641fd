# SPDX-License-Identifier: Apache-2.0
"""Blocks that come and go: adopted by a placement, loaded from a checkpoint, written into one.

Invariant: a block is owned only after its content is whole; a checkpoint's entry names content, marks and seq of one instant.
Orders come from the coordinator, one at a time; the push lock is held throughout.
"""

import logging

import numpy as np

from oarlock.checkpoint.block_file import BlockImage
from oarlock.checkpoint.manifest import BlockEntry, Manifest
from oarlock.checkpoint.store import LocalStore, open_checkpoint
from oarlock.client.closed import ClosedSet
from oarlock.client.router import Routes
from oarlock.embedding.block import BlockRows
from oarlock.embedding.dense import DenseBlock as DenseContent
from oarlock.proto.errors import InvalidArgument
from oarlock.ps.shard import Shard

logger = logging.getLogger(__name__)


def adopt(shard: Shard, me: int, routes: Routes, closed: ClosedSet, restore: str) -> None:
    """Own what ``routes`` gives shard ``me``; new blocks come from the checkpoint ``restore``, or start at first values."""
    with shard.push_lock:
        if routes.generation < shard.generation:
            raise InvalidArgument(f"generation {routes.generation} is older than this shard's {shard.generation}")
        if routes.generation == shard.generation:
            return
        wanted = routes.owners == me
        images = None
        if restore:
            images = _Images(*open_checkpoint(restore))
            # A restore replaces the closed set: splits closed in the abandoned history are open again.
            shard.closed = closed
        shard.closed.merge(closed)
        for number in np.flatnonzero(wanted & ~shard.owned).tolist():
            _create(shard, number, images.load(*shard.layout.name(number)) if images else None)
        for number in np.flatnonzero(shard.owned & ~wanted).tolist():
            _drop(shard, number)
        shard.owned = wanted
        shard.generation = routes.generation
    logger.info(
        "event=adopted generation=%d blocks=%d rows=%d",
        routes.generation,
        int(wanted.sum()),
        sum(t.rows for t in shard.tables),
    )


class _Images:
    """The block images of one checkpoint, by name."""

    def __init__(self, store: LocalStore, manifest: Manifest) -> None:
        self._store = store
        self._manifest = manifest
        self._entries = {(e.name, e.block): e for e in manifest.blocks}

    def load(self, name: str, block: int) -> BlockImage:
        return self._store.load_block(self._manifest, self._entries[name, block])


def _create(shard: Shard, number: int, image: BlockImage | None) -> None:
    layout = shard.layout
    if number >= layout.dense_base:
        found = layout.dense_blocks[number - layout.dense_base]
        parameter = shard.dense[found.parameter]
        parameter.adopt(found.block)
        if image is not None:
            parameter.import_block(found.block, DenseContent(image.weights[0], image.state[0]))
    else:
        name, local = layout.name(number)
        table = shard.tables[layout.table_index[name]]
        table.adopt(local)
        if image is not None:
            table.import_block(local, BlockRows(image.keys, image.weights, image.state))
    if image is not None:
        shard.marks.restore(number, dict(image.marks))
        shard.sequence[number] = image.seq


def _drop(shard: Shard, number: int) -> None:
    layout = shard.layout
    shard.marks.drop_block(number)
    shard.sequence[number] = 0
    if number >= layout.dense_base:
        found = layout.dense_blocks[number - layout.dense_base]
        shard.dense[found.parameter].drop(found.block)
    else:
        name, local = layout.name(number)
        shard.tables[layout.table_index[name]].drop(local)


def write(shard: Shard, cut: int, root: str) -> list[BlockEntry]:
    """Write all owned blocks into the folder of ``cut`` under ``root``; nothing exists until the manifest is committed."""
    store = LocalStore(root)
    with shard.push_lock:
        numbers = np.flatnonzero(shard.owned).tolist()
        entries = [store.write_block(cut, _image(shard, n)) for n in numbers]
    logger.info("event=blocks_written cut=%d blocks=%d", cut, len(entries))
    return entries


def _image(shard: Shard, number: int) -> BlockImage:
    layout = shard.layout
    name, local = layout.name(number)
    seq, marks = int(shard.sequence[number]), shard.marks.of_block(number)
    if number >= layout.dense_base:
        found = layout.dense_blocks[number - layout.dense_base]
        content = shard.dense[found.parameter].export_block(found.block)
        keys = np.empty(0, np.uint64)
        return BlockImage("dense", name, local, seq, marks, keys, content.weights[None], content.state[None])
    rows = shard.tables[layout.table_index[name]].export_block(local)
    return BlockImage("rows", name, local, seq, marks, rows.keys, rows.weights, rows.state)
