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
HELLO, REPLY, PULL, PUSH = 0, 1, 2, 3
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
# Parts given to the system in one call; it takes 1024.
_VECTOR = 512
_MOST_MILLISECONDS = (1 << 32) - 1
_PADDING = bytes(ALIGNMENT)


class Frame(NamedTuple):
    """A frame that came: its kind, the bytes of its message, and its parts, which lie in the receiver's buffer."""

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
    left = Sending(buffers)
    while left.some(connection):
        moved()


def skip(connection: socket.socket, length: int) -> None:
    """Receive ``length`` bytes and keep none of them; OSError."""
    into = memoryview(bytearray(min(length, SKIP_BYTES)))
    while length:
        got = connection.recv_into(into, min(length, into.nbytes))
        if not got:
            raise ConnectionResetError("the connection ended inside a frame")
        length -= got


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

    def body(self, buffers: Buffers) -> memoryview:
        """Return room for what follows the head. The system gives pages as they are written: a mere claim takes none."""
        try:
            return view_of(buffers.take(self.length))
        except MemoryError:
            raise OutOfMemory(f"there is no memory for a frame of {self.length} bytes") from None

    def frame(self, body: memoryview) -> Frame:
        """Return the frame, once all of the body is there; Malformed."""
        lengths = struct.unpack_from(f"<{self.parts}I", body)
        at = 4 * self.parts + self.size
        message = bytes(body[4 * self.parts : at])
        found = []
        for each in lengths:
            at += -at % ALIGNMENT
            found.append(body[at : at + each])
            at += each
        if at != self.length:
            raise Malformed(f"a frame of {self.length} bytes whose parts end at {at}")
        return Frame(self.kind, message, found)


def read_head(head: bytes | bytearray, most: int | None = None) -> Head:
    """Return what the first HEAD_BYTES say of a frame, of which at most ``most`` bytes may follow; Malformed, OutOfMemory."""
    magic, version, kind, parts, size, length, milliseconds = _HEAD.unpack(head)
    if magic != _MAGIC or version != VERSION:
        raise Malformed(f"no frame of version {VERSION}: it begins with {bytes(head[:5])!r}")
    if parts > MAX_PARTS or 4 * parts + size > length:
        raise Malformed(f"a frame of {length} bytes with {parts} parts and a message of {size} bytes cannot be")
    if length > (_most(parts) if most is None else most):
        raise OutOfMemory(f"a frame of {length} bytes is over the limit of {MAX_MESSAGE_BYTES} bytes in one message")
    return Head(kind, parts, size, length, milliseconds)


class Receiver:
    """The receiving end of one connection: frames come into buffers that are used again once nobody looks at them."""

    def __init__(self, connection: socket.socket, buffers: Buffers | None = None) -> None:
        self._connection = connection
        self._buffers = Buffers(MOST_KEPT) if buffers is None else buffers

    def receive(self, most: int | None = None) -> Frame:
        """Wait for a frame, of at most ``most`` bytes after its head, and return it.

        Raises Closed at its end, OSError (also where a connection ends inside a frame), Malformed, OutOfMemory.
        """
        return self.body(self.head(most))

    def head(self, most: int | None = None) -> Head:
        """Wait for the head of a frame; as ``receive``."""
        begin = bytearray(HEAD_BYTES)
        if not self._fill(memoryview(begin), first=True):
            raise Closed
        return read_head(begin, most)

    def body(self, head: Head, moved: Callable[[], object] = lambda: None) -> Frame:
        """Return the frame whose head has come; ``moved`` hears of every step of it."""
        body = head.body(self._buffers)
        self._fill(body, moved=moved)
        return head.frame(body)

    def _fill(self, view: memoryview, *, first: bool = False, moved: Callable[[], object] = lambda: None) -> bool:
        at = 0
        while at < view.nbytes:
            got = self._connection.recv_into(view[at:], min(view.nbytes - at, STEP_BYTES), socket.MSG_WAITALL)
            if not got:
                if first and not at:
                    return False
                raise ConnectionResetError("the connection ended inside a frame")
            at += got
            moved()
        return True
