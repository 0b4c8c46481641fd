# SPDX-License-Identifier: Apache-2.0
"""Raw features of callers: every datatype of a column reads as training reads the same value in a file."""

from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from oarlock.data.columns import ColumnSpec, codes_of, decode
from oarlock.proto.errors import InvalidArgument
from oarlock.serving.features import RawColumns
from oarlock.serving.tensors import DATATYPES, FLOATS, INTEGERS, Tensor, from_json, from_raw, to_raw

COLUMNS = (
    ColumnSpec("a", "number"),
    ColumnSpec("b", "number"),
    ColumnSpec("c", "category"),
    ColumnSpec("d", "category"),
    ColumnSpec("b", "category"),
    ColumnSpec("u", "key"),
    ColumnSpec("v", "key"),
    ColumnSpec("f", "float"),
)


def numeric(name: str, datatype: str, values: list[Any]) -> Tensor:
    return from_raw(name, datatype, (len(values),), np.array(values, DATATYPES[datatype][0]).tobytes())


def texts(name: str, values: list[str]) -> Tensor:
    return from_raw(
        name, "BYTES", (len(values),), b"".join(len(v.encode()).to_bytes(4, "little") + v.encode() for v in values)
    )


def given(**changes: Tensor) -> dict[str, Tensor]:
    made = {
        "a": numeric("a", "FP32", [1.5, np.nan, -2]),
        "b": numeric("b", "INT64", [7, 0, -7]),
        "c": numeric("c", "INT64", [5, -5, 1 << 40]),
        "d": texts("d", ["x", "", "ü"]),
        "u": numeric("u", "UINT64", [1, 0, (1 << 64) - 1]),
        "v": numeric("v", "UINT64", [3, 2, 1]),
        "f": numeric("f", "FP64", [0.1, 0.2, 0.3]),
    }
    return {**made, **changes}


def test_columns_read_together_are_as_read_one_by_one() -> None:
    columns, tensors = RawColumns(COLUMNS), given()
    found, rows = columns.read(tensors)
    apart = columns._apart(COLUMNS, tensors)
    assert rows == 3
    assert found.keys() == apart.keys() == {"a", "b", "u", "v", "f", *map(codes_of, "bcd")}
    for name, values in apart.items():
        assert found[name].dtype == values.dtype
        assert np.array_equal(found[name], values, equal_nan=values.dtype.kind == "f"), name
        assert found[name].flags.c_contiguous


@pytest.mark.parametrize("datatype", [*INTEGERS, *FLOATS, "BOOL", "BYTES"])
def test_a_number_is_the_same_in_every_datatype(datatype: str) -> None:
    tensor = texts("a", ["1", "0"]) if datatype == "BYTES" else numeric("a", datatype, [1, 0])
    found, _ = RawColumns(COLUMNS[:1]).read({"a": tensor})
    assert found["a"].tolist() == [1.0, 0.0]
    assert found["a"].dtype == np.float32


@pytest.mark.parametrize("datatype", [*INTEGERS, "BOOL", "BYTES"])
def test_a_category_is_the_same_in_every_datatype(datatype: str) -> None:
    tensor = texts("c", ["1", "0"]) if datatype == "BYTES" else numeric("c", datatype, [1, 0])
    found, _ = RawColumns(COLUMNS[2:3]).read({"c": tensor})
    read = decode("file", 0, pa.table({"c": ["1", "0"]}), COLUMNS[2:3])
    assert np.array_equal(found[codes_of("c")], read[codes_of("c")])


def test_what_is_missing_is_missing() -> None:
    columns = RawColumns(COLUMNS[:1])
    for tensor in (
        numeric("a", "FP32", [np.nan, 1]),
        texts("a", ["", "1"]),
        from_json("a", "FP32", [2], [None, 1]),
        from_json("a", "BYTES", [2, 1], [[None], ["1"]]),
    ):
        found, _ = columns.read({"a": tensor._replace(shape=(2,))})
        assert np.isnan(found["a"][0])
        assert found["a"][1] == 1
    codes = RawColumns(COLUMNS[2:3]).read({"c": from_json("c", "BYTES", [2], [None, "1"])})[0][codes_of("c")]
    assert codes[0] == 0


@pytest.mark.parametrize(
    ("name", "tensor", "words"),
    [
        ("b", numeric("b", "FP32", [1, 2, 3]), "input 'b': datatype FP32: give one of BYTES, INT8"),
        ("a", numeric("a", "FP64", [1, 1e300, 3]), "row 1, column 'a': 1e+300 is not a finite float32"),
        ("a", numeric("a", "FP32", [1, 2, np.inf]), "row 2, column 'a': inf is not a finite float32"),
        ("a", texts("a", ["1", "x", "2"]), "row 1, column 'a': 'x' is not a number"),
        ("v", numeric("v", "INT64", [1, 2, -3]), "row 2, column 'v': -3 is negative"),
        ("f", numeric("f", "FP32", [1, np.nan, 3]), "row 1, column 'f': nan is not a finite float32"),
        ("u", numeric("u", "UINT64", [1, 2]), "input 'u' has 2 rows, another one 3"),
        ("c", texts("c", ["x"] * 3)._replace(shape=(3, 2)), "give one value for each row"),
    ],
)
def test_what_is_wrong_is_told_by_column_and_row(name: str, tensor: Tensor, words: str) -> None:
    with pytest.raises(InvalidArgument) as refused:
        RawColumns(COLUMNS).read(given(**{name: tensor}))
    assert words in str(refused.value)


def test_a_text_that_is_no_utf8_is_a_category_and_no_number() -> None:
    raw = b"\2\0\0\0\xff\xfe"
    found, _ = RawColumns(COLUMNS[2:3]).read({"c": from_raw("c", "BYTES", (1,), raw)})
    assert found[codes_of("c")][0] > 16
    with pytest.raises(InvalidArgument, match="a text is not UTF-8"):
        RawColumns(COLUMNS[:1]).read({"a": from_raw("a", "BYTES", (1,), raw)})


def test_lists_are_no_columns_of_a_prediction() -> None:
    with pytest.raises(InvalidArgument, match="column 'l' is a key_list, which cannot be given"):
        RawColumns([ColumnSpec("l", "key_list")])


@pytest.mark.parametrize(
    "data", [b"", b"\1\0\0\0", b"\0\0\0", b"\0\0\0\0\0", b"\xff\xff\xff\xff", b"\xff\xff\xff\x7fabc"]
)
def test_lengths_that_are_no_lengths_are_refused(data: bytes) -> None:
    with pytest.raises(InvalidArgument, match=r"are no|are not what"):
        from_raw("x", "BYTES", (1,), data)


def test_raw_bytes_come_back_as_they_went() -> None:
    for tensor in given().values():
        assert to_raw(from_raw(tensor.name, tensor.datatype, tensor.shape, to_raw(tensor))) == to_raw(tensor)
    half = np.arange(9, dtype="<u8").tobytes()
    shifted = memoryview(b"x" + half)[1:]
    assert from_raw("k", "UINT64", (9,), shifted).values.tolist() == list(range(9))
