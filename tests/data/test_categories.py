# SPDX-License-Identifier: Apache-2.0
"""Categories: the hash of a value is the same in every Arrow form, equals its plain twin, and never changes."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from oarlock.data.categories import (
    FIRST_HASH,
    NULL_CATEGORY,
    hash_array,
    hash_integers,
    hash_text,
    hash_texts,
    is_category,
    replace_codes,
)
from oarlock.data.columns import ColumnSpec, check_schema, codes_of, decode
from oarlock.proto.errors import InvalidArgument

TEXTS = ["", "a", "17", "-5", "abcdefg", "abcdefgh", "abcdefghi", "ü" * 20, "x" * 1000, "a\0", "\0", None, "017", " 17"]
INTEGERS = [0, 1, 9, 10, 17, -5, 99_999_999, 100_000_000, -(2**63), 2**63 - 1, 10**15, 10**16, -(10**15), None]


Codes = np.ndarray[Any, Any]
Expected = Callable[[list[Any]], Codes]


@pytest.fixture
def expected(reference: ModuleType) -> Expected:
    return lambda values: np.array([reference.hash_value(value) for value in values], np.uint64)


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.binary(), pa.dictionary(pa.int8(), pa.string())])
def test_texts_in_every_form(kind: Any, expected: Expected) -> None:
    array = pa.array(TEXTS, pa.string())
    array = array.dictionary_encode() if pa.types.is_dictionary(kind) else array.cast(kind)
    wanted = expected(TEXTS)
    assert np.array_equal(hash_array(array), wanted)
    assert np.unique(wanted).size == len(TEXTS)
    # A slice counts from its own start; an empty one has no buffers to look at.
    assert np.array_equal(hash_array(array.slice(3, 6)), wanted[3:9])
    assert hash_array(array.slice(2, 0)).size == 0


def test_integers_are_their_digits(expected: Expected) -> None:
    wanted = expected(INTEGERS)
    assert np.array_equal(hash_array(pa.array(INTEGERS, pa.int64())), wanted)
    assert np.array_equal(hash_array(pa.array([None if v is None else str(v) for v in INTEGERS])), wanted)
    for kind in (pa.int8(), pa.uint8(), pa.int32(), pa.uint64()):
        assert np.array_equal(hash_array(pa.array([7, None, 100], kind)), expected([7, None, 100]))
    assert int(hash_array(pa.array([2**64 - 1], pa.uint64()))[0]) == expected([2**64 - 1])[0]
    assert np.array_equal(hash_array(pa.array([True, None, False])), expected([1, None, 0]))
    assert np.array_equal(hash_array(pa.array([5, 5, None]).dictionary_encode()), expected([5, 5, None]))


def test_random_values_against_the_twin(rng: np.random.Generator, expected: Expected) -> None:
    octets = [rng.bytes(int(size)) for size in rng.integers(0, 40, 500)]
    assert np.array_equal(hash_array(pa.array(octets, pa.binary())), expected(octets))
    whole = (rng.integers(-(2**63), 2**63, 500) >> rng.integers(0, 63, 500)).tolist()
    assert np.array_equal(hash_array(pa.array(whole)), expected(whole))
    edges = [sign * (10**k + d) for k in range(19) for d in (-1, 0, 1) for sign in (1, -1)]
    assert np.array_equal(hash_array(pa.array(edges)), expected(edges))


def test_nothing_but_null(reference: ModuleType) -> None:
    for array in (pa.array([None, None], pa.string()), pa.array([None, None]), pa.array([None, None], pa.int64())):
        assert hash_array(array).tolist() == [0, 0]
    no_values = pa.DictionaryArray.from_arrays(pa.array([None, None], pa.int8()), pa.array([], pa.string()))
    assert hash_array(no_values).tolist() == [0, 0]
    null_value = pa.DictionaryArray.from_arrays(pa.array([0, 1], pa.int8()), pa.array([None, "a"], pa.string()))
    assert hash_array(null_value).tolist() == [0, reference.hash_value("a")]


def test_hashes_are_pinned() -> None:
    # A change would lose the rows of every checkpoint.
    assert [hash_text(text) for text in ("", "17", ">50K")] == [16, 15345179612473410702, 7528864546016423475]
    assert int(NULL_CATEGORY) == 0
    assert int(FIRST_HASH) == 16


def test_few_codes_are_replaced() -> None:
    codes = np.array([5, 6, 7, 5], np.uint64)
    out = np.empty_like(codes)
    replace_codes(codes, np.array([5, 9], np.uint64), np.uint64(0), out)
    assert out.tolist() == [0, 6, 7, 0]


def test_kernels_are_compiled_once(expected: Expected) -> None:
    test_integers_are_their_digits(expected)
    for kind in (pa.string(), pa.large_string(), pa.binary(), pa.dictionary(pa.int8(), pa.string())):
        test_texts_in_every_form(kind, expected)
    for kernel in (hash_texts, hash_integers):
        if hasattr(kernel, "signatures"):
            assert len(kernel.signatures) == 1


def test_columns_of_numbers_and_categories(expected: Expected) -> None:
    table = pa.table(
        {"age": ["1.5", None, "nan", "1e3"], "n": pa.array([1, None, -2, 2**53]), "b": [True, None, False, True]}
    )
    specs = [
        ColumnSpec("age", "number"),
        ColumnSpec("age", "category"),
        ColumnSpec("n", "number"),
        ColumnSpec("b", "number"),
    ]
    check_schema("file", table.schema, specs)
    arrays = decode("file", 0, table, specs)
    assert np.array_equal(arrays["age"], np.array([1.5, np.nan, np.nan, 1000], np.float32), equal_nan=True)
    assert np.array_equal(arrays[codes_of("age")], expected(["1.5", None, "nan", "1e3"]))
    assert np.array_equal(arrays["n"], np.array([1, np.nan, -2, 2**53], np.float32), equal_nan=True)
    assert np.array_equal(arrays["b"], np.array([1, np.nan, 0, 1], np.float32), equal_nan=True)
    for values in arrays.values():
        assert values.flags.writeable
        assert values.flags.c_contiguous


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1.0, float("inf")], "row 11, column 'x': inf is not a finite float32"),
        ([1.0, -1e39], "row 11, column 'x': -1e.39 is not a finite float32"),
        (["1", "12a", "b"], "row 11, column 'x': '12a' is not a number; correct it, or list it as missing"),
        (["", "1"], "row 10, column 'x': '' is not a number"),
        (["1", "2", "9" * 60 + "x"], r"row 12, column 'x': '9{40}\.\.\.' is not a number"),
        (["1e400"], "row 10, column 'x': inf is not a finite float32"),
    ],
)
def test_numbers_that_are_none(values: list[Any], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        decode("file", 10, pa.table({"x": values}), [ColumnSpec("x", "number")])


def test_types_that_do_not_fit() -> None:
    schema = pa.schema({"x": pa.float64(), "l": pa.list_(pa.int64())})
    with pytest.raises(InvalidArgument, match="'x' has type double, but a category column needs strings"):
        check_schema("file", schema, [ColumnSpec("x", "category")])
    with pytest.raises(InvalidArgument, match=r"'l' has type list.*, but a number column needs a number type"):
        check_schema("file", schema, [ColumnSpec("l", "number")])
    assert not is_category(pa.timestamp("s"))
    assert is_category(pa.dictionary(pa.int8(), pa.int64()))
