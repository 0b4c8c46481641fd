# SPDX-License-Identifier: Apache-2.0
"""One block's file: what goes in comes out to the bit, equal content gives equal bytes, and all else is refused."""

import json
import struct
import zlib
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oarlock.checkpoint.block_file import BlockImage, decode, encode, take_rows
from oarlock.proto.errors import CorruptCheckpoint, InvalidArgument, PSError, VersionMismatch

TOP = (1 << 64) - 1


def rows(keys: list[int], /, dim: int = 2, width: int = 1, **changes: Any) -> BlockImage:
    weights = np.arange(len(keys) * dim, dtype=np.float32).reshape(len(keys), dim)
    state = -np.arange(len(keys) * width, dtype=np.float32).reshape(len(keys), width)
    values = {"kind": "rows", "name": "user", "block": 3, "seq": 9, "marks": {4: 1}}
    arrays = {"keys": np.array(keys, np.uint64), "weights": weights, "state": state}
    return BlockImage(**{**values, **arrays, **changes})


def read(data: Any) -> tuple[pa.Schema, pa.RecordBatch]:
    reader = pa.ipc.open_file(data)
    return reader.schema, reader.get_batch(0)


def rewritten(
    image: BlockImage, *, metadata: dict[bytes, bytes | None] | None = None, columns: dict[str, Any] | None = None
) -> bytes:
    """The image's file with other metadata (None takes one away) or other columns, as another program may write it."""
    schema, batch = read(encode(image))
    arrays = {name: batch.column(i) for i, name in enumerate(schema.names)} | (columns or {})
    arrays = {name: array for name, array in arrays.items() if array is not None}
    kept = {key: value for key, value in (dict(schema.metadata) | (metadata or {})).items() if value is not None}
    fields = [pa.field(name, array.type, nullable=bool(array.null_count)) for name, array in arrays.items()]
    sink = pa.BufferOutputStream()
    new = pa.schema(fields, metadata=kept)
    with pa.ipc.new_file(sink, new) as writer:
        writer.write_batch(pa.RecordBatch.from_arrays(list(arrays.values()), schema=new))
    return sink.getvalue().to_pybytes()


@given(
    keys=st.lists(st.integers(0, TOP) | st.sampled_from([0, 1, TOP]), unique=True, max_size=40),
    dim=st.integers(1, 5),
    width=st.integers(0, 4),
    marks=st.dictionaries(st.integers(0, (1 << 63) - 1), st.integers(0, (1 << 63) - 1), max_size=5),
    bits=st.integers(0, 2**32 - 1),
    dense=st.booleans(),
)
@settings(max_examples=150)
def test_what_goes_in_comes_out(
    keys: list[int], dim: int, width: int, marks: dict[int, int], bits: int, dense: bool
) -> None:
    rng = np.random.default_rng(bits)
    count = 1 if dense else len(keys)
    # Any finite bit pattern, subnormal numbers and -0.0 among them.
    weights, state = (
        rng.integers(0, 0x7F80_0000, (count, n), dtype=np.uint32).view(np.float32) * np.float32(rng.choice([-1, 1]))
        for n in (dim, width)
    )
    kind, found = ("dense", np.empty(0, np.uint64)) if dense else ("rows", np.array(keys, np.uint64))
    image = BlockImage(kind, "T-1.x", 17, 5, marks, found, weights, state)
    data = encode(image)
    back = decode(data)
    order = np.argsort(image.keys) if not dense else np.array([0])
    assert (back.kind, back.name, back.block, back.seq, dict(back.marks)) == (kind, "T-1.x", 17, 5, marks)
    assert back.keys.tobytes() == np.sort(image.keys).tobytes()
    assert back.weights.shape == weights.shape
    assert back.state.shape == state.shape
    assert back.weights.tobytes() == weights[order].tobytes()
    assert back.state.tobytes() == state[order].tobytes()
    # Equal content, in whatever order and layout, gives equal bytes.
    assert encode(back).equals(data)
    if not dense:
        mixed = rng.permutation(count)
        other = replace(
            image,
            keys=image.keys[mixed],
            weights=np.asfortranarray(weights[mixed]),
            state=state[mixed],
            marks=dict(reversed(marks.items())),
        )
        assert encode(other).equals(data)


@pytest.mark.parametrize("dtype", [np.float32, np.uint32])
@pytest.mark.parametrize("width", [0, 1, 3, 16])
def test_rows_are_taken_whole(dtype: Any, width: int, rng: np.random.Generator) -> None:
    values = rng.integers(0, 1 << 32, (50, width)).astype(dtype)
    for order in (rng.permutation(50), rng.integers(0, 50, 7), np.empty(0, np.intp)):
        for rows_of in (values, np.asfortranarray(values), values[::-1]):
            found = take_rows(rows_of, order)
            assert (found.dtype, found.shape) == (values.dtype, (len(order), width))
            assert found.tobytes() == rows_of[order].tobytes()
    assert take_rows(values[:0], np.empty(0, np.intp)).shape == (0, width)


def test_nothing_is_copied_on_the_way_back() -> None:
    data = encode(rows(list(range(1000)), dim=8, width=8))
    image = decode(data)
    for array in (image.keys, image.weights, image.state):
        address = array.__array_interface__["data"][0]
        assert data.address <= address < data.address + data.size
        assert not array.flags.writeable


def test_any_reader_of_arrow_reads_it() -> None:
    schema, batch = read(encode(rows([7, 3], dim=2, width=1)))
    assert schema.names == ["key", "weights", "state"]
    assert batch.to_pydict() == {"key": [3, 7], "weights": [[2, 3], [0, 1]], "state": [[-1], [-0.0]]}
    checksums = {
        "key": f"{zlib.crc32(struct.pack('<2Q', 3, 7)):08x}",
        "weights": f"{zlib.crc32(struct.pack('<4f', 2, 3, 0, 1)):08x}",
        "state": f"{zlib.crc32(struct.pack('<2f', -1, -0.0)):08x}",
    }
    assert dict(schema.metadata) == {
        b"oarlock.format": b"1.2",
        b"oarlock.kind": b"rows",
        b"oarlock.name": b"user",
        b"oarlock.block": b"3",
        b"oarlock.seq": b"9",
        b"oarlock.marks": b'{"4":1}',
        b"oarlock.columns": json.dumps(checksums, separators=(",", ":")).encode(),
    }
    assert read(encode(rows([1], width=0)))[0].names == ["key", "weights"]


def test_marks_ascend_by_number() -> None:
    schema, _ = read(encode(rows([], marks={10: 1, 9: 2})))
    assert schema.metadata[b"oarlock.marks"] == b'{"9":2,"10":1}'


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"kind": "sparse"}, "block kind 'sparse'"),
        ({"name": "../x"}, "table name '../x'"),
        ({"block": -1}, "block = -1"),
        ({"seq": True}, "seq = True"),
        ({"marks": {-1: 0}}, "split of a mark = -1"),
        ({"marks": {3: 1.5}}, "mark of split 3 = 1.5"),
        ({"keys": np.array([1, 2], np.int64)}, "keys is int64[2]: give a uint64 array"),
        ({"weights": np.zeros((2, 2))}, "weights is float64[2, 2]"),
        ({"weights": np.zeros(2, np.float32)}, "weights is float32[2]"),
        ({"weights": np.zeros((2, 0), np.float32)}, "1 to 2^31 - 1 weights"),
        ({"state": [[1.0], [2.0]]}, "state is list"),
        ({"state": np.zeros((3, 1), np.float32)}, "2 keys, 2 rows of weights, 3 of state"),
        ({"kind": "dense"}, "one row of weights, one of state, and no keys"),
    ],
)
def test_an_image_that_does_not_fit_is_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        rows([1, 2], **changes)
    assert says in str(caught.value)


def test_keys_are_there_once() -> None:
    with pytest.raises(InvalidArgument, match=r"table user, block 3: key 5 is there twice"):
        encode(rows([5, 9, 5]))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_are_finite(value: float) -> None:
    image = rows([30, 10, 20], dim=4)
    image.weights[1, 2] = value
    with pytest.raises(
        InvalidArgument, match=r"table user, block 3: key 10: weights\[2\] is -?(nan|inf), not a finite"
    ):
        encode(image)
    data = encode(image, check_finite=False)
    with pytest.raises(CorruptCheckpoint, match=r"rows-user.arrow: table user, block 3: key 10: weights\[2\] is"):
        decode(data, file="rows-user.arrow")
    assert not np.isfinite(decode(data, check_finite=False).weights[0, 2])
    image = rows([1])
    image.state[0, 0] = value
    with pytest.raises(InvalidArgument, match=r"key 1: state\[0\]"):
        encode(image)
    dense = rows([], kind="dense", weights=np.full((1, 3), value, np.float32), state=np.empty((1, 0), np.float32))
    with pytest.raises(InvalidArgument, match=r"dense parameter user, block 3: weights\[0\]"):
        encode(dense)


def test_large_finite_values_are_finite() -> None:
    image = rows([1, 2], weights=np.full((2, 2), np.finfo(np.float32).max, np.float32))
    assert decode(encode(image)).weights.max() == np.finfo(np.float32).max


def lists(values: list[list[float]], kind: Any = None) -> pa.Array:
    return pa.array(values, pa.list_(pa.field("item", kind or pa.float32(), nullable=False), len(values[0])))


@pytest.mark.parametrize(
    ("metadata", "error", "says"),
    [
        ({b"oarlock.format": b"2.0"}, VersionMismatch, "format 2.0; this Oarlock reads 1.x"),
        (
            {b"oarlock.format": b"0.9"},
            VersionMismatch,
            "format 0.9; this Oarlock reads 1.x: use the version of Oarlock that wrote it",
        ),
        ({b"oarlock.format": b"1"}, CorruptCheckpoint, "no format version"),
        ({b"oarlock.format": b"\xff"}, CorruptCheckpoint, "no format version"),
        ({b"oarlock.format": None}, CorruptCheckpoint, "no format version"),
        ({b"oarlock.seq": None}, CorruptCheckpoint, "metadata lacks oarlock.seq"),
        ({b"oarlock.new": b"1"}, CorruptCheckpoint, "unknown oarlock.new"),
        ({b"oarlock.new": b"1", b"oarlock.format": b"1.7"}, VersionMismatch, "format 1.7, this Oarlock knows 1.2"),
        ({b"oarlock.kind": b"cows"}, CorruptCheckpoint, "unknown kind 'cows'"),
        ({b"oarlock.name": b"a/b"}, CorruptCheckpoint, "table name 'a/b'"),
        ({b"oarlock.name": b"\xff"}, CorruptCheckpoint, "metadata cannot be read"),
        ({b"oarlock.block": b"x"}, CorruptCheckpoint, "metadata cannot be read"),
        ({b"oarlock.block": b"-1"}, CorruptCheckpoint, "block = -1"),
        ({b"oarlock.seq": b"007"}, CorruptCheckpoint, "not in their plain form"),
        ({b"oarlock.marks": b'{"4":1,"4":2}'}, CorruptCheckpoint, "not in their plain form"),
        ({b"oarlock.marks": b'{"4":-1}'}, CorruptCheckpoint, "mark of split 4 = -1"),
        ({b"oarlock.marks": b"[4]"}, CorruptCheckpoint, "metadata cannot be read"),
        ({b"oarlock.marks": b"{"}, CorruptCheckpoint, "metadata cannot be read"),
    ],
)
def test_metadata_that_does_not_fit_is_refused(
    metadata: dict[bytes, bytes | None], error: type[PSError], says: str
) -> None:
    with pytest.raises(error) as caught:
        decode(rewritten(rows([1, 2]), metadata=metadata), file="f.arrow")
    assert says in str(caught.value)
    assert str(caught.value).startswith("f.arrow: ")


def test_a_newer_minor_version_without_news_is_read() -> None:
    assert decode(rewritten(rows([1]), metadata={b"oarlock.format": b"1.7"})).keys.tolist() == [1]


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        ({"key": None}, "column key is missing"),
        ({"weights": None}, "column weights is missing"),
        ({"extra": pa.array([1, 2])}, "column 'extra' is unknown"),
        ({"key": pa.array([1, 2], pa.int64())}, "columns are key: int64"),
        ({"key": pa.array([1, None], pa.uint64())}, "column key has nulls"),
        ({"key": pa.array([2, 1], pa.uint64())}, "key 2 stands before key 1"),
        ({"key": pa.array([2, 2], pa.uint64())}, "key 2 is there twice"),
        ({"weights": pa.array([1.0, 2.0], pa.float32())}, "weights: float not null"),
        ({"weights": lists([[1.0], [2.0]], pa.float64())}, "fixed_size_list<item: double"),
        ({"weights": pa.array([[1.0], None], pa.list_(pa.float32(), 1))}, "column weights has nulls"),
        ({"state": pa.array([[1.0], [None]], pa.list_(pa.float32(), 1))}, "column state has nulls"),
        ({"state": pa.array([[1.0], [2.0]], pa.list_(pa.float32()))}, "columns are"),
        ({"weights": None, "state": None, "w": lists([[1.0], [2.0]])}, "column weights is missing"),
    ],
)
def test_columns_that_do_not_fit_are_refused(columns: dict[str, Any], says: str) -> None:
    with pytest.raises(CorruptCheckpoint) as caught:
        decode(rewritten(rows([1, 2]), columns=columns), file="f.arrow")
    assert says in str(caught.value)


def test_a_dense_file_has_one_row_and_no_key() -> None:
    dense = rows([], kind="dense", weights=np.ones((1, 3), np.float32), state=np.ones((1, 3), np.float32))
    two = {"weights": lists([[1.0, 1.0]] * 2), "state": lists([[1.0]] * 2)}
    with pytest.raises(CorruptCheckpoint, match="one row of weights"):
        decode(rewritten(dense, columns=two))
    with pytest.raises(CorruptCheckpoint, match="column 'key' is unknown"):
        decode(rewritten(dense, columns={"key": pa.array([1], pa.uint64())}))


def test_one_record_batch() -> None:
    schema, batch = read(encode(rows([1, 2])))
    for count in (0, 2):
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, schema) as writer:
            for i in range(count):
                writer.write_batch(batch.slice(i, 1))
        with pytest.raises(CorruptCheckpoint, match=f"{count} record batches where one is expected"):
            decode(sink.getvalue())


def test_hostile_bytes_end_in_an_error() -> None:
    """Even without the checksum that goes before: every bit of a file flipped, and every length."""
    data = encode(rows([1, 2, 3])).to_pybytes()
    for at in range(0, 8 * len(data), 3):
        changed = bytearray(data)
        changed[at // 8] ^= 1 << at % 8
        with suppress(CorruptCheckpoint, VersionMismatch):
            decode(bytes(changed))
    for length in range(0, len(data), 7):
        with pytest.raises(CorruptCheckpoint):
            decode(data[:length])
