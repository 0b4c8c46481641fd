# SPDX-License-Identifier: Apache-2.0
"""View: all blocks of a shard as they were at one instant, written as a cut while pushes go on.

    a block that has not changed since the last committed cut    what that wrote still holds
    one that has, and of which it is known what                  an increment: its changed rows, and the keys that left
    any other, or one whose increment would be as large          whole

Invariant: begun under the push lock, so each block's content, marks and seq are of the same groups; what is written of a block is
its content at that instant, whatever was pushed since. A cut follows on the newest one that the coordinator calls committed.
One view at a time: beginning another one lets it go.
"""

import logging
from collections.abc import Mapping
from functools import partial
from threading import Lock
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from oarlock.checkpoint.block_file import BlockImage
from oarlock.checkpoint.chain import should_be_whole
from oarlock.checkpoint.entry import BlockEntry
from oarlock.checkpoint.place import Place
from oarlock.checkpoint.store import NONE_GONE, CheckpointStore
from oarlock.checkpoint.writing import BlockTask, Change, write_blocks
from oarlock.client.layout import Layout
from oarlock.embedding.content import BlockRows
from oarlock.embedding.dense import DenseBlock
from oarlock.embedding.dense_view import DenseView
from oarlock.embedding.descriptor import ROWS, SPILLED_ROWS
from oarlock.embedding.digest import Digest
from oarlock.embedding.expanding_view import ExpandingView
from oarlock.embedding.saved import make_ready
from oarlock.embedding.view import TableView
from oarlock.proto.errors import InvalidArgument
from oarlock.ps.compacting import Compacting
from oarlock.ps.shard import Shard

logger = logging.getLogger(__name__)

# That write a cut while nobody trains. Beside training one does: more cost more of its speed than they save time.
ALONE_THREADS = 3
# Of the one that does: as of those who compute (client/processors.py), so that both come after those who answer pushes.
TRAINING_NICENESS = 5
# Memory for pushes that is kept ready between two blocks.
TRAINING_READY_BYTES = 32 << 20

_NO_KEYS = np.empty(0, np.uint64)


class Written(NamedTuple):
    """A cut that this shard wrote: its entries by number of block."""

    number: int
    entries: dict[int, BlockEntry]


class View:
    """Cut ``number`` of a shard's ``blocks`` int64[m]; ``base``: entries of the committed cut that it follows on."""

    def __init__(self, shard: Shard, number: int, base: Mapping[int, BlockEntry]) -> None:
        self.number = number
        self.blocks: NDArray[np.int64] = np.flatnonzero(shard.owned)
        # What was written, once all of it is: an order that is repeated gets the same answer.
        self.entries: dict[int, BlockEntry] | None = None
        # Of the blocks that are written: about how many bytes are, and will be.
        self.progress: tuple[int, int] | None = None
        # Whether it was torn when it was first asked for, None before: later tears break nothing.
        self.torn: bool | None = None
        # Whether nobody pushes while it is written.
        self._alone = False
        # Bytes of blocks that are not written yet: what pushes may want to save.
        self._left = 0
        # As it was told first: an order that is repeated gets the same answer.
        self.digested: tuple[int, int] | None = None
        self._layout = shard.layout
        self._base = base
        self._marks = shard.marks.copy()
        # A step is a mark of every block that is staged, also of those in which it changed nothing.
        self._stepping_from = shard.staged.first if shard.staged is not None else shard.layout.blocks
        self._dense_sequence = shard.dense_sequence.copy()
        self._block_bytes = [table.nbytes // max(1, len(table.owned)) for table in shard.tables]
        self._rows = [t.descriptors[:, ROWS] + t.descriptors[:, SPILLED_ROWS] for t in shard.tables]
        # A view is read by one thread at a time.
        self._reading = Lock()
        self._tables: list[TableView | ExpandingView] = [table.begin_view(number) for table in shard.tables]
        self._dense: DenseView = shard.dense_group.begin_view(number)
        # Of copies their owners have views.
        for copy in np.flatnonzero(shard.holdings.here & ~shard.owned).tolist():
            self._release(copy)

    def write(self, store: CheckpointStore, *, alone: bool = False) -> dict[int, BlockEntry]:
        """Write all blocks that have changed; return the entries of all by number. ``alone``: nobody trains meanwhile."""
        if self.entries is None:
            self._alone, self._left = alone, sum(map(self._bytes, self.blocks.tolist()))
            changed = []
            for number in self.blocks.tolist():
                if self._stands(number):
                    self._release(number)
                else:
                    changed.append(number)
            tasks = [BlockTask(self._bytes(number), partial(self._change, number)) for number in changed]
            self.progress = (0, sum(task.bytes for task in tasks))
            threads = ALONE_THREADS if alone else 1
            niceness = 0 if alone else TRAINING_NICENESS
            written = write_blocks(store, self.number, tasks, threads=threads, progress=self._told, niceness=niceness)
            entries = {n: self._base[n] for n in self.blocks.tolist() if n in self._base}
            entries.update(zip(changed, written, strict=True))
            self.entries = entries
            self.close()
            logger.info(
                "event=blocks_written cut=%d blocks=%d increments=%d unchanged=%d bytes=%d",
                self.number,
                len(entries),
                sum(1 for e in written if e.base),
                len(entries) - len(written),
                sum(e.bytes + e.waiting_bytes + e.gone_bytes for e in written),
            )
        return self.entries

    def _told(self, done: int, total: int) -> None:
        self.progress = (done, total)

    def digest(self) -> tuple[int, int]:
        """Return the digest of all blocks as they were, and how many rows they have."""
        found, rows = Digest(), 0
        for number in self.blocks.tolist():
            image = self._whole(number)
            rows += len(image.keys)
            if image.kind == "dense":
                found.add_dense(image.name, image.block, image.weights, image.state)
            else:
                content = image.keys, image.weights, image.state, image.counters, image.waiting, image.waited
                found.add_rows(image.name, image.block, *content, image.sketch)
        return found.value, rows

    def _whole(self, number: int) -> BlockImage:
        """Return all of a block."""
        seq, marks = self._sequence_of(number), self._marks_of(number)
        if number >= self._layout.dense_base:
            return _image(self._layout, number, seq, marks, self._dense.content(number - self._layout.dense_base))
        view, block = self._table_of(number)
        with self._reading:
            return _image(self._layout, number, seq, marks, view.content(block))

    def close(self) -> None:
        """Let go what is kept for it."""
        for view in self._tables:
            view.close()
        self._dense.close()

    def _sequence_of(self, number: int) -> int:
        """Return how many operations had changed a block."""
        if number >= self._layout.dense_base:
            return int(self._dense_sequence[number - self._layout.dense_base])
        view, block = self._table_of(number)
        return view.version(block)

    def _stands(self, number: int) -> bool:
        """Whether a block is as the committed cut has it, marks included."""
        before = self._base.get(number)
        return number < self._stepping_from and before is not None and before.seq == self._sequence_of(number)

    def _release(self, number: int) -> None:
        if number >= self._layout.dense_base:
            self._dense.release(number - self._layout.dense_base)
        else:
            view, block = self._table_of(number)
            view.release(block)

    def _table_of(self, number: int) -> tuple[TableView | ExpandingView, int]:
        name, block = self._layout.name(number)
        return self._tables[self._layout.table_index[name]], block

    def _bytes(self, number: int) -> int:
        """Return about how many bytes a block's content is."""
        if number >= self._layout.dense_base:
            return 8 * self._layout.dense_blocks[number - self._layout.dense_base].length
        return self._block_bytes[self._layout.table_index[self._layout.name(number)[0]]]

    def _rows_of(self, number: int) -> int:
        """Return how many rows a table's block had."""
        name, block = self._layout.name(number)
        return int(self._rows[self._layout.table_index[name]][block])

    def _change(self, number: int) -> Change:
        """Return what is to be written of a block."""
        seq, marks, before = self._sequence_of(number), self._marks_of(number), self._base.get(number)
        if number >= self._layout.dense_base:
            content = self._dense.content(number - self._layout.dense_base)
            self._dense.release(number - self._layout.dense_base)
            return Change(_image(self._layout, number, seq, marks, content))
        view, block = self._table_of(number)
        with self._reading:
            changes = view.changes(block) if before is not None else None
            if changes is not None and not should_be_whole(before, len(changes.rows.keys), self._rows_of(number)):
                rows, after, gone = changes.rows, before, changes.gone
            else:
                rows, after, gone = view.content(block), None, NONE_GONE
            view.release(block)
        self._left -= self._bytes(number)
        if not self._alone:
            make_ready(min(self._left, TRAINING_READY_BYTES))
        return Change(_image(self._layout, number, seq, marks, rows), after, gone)

    def _marks_of(self, number: int) -> dict[int, int]:
        return {split: int(of[number]) for split, of in self._marks.items() if of[number] >= 0}


class Views:
    """The view that a shard has open, and what it wrote before. The push lock is held, but for ``write``.

    What ``compacting`` makes of chains is what the next view's increments follow. ``place``: how its checkpoints are opened.
    """

    def __init__(self, shard: Shard, compacting: Compacting, place: Place) -> None:
        self._shard = shard
        self._place = place
        self._compacting = compacting
        self._open: View | None = None
        # Of the newest cut that was written, and of the newest that is known to be committed.
        self._last = self._committed = Written(0, {})

    def begin(self, number: int, committed: int) -> None:
        """Begin the view of cut ``number``; ``committed``: the newest cut that is."""
        shard = self._shard
        if committed and committed == self._last.number:
            for table in shard.tables:
                table.commit_view(committed)
            shard.dense_group.commit_view(committed)
            self._committed = self._last
        self.let_go()
        base = self._committed.entries if self._committed.number == committed else {}
        self._open = View(shard, number, self._compacting.rebased(committed, base))

    def let_go(self) -> None:
        if self._open is not None:
            self._open.close()
            self._open = None

    @property
    def writing(self) -> dict[str, int] | None:
        """Return how far the cut is that is being written here, None if none is."""
        view = self._open
        if view is None or view.entries is not None or view.progress is None:
            return None
        return {"cut": view.number, "written_bytes": view.progress[0], "bytes": view.progress[1]}

    def of(self, number: int) -> View:
        """Return the view of cut ``number``; InvalidArgument if there is none."""
        if self._open is None or self._open.number != number:
            raise InvalidArgument(f"this shard has no view of cut {number}: it was given up", cut=number)
        return self._open

    def write(self, view: View, root: str, *, alone: bool) -> list[BlockEntry]:
        """Write a view into the folder of its cut under ``root``; nothing exists until the manifest is committed."""
        store = self._place.store(root)
        try:
            with self._compacting.writing():
                entries = view.write(store, alone=alone)
        except OSError as error:
            raise InvalidArgument(f"a checkpoint cannot be written to {root}: {error}") from error
        self._last = Written(view.number, entries)
        self._compacting.written(view.number, entries, store)
        return list(entries.values())


def image_of(shard: Shard, number: int) -> BlockImage:
    """Return a block as it is now. The push lock is held."""
    layout = shard.layout
    seq, marks = shard.operations(number), shard.marks.of_block(number)
    if number >= layout.dense_base:
        found = layout.dense_blocks[number - layout.dense_base]
        return _image(layout, number, seq, marks, shard.dense[found.parameter].export_block(found.block))
    name, block = layout.name(number)
    return _image(layout, number, seq, marks, shard.tables[layout.table_index[name]].export_block(block))


def _image(layout: Layout, number: int, seq: int, marks: dict[int, int], content: BlockRows | DenseBlock) -> BlockImage:
    name, block = layout.name(number)
    if isinstance(content, DenseBlock):
        return BlockImage("dense", name, block, seq, marks, _NO_KEYS, content.weights[None], content.state[None])
    return BlockImage("rows", name, block, seq, marks, *content)
