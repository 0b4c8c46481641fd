# SPDX-License-Identifier: Apache-2.0
"""Frames: bulk messages on a bare socket. A head, a table of lengths, a message, and its parts as they lie in memory.

    head      magic, version, kind, number of parts, length of the message, length of all that follows the head, and how
              long the sender waits for an answer (milliseconds, 0: it does not say)
    lengths   uint32 little-endian for each part
    message   a protobuf message, as over gRPC but for the data of its larger arrays
    parts     those data, each from a multiple of 64 bytes on (counted from the end of the head)

Invariant: `receive` believes no number before it is checked, takes memory only within the limit of a message, and returns whole
frames or raises; after an error the connection is of no use. `send` and `receive` are for blocking sockets, where a
frame costs a call of the system for every STEP_BYTES. Any thread, one at a time for each socket and direction.
"""

import socket
import struct
from collections.abc import Callable, Sequence
from typing import NamedTuple

from oarlock.proto.arrays import MAX_MESSAGE_BYTES, Part, view_of
from oarlock.proto.buffers import ALIGNMENT, Buffers
from oarlock.proto.errors import Malformed, OutOfMemory

VERSION = 1
# Kinds of frames. What a reply answers is the frame before it on the same connection.
HELLO, REPLY, PULL, PUSH, REPLICATE, LOOKUP = range(6)
# Added to the kind of a request whose answer may have parts.
BESIDE = 0x80

_MAGIC = b"OARF"
_HEAD = struct.Struct("<4sBBHIII")
HEAD_BYTES = _HEAD.size
# More arrays than any message has: tables times arrays of a table.
MAX_PARTS = 1 << 14
# Buffers that a connection keeps for the next frames, while some of them are still looked at.
MOST_KEPT = 4
# Bytes that one call of the system moves at most, so that one sees whether the other side does anything.
STEP_BYTES = 4 << 20
# Room for what nobody wants.
SKIP_BYTES = 1 << 16
# A frame of so many bytes goes by one call of the system as a rule, and comes by one: what others need costs more than its bytes.
SMALL_BYTES = 1 << 15
# Bytes that are taken in before it is known how long a frame is: all of a small one, and of others what leads to their parts.
FIRST_BYTES = 1 << 12
# Parts given to the system in one call; it takes 1024.
_VECTOR = 512
_MOST_MILLISECONDS = (1 << 32) - 1
_PADDING = bytes(ALIGNMENT)


# Told the message of a frame and the lengths of its parts, says where each is to lie: in memory of just its length, or (None)
# anywhere. It is written to as the bytes come, also if the frame then breaks off.
Landing = Callable[[bytes, tuple[int, ...]], Sequence[memoryview | None]]


class Frame(NamedTuple):
    """A frame that came: its kind, the bytes of its message, and its parts, which lie in the receiver's buffer, or where they
    were told to."""

    kind: int
    message: bytes
    parts: list[memoryview]


class Closed(Exception):
    """The other side has closed the connection, between two frames."""


def encode(kind: int, message: bytes, parts: Sequence[Part] = ()) -> list[memoryview]:
    """Return the buffers of a frame, which share the memory of ``parts``."""
    views = [view_of(part) for part in parts]
    if len(views) > MAX_PARTS:
        raise Malformed(f"{len(views)} parts in one frame, at most {MAX_PARTS} can be")
    lengths = struct.pack(f"<{len(views)}I", *(view.nbytes for view in views))
    at = len(lengths) + len(message)
    out = [memoryview(lengths), memoryview(message)]
    for view in views:
        if at % ALIGNMENT:
            out.append(memoryview(_PADDING)[: -at % ALIGNMENT])
            at += -at % ALIGNMENT
        out.append(view)
        at += view.nbytes
    if at > _most(len(views)):
        raise OutOfMemory(f"a frame of {at} bytes is over the limit of {MAX_MESSAGE_BYTES} bytes in one message")
    head = _HEAD.pack(_MAGIC, VERSION, kind, len(views), len(message), at, 0)
    return [memoryview(head), *out]


def stamped(buffers: list[memoryview], seconds: float) -> list[memoryview]:
    """Return the same frame, which says that its sender waits ``seconds`` for an answer."""
    *head, _ = _HEAD.unpack(buffers[0])
    milliseconds = min(max(1, int(seconds * 1000)), _MOST_MILLISECONDS)
    return [memoryview(_HEAD.pack(*head, milliseconds)), *buffers[1:]]


def _most(parts: int) -> int:
    return MAX_MESSAGE_BYTES + parts * (4 + ALIGNMENT)


def send(connection: socket.socket, buffers: list[memoryview], moved: Callable[[], object] = lambda: None) -> None:
    """Send all of it, saying so step by step; OSError if that cannot be."""
    if len(buffers) <= _VECTOR and (size := sum([b.nbytes for b in buffers])) <= SMALL_BYTES:
        sent = connection.sendmsg(buffers)
        if sent == size:
            return
        moved()
        buffers = _behind(buffers, sent)
    left = Sending(buffers)
    while left.some(connection):
        moved()


def skip(connection: socket.socket, length: int) -> None:
    """Receive ``length`` bytes and keep none of them; OSError."""
    into = memoryview(bytearray(min(length, SKIP_BYTES)))
    while length:
        got = connection.recv_into(into, min(length, into.nbytes))
        if not got:
            raise _broken_off()
        length -= got


def _broken_off() -> ConnectionResetError:
    return ConnectionResetError("the connection ended inside a frame")


class Sending:
    """The buffers of a frame, as far as they were not sent yet."""

    def __init__(self, buffers: list[memoryview]) -> None:
        self._waiting = [b for b in buffers if b.nbytes]
        self._at = 0

    def some(self, connection: socket.socket) -> bool:
        """Send as much as one call of the system takes; return whether there is more. BlockingIOError changes nothing."""
        waiting, at = self._waiting, self._at
        sent = connection.sendmsg(_step(waiting[at : at + _VECTOR]))
        while at < len(waiting) and sent >= waiting[at].nbytes:
            sent -= waiting[at].nbytes
            at += 1
        if sent:
            waiting[at] = waiting[at][sent:]
        self._at = at
        return at < len(waiting)


def _step(views: list[memoryview]) -> list[memoryview]:
    """Return their first STEP_BYTES."""
    left = STEP_BYTES
    for i, view in enumerate(views):
        if view.nbytes >= left:
            return [*views[:i], view[:left]]
        left -= view.nbytes
    return views


class Head(NamedTuple):
    """What a frame says of itself, and can be."""

    kind: int
    parts: int
    size: int
    length: int
    milliseconds: int = 0

    @property
    def seconds(self) -> float | None:
        """How long the sender waits for an answer, if it says so."""
        return self.milliseconds / 1000 if self.milliseconds else None

    @property
    def memory(self) -> int:
        """Bytes that it takes to read it: the message is copied and parsed, and so are the parts if the answer may have none."""
        return self.length + 2 * (self.size if self.kind & BESIDE else self.length)

    def room(self, size: int, buffers: Buffers) -> memoryview:
        """Return room for ``size`` of its bytes. The system gives pages as they are written: a mere claim takes none."""
        try:
            return view_of(buffers.take(size))
        except MemoryError:
            raise self.no_memory() from None

    def no_memory(self) -> OutOfMemory:
        """Return what says that there is none for this frame."""
        return OutOfMemory(f"there is no memory for a frame of {self.length} bytes")

    @property
    def before(self) -> int:
        """Bytes between the head and the parts, without padding: their lengths and the message."""
        return 4 * self.parts + self.size

    def beginning(self, view: memoryview) -> tuple[tuple[int, ...], list[int], bytes]:
        """Return the parts' lengths and where each begins, and the message, of the ``before`` first bytes; Malformed."""
        lengths = struct.unpack_from(f"<{self.parts}I", view)
        begins, at = [], self.before
        for each in lengths:
            at += -at % ALIGNMENT
            begins.append(at)
            at += each
        if at != self.length:
            raise Malformed(f"a frame of {self.length} bytes whose parts end at {at}")
        return lengths, begins, bytes(view[4 * self.parts : self.before])

    def frame(self, view: memoryview) -> Frame:
        """Return the frame that ``view``, all that follows its head, is; Malformed."""
        lengths, begins, message = self.beginning(view)
        return Frame(self.kind, message, [view[at : at + n] for at, n in zip(begins, lengths, strict=True)])


def read_head(head: bytes | memoryview, most: int | None = None) -> Head:
    """Return what the first HEAD_BYTES say of a frame, of which at most ``most`` bytes may follow; Malformed, OutOfMemory."""
    magic, version, kind, parts, size, length, milliseconds = _HEAD.unpack(head)
    if magic != _MAGIC or version != VERSION:
        raise Malformed(f"no frame of version {VERSION}: it begins with {bytes(head[:5])!r}")
    if parts > MAX_PARTS or 4 * parts + size > length:
        raise Malformed(f"a frame of {length} bytes with {parts} parts and a message of {size} bytes cannot be")
    if length > (_most(parts) if most is None else most):
        raise OutOfMemory(f"a frame of {length} bytes is over the limit of {MAX_MESSAGE_BYTES} bytes in one message")
    return Head(kind, parts, size, length, milliseconds)


class Body:
    """What follows the head of a frame, on its way in: `room` is where the next bytes are to be put, `took` says how many were.

    ``came``: those that were taken in together with the head, of which nothing behind the frame's end is looked at.
    """

    def __init__(self, head: Head, came: memoryview, buffers: Buffers, landing: Landing | None = None) -> None:
        self._head = head
        self._buffers = buffers
        self._landing = landing if head.parts else None
        self._frame: Frame | None = None
        # All of it, or what comes before the parts.
        self._view = head.room(head.length if self._landing is None else head.before, buffers)
        self._room = [self._view] if self._view.nbytes else []
        self._put(came[: head.length])

    @property
    def room(self) -> list[memoryview]:
        """Where the next bytes belong, of one call of the system; empty: all are there."""
        return _step(self._room[:_VECTOR])

    def took(self, count: int) -> None:
        """Go on behind so many bytes; Malformed, OutOfMemory."""
        self._room = _behind(self._room, count)
        if not self._room and self._landing is not None:
            self._land(self._landing)

    def _put(self, data: memoryview) -> None:
        """Take in bytes that lie elsewhere."""
        while data.nbytes and self._room:
            count = min(data.nbytes, self._room[0].nbytes)
            self._room[0][:count] = data[:count]
            data = data[count:]
            self.took(count)

    def _land(self, landing: Landing) -> None:
        """Make room for the parts, now that it is known what they are."""
        lengths, begins, message = self._head.beginning(self._view)
        self._landing = None
        told = [
            view if view is not None and view.nbytes == length else None
            for view, length in zip(landing(message, lengths), lengths, strict=True)
        ]
        # The others lie as far apart as they would in a buffer of the whole frame.
        rest = sum(length + ALIGNMENT for view, length in zip(told, lengths, strict=True) if view is None)
        anywhere = self._head.room(rest, self._buffers)
        padding = memoryview(bytearray(ALIGNMENT))
        parts: list[memoryview] = []
        at, used = self._head.before, 0
        for view, length, begin in zip(told, lengths, begins, strict=True):
            if view is None:
                view = anywhere[used : used + length]
                used += length + -length % ALIGNMENT
            parts.append(view)
            self._room.extend(each for each in (padding[: begin - at], view) if each.nbytes)
            at = begin + length
        self._frame = Frame(self._head.kind, message, parts)

    def frame(self) -> Frame:
        """Return the frame, once there is no room any more; Malformed."""
        if self._frame is None:
            self._frame = self._head.frame(self._view)
        return self._frame


def _behind(views: list[memoryview], count: int) -> list[memoryview]:
    """Return what is left of them behind their first ``count`` bytes."""
    at = 0
    while at < len(views) and count >= views[at].nbytes:
        count -= views[at].nbytes
        at += 1
    return [views[at][count:], *views[at + 1 :]] if count else views[at:]


class Receiver:
    """The receiving end of one connection: frames come into buffers that are used again once nobody looks at them."""

    def __init__(
        self, connection: socket.socket, buffers: Buffers | None = None, *, first_bytes: int = FIRST_BYTES
    ) -> None:
        self._connection = connection
        self._buffers = Buffers(MOST_KEPT) if buffers is None else buffers
        self._first = memoryview(bytearray(first_bytes))
        self._at = 0

    def receive(self, most: int | None = None) -> Frame:
        """Wait for a frame, of at most ``most`` bytes after its head, and return it.

        Raises Closed at its end, OSError (also where a connection ends inside a frame), Malformed, OutOfMemory.
        """
        return self.body(self.head(most))

    def head(self, most: int | None = None, moved: Callable[[], object] = lambda: None) -> Head:
        """Wait for the head of a frame; as ``receive``. `body` or `skip` comes next. ``moved`` hears of steps but the last."""
        while self._at < HEAD_BYTES:
            got = self._connection.recv_into(self._first[self._at :])
            if not got:
                if not self._at:
                    raise Closed
                raise _broken_off()
            self._at += got
            if self._at < HEAD_BYTES:
                moved()
        return read_head(self._first[:HEAD_BYTES], most)

    def body(self, head: Head, moved: Callable[[], object] = lambda: None) -> Frame:
        """Return the frame whose head has come; ``moved`` hears of every step of it."""
        if head.length <= min(SMALL_BYTES, self._at - HEAD_BYTES):
            # All of it came with its head: it needs no room to come into, but memory of its own.
            try:
                view = memoryview(bytearray(self._first[HEAD_BYTES : HEAD_BYTES + head.length]))
            except MemoryError:
                raise head.no_memory() from None
            self._keep(head)
            return head.frame(view)
        body = Body(head, self._first[HEAD_BYTES : self._at], self._buffers)
        self._keep(head)
        while room := body.room:
            got = self._connection.recv_into(room[0], 0, socket.MSG_WAITALL)
            if not got:
                raise _broken_off()
            body.took(got)
            moved()
        return body.frame()

    @property
    def ahead(self) -> int:
        """How many bytes of a next frame came with the last one."""
        return self._at

    def skip(self, head: Head) -> None:
        """Receive the frame whose head has come, and keep none of it; OSError."""
        skip(self._connection, max(0, HEAD_BYTES + head.length - self._at))
        self._keep(head)

    def _keep(self, head: Head) -> None:
        """Keep what came of the next frame already."""
        end = HEAD_BYTES + head.length
        left = max(0, self._at - end)
        if left:
            self._first[:left] = bytes(self._first[end : self._at])
        self._at = left
