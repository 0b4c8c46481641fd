# SPDX-License-Identifier: Apache-2.0
"""Numbers of numpy are read as those of Arrow, whatever their type: callers' rows as training's files."""

import numpy as np
import pyarrow as pa
import pytest

from oarlock.data.columns import ColumnSpec, codes_of, decode, decode_plain
from oarlock.proto.errors import InvalidArgument

INTEGERS = ["<i1", "<i2", "<i4", "<i8", "<u1", "<u2", "<u4", "<u8"]
FLOATS = ["<f2", "<f4", "<f8"]
KINDS = {
    "key": INTEGERS,
    "category": [*INTEGERS, "?"],
    **{kind: [*INTEGERS, "?", *FLOATS] for kind in ("number", "float", "label")},
}


def edges(dtype: str, kind: str) -> np.ndarray:
    """Return values that a kind allows: the ends of the type, and what a float32 cannot hold exactly."""
    if dtype == "?":
        return np.array([True, False])
    if np.dtype(dtype).kind == "f":
        values = [0.0, -0.0, 1.5, 1 / 3, -60000.0, *([np.nan] if kind == "number" else [])]
        return np.array(values, dtype)
    low, high = (int(getattr(np.iinfo(dtype), name)) for name in ("min", "max"))
    near = [2**24 + 1, 2**53 + 1, 2**53 + 2**29 + 1]
    values = [low, high, high - 1, 0, 1, 7, *(value for value in near if value <= high)]
    return np.array([max(0, value) for value in values] if kind == "key" else values, dtype)


@pytest.mark.parametrize(("kind", "dtype"), [(kind, dtype) for kind, dtypes in KINDS.items() for dtype in dtypes])
def test_numbers_of_numpy_are_read_as_those_of_arrow(kind: str, dtype: str) -> None:
    values = edges(dtype, kind)
    name = codes_of("x") if kind == "category" else "x"
    expected = decode("file", 0, pa.table({"x": pa.array(values)}), [ColumnSpec("x", kind)])[name]
    frozen = values.copy()
    frozen.flags.writeable = False
    for given in (values.copy(), frozen, np.repeat(values, 2)[::2]):
        found = decode_plain(kind, given)
        assert found.dtype == expected.dtype
        assert found.tobytes() == expected.tobytes()
        assert found.flags.c_contiguous
        assert found.flags.writeable


@pytest.mark.parametrize(
    ("kind", "bad"),
    [("key", np.array([1, -1])), ("number", np.array([1, np.inf])), ("float", np.array([0, np.nan], np.float32))],
)
def test_what_a_kind_forbids_is_refused_by_its_position(kind: str, bad: np.ndarray) -> None:
    with pytest.raises(InvalidArgument, match="row 1"):
        decode_plain(kind, bad)
    assert len(decode_plain(kind, bad[:1])) == 1
    assert len(decode_plain(kind, bad[:0])) == 0
