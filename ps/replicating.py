# SPDX-License-Identifier: Apache-2.0
"""Replicating: the streams of an owner on their way to the copies, of operations and of images, and its reports on theirs to the
coordinator.

Invariant: at most one message of a stream is under way; what was not answered is sent again, whoever is away, until a record says
that the shard has left. One event loop.
"""

import asyncio
import logging
from collections.abc import Sequence
from concurrent.futures import Executor
from functools import partial

import numpy as np

from oarlock.client.membership import Membership
from oarlock.client.router import unpack_changes
from oarlock.proto.arrays import Part, pack, unpack
from oarlock.proto.bulk import Bulk, opened
from oarlock.proto.common_pb2 import Header
from oarlock.proto.coordinator_pb2 import ReportReply, ReportRequest
from oarlock.proto.errors import PSError, Unavailable
from oarlock.proto.shard_pb2 import ReplicateReply, ReplicateRequest
from oarlock.ps.adopting import adopt
from oarlock.ps.copying import take_turn
from oarlock.ps.holdings import Numbers
from oarlock.ps.image_stream import ImageStream
from oarlock.ps.operations import encode
from oarlock.ps.reports import Generations, Matter
from oarlock.ps.shard import Shard
from oarlock.ps.stream import Stream

logger = logging.getLogger(__name__)

# Between two tries that came to nothing.
FIRST_SECONDS, MOST_SECONDS = 0.005, 0.5
CALL_SECONDS = 20.0
# A copy that cannot be reached for so many leases is to leave the sets of the blocks that wait for it. Of a shard that is dead
# the coordinator says so before, after one.
SILENT_LEASES = 2
# Of the time in which blocks move for the sake of balance, or of another number of shards, this part is spent on copies.
COPYING_SHARE, MOST_REST_SECONDS = 0.1, 1.0


def message_of(shard: Shard, stream: Stream, header: Header) -> Bulk | None:
    """Return what is to be sent on a stream now, None if there is nothing."""
    with shard.leading.lock:
        first, operations = stream.some()
    if not operations:
        return None
    known, parts = shard.holdings.generations, list[Part]()
    request = ReplicateRequest(header=header, stream=stream.number, first=first)
    request.operations.extend(encode(shard.layout, o, known[o.numbers], parts) for o in operations)
    return Bulk(request, parts)


def take_answer(shard: Shard, stream: Stream, reply: ReplicateReply, parts: Sequence[Part] = ()) -> None:
    """Take in what the other side has done."""
    refused = unpack(reply.refused, np.int32, "refused blocks", parts=parts).astype(np.int32)
    refused = refused[(refused >= 0) & (refused < shard.layout.blocks)]
    shard.leading.answered(stream.to.id, stream.number, reply.next, refused)


class Replicating:
    """Sends what ``shard`` has to tell, as ``member`` of its job. Records are adopted in a thread of ``executor``."""

    def __init__(self, shard: Shard, member: Membership, executor: Executor | None = None) -> None:
        self._shard = shard
        self._executor = executor
        self._member = member
        self._changed = asyncio.Event()
        # Until when no copy begins that nobody waits for.
        self._rests_until = 0.0
        self._sending: dict[Stream, asyncio.Task[None]] = {}
        self._reporting: asyncio.Task[None] | None = None

    async def run(self) -> None:
        """Send until cancelled."""
        loop, leading = asyncio.get_running_loop(), self._shard.leading
        leading.wake = partial(loop.call_soon_threadsafe, self._changed.set)
        try:
            while True:
                self._changed.clear()
                self._begin()
                await self._changed.wait()
        finally:
            leading.wake = lambda: None
            for task in (*self._sending.values(), *([self._reporting] if self._reporting else [])):
                task.cancel()
            leaving = Unavailable("this shard is leaving its job")
            leading.fail(leaving)
            self._shard.closing.fail(leaving)

    def _begin(self) -> None:
        """Begin to send where there is something, and nothing is under way."""
        with self._shard.leading.lock:
            leading = self._shard.leading
            full = [stream for stream in leading.streams.values() if stream.first < stream.next]
            full += [images for images in leading.images.values() if images.busy]
        for stream in full:
            if stream not in self._sending:
                send = self._copy(stream) if isinstance(stream, ImageStream) else self._send(stream)
                task = self._sending[stream] = asyncio.ensure_future(send)
                task.add_done_callback(lambda _, s=stream: self._ended(s))  # type: ignore[misc]
        if self._reporting is None and self._shard.reports.waiting():
            self._reporting = asyncio.ensure_future(self._report())
            self._reporting.add_done_callback(lambda _: self._reported())

    def _ended(self, stream: Stream) -> None:
        task = self._sending.pop(stream)
        if not task.cancelled():
            task.result()
            self._changed.set()

    def _reported(self) -> None:
        task, self._reporting = self._reporting, None
        if task is not None and not task.cancelled():
            task.result()
            self._changed.set()

    async def _copy(self, images: ImageStream) -> None:
        """Take and send images, as long as any are wanted. Each is taken in a thread: it waits for those that push."""
        clock = asyncio.get_running_loop().time
        while images.busy and self._shard.leading.images.get(images.to.id) is images:
            if not images.leisurely:
                await self._copy_one(images)
                continue
            # One to whomever, then a rest: who pushes here, and who trains on the same machine, have the time in between.
            while (begun := clock()) < self._rests_until:
                await asyncio.sleep(self._rests_until - begun)
            # Somebody who does not answer holds up the others no longer than that.
            self._rests_until = begun + MOST_REST_SECONDS
            await self._copy_one(images)
            self._rests_until = clock() + min(MOST_REST_SECONDS, (clock() - begun) * (1 / COPYING_SHARE - 1))

    async def _copy_one(self, images: ImageStream) -> None:
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._executor, take_turn, self._shard, images.to.id)
        await self._send(images)

    async def _send(self, stream: Stream) -> None:
        """Send what a stream has, and what comes meanwhile."""
        leading, pause, to = self._shard.leading, FIRST_SECONDS, stream.to.id
        clock = asyncio.get_running_loop().time
        answered_at, silent = clock(), False
        while stream in (leading.streams.get(to), leading.images.get(to)):
            message = message_of(self._shard, stream, self._member.header(stream.to.incarnation))
            if message is None:
                return
            first = message.message.first
            try:
                answered = await self._member.transport.call(
                    stream.to.address, "Shard.Replicate", message, timeout_seconds=CALL_SECONDS
                )
                take_answer(self._shard, stream, *opened(answered))
                answered_at, silent = clock(), False
            except PSError as error:
                logger.debug("event=not_replicated shard=%d error=%s", stream.to.id, error)
                if clock() - answered_at >= SILENT_LEASES * self._member.spec.lease_seconds:
                    if not silent:
                        logger.warning("event=copy_unreachable shard=%d error=%s", stream.to.id, error)
                    silent = True
                    leading.silent(stream)
            if stream.first > first:
                pause = FIRST_SECONDS
            else:
                await asyncio.sleep(pause * (0.5 + self._member.rng.random() / 2))
                pause = min(2 * pause, MOST_SECONDS)

    async def _report(self) -> None:
        """Tell the coordinator what it has to hear, until it has answered."""
        pause = FIRST_SECONDS
        while matters := self._shard.reports.waiting():
            # At once and side by side: blocks may be closed until the coordinator has heard it.
            if all(await asyncio.gather(*(self._tell(*each) for each in matters))):
                pause = FIRST_SECONDS
                continue
            await asyncio.sleep(pause * (0.5 + self._member.rng.random() / 2))
            pause = min(2 * pause, MOST_SECONDS)

    async def _tell(self, matter: Matter, numbers: Numbers, generations: Generations) -> bool:
        """Tell the coordinator something of blocks; return whether it has answered."""
        reports = self._shard.reports
        term = reports.term
        request = ReportRequest(
            header=self._member.header(),
            told=matter.told,  # type: ignore[arg-type]
            blocks=pack(numbers),
            generations=pack(generations.astype(np.uint64)),
            shard=matter.shard,
            order=matter.order.number,
            term=matter.order.term,
        )
        try:
            reply: ReportReply = await self._member.transport.call(
                self._member.coordinator, "Coordinator.Report", request, timeout_seconds=CALL_SECONDS / 4
            )
        except PSError as error:
            logger.debug("event=not_reported told=%d error=%s", matter.told, error)
            return False
        reports.answered(matter, numbers, generations, term)
        if reply.HasField("record"):
            await asyncio.get_running_loop().run_in_executor(self._executor, self._learn, reply)
        return True

    def _learn(self, reply: ReportReply) -> None:
        """Adopt records that are other ones than were believed here; nothing is made by them."""
        told = unpack_changes(self._shard.layout, reply.record)
        nothing = np.empty(0, np.int32)
        adopt(self._shard, self._member.id, told, self._shard.closed, create=nothing, complete=False)
