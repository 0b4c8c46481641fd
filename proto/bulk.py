# SPDX-License-Identifier: Apache-2.0
"""Bulk messages: a small protobuf message and, beside it, the arrays that it speaks of, which are never copied into it.

Invariant: an Array of the message with ``part`` = n > 0 has its data in ``parts[n - 1]``; every other Array has it in itself. A
message is inlined, all data in itself, where bytes of one message are wanted (gRPC). Immutable once sent; any thread.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, overload

from google.protobuf.message import Message

from oarlock.proto.arrays import MAX_MESSAGE_BYTES, Part, view_of
from oarlock.proto.common_pb2 import Array
from oarlock.proto.errors import Malformed, OutOfMemory


class Parts(Sequence[Part]):
    """Parts that came from another process. Each is read once: few bytes could stand for many if several arrays named them."""

    def __init__(self, came: Sequence[Part]) -> None:
        self._came = came
        self._read = bytearray(len(came))

    def __len__(self) -> int:
        return len(self._came)

    @overload
    def __getitem__(self, number: int) -> Part: ...
    @overload
    def __getitem__(self, number: slice) -> Sequence[Part]: ...
    def __getitem__(self, number: int | slice) -> Part | Sequence[Part]:
        if isinstance(number, slice):
            return [self[i] for i in range(*number.indices(len(self)))]
        if self._read[number]:
            raise Malformed(f"two arrays are said to be part {number + 1}")
        self._read[number] = 1
        return self._came[number]

    def __iter__(self) -> Iterator[Part]:
        """Go through all of them, which reads none."""
        return iter(self._came)


# Told the message of an answer and the lengths of its parts, says where each is to be received: in memory of just its length, or
# (None) anywhere.
Landing = Callable[[Any, Sequence[int]], Sequence[memoryview | None]]


@dataclass(frozen=True)
class Bulk:
    """A message and its parts: C-contiguous arrays or other buffers.

    ``landing``, of a request: where its sender wants the answer's parts. A transport need not ask it; the parts of an answer are
    where that says they are. What it names is written to, if at all, before the call is over, also if that fails.
    """

    message: Any
    parts: Sequence[Part]
    landing: Landing | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(view_of(part).nbytes for part in self.parts)

    def SerializeToString(self) -> bytes:
        """Return the bytes of the message with all data in itself."""
        whole: bytes = inlined(self).SerializeToString()
        return whole


def opened(sent: Any) -> tuple[Any, Sequence[Part]]:
    """Return (message, parts) of a Bulk, or of a message that has everything in itself."""
    return (sent.message, sent.parts) if isinstance(sent, Bulk) else (sent, ())


def inlined(sent: Any) -> Any:
    """Return the message with the data of all its arrays in itself; OutOfMemory if that is over the limit of a message."""
    if not isinstance(sent, Bulk):
        return sent
    if sent.nbytes > MAX_MESSAGE_BYTES:
        raise OutOfMemory(
            f"arrays of {sent.nbytes} bytes are over the limit of {MAX_MESSAGE_BYTES} bytes in one message"
        )
    whole = type(sent.message)()
    whole.CopyFrom(sent.message)
    _inline(whole, sent.parts)
    return whole


def _inline(message: Message, parts: Sequence[Part]) -> None:
    """Go through the few fields of a message and fill its arrays."""
    if isinstance(message, Array):
        if message.part:
            if message.part > len(parts):
                raise Malformed(f"an array is said to be part {message.part} of {len(parts)}")
            message.data = bytes(view_of(parts[message.part - 1]))
            message.part = 0
        return
    for field, value in message.ListFields():
        if field.message_type is not None:
            for each in value if field.is_repeated else (value,):
                _inline(each, parts)
