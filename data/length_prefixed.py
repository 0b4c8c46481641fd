# SPDX-License-Identifier: Apache-2.0
"""Binary values with their lengths before them, as the Open Inference Protocol has texts: uint32, little-endian, then the bytes.

Invariant: lengths are checked against the bytes that there are before anything is copied. Any thread.
"""

from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from oarlock.embedding.jit import jit
from oarlock.proto.errors import Malformed

_PREFIX = 4


@jit
def _find(data: NDArray[np.uint8], offsets: NDArray[np.int32]) -> int:
    """Write where each value ends if all stood side by side; return how many values there are room for, -1: all, and no more."""
    at = 0
    total = 0
    offsets[0] = 0
    for i in range(offsets.shape[0] - 1):
        if at + 4 > data.shape[0]:
            return i
        length = 0
        for j in range(4):
            length |= int(data[at + j]) << (8 * j)
        at += 4
        if at + length > data.shape[0]:
            return i
        at += length
        total += length
        offsets[i + 1] = total
    return -1 if at == data.shape[0] else offsets.shape[0] - 1


@jit
def _strip(data: NDArray[np.uint8], offsets: NDArray[np.int32], out: NDArray[np.uint8]) -> None:
    """Copy the values side by side."""
    for i in range(offsets.shape[0] - 1):
        begin = offsets[i] + 4 * (i + 1)
        for j in range(offsets[i + 1] - offsets[i]):
            out[offsets[i] + j] = data[begin + j]


def split_values(name: str, data: NDArray[np.uint8], count: int) -> Any:
    """Return the ``count`` values that lie in ``data`` as an Arrow array of binary values; Malformed if it has another number."""
    offsets = np.empty(count + 1, np.int32)
    if len(data) >= 1 << 31:
        raise Malformed(f"tensor {name!r}: {len(data)} bytes; the limit is 2^31")
    found = int(_find(data, offsets))
    if found >= 0:
        raise Malformed(f"tensor {name!r}: its {len(data)} bytes are no {count} values with their lengths before them")
    out = np.empty(int(offsets[-1]), np.uint8)
    _strip(data, offsets, out)
    return pa.Array.from_buffers(pa.binary(), count, [None, pa.py_buffer(offsets), pa.py_buffer(out)])


def join_values(values: Any) -> bytes:
    """Return the bytes of an Arrow array of binary values without nulls."""
    return b"".join(len(value).to_bytes(_PREFIX, "little") + value for value in values.to_pylist())
