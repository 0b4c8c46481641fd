# SPDX-License-Identifier: Apache-2.0
"""Leading: what an owner owes the copies of its blocks, and what waits for them (SEMANTICS section 6).

    copying     the block travels to the other shard (ps/image_stream.py)
    requires    the other shard has it, is told of every operation on it, and nothing is acknowledged before it has that

Invariant: whoever is required has the whole block and every operation since, or an answer that waits for it is not given (R1). A
shard is required before the coordinator hears of it, and until the coordinator's record says that it has left (R2). ``lock``
covers all of it, and is taken with or without the shard's push lock, never the other way round. Answers are given without
either.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from random import SystemRandom
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from oarlock.client.router import ShardAddress
from oarlock.proto.arrays import pack, unpack
from oarlock.proto.coordinator_pb2 import ADDED, CONFIRMED, HANDED, SLOW
from oarlock.proto.pending import Pending
from oarlock.proto.shard_pb2 import PushReply
from oarlock.ps.holdings import NO_ORDER, Holdings, Numbers, Order
from oarlock.ps.image_stream import ImageStream
from oarlock.ps.operations import Operation
from oarlock.ps.reports import Generations, Reports
from oarlock.ps.stream import Stream

# Blocks, ascending, and the generations of their records.
Known = tuple[Numbers, Generations]


@dataclass
class _Until:
    """``then`` follows once the streams to shards ``at`` are answered up to there, for those ``numbers`` that are left."""

    numbers: Numbers
    at: dict[int, int]
    then: Callable[[Numbers], None]
    # Only of an answer to a client, which is given for blocks that went elsewhere, too: they have to be sent again.
    reply: PushReply | None = None
    pending: Pending | None = None
    moved: list[Numbers] = field(default_factory=list)


class Leading:
    """``wake``: called, from any thread, when there is something to send or to report."""

    def __init__(self, holdings: Holdings, reports: Reports) -> None:
        self.lock = Lock()
        self.wake: Callable[[], object] = lambda: None
        self.streams: dict[int, Stream] = {}
        self.images: dict[int, ImageStream] = {}
        self._holdings = holdings
        self._blocks = len(holdings.owned)
        self._reports = reports
        self._draw = SystemRandom()
        self._requires: dict[int, NDArray[np.bool_]] = {}
        # Blocks whose copy refuses: it stays required until it has left the set.
        self._broken: dict[int, NDArray[np.bool_]] = {}
        self._waiting: list[_Until] = []

    # Operations

    def did(self, operation: Operation) -> None:
        """Keep an operation for all who are told of it. The push lock is held."""
        with self.lock:
            for shard, mask in self._requires.items():
                mine = operation.only(mask[operation.numbers])
                if mine is not None:
                    self.streams[shard].append(mine)
            for images in self.images.values():
                images.hold(operation)
        self.wake()

    def answer(self, reply: PushReply, numbers: Numbers) -> "PushReply | Pending":
        """Return an answer about blocks owned here, which waits for all that was done to them. The push lock is held."""
        with self.lock:
            at = self._tail(numbers)
            if not at:
                return reply
            pending = Pending(so_far=reply)
            self._waiting.append(_Until(numbers, at, lambda _: None, reply, pending))
            return pending

    def everywhere(self, numbers: NDArray[np.integer[Any]]) -> bool:
        """Whether all members have all that was done to these blocks. The push lock is held."""
        with self.lock:
            return not self._tail(numbers)

    def _tail(self, numbers: NDArray[np.integer[Any]]) -> dict[int, int]:
        """Return how far which streams have to be answered before these blocks are the same everywhere."""
        at = {}
        for shard, mask in self._requires.items():
            if mask[numbers].any():
                stream = self.streams[shard]
                if stream.first < stream.next or self._is_broken(shard, numbers):
                    at[shard] = stream.next
        return at

    def answered(self, shard: int, number: int, upto: int, refused: Numbers) -> None:
        """A shard has all operations of stream ``number`` below ``upto``, but for the blocks that it refused."""
        with self.lock:
            known = (self.streams.get(shard), self.images.get(shard))
            stream = next((s for s in known if s is not None and s.number == number), None)
            if stream is None:
                return
            if len(refused):
                self._refused(shard, refused)
            stream.answered(upto)
            if isinstance(stream, ImageStream):
                self._arrived(shard, stream)
            done = self._settled()
        _give(done)

    def _refused(self, shard: int, numbers: Numbers) -> None:
        if shard in self.images:
            self.images[shard].give_up(numbers)
        requires = self._requires.get(shard)
        required = numbers[requires[numbers]] if requires is not None else numbers[:0]
        if len(required):
            self._broken.setdefault(shard, np.zeros(self._blocks, np.bool_))[required] = True
            self._report(SLOW, required, self._known(required), shard)

    def silent(self, stream: Stream) -> None:
        """A shard does not answer: no block shall wait for it any longer than until a record says so."""
        shard = stream.to.id
        with self.lock:
            requires = self._requires.get(shard)
            if self.streams.get(shard) is not stream or requires is None or not requires.any():
                return
            numbers = np.flatnonzero(requires).astype(np.int32)
            self._report(SLOW, numbers, self._known(numbers), shard)
        self.wake()

    # Members

    def want(self, to: ShardAddress, number: int, leisurely: bool = False) -> None:
        """Have a block copied to a shard once its turn comes, unless that has it or it is under way. The push lock is held."""
        with self.lock:
            requires = self._requires.get(to.id)
            if requires is not None and requires[number]:
                return
            images = self.images.get(to.id)
            if images is None or images.to.incarnation != to.incarnation:
                images = self.images[to.id] = ImageStream(to, self._draw.getrandbits(63))
            if not images.has(number):
                images.wanted[number] = leisurely
        self.wake()

    def turn(self, shard: int) -> int | None:
        """Return the block that is to be copied to a shard now, None if there is none. The push lock is held."""
        with self.lock:
            return self.images[shard].turn() if shard in self.images else None

    def add(self, shard: int, image: Operation) -> None:
        """Begin a copy: ``image`` is the block as it is. The push lock is held."""
        with self.lock:
            self.images[shard].begin(image, self._known(image.numbers))
        self.wake()

    def _arrived(self, shard: int, images: ImageStream) -> None:
        """Once a shard has a block, have it told what it lacks of it since; from now on it is waited for."""
        found = images.arrived()
        if found is not None:
            stream = self._stream(images.to)
            for operation in found.held:
                stream.append(operation)
            self._require(shard, found.numbers, found.known)

    @property
    def listens(self) -> bool:
        """Whether anybody has to hear what is done. The push lock is held."""
        with self.lock:
            if any(images.travels for images in self.images.values()):
                return True
            return any(mask.any() for mask in self._requires.values())

    def _require(self, shard: int, numbers: Numbers, known: Known) -> None:
        """Wait for a shard from now on; report it as soon as it has what it lacks until then, too."""
        self._requires.setdefault(shard, np.zeros(self._blocks, np.bool_))[numbers] = True
        at = {shard: self.streams[shard].next}
        self._waiting.append(_Until(numbers, at, lambda left: self._report(ADDED, left, known, shard)))

    def _known(self, numbers: Numbers) -> Known:
        """Return the generations of these blocks' records as they are known now: what is reported later is of them."""
        ordered = np.sort(numbers)
        return ordered, self._holdings.generations[ordered]

    def _report(self, told: int, numbers: Numbers, known: Known, shard: int = 0, order: Order = NO_ORDER) -> None:
        generations = known[1][np.searchsorted(known[0], numbers)]
        self._reports.add(told, numbers, generations, shard=shard, order=order)

    def _stream(self, to: ShardAddress) -> Stream:
        found = self.streams.get(to.id)
        if found is None or found.to.incarnation != to.incarnation:
            found = self.streams[to.id] = Stream(to, self._draw.getrandbits(63))
        return found

    def lead(self, members: dict[int, tuple[ShardAddress, Numbers]], numbers: Numbers) -> None:
        """Of the owned blocks ``numbers`` exactly these shards have copies from now on, by a record. The push lock is held.

        Whoever is not among them is told no more, and not waited for; whoever is new has the content from elsewhere.
        """
        with self.lock:
            # What a member has refused it lacks under this record, too, until it has left the set.
            refused = {s: mine[self._broken[s][mine]] for s, (_, mine) in members.items() if s in self._broken}
            self._forget(numbers)
            for shard, (address, mine) in members.items():
                self._stream(address)
                self._requires.setdefault(shard, np.zeros(self._blocks, np.bool_))[mine] = True
                if shard in refused:
                    self._refused(shard, refused[shard])
            with_copies = [mine for _, mine in members.values()]
            if with_copies:
                found = np.unique(np.concatenate(with_copies))
                at = {s: stream.next for s, stream in self.streams.items() if s in members}
                known = self._known(found)
                self._waiting.append(_Until(found, at, lambda left: self._report(CONFIRMED, left, known)))
            self._drop_streams()
            done = self._settled()
        _give(done)
        self.wake()

    def let_go(self, numbers: Numbers) -> None:
        """Own these blocks no more: what waits for them is sent again, elsewhere. The push lock is held."""
        with self.lock:
            for each in self._waiting:
                if each.reply is not None:
                    lost = np.isin(each.numbers, numbers)
                    each.moved.append(each.numbers[lost])
                    each.numbers = each.numbers[~lost]
            self._forget(numbers)
            self._drop_streams()
            done = self._settled()
        _give(done)

    def _drop_streams(self) -> None:
        """Keep nothing for a shard that has no copy of what is owned here, and is to get none: it may be gone for good."""
        required = {shard for shard, mask in self._requires.items() if mask.any()}
        for of_shards in (self.streams, self._requires, self._broken):
            for shard in of_shards.keys() - required:
                del of_shards[shard]
        for shard in [s for s, images in self.images.items() if not (images.wanted or images.travels)]:
            del self.images[shard]

    def _forget(self, numbers: Numbers) -> None:
        """A newer record counts: what was under way by the one before has ended, but for answers to clients."""
        for masks in (self._requires, self._broken):
            for mask in masks.values():
                mask[numbers] = False
        for images in self.images.values():
            images.give_up(numbers)
        self._reports.forget(numbers)
        for each in self._waiting:
            if each.reply is None:
                each.numbers = np.setdiff1d(each.numbers, numbers).astype(np.int32)

    def hand_over(self, numbers: Numbers, to: int, order: Order) -> None:
        """Report blocks that were closed as soon as all members have all of them. The push lock is held."""
        with self.lock:
            known = self._known(numbers)
            then = partial(self._report, HANDED, known=known, shard=to, order=order)
            self._waiting.append(_Until(numbers, self._tail(numbers), then))
            done = self._settled()
        _give(done)
        self.wake()

    def reopened(self, numbers: Numbers) -> None:
        """Nothing is reported of a hand-over that came to nothing. The push lock is held."""
        with self.lock:
            self._reports.forget(numbers, HANDED)

    # What waits

    def _settled(self) -> list[_Until]:
        """Do what has been waited for; return the answers that are to be given."""
        answers: list[_Until] = []
        # What follows may wait itself.
        looking = True
        while looking:
            looking, waiting, self._waiting = False, self._waiting, []
            for each in waiting:
                each.at = {s: at for s, at in each.at.items() if self._lacks(each, s, at)}
                if each.at and len(each.numbers):
                    self._waiting.append(each)
                elif each.reply is not None:
                    answers.append(each)
                elif len(each.numbers):
                    each.then(each.numbers)
                    looking = True
        return answers

    def _lacks(self, each: _Until, shard: int, at: int) -> bool:
        stream = self.streams.get(shard)
        if stream is None or not self._requires[shard][each.numbers].any():
            return False
        return stream.first < at or self._is_broken(shard, each.numbers)

    def _is_broken(self, shard: int, numbers: NDArray[np.integer[Any]]) -> bool:
        """Whether a shard refuses one of these blocks, and is required still."""
        return shard in self._broken and bool(self._broken[shard][numbers].any())

    def fail(self, error: Any) -> None:
        """Let nobody wait any more: the process ends."""
        with self.lock:
            waiting, self._waiting = self._waiting, []
        for each in waiting:
            if each.pending is not None:
                each.pending.fail(error)


def _give(answers: Iterable[_Until]) -> None:
    for each in answers:
        assert each.reply is not None, "only answers to clients are given"
        assert each.pending is not None, "as the reply"
        if each.moved:
            before = unpack(each.reply.moved, np.int32, "moved blocks")
            each.reply.moved.CopyFrom(pack(np.concatenate([before, *each.moved]).astype(np.int32)))
        each.pending.resolve(each.reply)
