# SPDX-License-Identifier: Apache-2.0
"""Changes: what a shard answers to processes that serve its model: what came since they asked last, or blocks whole.

Invariant: nothing is changed. An answer has a bounded size, so one who is slow asks more often, and once it is farther behind
than the feed reaches (``ps/feed.py``) it gets whole blocks: nothing is kept for it. Whole blocks leave at a bounded rate, for
they cost the shard more than what changed does; so do dense values (``ps/dense_changes.py``). Called from many threads.
"""

import time
from collections.abc import Callable, Iterator
from threading import Lock
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from oarlock.embedding.frozen import stored_bytes, stored_rows
from oarlock.embedding.lookup import row_bytes, rows_from
from oarlock.proto.arrays import pack, unpack
from oarlock.proto.errors import Malformed, PSError
from oarlock.proto.shard_pb2 import ChangesReply, ChangesRequest, TableChanges
from oarlock.proto.work import expects
from oarlock.ps.dense_changes import DenseChanges
from oarlock.ps.feed import Part

if TYPE_CHECKING:
    from oarlock.ps.shard import Shard

# About how much an answer has, and how much of a block one page of it.
ANSWER_BYTES = 16 << 20
PAGE_BYTES = 4 << 20
# What leaves as whole blocks in a second, to all who ask.
WHOLE_BYTES_PER_SECOND = 256 << 20

MOST = 1 << 62

Numbers = NDArray[np.int32]
Longs = NDArray[np.int64]


class Changes:
    """Answers ChangesRequests about ``shard``."""

    def __init__(
        self,
        shard: "Shard",
        *,
        answer_bytes: int = ANSWER_BYTES,
        page_bytes: int = PAGE_BYTES,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._shard = shard
        self._answer_bytes = answer_bytes
        self._page_bytes = page_bytes
        self._clock = clock
        self._counting = Lock()
        # When the next whole block may leave.
        self._next_whole = 0.0
        self.whole_bytes = 0
        self.bytes = 0
        self.dense = DenseChanges(shard, clock=lambda: self._clock())

    def answer(self, request: ChangesRequest) -> ChangesReply:
        """Answer with what is news to the sender, of the blocks that it names and this shard owns."""
        numbers, known, takes, least = self._read(request)
        feed, shard = self._shard.feed, self._shard
        take, age = feed.take()
        here = shard.owned[numbers]
        reply = ChangesReply(age_seconds=age, take=take)
        asked = np.concatenate([numbers, self.dense.asked(request)])
        if not shard.owned[asked].all():
            elsewhere = asked[~shard.owned[asked]]
            reply.moved.CopyFrom(pack(elsewhere))
            with shard.push_lock:
                shard.holdings.tell_where(elsewhere, reply.where)
        have, learnt = np.full(len(feed.since), -1, np.int64), np.zeros(len(feed.since), np.int64)
        have[numbers[here]], learnt[numbers[here]] = known[here], takes[here]
        reached, news = feed.after(have, learnt)
        size = self._changed(news, reply)
        whole = here & ~reached[numbers]
        reply.whole.CopyFrom(pack(numbers[whole]))
        size += self._whole(numbers[whole], least[whole], size, reply)
        size += self.dense.add(request, reply)
        with self._counting:
            self.bytes += size
        return reply

    def _read(self, request: ChangesRequest) -> tuple[Numbers, Longs, Longs, NDArray[np.uint64]]:
        """Return the blocks, what operations the sender knows of each (-1: none), since which take, and from which keys on."""
        numbers: Numbers = unpack(request.blocks, np.int32, "blocks").astype(np.int32)
        sequences = unpack(request.sequences, np.uint64, "sequences")
        least = unpack(request.least, np.uint64, "least") if request.HasField("least") else np.zeros_like(sequences)
        takes = unpack(request.takes, np.uint64, "takes") if request.HasField("takes") else np.zeros_like(sequences)
        if not len(numbers) == len(sequences) == len(least) == len(takes):
            counts = f"{len(sequences)} sequences, {len(takes)} takes and {len(least)} least keys"
            raise Malformed(f"{len(numbers)} blocks with {counts}")
        most = len(self._shard.feed.since)
        if len(numbers) and (numbers[0] < 0 or numbers[-1] >= most or not (numbers[1:] > numbers[:-1]).all()):
            raise Malformed(f"blocks are not ascending, from 0 to below {most}, the blocks of tables")
        if len(numbers) and max(int(sequences.max()), int(takes.max())) > MOST:
            raise Malformed(f"a sequence of {int(sequences.max())}, or a take of {int(takes.max())}, is over 2^62")
        return numbers, sequences.astype(np.int64) - 1, takes.astype(np.int64), least

    def _changed(self, news: Iterator[Part], reply: ChangesReply) -> int:
        """Add what the feed has; return how many bytes."""
        size = 0
        for part in news:
            if size and size + part.nbytes > self._answer_bytes:
                reply.more = True
                break
            size += part.nbytes
            expects(part.nbytes)
            reply.tables.append(_packed(part))
        return size

    def _whole(self, numbers: Numbers, least: NDArray[np.uint64], size: int, reply: ChangesReply) -> int:
        """Add blocks whole as far as there is room; return how many bytes."""
        begun = size
        for number, first in zip(numbers.tolist(), least.tolist(), strict=True):
            # One in each answer, however much changes.
            if (size > begun and size + self._page_bytes > self._answer_bytes) or not self._may_leave():
                break
            try:
                page = self._page(number, first)
            except PSError:
                # It moved away meanwhile; the next answer says so.
                break
            came = page.ByteSize()
            with self._counting:
                self.whole_bytes += came
                self._next_whole = max(self._next_whole, self._clock()) + came / WHOLE_BYTES_PER_SECOND
            size += came
            reply.tables.append(page)
        return size - begun

    def _may_leave(self) -> bool:
        with self._counting:
            return self._next_whole <= self._clock()

    def _page(self, number: int, least: int) -> TableChanges:
        shard = self._shard
        name, block = shard.layout.name(number)
        index = shard.layout.table_index[name]
        table = shard.tables[index]
        expects(2 * self._page_bytes)
        # Noted before its rows are looked at: they are at least as new.
        version = np.array([shard.feed.upto[number]], np.uint64)
        rows, more = rows_from(table, block, least, max(1, self._page_bytes // row_bytes(table)))
        stored = stored_rows(table.spec, rows.weights, rows.state)
        return TableChanges(
            table=index,
            whole=True,
            blocks=pack(np.array([block], np.int32)),
            before=pack(np.zeros(1, np.uint64)),
            after=pack(version),
            counts=pack(np.array([len(rows.keys)], np.int32)),
            keys=pack(rows.keys),
            rows=pack(stored.reshape(len(rows.keys), stored_bytes(table.spec))),
            next=int(rows.keys[-1]) + 1 if more else 0,
        )


def _packed(part: Part) -> TableChanges:
    return TableChanges(
        table=part.table,
        blocks=pack(part.blocks),
        before=pack(part.before.astype(np.uint64)),
        after=pack(part.after.astype(np.uint64)),
        counts=pack(part.counts),
        keys=pack(part.keys),
        rows=pack(part.rows),
        gone_counts=pack(part.gone_counts),
        gone=pack(part.gone),
    )
