# SPDX-License-Identifier: Apache-2.0
"""Rows as files: read back by other programs, to the bit; whole or not there; nothing is replaced."""

import json
import re
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from oarlock.embedding.spec import TableSpec
from oarlock.export import tables
from oarlock.export.safetensors_file import SafetensorsFile
from oarlock.export.tables import FORMATS, chosen_tables, dense_values, export_tables
from oarlock.proto.errors import CorruptCheckpoint, InvalidArgument, Malformed, UnknownTable


def wanted(model: Any, table: str) -> dict[str, np.ndarray[Any, Any]]:
    """What the checkpoint holds of a table, block by block, by its own reader."""
    manifest = model.store.load_manifest(None)
    images = [model.store.load_block(manifest, e) for e in manifest.blocks if e.name == table]
    return {name: np.concatenate([getattr(image, name) for image in images]) for name in ("keys", "weights", "state")}


def export(model: Any, to: Path, format: str, *names: str, **options: Any) -> Any:
    manifest = model.store.load_manifest(None)
    return export_tables(model.store, manifest, chosen_tables(manifest, names), to, format, **options)


def read(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    """Read a file as whoever does not know Oarlock would."""
    if path.suffix == ".safetensors":
        safe = pytest.importorskip("safetensors.numpy")
        found: dict[str, np.ndarray[Any, Any]] = safe.load_file(path)
        return found
    if path.suffix == ".parquet":
        table = pq.read_table(path)
    else:
        with pa.memory_map(str(path)) as source:
            table = pa.ipc.open_file(source).read_all()
    out = {"keys": table["key"].to_numpy()}
    for name in set(table.column_names) - {"key"}:
        column = table[name].combine_chunks()
        out[name] = column.flatten().to_numpy().reshape(len(table), -1 if len(table) else 0)
    return out


@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("format", FORMATS)
def test_each_table_reads_back_to_the_bit(
    model: Any, tmp_path: Path, format: str, state: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Parts of a few rows, and groups of a few parts.
    monkeypatch.setattr(tables, "PART_BYTES", 300)
    monkeypatch.setattr("oarlock.export.rows_file.GROUP_BYTES", 1000)
    made = export(model, tmp_path / "out", format, whole=state)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [f"item.{format}", f"user.{format}"]
    assert {p.name for p in tmp_path.iterdir()} == {"checkpoints", "out"}
    for one in made:
        want, found = wanted(model, one.table), read(one.path)
        assert one.rows == len(want["keys"]) == 200 - (one.table == "user")
        assert one.bytes == one.path.stat().st_size
        assert found.keys() == ({"keys", "weights", "state"} if state else {"keys", "weights"})
        for name, values in found.items():
            assert values.dtype == want[name].dtype
            assert values.tobytes() == want[name].tobytes(), name


def test_duckdb_reads_parquet(model: Any, tmp_path: Path) -> None:
    (made,) = export(model, tmp_path / "user.parquet", "parquet", "user")
    want = wanted(model, "user")
    with duckdb.connect() as connection:
        rows = connection.execute(f"select key, weights from '{made.path}'").fetchall()
    assert [row[0] for row in rows] == want["keys"].tolist()
    assert np.array([row[1] for row in rows], np.float32).tobytes() == want["weights"].tobytes()


def test_a_file_says_of_what_it_is(model: Any, tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors")
    export(model, tmp_path / "a.parquet", "parquet", "user")
    export(model, tmp_path / "a.safetensors", "safetensors", "user")
    told = [json.loads(pq.read_schema(tmp_path / "a.parquet").metadata[b"oarlock"])]
    with safetensors.safe_open(tmp_path / "a.safetensors", "numpy") as file:
        told.append(json.loads(file.metadata()["oarlock"]))
    for facts in told:
        assert (facts["job"], facts["run"], facts["cut"], facts["seed"]) == (model.job, 0, 2, 42)
        assert facts["table"]["name"] == "user"


@pytest.mark.parametrize("format", FORMATS)
def test_a_damaged_checkpoint_gives_nothing(model: Any, tmp_path: Path, format: str) -> None:
    manifest = model.store.load_manifest(None)
    entry = next(e for e in manifest.blocks if (e.name, e.block) == ("user", 3))
    path = tmp_path / "checkpoints" / entry.folder / entry.file
    data = bytearray(path.read_bytes())
    data[-200] ^= 1
    path.write_bytes(data)
    for to in (tmp_path / "out", tmp_path / f"user.{format}"):
        with pytest.raises(CorruptCheckpoint, match=re.escape(f"{entry.folder}/{entry.file}: altered")):
            export(model, to, format, "user")
    assert {p.name for p in tmp_path.iterdir()} == {"checkpoints"}


@pytest.mark.parametrize("format", FORMATS)
def test_what_is_there_stays(model: Any, tmp_path: Path, format: str) -> None:
    file, folder = tmp_path / f"mine.{format}", tmp_path / "folder"
    file.write_text("mine")
    folder.mkdir()
    for to in (file, folder):
        with pytest.raises(InvalidArgument, match=r"is there already: give another name$"):
            export(model, to, format, "user")
    assert file.read_text() == "mine"
    assert {p.name for p in tmp_path.iterdir()} == {"checkpoints", "folder", file.name}


def test_a_request_that_is_wrong_is_refused(model: Any, tmp_path: Path) -> None:
    with pytest.raises(UnknownTable, match="no table 'film'; its tables are: user, item"):
        export(model, tmp_path / "out", "arrow", "film")
    with pytest.raises(InvalidArgument, match="one file, and there are 2 tables"):
        export(model, tmp_path / "out.arrow", "arrow")
    with pytest.raises(InvalidArgument, match="there is no folder"):
        export(model, tmp_path / "no" / "out.arrow", "arrow", "user")
    with pytest.raises(InvalidArgument, match="choose one of parquet"):
        export(model, tmp_path / "out.pickle", "pickle", "user")


def test_progress_ends_at_all_bytes(model: Any, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    export(model, tmp_path / "out", "arrow", progress=lambda done, total: told.append((done, total)))
    assert len(told) == 6
    assert told == sorted(told)
    assert told[-1][0] == told[-1][1]


def test_an_empty_table_is_a_file_without_rows(tmp_path: Path) -> None:
    import serving_rig

    empty = serving_rig.Model(tmp_path / "checkpoints", specs=(TableSpec("user", 3, blocks=2),))
    empty.keys = empty.keys[:0]
    empty.cut(1)
    for format in FORMATS:
        (made,) = export(empty, tmp_path / f"user.{format}", format)
        assert made.rows == 0
        assert read(made.path)["weights"].size == 0


def test_tensors_are_filled_exactly(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    tensors = {"a": (np.uint64, (3,)), "b": (np.float32, (2, 2))}
    with pytest.raises(Malformed, match="fewer values"), SafetensorsFile(path, tensors, {}) as file:
        file.write("a", np.arange(3, dtype=np.uint64))
    with pytest.raises(Malformed, match="more values"), SafetensorsFile(path, tensors, {}) as file:
        file.write("a", np.arange(4, dtype=np.uint64))
    with pytest.raises(Malformed, match="float64 came"), SafetensorsFile(path, tensors, {}) as file:
        file.write("b", np.zeros((2, 2)))
    with pytest.raises(InvalidArgument, match="float16 is none of"):
        SafetensorsFile(path, {"a": (np.float16, (1,))}, {})
    assert not list(tmp_path.iterdir())


def test_dense_parameters_come_in_their_shapes(model: Any) -> None:
    found = dense_values(model.store, model.store.load_manifest(None))
    assert {name: values.tolist() for name, values in found.items()} == {"bias": [0.0, 0.0]}
