# SPDX-License-Identifier: Apache-2.0
"""View: all blocks of a shard as they were at one instant, which are written while pushes go on.

Invariant: begun under the push lock, so each block's content, marks and seq are of the same groups; what is written of a block is
its content at that instant, whatever was pushed since. One view at a time: beginning another one lets it go.
"""

import logging
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from oarlock.checkpoint.block_file import BlockImage
from oarlock.checkpoint.manifest import BlockEntry
from oarlock.checkpoint.store import LocalStore
from oarlock.client.layout import Layout
from oarlock.embedding.content import BlockRows
from oarlock.embedding.dense import DenseBlock
from oarlock.proto.errors import InvalidArgument
from oarlock.ps.shard import Shard

logger = logging.getLogger(__name__)


@dataclass
class View:
    """Cut ``number`` of a shard: its blocks int64[m], their seqs, marks by split int32[blocks], and contents."""

    number: int
    blocks: NDArray[np.int64]
    sequence: NDArray[np.int64]
    marks: dict[int, NDArray[np.int32]]
    contents: dict[int, BlockRows | DenseBlock]
    # What was written, once all of it is: an order that is repeated gets the same answer.
    entries: list[BlockEntry] | None = None
    # Whether it was torn when it was first asked for, None before: later tears break nothing.
    torn: bool | None = None

    def image(self, shard: Shard, number: int) -> BlockImage:
        """Return a block as it was at the instant."""
        marks = {split: int(of[number]) for split, of in self.marks.items() if of[number] >= 0}
        return _image(shard.layout, number, int(self.sequence[number]), marks, self.contents[number])

    def close(self) -> None:
        """Let go what is kept for it."""
        self.contents = {}


def image_of(shard: Shard, number: int) -> BlockImage:
    """Return a block as it is now. The push lock is held."""
    seq, marks = shard.operations(number), shard.marks.of_block(number)
    return _image(shard.layout, number, seq, marks, _content(shard, number))


def _image(layout: Layout, number: int, seq: int, marks: dict[int, int], content: BlockRows | DenseBlock) -> BlockImage:
    name, local = layout.name(number)
    if isinstance(content, DenseBlock):
        keys = np.empty(0, np.uint64)
        return BlockImage("dense", name, local, seq, marks, keys, content.weights[None], content.state[None])
    return BlockImage("rows", name, local, seq, marks, *content)


def begin_view(shard: Shard, number: int) -> View:
    """Begin the view of cut ``number``. The push lock is held."""
    blocks = np.flatnonzero(shard.owned)
    contents = {n: _content(shard, n) for n in blocks.tolist()}
    return View(number, blocks, shard.sequence, shard.marks.copy(), contents)


def _content(shard: Shard, number: int) -> BlockRows | DenseBlock:
    layout = shard.layout
    if number >= layout.dense_base:
        found = layout.dense_blocks[number - layout.dense_base]
        return shard.dense[found.parameter].export_block(found.block)
    name, local = layout.name(number)
    return shard.tables[layout.table_index[name]].export_block(local)


def write_view(shard: Shard, view: View, root: str) -> list[BlockEntry]:
    """Write all blocks into the folder of the cut under ``root``; nothing exists until the manifest is committed."""
    if view.entries is not None:
        return view.entries
    store = LocalStore(root)
    try:
        entries = [store.write_block(view.number, view.image(shard, n)) for n in view.blocks.tolist()]
    except OSError as error:
        raise InvalidArgument(f"a checkpoint cannot be written to {root}: {error}") from error
    view.entries = entries
    view.close()
    logger.info("event=blocks_written cut=%d blocks=%d", view.number, len(entries))
    return entries
