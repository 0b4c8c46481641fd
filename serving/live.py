# SPDX-License-Identifier: Apache-2.0
"""A live model: tables and dense parameters of a job that trains, as far as its shards have told, in one run of its history.

    of each block    who told last, the number of its operations that this has (``sequences``, + 1; 0: none yet), when that was
                     confirmed; pages of it that have come, until it is whole
    whole            its pages are put in place at once, with what changed meanwhile, when all that was asked for is there

Invariant: changes of a block are applied in the order of its operations, those of another shard, or of another life of it, only
on top of the whole block; so a row that is served goes forwards only, and a key that left is gone with its tombstone. What does
not fit is Malformed, and applied nowhere. Look-ups go on meanwhile; everything else is under ``lock``.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from threading import Lock

import numpy as np
from numpy.typing import NDArray

from oarlock.client.layout import Layout
from oarlock.client.router import ShardAddress
from oarlock.embedding.fresh import Change, FreshTable
from oarlock.proto.arrays import pack, unpack
from oarlock.proto.common_pb2 import Array, Header
from oarlock.proto.errors import Malformed, Unavailable
from oarlock.proto.shard_pb2 import ChangesReply, ChangesRequest, TableChanges
from oarlock.serving.live_dense import LiveDense
from oarlock.serving.part import WHOLE, ModelPart
from oarlock.serving.snapshot import Version, Wanted, unknown_table

Numbers = NDArray[np.int32]
Longs = NDArray[np.int64]


@dataclass
class Counts:
    """What a process has applied since it began; whoever counts has the model's lock."""

    rows: int = 0
    tombstones: int = 0
    bytes: int = 0
    whole_blocks: int = 0


@dataclass
class _Arriving:
    """A block that comes whole: its pages, and what changed after the first one."""

    sequence: int
    take: int
    keys: list[NDArray[np.uint64]] = field(default_factory=list)
    rows: list[NDArray[np.uint8]] = field(default_factory=list)
    then: list[Change] = field(default_factory=list)
    least: int = 0
    all_here: bool = False
    # Whether it was asked what followed once all pages were here.
    asked: bool = False


class Live:
    """The tables of ``layout`` in ``run`` of ``job``, empty at first, as they were ``now`` by the monotonic ``clock``.

    ``with_dense``: with its dense parameters, too, as predictions need them. Of a ``part`` that is not all of the model,
    blocks of other parts stay empty.
    """

    def __init__(
        self,
        job: str,
        run: int,
        layout: Layout,
        seed: int,
        *,
        now: float,
        clock: Callable[[], float] = time.monotonic,
        counts: Counts | None = None,
        with_dense: bool = False,
        part: ModelPart = WHOLE,
    ) -> None:
        self.job = job
        self.part = part
        self.copies = 1
        self.run = run
        self.layout = layout
        self.seed = seed
        self.cut = 0
        self.lock = Lock()
        self.counts = counts if counts is not None else Counts()
        self.tables = {spec.name: FreshTable(spec, seed=seed) for spec in layout.tables}
        self._by_number = list(self.tables.values())
        self._clock = clock
        blocks = layout.dense_base
        # Which blocks are kept up to date here.
        self.mine: NDArray[np.bool_] = np.concatenate(
            [np.zeros(0, np.bool_), *(part.mask(spec.blocks) for spec in layout.tables)]
        )
        self.sequences: Longs = np.zeros(blocks, np.int64)
        self._takes: Longs = np.zeros(blocks, np.int64)
        # After how many operations rows are as they are served, whoever told that.
        self._served: Longs = np.full(blocks, -1, np.int64)
        self._sources: Longs = np.zeros(blocks, np.int64)
        self._confirmed: NDArray[np.float64] = np.full(blocks, now)
        # Of the block that was confirmed longest ago; read without the lock.
        self._oldest = now if self.mine.any() else math.inf
        self._arriving: dict[int, _Arriving] = {}
        self._there: NDArray[np.bool_] = np.zeros(blocks, np.bool_)
        self.parameters = LiveDense(layout, now=now, clock=clock) if with_dense else None
        # Whether all blocks of tables have been told by shards.
        self.complete = not self.mine.any()
        # Whether every block of a cut has been here.
        self.filled = False
        # By table: who is told of keys whose rows changed, with the lock held.
        self.notes: Mapping[str, Callable[[NDArray[np.uint64]], None]] = {}

    @property
    def whole(self) -> bool:
        """Whether all blocks are here, of a cut or as shards told them."""
        parameters = self.parameters
        return (self.filled or self.complete) and (parameters is None or parameters.values is not None)

    @property
    def dense(self) -> NDArray[np.float32]:
        """All dense parameters: float32[P], which nobody changes; another array once they are others."""
        values = None if self.parameters is None else self.parameters.values
        if values is None:
            raise Unavailable("the dense parameters of this model are not here: ask again")
        return values

    def lookup(self, table: str, keys: NDArray[np.uint64], out: NDArray[np.float32]) -> int:
        """Write the weights of keys: uint64[n] to out: float32[n, dim]; return how many of them have no row."""
        return self.table(table).lookup(keys, out)

    def lookup_many(self, wanted: Sequence[Wanted]) -> list[int]:
        """Do so for each (table, keys, out) of ``wanted``."""
        return [self.table(table).lookup(keys, out) for table, keys, out in wanted]

    def lacks(self, name: str, block: int, sequence: int) -> bool:
        """Return whether a block's state after ``sequence`` operations is newer than what is served of it."""
        return bool(self._served[self.layout.table_base[self.layout.table_index[name]] + block] < sequence)

    def fill(
        self, name: str, block: int, sequence: int, keys: NDArray[np.uint64], rows: NDArray[np.uint8], at: float
    ) -> None:
        """Have a block be as a cut has it, where it was so ``at``, unless it is newer by now; shards tell it whole afterwards."""
        number = self.layout.table_base[self.layout.table_index[name]] + block
        with self.lock:
            if self._served[number] < sequence:
                self._replace(name, block, keys, rows)
                self._forget([number])
                self._served[number] = sequence
                self._confirmed[number] = at if not self._there[number] else max(at, float(self._confirmed[number]))
                self._look_at_oldest()

    def _look_at_oldest(self) -> None:
        if self.mine.any():
            self._oldest = float(self._confirmed[self.mine].min())

    @property
    def age(self) -> float:
        """How many seconds ago the state was the shards' own, of the block of which that is longest ago."""
        age = max(0.0, self._clock() - self._oldest)
        return age if self.parameters is None else max(age, self.parameters.age)

    @property
    def version(self) -> Version:
        return Version(self.run, self.cut, time.time() - self.age, live=True)

    @property
    def rows(self) -> int:
        return sum(table.rows for table in self.tables.values())

    @property
    def nbytes(self) -> int:
        return sum(table.nbytes for table in self.tables.values())

    def table(self, name: str) -> FreshTable:
        """Return a table; UnknownTable says which there are."""
        found = self.tables.get(name)
        if found is None:
            raise unknown_table(name, self.tables)
        return found

    # The exchange with a shard; the lock is held.

    def question(self, shard: ShardAddress, numbers: Numbers, header: Header) -> ChangesRequest:
        """Return what to ask a shard about its blocks, numbers: int32[m] ascending in the layout."""
        numbers, of_dense = self._apart(numbers)
        anew = numbers[self._sources[numbers] != shard.incarnation]
        # What is served of them goes on to be, until the new owner has told all of it.
        self._forget(anew.tolist())
        self._sources[anew] = shard.incarnation
        least = np.zeros(len(numbers), np.uint64)
        for at, number in enumerate(numbers.tolist()) if self._arriving else ():
            coming = self._arriving.get(number)
            if coming is not None:
                least[at] = coming.least
                coming.asked = coming.all_here
        request = ChangesRequest(
            header=header,
            blocks=pack(numbers),
            sequences=pack(self.sequences[numbers].astype(np.uint64)),
            takes=pack(self._takes[numbers].astype(np.uint64)),
            least=pack(least),
        )
        if self.parameters is not None:
            self.parameters.question(shard, of_dense, request)
        return request

    def _apart(self, numbers: Numbers) -> tuple[Numbers, Numbers]:
        """Return which of ascending numbers are of tables, and which of dense parameters."""
        at = int(np.searchsorted(numbers, self.layout.dense_base))
        return numbers[:at], numbers[at:]

    def apply(self, shard: ShardAddress, numbers: Numbers, reply: ChangesReply, asked_at: float) -> bool:
        """Apply a shard's answer to what was asked at ``asked_at``; return whether to ask for more at once."""
        numbers, of_dense = self._apart(numbers)
        mine = np.zeros(len(self.sequences), np.bool_)
        mine[numbers[self._sources[numbers] == shard.incarnation]] = True
        moved, whole = self._named(reply.moved, "moved", self.layout.blocks), self._named(reply.whole, "whole")
        at = asked_at - max(0.0, reply.age_seconds)
        more = bool(reply.more)
        if self.parameters is not None and len(of_dense):
            self.parameters.moved(moved)
            more |= self.parameters.apply(shard, of_dense, reply, at)
        moved = moved[moved < self.layout.dense_base]
        mine[moved] = False
        self._forget(moved.tolist())
        self._forget([number for number in whole.tolist() if self.sequences[number] > 0])
        for part in reply.tables:
            self.counts.bytes += part.ByteSize()
            if part.whole:
                self._page(part, mine, reply.take)
            else:
                self._changed(part, mine, reply.take)
        if not reply.more:
            self._confirm(mine, at)
        return more or any(part.whole for part in reply.tables)

    # Inside

    def _named(self, message: Array, what: str, most: int | None = None) -> Numbers:
        found: Numbers = unpack(message, np.int32, f"{what} blocks")
        most = len(self.sequences) if most is None else most
        if len(found) and not 0 <= int(found.min()) <= int(found.max()) < most:
            raise Malformed(f"{what} blocks are not all from 0 to below {most}")
        return found

    def _forget(self, numbers: list[int]) -> None:
        """Take nothing that comes for what follows on what is here of blocks; it is served on."""
        for number in numbers:
            self._arriving.pop(number, None)
        self.sequences[numbers] = self._takes[numbers] = 0

    def _table(self, part: TableChanges) -> tuple[FreshTable, int, Numbers, Longs]:
        """Return the table of a part, the number of its first block, the part's blocks within it, and where it leads to."""
        if part.table >= len(self._by_number):
            raise Malformed(f"rows of table {part.table} came, the job has {len(self._by_number)}")
        table, base = self._by_number[part.table], self.layout.table_base[part.table]
        blocks: Numbers = unpack(part.blocks, np.int32, f"blocks of {table.spec.name}")
        if len(blocks) and not 0 <= int(blocks.min()) <= int(blocks.max()) < table.spec.blocks:
            raise Malformed(f"table {table.spec.name}: a block is not one of {table.spec.blocks}")
        after = unpack(part.after, np.uint64, f"sequences of {table.spec.name}").astype(np.int64)
        if len(after) != len(blocks) or (len(after) and int(after.min()) < 0):
            raise Malformed(f"table {table.spec.name}: {len(after)} sequences of {len(blocks)} blocks")
        return table, base, blocks, after

    def _rows(self, part: TableChanges, table: FreshTable) -> tuple[NDArray[np.uint64], NDArray[np.uint8]]:
        name = table.spec.name
        keys = unpack(part.keys, np.uint64, f"keys of {name}")
        rows = unpack(part.rows, np.uint8, f"rows of {name}", dims=2, columns=table.row_bytes)
        if len(rows) != len(keys):
            raise Malformed(f"table {name}: {len(rows)} rows of {len(keys)} keys")
        return keys, rows

    def _page(self, part: TableChanges, mine: NDArray[np.bool_], take: int) -> None:
        """Keep a page of a block until all of them are here."""
        table, base, blocks, after = self._table(part)
        if len(blocks) != 1:
            raise Malformed(f"table {table.spec.name}: {len(blocks)} blocks in one page")
        number = base + int(blocks[0])
        if not mine[number]:
            return
        keys, rows = self._rows(part, table)
        coming = self._arriving.get(number)
        if coming is None or not coming.least:
            coming = _Arriving(int(after[0]), take)
        if len(keys) and int(keys.min()) < coming.least:
            raise Malformed(f"table {table.spec.name}: a page has keys of the page before")
        if part.next and (not len(keys) or part.next <= int(keys.max())):
            raise Malformed(f"table {table.spec.name}: a page ends nowhere")
        self._arriving[number] = coming
        coming.keys.append(keys)
        coming.rows.append(rows)
        coming.least = part.next
        if not part.next:
            coming.all_here = True
            self.sequences[number], self._takes[number] = coming.sequence + 1, coming.take

    def _changed(self, part: TableChanges, mine: NDArray[np.bool_], take: int) -> None:
        """Apply what changed to the blocks that it follows on."""
        table, base, blocks, after = self._table(part)
        name, numbers = table.spec.name, base + blocks
        before = unpack(part.before, np.uint64, f"sequences of {name}").astype(np.int64)
        if len(before) != len(blocks) or len(np.unique(blocks)) != len(blocks):
            raise Malformed(f"table {name}: {len(before)} sequences of {len(blocks)} blocks, each once")
        known = self.sequences[numbers] - 1
        follows = mine[numbers] & (known >= 0) & (before <= known) & (known < after)
        # They come whole.
        self._forget(numbers[mine[numbers] & ~follows].tolist())
        keys, rows = self._rows(part, table)
        counts = unpack(part.counts, np.int32, f"counts of {name}")
        gone = unpack(part.gone, np.uint64, f"keys that left {name}")
        gone_counts = unpack(part.gone_counts, np.int32, f"counts of {name}")
        change = table.checked(Change(blocks, keys, rows, counts, gone, gone_counts))
        here = np.array([number not in self._arriving for number in numbers.tolist()], np.bool_)
        for at in np.flatnonzero(follows & ~here).tolist():
            self._arriving[int(numbers[at])].then.append(change.only(np.arange(len(blocks)) == at))
        direct = change.only(follows & here)
        try:
            table.change(direct)
        finally:
            self._note(name, direct.keys, direct.gone)
        self._served[numbers[follows & here]] = after[follows & here]
        self.counts.rows += len(direct.keys)
        self.counts.tombstones += len(direct.gone)
        self.sequences[numbers[follows]] = after[follows] + 1
        self._takes[numbers[follows]] = take

    def _confirm(self, mine: NDArray[np.bool_], at: float) -> None:
        """Put blocks in place that came whole; all that is known of blocks was so ``at``."""
        for number in [n for n, coming in self._arriving.items() if mine[n] and coming.asked]:
            self._place(number)
        known = mine & (self.sequences > 0)
        known[list(self._arriving)] = False
        self._confirmed[known] = np.maximum(self._confirmed[known], at)
        self._there |= known
        self._look_at_oldest()
        self.complete = bool(self._there[self.mine].all())

    def _replace(
        self, name: str, block: int, keys: NDArray[np.uint64], rows: NDArray[np.uint8], then: Sequence[Change] = ()
    ) -> None:
        before = self.tables[name].keys_of(block) if name in self.notes else None
        self.tables[name].replace(block, keys, rows, then)
        if before is not None:
            self._note(name, before, self.tables[name].keys_of(block))

    def _note(self, name: str, *keys: NDArray[np.uint64]) -> None:
        """Tell who wants to know which rows of a table may be others, or gone, by now."""
        note = self.notes.get(name)
        if note is not None:
            for each in keys:
                note(each)

    def _place(self, number: int) -> None:
        coming = self._arriving.pop(number)
        name, block = self.layout.name(number)
        try:
            self._replace(name, block, np.concatenate(coming.keys), np.concatenate(coming.rows), coming.then)
        except Malformed:
            self._forget([number])
            raise
        self._served[number] = self.sequences[number] - 1
        self.counts.whole_blocks += 1
