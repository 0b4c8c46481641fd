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

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from oarlock.data.columns import Arrays, ColumnSpec, codes_of, decode, decode_plain
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


class RawColumns:
    """The columns that a model is given: which datatypes each takes, and how tensors of them become arrays."""

    def __init__(self, columns: Sequence[ColumnSpec]) -> None:
        self._columns = tuple(columns)
        # By name; one may be read as a number and as a category.
        self._kinds: dict[str, set[str]] = {}
        for column in columns:
            if column.kind not in DATATYPES_OF:
                raise InvalidArgument(
                    f"column {column.name!r} is a {column.kind}, which cannot be given for a prediction"
                )
            self._kinds.setdefault(column.name, set()).add(column.kind)
        self._allowed = {
            name: [each for each in DATATYPES_OF[min(kinds)] if all(each in DATATYPES_OF[kind] for kind in kinds)]
            for name, kinds in self._kinds.items()
        }

    def told(self) -> dict[str, str]:
        """Return the datatype that metadata name for each column."""
        return {name: BYTES if "category" in kinds else _USUAL[min(kinds)] for name, kinds in self._kinds.items()}

    def read(self, tensors: Mapping[str, Tensor]) -> tuple[Arrays, int]:
        """Return the columns' arrays and how many rows they have."""
        if self._kinds.keys() != tensors.keys():
            self._differ(tensors)
        rows = self._rows(tensors)
        try:
            return self._together(tensors, rows), rows
        except InvalidArgument:
            # Column by column, which tells the column that is at fault, and its row.
            return self._apart(self._columns, tensors), rows

    def _rows(self, tensors: Mapping[str, Tensor]) -> int:
        """Return how many rows all tensors have, whose datatypes and shapes can be the columns'."""
        rows = -1
        for name, allowed in self._allowed.items():
            tensor = tensors[name]
            if tensor.datatype not in allowed:
                raise InvalidArgument(f"input {name!r}: datatype {tensor.datatype}: give one of {', '.join(allowed)}")
            if len(tensor.shape) > 1 and tensor.shape[1] != 1:
                raise Malformed(
                    f"input {name!r}: shape {list(tensor.shape)}: give one value for each row, [rows] or [rows, 1]"
                )
            if rows >= 0 and tensor.shape[0] != rows:
                raise Malformed(f"input {name!r} has {tensor.shape[0]} rows, another one {rows}")
            rows = tensor.shape[0]
        return rows

    def _apart(self, columns: Sequence[ColumnSpec], tensors: Mapping[str, Tensor]) -> Arrays:
        found = {}
        for name in {column.name: None for column in columns}:
            values = arrow_of(tensors[name])
            text = tensors[name].datatype == BYTES and "number" in self._kinds[name]
            found[name] = _text(name, values) if text else values
        return decode("request", 0, pa.table(found), columns)

    def _together(self, tensors: Mapping[str, Tensor], rows: int) -> Arrays:
        """Return the same as ``_apart``, with columns of one kind that came as one datatype read as one long one."""
        groups: dict[tuple[str, str], list[str]] = {}
        rest: list[ColumnSpec] = []
        for column in self._columns:
            tensor = tensors[column.name]
            if isinstance(tensor.values, np.ndarray):
                groups.setdefault((column.kind, tensor.datatype), []).append(column.name)
            else:
                rest.append(column)
        out: Arrays = {}
        for (kind, _), names in groups.items():
            whole = decode_plain(kind, np.concatenate([tensors[name].values for name in names]))
            for number, name in enumerate(names):
                out[codes_of(name) if kind == "category" else name] = whole[number * rows : (number + 1) * rows]
        return out | self._apart(rest, tensors) if rest else out

    def _differ(self, tensors: Mapping[str, Tensor]) -> None:
        """Raise for inputs that are not those of the columns."""
        known = ", ".join(self._kinds)
        if missing := [name for name in self._kinds if name not in tensors]:
            raise InvalidArgument(f"input {missing[0]!r} is missing; this model needs {known}"[:1000])
        unknown = next(name for name in tensors if name not in self._kinds)
        raise InvalidArgument(f"input {unknown!r} is none of this model's, which are {known}"[:1000])


def _text(name: str, values: Any) -> Any:
    """Return binary values as text, null where it is empty."""
    try:
        texts = values.cast(pa.string())
    except pa.ArrowInvalid:
        raise InvalidArgument(f"input {name!r}: a text is not UTF-8") from None
    return pc.if_else(pc.equal(pc.binary_length(texts), 0), pa.scalar(None, pa.string()), texts)
