# SPDX-License-Identifier: Apache-2.0
"""Following: the copies here do what the owners of their blocks tell them (SEMANTICS section 6).

    an operation    of the copy's own generation, by its owner, the next of the block: done; done before: passed over
                    of a generation that is not known here yet, or no more to its sender: the stream waits for a record
                    of a copy that is owned by another one, or that is not here, or with a gap: refused
    a full copy     takes the place of nothing, or of a copy of a lower (generation, seq)

Invariant: a copy is at some operation of its owner, whole, and never goes back; one on which an operation fails is let go. What
is refused stays refused until a full copy or a record comes. The shard's push lock is held for all that changes a copy; rows of
an image are made ready for their place before.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray

from oarlock.proto.arrays import Part, pack
from oarlock.proto.errors import Malformed, PSError, Unavailable
from oarlock.proto.shard_pb2 import ReplicateReply, ReplicateRequest
from oarlock.ps.blocks import drop
from oarlock.ps.images import Ready, fill, take
from oarlock.ps.operations import Image, Operation, apply, decode, lead_of, nbytes, sequences_of
from oarlock.ps.shard import Shard

logger = logging.getLogger(__name__)

# Senders whose streams are known; one that was forgotten begins another one.
MOST_STREAMS = 4096
# Of one stream; the number behind the last one still has to fit into an answer.
MOST_OPERATIONS = 1 << 62
# What becomes of an image.
TAKE, HAVE, REFUSE, LATER = "take", "have", "refuse", "later"


class Following:
    """The streams that come to ``shard``: two of each sender, of operations and of images."""

    def __init__(self, shard: Shard) -> None:
        self._shard = shard
        # By sender and number of the stream, that of the next operation.
        self._streams: dict[tuple[int, int], int] = {}
        # As well, which blocks refused and at which operation: told until the sender has heard it, and goes on behind that.
        self._refused: dict[tuple[int, int], dict[int, int]] = {}

    def take(self, request: ReplicateRequest, parts: Sequence[Part]) -> ReplicateReply:
        """Do what is told and was not done before; answer how far that came."""
        shard = self._shard
        if request.first >= MOST_OPERATIONS:
            raise Malformed(f"a stream whose next operation is number {request.first}: none has that many")
        operations = [
            decode(shard.layout, message, parts, window=shard.closed_window) for message in request.operations
        ]
        with self._made_ready(request, operations) as ready, shard.push_lock:
            sender = self._sender(request)
            at = self._at(request)
            stream = (request.header.sender, request.stream)
            known = self._refused.get(stream, {})
            refused = {n: position for n, position in known.items() if position >= request.first}
            self._refused[stream] = refused
            shard.counters["copied_bytes"] += sum(nbytes(o) for o, _ in operations if isinstance(o.does, Image))
            for position, (operation, generations) in enumerate(operations, request.first):
                if position < at:
                    continue
                if position > at:
                    break
                found = self._step(sender, operation, generations, ready)
                if found is None:
                    break
                refused.update(dict.fromkeys(found, position))
                at += 1
                self._streams[stream] = at
            numbers = np.array(sorted(refused), np.int32)
            here = np.where(shard.holdings.here[numbers], shard.holdings.generations[numbers], 0)
        return ReplicateReply(next=at, refused=pack(numbers), generations=pack(here.astype(np.uint64)))

    @contextmanager
    def _made_ready(
        self, request: ReplicateRequest, operations: list[tuple[Operation, NDArray[np.int64]]]
    ) -> Iterator[Ready]:
        """Have the first operation's rows ready for their place, if it is an image that is to be taken: nobody waits for that."""
        ready: Ready = {}
        operation, generations = operations[0] if operations else (None, None)
        if operation is not None and generations is not None and isinstance(operation.does, Image):
            with self._shard.push_lock:
                self._sender(request)
                stands = self._at(request) == request.first and self._stands(operation, int(generations[0])) == TAKE
            filled = fill(self._shard, operation.does) if stands else None
            if filled is not None:
                ready[operation.does.number] = filled
        try:
            yield ready
        finally:
            for contents in ready.values():
                for content in contents:
                    content.free()

    def _sender(self, request: ReplicateRequest) -> int:
        """Return which shard sent a request."""
        sender = self._shard.holdings.id_of(request.header.sender)
        if sender < 0:
            raise Unavailable(f"the shard of incarnation {request.header.sender} is not known here yet")
        return sender

    def _at(self, request: ReplicateRequest) -> int:
        """Return the number of the next operation of a stream."""
        stream = (request.header.sender, request.stream)
        # Of one that is not known all before has been answered for.
        at = self._streams.setdefault(stream, request.first)
        if len(self._streams) > MOST_STREAMS:
            forgotten = next(iter(self._streams))
            del self._streams[forgotten]
            self._refused.pop(forgotten, None)
        return at

    def _step(
        self, sender: int, operation: Operation, generations: NDArray[np.int64], ready: Ready
    ) -> list[int] | None:
        """Do an operation; return the blocks that refuse it, None if it has to wait for a record."""
        if isinstance(operation.does, Image):
            return self._image(sender, operation, operation.does, int(generations[0]), ready)
        holdings, numbers = self._shard.holdings, operation.numbers
        known = holdings.generations[numbers]
        copies, mine = holdings.is_copy(numbers), holdings.owners[numbers] == sender
        # A record that is not known here yet, or one that its owner does not know yet.
        if (copies & (known < generations)).any() or (copies & mine & (known > generations)).any():
            return None
        lead = lead_of(self._shard, operation)
        takes = copies & mine & (known == generations)
        todo = operation.only(takes & (lead == 1))
        if todo is not None:
            self._apply(todo)
        found: list[int] = numbers[~takes | (lead > 1) | ~holdings.here[numbers]].tolist()
        return found

    def _apply(self, operation: Operation) -> None:
        """Do an operation; copies on which it fails are none any more."""
        try:
            apply(self._shard, operation)
        except (PSError, MemoryError, OSError) as error:
            logger.warning("event=copies_let_go blocks=%s error=%s", operation.numbers[:16].tolist(), error)
            for number in operation.numbers.tolist():
                drop(self._shard, number)
            self._shard.holdings.here[operation.numbers] = False

    def _stands(self, operation: Operation, generation: int) -> str:
        """Return what becomes of an image."""
        holdings, number = self._shard.holdings, int(operation.numbers[0])
        known, here = int(holdings.generations[number]), bool(holdings.here[number])
        if here and not holdings.is_copy(operation.numbers)[0]:
            # The record here says that this shard owns it: a newer one is on its way, or the sender hears that it is not.
            return LATER if generation > known else REFUSE
        if generation < known:
            return REFUSE
        sequence = int(sequences_of(self._shard, operation.numbers)[0]) if here and generation == known else -1
        return HAVE if sequence >= operation.sequences[0] else TAKE

    def _image(
        self, sender: int, operation: Operation, image: Image, generation: int, ready: Ready
    ) -> list[int] | None:
        holdings, number = self._shard.holdings, int(operation.numbers[0])
        stands = self._stands(operation, generation)
        if stands != TAKE:
            return {LATER: None, REFUSE: [number], HAVE: []}[stands]
        take(self._shard, image, ready)
        holdings.here[number] = True
        holdings.generations[number] = generation
        holdings.owners[number] = sender
        # Whatever it lacked before of this owner, it has now; that tells of it only once it has heard that it came.
        for (incarnation, _), refused in self._refused.items():
            if incarnation == holdings.shards[sender].incarnation:
                refused.pop(number, None)
        return []
