# SPDX-License-Identifier: Apache-2.0
"""Replace: a table's blocks get the content that they have in a checkpoint, in the midst of training.

    read     the blocks' rows are read and checked, beside training; memory holds them twice
    apply    all gates are shut: they take the place of what is there, in every block one operation more

Invariant: marks and the closed set stay as they are, so a group that was applied before is not applied again, and one that comes
after is applied once. Done once per number: the same order again gets the same answer, and an order that failed may be given
again. Orders come from the coordinator, any thread; the push lock is held while content changes.
"""

import difflib
import logging
from collections.abc import Collection
from threading import Lock
from typing import NamedTuple

import numpy as np

from oarlock.checkpoint.block_file import BlockImage
from oarlock.checkpoint.store import open_checkpoint
from oarlock.embedding.content import BlockRows
from oarlock.proto.errors import InvalidArgument, NotFound, SpecMismatch
from oarlock.ps.blocks import Images, form_of
from oarlock.ps.images import image_of
from oarlock.ps.shard import Shard

logger = logging.getLogger(__name__)


class Order(NamedTuple):
    """Take up the rows of ``table`` in ``path`` at gate ``number``, where ``workers`` stand; placement ``generation`` follows."""

    table: str
    path: str
    number: int
    workers: Collection[int]
    generation: int


class Replacing:
    """What was read for ``shard``, and which order was carried out last."""

    def __init__(self, shard: Shard) -> None:
        self._shard = shard
        self._reading = Lock()
        self._read: tuple[str, str, dict[int, BlockRows]] | None = None
        self._done: tuple[int, int] = (0, 0)

    def read(self, table: str, path: str) -> int:
        """Read and check the rows of the blocks that are here; return how many there are."""
        shard = self._shard
        refuse_steps(shard)
        layout = shard.layout
        if table not in layout.table_index:
            near = difflib.get_close_matches(table, layout.table_index, 1, 0.5)
            hint = f"; did you mean {near[0]!r}?" if near else "."
            raise NotFound(f"the job has no table {table[:80]!r}{hint} There are: {', '.join(layout.table_index)}")
        with self._reading:
            if self._read is None or self._read[:2] != (table, path):
                self._read = None
                self._read = (table, path, self._images(table, path))
            return sum(len(rows.keys) for rows in self._read[2].values())

    def forget(self) -> None:
        """Let go what was read and not used: nobody will."""
        self._read = None

    def _images(self, table: str, path: str) -> dict[int, BlockRows]:
        shard = self._shard
        base = shard.layout.table_base[shard.layout.table_index[table]]
        spec = shard.tables[shard.layout.table_index[table]].spec
        try:
            store, manifest = open_checkpoint(path, options=shard.place.options_for(path))
            found = manifest.table_specs().get(table)
            if found is None or form_of(found) != form_of(spec):
                raise SpecMismatch(
                    f"{table}: the checkpoint {path} has {form_of(found) if found else 'no such table'}, this job has "
                    f"{form_of(spec)}: a table goes back to rows of its own kind only",
                    table=table,
                )
            numbers = (base + np.flatnonzero(shard.owned[base : base + spec.blocks])).tolist()
            images: dict[int, BlockRows] = {}

            def use(number: int, image: BlockImage) -> None:
                # Copied: a map of a file keeps it open, and there may be thousands.
                images[number] = BlockRows(
                    image.keys.copy(),
                    image.weights.copy(),
                    image.state.copy(),
                    image.counters.copy(),
                    image.waiting.copy(),
                    image.waited.copy(),
                    bytes(image.sketch),
                )

            Images(store, manifest).load(shard.layout, numbers, use)
        except OSError as error:
            raise InvalidArgument(f"the checkpoint {path} cannot be read: {error}") from error
        return images

    def apply(self, shard: Shard, order: Order) -> int:
        """Put what was read into the table, unless that was done under this number; return how many rows it is."""
        refuse_steps(shard)
        # Who wants it read while it is being used up waits, and reads it anew: it is for a later number.
        with self._reading, shard.push_lock:
            if order.number == self._done[0]:
                return self._done[1]
            read = self._read
            if read is None or read[:2] != (order.table, order.path):
                raise InvalidArgument(f"the rows of {order.table[:80]} in {order.path} were not read before")
            shard.cuts.check_newer(order.number)
            table = shard.tables[shard.layout.table_index[order.table]]
            base = shard.layout.table_base[shard.layout.table_index[order.table]]
            for number, rows in read[2].items():
                # A cut that is written meanwhile has kept what was there.
                table.import_block(number - base, rows, version=table.version(number - base) + 1)
                if shard.told is not None:
                    shard.did(np.array([number], np.int32), image_of(shard, number))
            # Last: an order that failed in the middle begins again.
            shard.cuts.begin(order.number, order.workers)
            shard.generation = max(shard.generation, order.generation)
            shard.unbroken = shard.generation
            self._done = (order.number, sum(len(rows.keys) for rows in read[2].values()))
            self._read = None
        logger.info("event=table_replaced table=%s path=%s rows=%d", order.table, order.path, self._done[1])
        return self._done[1]


def refuse_steps(shard: Shard) -> None:
    """Refuse where groups are steps of all ranks together."""
    if shard.staged is not None:
        raise InvalidArgument(
            "mode sync and the roll back of one table contradict each other: its rows are those of every job with the same data "
            "and settings, at one step with all others; go back with the whole job: --resume --restore @CUT"
        )
