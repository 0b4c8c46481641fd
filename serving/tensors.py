# SPDX-License-Identifier: Apache-2.0
"""Tensors of the Open Inference Protocol: their datatypes, and the three forms in which their values come and go.

    raw        the bytes of all values, little-endian; of BYTES a uint32 length before each
    contents   the field of an InferTensorContents that the datatype has
    JSON       a list, flat or nested like the shape

Invariant: a Tensor that exists has as many values as its shape says. What came from outside is checked before memory is taken for
it. Pure; any thread.
"""

from collections.abc import Iterable
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from oarlock.data.length_prefixed import join_values, split_values
from oarlock.proto.errors import InvalidArgument, Malformed

BYTES = "BYTES"
# numpy's dtype and the field of InferTensorContents; FP16 and BF16 have none.
DATATYPES: dict[str, tuple[str, str]] = {
    "BOOL": ("?", "bool_contents"),
    "INT8": ("<i1", "int_contents"),
    "INT16": ("<i2", "int_contents"),
    "INT32": ("<i4", "int_contents"),
    "INT64": ("<i8", "int64_contents"),
    "UINT8": ("<u1", "uint_contents"),
    "UINT16": ("<u2", "uint_contents"),
    "UINT32": ("<u4", "uint_contents"),
    "UINT64": ("<u8", "uint64_contents"),
    "FP16": ("<f2", ""),
    "FP32": ("<f4", "fp32_contents"),
    "FP64": ("<f8", "fp64_contents"),
    BYTES: ("", "bytes_contents"),
}
INTEGERS = ("INT8", "INT16", "INT32", "INT64", "UINT8", "UINT16", "UINT32", "UINT64")
FLOATS = ("FP16", "FP32", "FP64")
MAX_DIMS = 2
MAX_VALUES = 1 << 26
MAX_NAME = 256


class Tensor(NamedTuple):
    """``values``: of BYTES an Arrow array of binary values, of others a flat numpy array; an Arrow array where some are null."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    values: Any


def count_of(name: str, datatype: str, shape: Iterable[Any]) -> tuple[tuple[int, ...], int]:
    """Return the shape and how many values it has; InvalidArgument for what is none, or is too much."""
    if len(name) > MAX_NAME:
        raise Malformed(f"a tensor's name has {len(name)} characters; the limit is {MAX_NAME}")
    if datatype not in DATATYPES:
        raise InvalidArgument(f"tensor {name!r}: datatype {datatype[:20]!r}: give one of {', '.join(DATATYPES)}")
    dims: list[int] = []
    total = 1
    for value in shape:
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_VALUES:
            raise Malformed(f"tensor {name!r}: a dimension of {str(value)[:40]}: give integers from 0 to {MAX_VALUES}")
        dims.append(value)
        total *= value
        if len(dims) > MAX_DIMS:
            raise Malformed(f"tensor {name!r} has more than {MAX_DIMS} dimensions")
    if not dims or total > MAX_VALUES:
        raise Malformed(
            f"tensor {name!r}: {total} values of shape {dims}: give one dimension or more, and {MAX_VALUES} at most"
        )
    return tuple(dims), total


def from_raw(name: str, datatype: str, shape: Iterable[int], data: Any) -> Tensor:
    """Return the tensor of raw bytes."""
    dims, total = count_of(name, datatype, shape)
    view = memoryview(data).cast("B")
    if datatype == BYTES:
        if total * 4 > len(view):
            raise _differs(name, dims, f"{len(view)} bytes")
        return Tensor(name, datatype, dims, split_values(name, np.frombuffer(view, np.uint8), total))
    dtype = np.dtype(DATATYPES[datatype][0])
    if len(view) != total * dtype.itemsize:
        raise _differs(name, dims, f"{len(view)} bytes")
    if datatype == "BOOL":
        # Any other byte would be no bool of numpy's.
        return Tensor(name, datatype, dims, np.frombuffer(view, np.uint8) != 0)
    # A slice of a larger message may begin anywhere.
    values = np.frombuffer(view, dtype)
    return Tensor(name, datatype, dims, values if values.flags.aligned else values.copy())


def from_contents(name: str, datatype: str, shape: Iterable[int], contents: Any) -> Tensor:
    """Return the tensor of an InferTensorContents."""
    dims, total = count_of(name, datatype, shape)
    kind, field = DATATYPES[datatype]
    if not field:
        raise InvalidArgument(f"tensor {name!r}: {datatype} has no contents in this protocol: give raw_input_contents")
    set_fields = [found.name for found, _ in contents.ListFields()]
    if set_fields not in ([field], []):
        raise Malformed(f"tensor {name!r}: {datatype} stands in {field}, not in {', '.join(set_fields)}")
    values = getattr(contents, field)
    if len(values) != total:
        raise _differs(name, dims, f"{len(values)} values")
    if datatype == BYTES:
        return Tensor(name, datatype, dims, pa.array(list(values), pa.binary()))
    return Tensor(name, datatype, dims, _narrow(name, datatype, np.array(values, _WIDE.get(field, kind)), kind))


# Contents of small integers are wider than their datatype.
_WIDE = {"int_contents": "<i4", "uint_contents": "<u4"}


def _narrow(name: str, datatype: str, values: NDArray[Any], kind: str) -> NDArray[Any]:
    out = values.astype(kind)
    if out.dtype != values.dtype and not np.array_equal(out, values):
        raise Malformed(f"tensor {name!r}: a value is outside {datatype}")
    return out


def from_json(name: str, datatype: str, shape: Iterable[Any], data: Any) -> Tensor:
    """Return the tensor of a JSON list; null is a value that is missing."""
    dims, total = count_of(name, datatype, shape)
    if not isinstance(data, list):
        raise Malformed(f"tensor {name!r}: data is no list")
    if len(dims) == 2 and len(data) == dims[0] and all(isinstance(row, list) for row in data):
        if any(len(row) != dims[1] for row in data):
            raise Malformed(f"tensor {name!r}: the lists in data differ from the shape {list(dims)}")
        data = list(chain.from_iterable(data))
    if len(data) != total:
        raise _differs(name, dims, f"{len(data)} values")
    kinds = _OF_JSON["BYTES" if datatype == BYTES else "BOOL" if datatype == "BOOL" else datatype[:2]]
    if not set(map(type, data)) <= kinds:
        wrong = next(value for value in data if type(value) not in kinds)
        raise Malformed(f"tensor {name!r}: {str(wrong)[:40]!r} is no {datatype}")
    try:
        if datatype == BYTES:
            values = pa.array(data, pa.string()).cast(pa.binary())
        elif datatype[:2] == "FP":
            # As float64 first: a float32 of it is rounded once.
            values = pa.array(data, pa.float64())
        else:
            values = pa.array(data, _ARROW[datatype])
    except (pa.ArrowException, OverflowError, ValueError, TypeError):
        raise Malformed(f"tensor {name!r}: a value is outside {datatype}") from None
    return Tensor(name, datatype, dims, values)


_NONE = type(None)
_OF_JSON: dict[str, set[type]] = {
    "BOOL": {bool, _NONE},
    "BYTES": {str, _NONE},
    "FP": {float, int, _NONE},
    "IN": {int, _NONE},
    "UI": {int, _NONE},
}
_ARROW = {
    "BOOL": pa.bool_(),
    **{f"INT{bits}": getattr(pa, f"int{bits}")() for bits in (8, 16, 32, 64)},
    **{f"UINT{bits}": getattr(pa, f"uint{bits}")() for bits in (8, 16, 32, 64)},
}


def arrow_of(tensor: Tensor) -> Any:
    """Return the values as an Arrow array."""
    return tensor.values if isinstance(tensor.values, pa.Array) else pa.array(tensor.values)


def to_raw(tensor: Tensor) -> bytes:
    """Return the raw bytes of a tensor that an answer has."""
    if tensor.datatype == BYTES:
        return join_values(tensor.values)
    return np.ascontiguousarray(tensor.values, DATATYPES[tensor.datatype][0]).tobytes()


def _differs(name: str, dims: tuple[int, ...], what: str) -> Malformed:
    return Malformed(f"tensor {name!r}: {what} are not what its datatype and shape {list(dims)} say")
