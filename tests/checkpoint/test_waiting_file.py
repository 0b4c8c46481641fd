# SPDX-License-Identifier: Apache-2.0
"""A block's second file, of keys without a row: what goes in comes out, and all else is refused by name."""

import json
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oarlock.checkpoint.block_file import BlockImage, decode, encode
from oarlock.checkpoint.manifest import BlockEntry, Manifest
from oarlock.checkpoint.store import LocalStore
from oarlock.checkpoint.waiting_file import decode_waiting, encode_waiting, knows_waiting
from oarlock.proto.errors import CorruptCheckpoint, InvalidArgument, SpecMismatch, VersionMismatch

TOP = (1 << 64) - 1
UINT32 = (1 << 32) - 1


def image_of(keys: list[int], waiting: dict[int, int] | bytes = b"", /, columns: int = 0, **changes: Any) -> BlockImage:
    n = len(keys)
    values: dict[str, Any] = {"kind": "rows", "name": "user", "block": 3, "seq": 9, "marks": {4: 1}}
    values |= {"keys": np.array(keys, np.uint64), "weights": np.ones((n, 2), np.float32)}
    values |= {"state": np.empty((n, 0), np.float32), "counters": np.zeros((n, columns), np.uint32)}
    if isinstance(waiting, bytes):
        values["sketch"] = waiting
    else:
        values["waiting"] = np.array(list(waiting), np.uint64)
        values["waited"] = np.array(list(waiting.values()), np.uint32)
    return BlockImage(**{**values, **changes})


WAITING = image_of([1, 5], {9: 2, 3: 7})
SKETCHED = image_of([1, 5], bytes(range(200)))


@given(
    rows=st.sets(st.integers(0, TOP), max_size=20),
    waiting=st.dictionaries(st.integers(0, TOP), st.integers(1, UINT32), min_size=1, max_size=30),
    columns=st.integers(0, 4),
    bits=st.integers(0, UINT32),
)
@settings(max_examples=100)
def test_counters_and_waiting_keys_come_back(rows: set[int], waiting: dict[int, int], columns: int, bits: int) -> None:
    keys = sorted(rows - waiting.keys())
    counters = np.random.default_rng(bits).integers(0, UINT32, (len(keys), columns), np.uint32)
    image = replace(image_of(keys, waiting), counters=counters)
    assert knows_waiting(image)
    bare = decode(encode(image))
    assert bare.counters.tobytes() == counters.tobytes()
    assert bare.counters.shape == counters.shape
    assert not knows_waiting(bare)
    data = encode_waiting(image)
    back = decode_waiting(data, bare)
    assert dict(zip(back.waiting.tolist(), back.waited.tolist(), strict=True)) == waiting
    assert back.waiting.tolist() == sorted(waiting)
    assert (back.waiting.dtype, back.waited.dtype, back.sketch) == (np.uint64, np.uint32, b"")
    # Equal content in another order gives equal bytes.
    assert encode_waiting(back).equals(data)


@given(st.binary(min_size=1, max_size=300))
def test_a_sketch_comes_back(sketch: bytes) -> None:
    image = image_of([1], sketch)
    back = decode_waiting(encode_waiting(image), image_of([1]))
    assert (back.sketch, len(back.waiting)) == (sketch, 0)
    assert encode_waiting(back).equals(encode_waiting(image))


def test_the_first_file_knows_nothing_of_the_second() -> None:
    assert encode(WAITING).equals(encode(image_of([1, 5])))
    for data in (encode(image_of([1])), encode(image_of([1], columns=2)), encode_waiting(WAITING)):
        assert pa.ipc.open_file(data).schema.metadata[b"oarlock.format"] == b"1.2"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"counters": np.zeros((1, 2), np.uint32)}, "counters of [1, 2]: give a row of them for each of 2 rows"),
        ({"counters": np.zeros((2, 2), np.int32)}, "counters is int32[2, 2]: give a uint32 array of 2 axes"),
        ({"waited": np.zeros(1, np.uint32)}, "0 waiting keys, 1 counts of them"),
        ({"waiting": np.zeros(1, np.int64)}, "waiting is int64[1]"),
        (
            {"waiting": np.ones(1, np.uint64), "waited": np.ones(1, np.uint32), "sketch": b"x"},
            "waiting keys are counted, or sketched",
        ),
    ],
)
def test_an_image_that_does_not_fit_is_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        image_of([1, 2], **changes)
    assert says in str(caught.value)


def test_a_dense_block_has_none_of_it() -> None:
    dense = {"kind": "dense", "weights": np.ones((1, 2), np.float32), "state": np.ones((1, 0), np.float32)}
    with pytest.raises(InvalidArgument, match="a row of them for each of 1 rows of a table"):
        image_of([], **dense, counters=np.ones((1, 1), np.uint32))
    with pytest.raises(InvalidArgument, match="by a table's block only"):
        image_of([], b"x", **dense, counters=np.empty((1, 0), np.uint32))


@pytest.mark.parametrize(
    ("image", "says"),
    [
        (image_of([1], {7: 0}), "waiting key 7 came 0 times"),
        (image_of([1, 7], {7: 1}), "key 7 has a row, and waits for one"),
        (
            image_of([1], waiting=np.array([7, 7], np.uint64), waited=np.ones(2, np.uint32)),
            "waiting key 7 is there twice",
        ),
    ],
)
def test_what_cannot_be_is_not_written(image: BlockImage, says: str) -> None:
    with pytest.raises(InvalidArgument, match=f"table user, block 3: {says}"):
        encode_waiting(image)


def rewritten(image: BlockImage, columns: dict[str, pa.Array], **metadata: str) -> bytes:
    """The image's second file with other columns and metadata."""
    old = dict(pa.ipc.open_file(encode_waiting(image)).schema.metadata)
    new = old | {f"oarlock.{name}".encode(): value.encode() for name, value in metadata.items()}
    fields = [pa.field(name, array.type, nullable=bool(array.null_count)) for name, array in columns.items()]
    schema, sink = pa.schema(fields, metadata=new), pa.BufferOutputStream()
    with pa.ipc.new_file(sink, schema) as writer:
        writer.write_batch(pa.RecordBatch.from_arrays(list(columns.values()), schema=schema))
    return sink.getvalue().to_pybytes()


def u64(*values: int | None) -> pa.Array:
    return pa.array(values, pa.uint64())


def u32(*values: int | None) -> pa.Array:
    return pa.array(values, pa.uint32())


GOOD = {"key": u64(3, 9), "count": u32(7, 2)}


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        ({"key": u64(3)}, "column count is missing"),
        ({"count": u32(3)}, "column key is missing"),
        ({**GOOD, "more": u32(1, 2)}, "column 'more' is unknown"),
        ({"count": u32(7, 2), "key": u64(3, 9)}, "expected the order key, count"),
        ({"key": u64(3, 9), "count": pa.array([7, 2], pa.int64())}, "count: int64 not null: expected key: uint64"),
        ({"key": u64(3, None), "count": u32(7, 2)}, "column key has nulls"),
        ({"key": u64(3, 9), "count": u32(7, None)}, "column count has nulls"),
        ({"key": u64(9, 3), "count": u32(7, 2)}, "waiting key 3 is out of order"),
        ({"key": u64(9, 9), "count": u32(7, 2)}, "waiting key 9 is there twice"),
        ({"key": u64(3, 9), "count": u32(7, 0)}, "waiting key 9 came 0 times"),
        ({"key": u64(3, 5), "count": u32(7, 2)}, "key 5 has a row"),
        ({"key": u64(), "count": u32()}, "it is empty"),
        ({"sketch": pa.array([], pa.uint8())}, "it is empty"),
        ({"sketch": pa.array([1, None], pa.uint8())}, "column sketch has nulls"),
        ({"sketch": pa.array([1, 2], pa.int8())}, "columns are sketch: int8"),
        ({"sketch": pa.array([1, 2], pa.uint8()), **GOOD}, "column 'key' is unknown"),
    ],
)
def test_columns_that_do_not_fit_are_refused(columns: dict[str, pa.Array], says: str) -> None:
    with pytest.raises(CorruptCheckpoint) as caught:
        decode_waiting(rewritten(WAITING, columns), WAITING, file="w.arrow")
    assert says in str(caught.value)
    assert str(caught.value).startswith("w.arrow: ")


@pytest.mark.parametrize(
    "metadata", [{"name": "item"}, {"block": "4"}, {"seq": "8"}, {"marks": '{"4":2}'}, {"marks": "{}"}]
)
def test_a_file_of_another_block_or_instant_is_refused(metadata: dict[str, str]) -> None:
    with pytest.raises(CorruptCheckpoint, match=r"w\.arrow: it is of table .*, not of table user, block 3 after 9"):
        decode_waiting(rewritten(WAITING, GOOD, **metadata), WAITING, file="w.arrow")


def test_kinds_and_versions_are_told_apart() -> None:
    with pytest.raises(CorruptCheckpoint, match="unknown kind 'waiting'"):
        decode(encode_waiting(WAITING))
    with pytest.raises(CorruptCheckpoint, match="unknown kind 'rows'"):
        decode_waiting(encode(WAITING), WAITING)
    later = rewritten(WAITING, {**GOOD, "more": u32(1, 2)}, format="1.7")
    with pytest.raises(VersionMismatch, match=r"format 1\.7, this Oarlock knows 1\.2"):
        decode_waiting(later, WAITING)


def counters_file(columns: pa.Array) -> bytes:
    schema = pa.ipc.open_file(encode(image_of([1, 5], columns=2))).schema
    batch = pa.ipc.open_file(encode(image_of([1, 5], columns=2))).get_batch(0)
    fields = [*list(schema)[:2], pa.field("counters", columns.type, nullable=bool(columns.null_count))]
    new, sink = pa.schema(fields, metadata=schema.metadata), pa.BufferOutputStream()
    with pa.ipc.new_file(sink, new) as writer:
        writer.write_batch(pa.RecordBatch.from_arrays([batch.column(0), batch.column(1), columns], schema=new))
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize(
    ("column", "says"),
    [
        (pa.array([[1], [2]], pa.list_(pa.field("item", pa.float32(), nullable=False), 1)), "columns are"),
        (pa.array([[1], [2]], pa.list_(pa.uint32())), "columns are"),
        (pa.array([[1], None], pa.list_(pa.uint32(), 1)), "column counters has nulls"),
        (pa.array([[1], [None]], pa.list_(pa.uint32(), 1)), "column counters has nulls"),
        (u32(1, 2), "columns are"),
    ],
)
def test_counters_that_do_not_fit_are_refused(column: pa.Array, says: str) -> None:
    with pytest.raises(CorruptCheckpoint, match=says):
        decode(counters_file(column))


@pytest.mark.parametrize("image", [WAITING, SKETCHED], ids=["counts", "sketch"])
def test_hostile_bytes_end_in_an_error(image: BlockImage) -> None:
    """Even without the checksum that goes before: bits of a file flipped, and many lengths."""
    data = encode_waiting(image).to_pybytes()
    for at in range(0, 8 * len(data), 3):
        changed = bytearray(data)
        changed[at // 8] ^= 1 << at % 8
        with suppress(CorruptCheckpoint, VersionMismatch):
            decode_waiting(bytes(changed), image)
    for length in range(0, len(data), 7):
        with pytest.raises(CorruptCheckpoint):
            decode_waiting(data[:length], image)


def entry_of(**changes: Any) -> BlockEntry:
    values = {"kind": "rows", "name": "user", "block": 0, "file": "rows-user-00000.arrow", "bytes": 9, "rows": 1}
    return BlockEntry(**{**values, "seq": 1, "sha256": "a" * 64, **changes})


def test_an_entry_names_its_second_file() -> None:
    assert entry_of().waiting_file == ""
    assert (
        entry_of(file="rows-user=1-00000.arrow", waiting_bytes=5, waiting_sha256="b" * 64).waiting_file
        == "waiting-user=1-00000.arrow"
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"waiting_bytes": 5},
        {"waiting_sha256": "b" * 64},
        {"waiting_bytes": 5, "waiting_sha256": "x"},
        {"waiting_bytes": 5, "waiting_sha256": None},
        {"waiting_bytes": -5, "waiting_sha256": "b" * 64},
        {"waiting_bytes": True, "waiting_sha256": "b" * 64},
        {"kind": "dense", "file": "dense-user-00000.arrow", "waiting_bytes": 5, "waiting_sha256": "b" * 64},
    ],
)
def test_an_entry_with_half_a_second_file_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument, match="waiting_"):
        entry_of(**changes)


def test_a_manifest_leaves_out_what_no_block_has(tmp_path: Path, quick: Any, write: Any, write_whole: Any) -> None:
    for manifest, lines in ((write(quick(tmp_path / "a"), 1, 1), 0), (write_whole(quick(tmp_path / "b"), 1, 1), 3)):
        blocks = json.loads(manifest.encode())["blocks"]
        assert sum("waiting_bytes" in block for block in blocks) == lines
        assert Manifest.decode(manifest.encode()) == manifest


def test_a_second_file_and_a_block_share_no_name(make_manifest: Any, write_whole: Any, tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    manifest = write_whole(store, 1, 1)
    names = [name for entry in manifest.blocks for name in (entry.file, entry.waiting_file) if name]
    assert sorted([*names, "manifest.json"]) == sorted(path.name for path in (tmp_path / "cut-000001").iterdir())
    rows = next(entry for entry in manifest.blocks if entry.kind == "rows")
    twice = [replace(e, file=rows.file) if e.kind == "rows" else e for e in manifest.blocks]
    with pytest.raises(SpecMismatch, match="another block has the file"):
        make_manifest(1, twice, tables=manifest.tables)


def test_what_is_in_the_way_of_the_second_file_spares_the_first(tmp_path: Path) -> None:
    """A block that cannot be written whole writes nothing."""
    store = LocalStore(tmp_path)
    with pytest.raises(InvalidArgument, match="waiting key 7 came 0 times"):
        store.write_block(1, image_of([1], {7: 0}))
    assert not (tmp_path / "cut-000001").exists()


def test_bytes_of_both_files_are_verified(tmp_path: Path, write_whole: Any) -> None:
    store = LocalStore(tmp_path)
    manifest = write_whole(store, 1, 1)
    told: list[tuple[int, int]] = []
    store.verify(manifest, progress=lambda done, total: told.append((done, total)))
    size = sum(p.stat().st_size for p in (tmp_path / "cut-000001").iterdir() if p.name != "manifest.json")
    assert told[-1] == (size, size)
