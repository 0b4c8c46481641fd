# SPDX-License-Identifier: Apache-2.0
"""Columns: checksums of their own that say which is damaged, and compression that any reader of Arrow undoes."""

import json
import os
import zlib
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pytest

from oarlock.checkpoint.block_file import BlockImage, decode, encode, encode_pieces
from oarlock.checkpoint.frame import damaged_columns, joined
from oarlock.checkpoint.store import CheckpointStore, LocalStore
from oarlock.checkpoint.waiting_file import encode_waiting
from oarlock.proto.errors import CorruptCheckpoint, InvalidArgument, VersionMismatch

COMPRESSIONS = [None, "zstd"]


@pytest.fixture
def image() -> BlockImage:
    keys = np.arange(1, 4001, dtype=np.uint64) * 7
    weights = (np.arange(16000, dtype=np.float32) % 64).reshape(4000, 4)
    counters = np.arange(8000, dtype=np.uint32).reshape(4000, 2) % 5
    image = BlockImage("rows", "user", 3, 9, {4: 1}, keys, weights, weights[:, :2] + 1, counters)
    return replace(image, waiting=keys + np.uint64(1), waited=np.ones(4000, np.uint32))


@pytest.mark.parametrize("compress", COMPRESSIONS)
def test_each_column_has_the_checksum_of_its_values(image: BlockImage, compress: str | None) -> None:
    reader = pa.ipc.open_file(joined(encode_pieces(image, compress=compress)))
    written = json.loads(reader.schema.metadata[b"oarlock.columns"])
    columns = {"key": image.keys, "weights": image.weights, "state": image.state, "counters": image.counters}
    assert written == {name: f"{zlib.crc32(array.tobytes()):08x}" for name, array in columns.items()}
    assert {len(value) for value in written.values()} == {8}


@pytest.mark.parametrize("compress", COMPRESSIONS)
def test_the_damaged_column_is_named(image: BlockImage, compress: str | None, rng: np.random.Generator) -> None:
    """Wherever a byte is changed, its column is named, and no other one."""
    data = joined(encode_pieces(image, compress=compress)).to_pybytes()
    assert damaged_columns(data) == []
    named = set()
    for at in rng.integers(0, len(data), 400).tolist():
        changed = bytearray(data)
        changed[at] ^= 1 << at % 8
        found = damaged_columns(bytes(changed))
        assert len(found) <= 1 or compress
        named |= set(found)
    assert named >= {"key", "weights", "state", "counters"}


def test_verify_says_which_column(tmp_path: Path, quick: Any, write: Any) -> None:
    store = quick(tmp_path)
    manifest = write(store, 1, 1)
    path = tmp_path / "cut-000001" / "rows-user-00000.arrow"
    data = bytearray(path.read_bytes())
    at = data.index(np.float32(4.25).tobytes())
    data[at] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptCheckpoint, match="altered: column weights: its checksum does not fit") as caught:
        store.verify(manifest)
    assert caught.value.details["columns"] == ["weights"]
    # Not of a column: what stands around them.
    data[at] ^= 1
    data[data.index(b"oarlock.seq")] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptCheckpoint, match="altered: its checksum does not fit") as caught:
        store.verify(manifest)
    assert caught.value.details["columns"] == []


def test_hostile_bytes_name_nothing_worse_than_columns(image: BlockImage) -> None:
    small = replace(image, **{n: getattr(image, n)[:3] for n in ("keys", "weights", "state", "counters")})
    data = encode(small).to_pybytes()
    for at in range(0, 8 * len(data), 5):
        changed = bytearray(data)
        changed[at // 8] ^= 1 << at % 8
        damaged_columns(bytes(changed))
    for length in range(0, len(data), 9):
        damaged_columns(data[:length])


@pytest.mark.parametrize("compress", COMPRESSIONS)
def test_hostile_compressed_bytes_end_in_an_error(image: BlockImage, compress: str | None) -> None:
    small = replace(image, **{n: getattr(image, n)[:9] for n in ("keys", "weights", "state", "counters")})
    data = joined(encode_pieces(small, compress=compress)).to_pybytes()
    for at in range(0, 8 * len(data), 7):
        changed = bytearray(data)
        changed[at // 8] ^= 1 << at % 8
        with suppress(CorruptCheckpoint, VersionMismatch):
            decode(bytes(changed))


def test_compressed_files_are_smaller_and_the_same(tmp_path: Path, image: BlockImage, same: Any) -> None:
    sizes = []
    for compress in COMPRESSIONS:
        store = LocalStore(tmp_path / str(compress), compress=compress)
        entry = store.write_block(1, image)
        folder = tmp_path / str(compress) / "cut-000001"
        sizes.append(entry.bytes)
        assert sum(os.path.getsize(folder / name) for name in os.listdir(folder)) == entry.total_bytes
        back = decode((folder / entry.file).read_bytes())
        assert same(replace(back, waiting=image.waiting, waited=image.waited), image)
    assert sizes[1] < sizes[0] / 4
    assert len(encode_waiting(image, compress="zstd")) < len(encode_waiting(image)) / 2


@pytest.mark.parametrize("compress", ["lz4", "", 3])
def test_other_compressions_are_refused(tmp_path: Path, compress: Any) -> None:
    with pytest.raises(InvalidArgument, match="choose zstd, or None"):
        LocalStore(tmp_path, compress=compress)


@pytest.mark.parametrize("compress", COMPRESSIONS)
def test_chains_may_mix(tmp_path: Path, compress: str | None, make_manifest: Any, quick: Any) -> None:
    from checkpoint_story import check, write

    store = quick(tmp_path)
    before = write(store, make_manifest, 1, 1, None).blocks
    other = CheckpointStore(store.files, compress="zstd" if compress is None else None)
    write(other, make_manifest, 2, 2, list(before))
    assert check(store) == [1, 2]


@pytest.mark.parametrize("compress", COMPRESSIONS)
def test_plain_pyarrow_and_duckdb_read_it(tmp_path: Path, image: BlockImage, compress: str | None) -> None:
    duckdb = pytest.importorskip("duckdb", reason="duckdb is not installed: reading with DuckDB has NOT RUN")
    entry = LocalStore(tmp_path, compress=compress).write_block(1, image)
    with pa.memory_map(str(tmp_path / "cut-000001" / entry.file)) as source:
        rows = pa.ipc.open_file(source).read_all()
    assert rows.column("key").to_pylist() == image.keys.tolist()
    assert rows.column("counters").to_pylist() == image.counters.tolist()
    with duckdb.connect() as connection:
        connection.register("rows", rows)
        count, largest, total = connection.execute(
            "select count(*), max(key), sum(weights[1]) from rows where key % 2 = 0"
        ).fetchone()
    even = image.keys % 2 == 0
    assert (count, largest) == (even.sum(), image.keys[even].max())
    assert total == image.weights[even, 0].sum(dtype=np.float64)
