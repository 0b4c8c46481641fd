# SPDX-License-Identifier: Apache-2.0
"""A file of tensors in the safetensors format, written piece by piece, whole under its name or not there at all.

    8 bytes      length n of the header, uint64, little-endian
    n bytes      JSON: name -> {"dtype", "shape", "data_offsets": [begin, end]}, offsets counted from the end of the header, and
                 "__metadata__": text by name; blanks at its end, so that the first tensor begins at a multiple of 8
    the rest     the tensors, in the order of the header, without gaps, little-endian, row-major

Invariant: the file is as long as its header says from the start, and gets its name only when each tensor was filled exactly;
nothing in it can be run. Shapes are known before the first piece is written, so no more than a piece is in memory. One thread.
"""

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from oarlock.export.publish import partial_of, publish, refuse_existing
from oarlock.proto.errors import InvalidArgument, Malformed

_TYPES = {
    "U64": np.dtype("<u8"),
    "I64": np.dtype("<i8"),
    "F32": np.dtype("<f4"),
    "U32": np.dtype("<u4"),
    "U8": np.dtype("u1"),
}
_CODES = {dtype: code for code, dtype in _TYPES.items()}
# What the format's own readers allow.
MAX_HEADER_BYTES = 100_000_000


class SafetensorsFile:
    """Writes tensors to ``path``: dtype and shape by name; ``metadata`` is text by name."""

    def __init__(
        self, path: Path, tensors: Mapping[str, tuple[Any, tuple[int, ...]]], metadata: Mapping[str, str]
    ) -> None:
        refuse_existing(path)
        self.path = path
        self._partial = partial_of(path)
        self._begins: dict[str, int] = {}
        self._ends: dict[str, int] = {}
        self._types: dict[str, np.dtype[Any]] = {}
        self._filled = dict.fromkeys(tensors, 0)
        header: dict[str, Any] = {"__metadata__": dict(metadata)}
        at = 0
        for name, (kind, shape) in tensors.items():
            dtype = np.dtype(kind).newbyteorder("<")
            if dtype not in _CODES:
                raise InvalidArgument(f"tensor {name}: {dtype} is none of {', '.join(_TYPES)}")
            begin, at = at, at + dtype.itemsize * math.prod(shape)
            self._begins[name], self._ends[name], self._types[name] = begin, at, dtype
            header[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [begin, at]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        if len(text) > MAX_HEADER_BYTES:
            raise InvalidArgument(f"{path}: the header takes {len(text)} bytes; the format allows {MAX_HEADER_BYTES}")
        self._header = struct.pack("<Q", len(text)) + text
        self._bytes = at
        self._file: BinaryIO

    def __enter__(self) -> "SafetensorsFile":
        self._file = self._partial.open("wb")
        self._file.write(self._header)
        return self

    def write(self, name: str, values: NDArray[Any]) -> None:
        """Add values to a tensor, behind those that it has."""
        if values.dtype.newbyteorder("<") != self._types[name]:
            raise Malformed(f"tensor {name}: {values.dtype} came for {self._types[name]}")
        data = np.ascontiguousarray(values, self._types[name]).reshape(-1).view(np.uint8)
        at = self._begins[name] + self._filled[name]
        if at + len(data) > self._ends[name]:
            raise Malformed(f"tensor {name}: more values came than its shape has")
        self._file.seek(len(self._header) + at)
        self._file.write(data.data)
        self._filled[name] += len(data)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            with self._file:
                if kind is None:
                    for name, filled in self._filled.items():
                        if filled != self._ends[name] - self._begins[name]:
                            raise Malformed(f"tensor {name}: fewer values came than its shape has")
                    self._file.truncate(len(self._header) + self._bytes)
            if kind is None:
                publish(self._partial, self.path)
        finally:
            self._partial.unlink(missing_ok=True)
