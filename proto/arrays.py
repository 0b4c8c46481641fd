# SPDX-License-Identifier: Apache-2.0
"""Arrays as messages: little-endian bytes with dtype and shape, checked against limits before they are believed.

Invariant: `unpack` returns an array only if data, dtype and shape agree; the array is read-only and shares the
message's memory. Any thread.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from google.protobuf.message import EncodeError, Message
from numpy.typing import NDArray

from oarlock.proto import common_pb2 as pb
from oarlock.proto.errors import Malformed, OutOfMemory

# One message may hold this many bytes; gRPC refuses larger ones before they are read (rpc.py).
MAX_MESSAGE_BYTES = 128 << 20
MAX_DIMENSIONS = 4

# Arrays from here on travel beside their message, if it has a place for that: a small one is sooner copied.
PART_BYTES = 1024

# What an array's data may be when it travels beside its message.
Part = NDArray[Any] | memoryview | bytes | bytearray

_DTYPES: dict[int, np.dtype[Any]] = {
    pb.UINT64: np.dtype("<u8"),
    pb.INT32: np.dtype("<i4"),
    pb.FLOAT32: np.dtype("<f4"),
    pb.UINT32: np.dtype("<u4"),
    pb.UINT8: np.dtype("u1"),
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
# What readers ask for: the type's dtype and its code. Looked up, since making a dtype costs more than all else of a small array.
_WANTED: dict[type[np.generic], tuple[np.dtype[Any], int]] = {dtype.type: (dtype, c) for dtype, c in _CODES.items()}


def encoded(message: Message, what: str) -> bytes:
    """Return the bytes of a message that is ready to travel; OutOfMemory if it is too large for that."""
    try:
        data: bytes = message.SerializeToString()
    except EncodeError:
        # Over 2 GiB there are no bytes of a message at all.
        raise OutOfMemory(f"{what} is over the limit of {MAX_MESSAGE_BYTES} bytes in one message") from None
    if len(data) > MAX_MESSAGE_BYTES:
        raise OutOfMemory(f"{what} is {len(data)} bytes, over the limit of {MAX_MESSAGE_BYTES} bytes in one message")
    return data


def pack(array: NDArray[Any], parts: list[Part] | None = None) -> pb.Array:
    """Return ``array`` (uint64, int32, uint32, uint8 or float32, up to 4 dimensions) as a message.

    The data is copied into it; or, if it is not small, put into ``parts`` as it is: it must not change any more then.
    """
    if array.ndim > MAX_DIMENSIONS:
        raise Malformed(f"an array of {array.ndim} dimensions cannot travel; at most {MAX_DIMENSIONS} can")
    values, code = array, _CODES.get(array.dtype)
    if code is None:
        dtype = array.dtype.newbyteorder("<")
        code = _CODES.get(dtype)
        if code is None:
            raise Malformed(f"an array of {array.dtype} cannot travel; use one of {', '.join(d.name for d in _CODES)}")
        values = array.astype(dtype, copy=False)
    if parts is None or array.nbytes < PART_BYTES:
        return pb.Array(data=values.tobytes(), dtype=code, shape=array.shape)  # type: ignore[arg-type]
    parts.append(np.ascontiguousarray(values))
    return pb.Array(dtype=code, shape=array.shape, part=len(parts))  # type: ignore[arg-type]


def unpack(
    message: pb.Array,
    dtype: type[np.generic],
    what: str,
    *,
    dims: int = 1,
    columns: int | None = None,
    parts: Sequence[Part] = (),
) -> NDArray[Any]:
    """Return the message's array, which must have ``dtype`` and ``dims`` dimensions (and ``columns`` in the last one).

    ``parts``: what came beside the message that the array is from. An absent array is an empty one. Malformed names ``what``
    and the two things that disagree.
    """
    wanted, expected = _WANTED[dtype]
    code = message.dtype
    if code == pb.DTYPE_UNSPECIFIED and not message.part and not message.data and not message.shape:
        return np.empty((0,) * (dims - 1) + (columns or 0,) if dims > 1 else (0,), dtype=wanted)
    if code != expected:
        found = _DTYPES.get(code)
        raise Malformed(f"{what}: dtype {found.name if found else code}, wanted {wanted.name}")
    # Counted before it is copied: a shape of a hundred bytes a dimension in memory is one byte a dimension in a message.
    dimensions = message.shape
    if len(dimensions) != dims or dims > MAX_DIMENSIONS:
        raise Malformed(f"{what}: {len(dimensions)} dimensions, wanted {dims}")
    shape = tuple(dimensions)
    size = math.prod(shape)
    if size * wanted.itemsize > MAX_MESSAGE_BYTES:
        raise OutOfMemory(f"{what}: {size} values are over the limit of {MAX_MESSAGE_BYTES} bytes in one message")
    data = _data(message, what, parts)
    if size * wanted.itemsize != data.nbytes:
        raise Malformed(f"{what}: {data.nbytes} bytes for shape {shape} of {wanted.name}")
    if columns is not None and shape[-1] != columns:
        raise Malformed(f"{what}: {shape[-1]} columns, wanted {columns}")
    array = np.frombuffer(data, dtype=wanted)
    if dims != 1:
        array = array.reshape(shape)
    array.flags.writeable = False
    return array


def _data(message: pb.Array, what: str, parts: Sequence[Part]) -> memoryview:
    part, data = message.part, message.data
    if not part:
        return memoryview(data)
    if data or part > len(parts):
        raise Malformed(f"{what}: the data is said to be part {part} of {len(parts)}, and {len(data)} bytes")
    return view_of(parts[part - 1])


def view_of(part: Part) -> memoryview:
    """Return a part's bytes, without a copy."""
    view = memoryview(part)  # type: ignore[arg-type]
    # A shape with a zero in it cannot be cast.
    return view.cast("B") if view.nbytes else memoryview(b"")
