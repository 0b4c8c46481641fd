# SPDX-License-Identifier: Apache-2.0
"""Columns: what a model reads of a row, and the way from an Arrow column to a checked numpy array.

Invariant: an array that leaves here is contiguous and writable (kernels are compiled once, not again for read-only
arrays), has the dtype of its kind and holds no value that its kind forbids;
a bad one ends in an error that names the file, the row's position in it and the value. Callable from any thread.

    kind       Parquet types            array
    key        integers                 uint64[rows]; no null, none negative
    float      float, integer, bool     float32[rows]; no null, all finite
    label      as float                 float32[rows]; as float
    key_list   lists of integers        values: uint64[n] under the column's name and offsets: int64[rows + 1] under
                                        ``offsets_of(name)``; row r holds values[offsets[r]:offsets[r + 1]]
    number     as float, or text        float32[rows]; null and missing are NaN, none infinite
    category   text, integers, bool,    uint64[rows] under ``codes_of(name)``, so that one column can be read as a number
               dictionaries of these    too: a hash of the value (``data/categories.py``), null is NULL_CATEGORY
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from oarlock.data.categories import hash_array, hash_numbers, is_category
from oarlock.proto.errors import InvalidArgument

Arrays = dict[str, npt.NDArray[Any]]

KINDS = {
    "key": "an integer type (int8 to int64, uint8 to uint64)",
    "float": "a number type (float, integer or bool)",
    "label": "a number type (float, integer or bool)",
    "key_list": "a list of an integer type",
    "number": "a number type (float, integer or bool), or strings that hold numbers",
    "category": "strings, binary, an integer type, bool, or a dictionary of these",
}


@dataclass(frozen=True)
class ColumnSpec:
    """A column by name and what it is: a name of ``KINDS``."""

    name: str
    kind: str

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise InvalidArgument(f"column name {self.name!r}: give a non-empty string")
        if self.kind not in KINDS:
            raise InvalidArgument(f"column {self.name}: kind {self.kind!r}: choose one of {', '.join(KINDS)}")


def offsets_of(name: str) -> str:
    """Return the name under which the offsets of a list column are found."""
    return f"{name}:offsets"


def codes_of(name: str) -> str:
    """Return the name under which the codes of a categorical column are found."""
    return f"{name}:codes"


def check_schema(path: str, schema: Any, columns: Sequence[ColumnSpec]) -> None:
    """Raise unless the Arrow schema of the file at ``path`` has every column once and with a type of its kind."""
    for column in columns:
        found = schema.get_all_field_indices(column.name)
        if not found:
            names = ", ".join(schema.names) or "none"
            raise InvalidArgument(f"{path}: no column {column.name!r}; the file's columns are {names}")
        if len(found) > 1:
            raise InvalidArgument(f"{path}: column {column.name!r} appears {len(found)} times; keep one of them")
        kind = schema.field(found[0]).type
        if not _fits(column.kind, kind):
            raise InvalidArgument(
                f"{path}: column {column.name!r} has type {kind}, but a {column.kind} column needs "
                f"{KINDS[column.kind]}; convert the column and write the file again"
            )


def decode(path: str, first_row: int, table: Any, columns: Sequence[ColumnSpec]) -> Arrays:
    """Return the arrays of an Arrow table whose first row stands at ``first_row`` of the file at ``path``."""
    arrays: Arrays = {}
    for column in columns:
        place = _Place(path, column.name, first_row)
        chunk = _one_chunk(table.column(column.name))
        if column.kind == "key":
            arrays[column.name] = _keys(place, chunk)
        elif column.kind == "key_list":
            arrays[column.name], arrays[offsets_of(column.name)] = _key_list(place, chunk)
        elif column.kind == "category":
            arrays[codes_of(column.name)] = hash_array(chunk)
        elif column.kind == "number":
            arrays[column.name] = _numbers(place, chunk)
        else:
            arrays[column.name] = _floats(place, chunk)
    return arrays


def decode_plain(kind: str, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return the array of a column of numpy's numbers, as ``decode`` does of one of Arrow's; no lists of them.

    An InvalidArgument names the position, and no column.
    """
    if kind == "category":
        codes = np.empty(len(values), np.uint64)
        hash_numbers(values, codes)
        return codes
    place = _Place("values", kind, 0)
    if kind == "key":
        return _as_keys(place, values)
    return _as_numbers(place, values) if kind == "number" else _as_floats(place, values)


@dataclass(frozen=True)
class _Place:
    path: str
    column: str
    first_row: int

    def bad(self, row: int, what: str) -> InvalidArgument:
        return InvalidArgument(f"{self.path}: row {self.first_row + row}, column {self.column!r}: {what}")


def _is_list(kind: Any) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _is_text(kind: Any) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _fits(kind: str, found: Any) -> bool:
    if kind == "category":
        return is_category(found)
    if kind == "number" and (_is_text(found) or pa.types.is_null(found)):
        return True
    if kind == "key":
        return bool(pa.types.is_integer(found))
    if kind == "key_list":
        return _is_list(found) and bool(pa.types.is_integer(found.value_type))
    return bool(pa.types.is_floating(found) or pa.types.is_integer(found) or pa.types.is_boolean(found))


def _one_chunk(column: Any) -> Any:
    if column.num_chunks == 1:
        return column.chunk(0)
    return pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)


def _first_null(chunk: Any) -> int:
    return int(np.argmax(chunk.is_null().to_numpy(zero_copy_only=False)))


def _owned(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return np.require(values, requirements=("C", "W", "O"))


def _to_keys(values: npt.NDArray[Any]) -> npt.NDArray[np.uint64]:
    return _owned(values.view(np.uint64) if values.dtype == np.int64 else values.astype(np.uint64, copy=False))


def _keys(place: _Place, chunk: Any) -> npt.NDArray[np.uint64]:
    if chunk.null_count:
        raise place.bad(_first_null(chunk), "null is not a key; give every row an id")
    return _as_keys(place, chunk.to_numpy(zero_copy_only=False))


def _as_keys(place: _Place, values: npt.NDArray[Any]) -> npt.NDArray[np.uint64]:
    if values.dtype.kind == "i" and values.size and values.min() < 0:
        row = int(np.argmax(values < 0))
        raise place.bad(row, f"{values[row]} is negative; a key is an integer from 0 to 2^64 - 1")
    return _to_keys(values)


def _key_list(place: _Place, chunk: Any) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.int64]]:
    if chunk.null_count:
        raise place.bad(_first_null(chunk), "null is not a list; use an empty list")
    if pa.types.is_fixed_size_list(chunk.type):
        offsets = np.arange(len(chunk) + 1, dtype=np.int64) * chunk.type.list_size
    else:
        offsets = chunk.offsets.to_numpy(zero_copy_only=False).astype(np.int64)
        # A sliced column's offsets count from the whole buffer; flatten() below starts at the slice.
        offsets -= offsets[0]
    values = chunk.flatten()
    bad = _first_null(values) if values.null_count else -1
    keys = values.to_numpy(zero_copy_only=False) if bad < 0 else np.empty(0, np.uint64)
    if keys.dtype.kind == "i" and keys.size and keys.min() < 0:
        bad = int(np.argmax(keys < 0))
    if bad >= 0:
        row = int(np.searchsorted(offsets, bad, side="right")) - 1
        raise place.bad(row, f"the list holds {values[bad].as_py()}; a key is an integer from 0 to 2^64 - 1")
    return _to_keys(keys), _owned(offsets)


def _floats(place: _Place, chunk: Any) -> npt.NDArray[np.float32]:
    if chunk.null_count:
        raise place.bad(_first_null(chunk), "the value is null; fill it or leave the row out")
    return _as_floats(place, chunk.to_numpy(zero_copy_only=False))


def _as_floats(place: _Place, values: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    with np.errstate(over="ignore"):
        floats: npt.NDArray[np.float32] = _owned(values.astype(np.float32, copy=False))
    finite = np.isfinite(floats)
    if not finite.all():
        row = int(np.argmin(finite))
        raise place.bad(row, f"{values[row]} is not a finite float32; fill it or leave the row out")
    return floats


def _numbers(place: _Place, chunk: Any) -> npt.NDArray[np.float32]:
    if _is_text(chunk.type):
        chunk = parse_numbers(chunk, place.bad)
    elif not pa.types.is_floating(chunk.type):
        chunk = (chunk.cast(pa.uint8()) if pa.types.is_boolean(chunk.type) else chunk).cast(pa.float64(), safe=False)
    return _as_numbers(place, chunk.to_numpy(zero_copy_only=False))


def _as_numbers(place: _Place, values: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    if values.dtype.kind != "f":
        values = values.astype(np.float64)
    with np.errstate(over="ignore"):
        floats: npt.NDArray[np.float32] = _owned(values.astype(np.float32, copy=False))
    infinite = np.isinf(floats)
    if infinite.any():
        row = int(np.argmax(infinite))
        raise place.bad(
            row, f"{values[row]} is not a finite float32; correct it, or leave it empty where it is unknown"
        )
    return floats


def parse_numbers(texts: Any, bad: Callable[[int, str], InvalidArgument]) -> Any:
    """Return the doubles of an Arrow array of strings; what is none raises ``bad(row, what)`` for the first one."""
    try:
        return texts.cast(pa.float64())
    except pa.ArrowInvalid:
        # The first bad value by bisection: all rows before ``low`` are good, not all before ``high``.
        low, high = 0, len(texts)
        while low + 1 < high:
            middle = (low + high) // 2
            try:
                texts.slice(low, middle - low).cast(pa.float64())
                low = middle
            except pa.ArrowInvalid:
                high = middle
        value = texts[low].as_py()
        text = value if len(value) <= 40 else f"{value[:40]}..."
        raise bad(low, f"{text!r} is not a number; correct it, or list it as missing in the schema") from None
