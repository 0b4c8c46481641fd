# SPDX-License-Identifier: Apache-2.0
"""Raw features of callers, as tensors, to the arrays that a recipe encodes: read as training reads its files.

    kind of column   datatypes
    key              integers, none negative
    float            FP16, FP32, FP64, integers, BOOL; all finite
    number           the same, or BYTES that hold a number; NaN, null and an empty text are missing
    category         BYTES, integers, BOOL; null is missing

Invariant: what leaves here has the kinds' arrays (data/columns.py), all of one length; an error names the input and the row,
counted from 0. Pure; any thread.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from oarlock.data.columns import Arrays, ColumnSpec, decode
from oarlock.proto.errors import InvalidArgument, Malformed
from oarlock.serving.tensors import BYTES, FLOATS, INTEGERS, Tensor, arrow_of

_NUMBERS = (*FLOATS, *INTEGERS, "BOOL")
DATATYPES_OF = {
    "key": INTEGERS,
    "float": _NUMBERS,
    "label": _NUMBERS,
    "number": (*_NUMBERS, BYTES),
    "category": (BYTES, *INTEGERS, "BOOL"),
}
# What is told of a column of these kinds.
_USUAL = {"key": "UINT64", "float": "FP32", "label": "FP32", "number": "FP32", "category": BYTES}


def kinds_of(columns: Sequence[ColumnSpec]) -> dict[str, set[str]]:
    """Return the kinds of each column by name: one may be read as a number and as a category."""
    kinds: dict[str, set[str]] = {}
    for column in columns:
        if column.kind not in DATATYPES_OF:
            raise InvalidArgument(f"column {column.name!r} is a {column.kind}, which cannot be given for a prediction")
        kinds.setdefault(column.name, set()).add(column.kind)
    return kinds


def usual_datatype(kinds: set[str]) -> str:
    """Return the datatype that metadata name for a column."""
    return BYTES if "category" in kinds else _USUAL[min(kinds)]


def arrays_of(columns: Sequence[ColumnSpec], tensors: Mapping[str, Tensor]) -> tuple[Arrays, int]:
    """Return the columns' arrays and how many rows they have."""
    kinds = kinds_of(columns)
    if missing := [name for name in kinds if name not in tensors]:
        raise InvalidArgument(f"input {missing[0]!r} is missing; this model needs {', '.join(kinds)}"[:1000])
    if unknown := [name for name in tensors if name not in kinds]:
        raise InvalidArgument(f"input {unknown[0]!r} is none of this model's, which are {', '.join(kinds)}"[:1000])
    rows, found = -1, {}
    for name, of in kinds.items():
        tensor = tensors[name]
        allowed = [each for each in DATATYPES_OF[min(of)] if all(each in DATATYPES_OF[kind] for kind in of)]
        if tensor.datatype not in allowed:
            raise InvalidArgument(f"input {name!r}: datatype {tensor.datatype}: give one of {', '.join(allowed)}")
        if len(tensor.shape) > 1 and tensor.shape[1] != 1:
            raise Malformed(
                f"input {name!r}: shape {list(tensor.shape)}: give one value for each row, [rows] or [rows, 1]"
            )
        if rows >= 0 and tensor.shape[0] != rows:
            raise Malformed(f"input {name!r} has {tensor.shape[0]} rows, another one {rows}")
        rows = tensor.shape[0]
        found[name] = _text(name, arrow_of(tensor)) if "number" in of and tensor.datatype == BYTES else arrow_of(tensor)
    return decode("request", 0, pa.table(found), columns), rows


def _text(name: str, values: Any) -> Any:
    """Return binary values as text, null where it is empty."""
    try:
        texts = values.cast(pa.string())
    except pa.ArrowInvalid:
        raise InvalidArgument(f"input {name!r}: a text is not UTF-8") from None
    return pc.if_else(pc.equal(pc.binary_length(texts), 0), pa.scalar(None, pa.string()), texts)
