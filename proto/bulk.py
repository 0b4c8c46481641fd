# SPDX-License-Identifier: Apache-2.0
"""Bulk messages: a small protobuf message and, beside it, the arrays that it speaks of, which are never copied into it.

Invariant: an Array of the message with ``part`` = n > 0 has its data in ``parts[n - 1]``; every other Array has it in itself. A
message is inlined, all data in itself, where bytes of one message are wanted (gRPC). Immutable once sent; any thread.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from google.protobuf.message import Message

from oarlock.proto.arrays import MAX_MESSAGE_BYTES, Part, view_of
from oarlock.proto.common_pb2 import Array
from oarlock.proto.errors import Malformed, OutOfMemory


@dataclass(frozen=True)
class Bulk:
    """A message and its parts: C-contiguous arrays or other buffers."""

    message: Any
    parts: Sequence[Part]

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
