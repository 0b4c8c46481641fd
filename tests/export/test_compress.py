# SPDX-License-Identifier: Apache-2.0
"""Compressed checkpoints: served as they should read, refused when they are damaged, and what evaluation says of them."""

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from oarlock.checkpoint.store import open_checkpoint
from oarlock.embedding.packed import pack_int4, pack_int8
from oarlock.export.compress import compress, cost
from oarlock.export.evaluation import evaluate
from oarlock.export.method import METHODS, Method
from oarlock.export.tables import dense_values
from oarlock.launch.folder import read_spec
from oarlock.proto.errors import CorruptCheckpoint, InvalidArgument, NotFound, UnknownTable, VersionMismatch
from oarlock.serving.compressed import COMPRESSED, Compressed, checksum_of, locate_served
from oarlock.serving.snapshot import Snapshot, open_snapshot
from oarlock.serving.swap import Serving


def rows_of(snapshot: Snapshot, table: str, keys: Any) -> Any:
    out = np.empty((len(keys), snapshot.tables[table].spec.dim), np.float32)
    missing = snapshot.tables[table].lookup(np.asarray(keys, np.uint64), out)
    return out, missing


def made(model: Any, to: Path, **methods: Method) -> Compressed:
    return compress(model.store, model.store.load_manifest(None), methods, to)


@pytest.mark.parametrize("name", METHODS)
def test_it_is_served_as_it_should_read(model: Any, tmp_path: Path, name: str) -> None:
    before = open_snapshot(model.store, model.store.load_manifest(None))
    made(
        model,
        tmp_path / "out",
        item=Method(name, parts=16 if name == "pq" else 0, by="change" if name == "mixed" else ""),
    )
    store, cut = locate_served(str(tmp_path / "out"))
    assert isinstance(store, Compressed)
    assert cut is None
    assert locate_served(f"{tmp_path / 'out'}@2")[1] == 2
    serving = Serving(store)
    after = serving.load()
    assert (after.version, after.job) == (before.version, before.job)
    assert serving.store.cuts() == [2]
    assert not serving.look()
    keys = [*model.keys.tolist(), 0, 5]
    # The other table reads to the bit, and so do keys without a row.
    assert rows_of(after, "user", keys)[0].tobytes() == rows_of(before, "user", keys)[0].tobytes()
    was, now = rows_of(before, "item", keys), rows_of(after, "item", keys)
    assert now[0][-2:].tobytes() == was[0][-2:].tobytes()
    if name == "prune":
        kept = now[0].any(axis=1)
        assert kept.sum() == after.tables["item"].rows == 100
        assert now[1] == 102
        assert now[0][kept].tobytes() == was[0][kept].tobytes()
        # Those with the largest weights, as keys without a row read as zeros.
        assert was[0][:-2][kept[:-2], 0].min() >= was[0][:-2][~kept[:-2], 0].max()
        return
    assert now[1] == was[1] == 2
    if name == "int8":
        assert np.abs(now[0] - was[0]).max() <= np.abs(was[0]).max() / 254
        assert after.tables["item"].row_bytes == 20
        assert 20 / before.tables["item"].row_bytes <= 0.32
    elif name == "mixed":
        # All weights of a row are equal, so one value is enough for those that are not whole.
        assert np.allclose(now[0], was[0], rtol=1e-4)
        whole = (now[0] == was[0]).all(axis=1)
        largest = np.sort(was[0][:-2, 0])[-20:]
        assert whole[:-2][np.isin(was[0][:-2, 0], largest)].all()
        assert after.tables["item"].row_bytes == 16
        assert after.tables["item"].values_bytes == 200 * 16 + (4 + 20) * 64
    elif name == "int4":
        assert np.allclose(now[0], was[0], rtol=0.002)  # weights of a row are equal, so the scale is all
    else:
        # 200 rows: each has a line of its own, but for the 256 that were drawn.
        assert np.abs(now[0] - was[0]).max() < 30
    assert after.tables["item"].form == name


def test_rows_are_packed_as_the_forms_say(model: Any, tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    manifest = model.store.load_manifest(None)
    weights = rng.normal(0, 1, (50, 16)).astype(np.float32)
    for name, pack in (("int8", pack_int8), ("int4", pack_int4)):
        folder = tmp_path / name
        made(model, folder, item=Method(name))
        blocks = open_snapshot(Compressed(folder), manifest).tables["item"].blocks
        want = [model.store.load_block(manifest, e).weights for e in manifest.blocks if e.name == "item"]
        for block, rows in zip(blocks, want, strict=True):
            assert block.stored.tobytes() == pack(rows).tobytes()
    assert pack_int8(weights).shape == (50, 20)


def test_what_is_there_stays_and_what_is_wrong_is_refused(model: Any, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(InvalidArgument, match="is there already"):
        made(model, tmp_path / "out", item=Method("int8"))
    with pytest.raises(UnknownTable, match="no table 'film'"):
        made(model, tmp_path / "new", film=Method("int8"))
    with pytest.raises(InvalidArgument, match="give 1 to 16"):
        made(model, tmp_path / "new", item=Method("pq", parts=17))
    for wrong in (
        {"name": "zip"},
        {"name": "prune", "keep": 1.5},
        {"name": "mixed", "by": "luck"},
        {"name": "pq", "parts": -1},
    ):
        with pytest.raises(InvalidArgument):
            Method(**wrong)  # type: ignore[arg-type]
    for by, words in (
        ("", "does not keep how often"),
        ("occurrences", "keeps no occurrences"),
        ("score", "keeps no score"),
    ):
        with pytest.raises(InvalidArgument, match=words):
            made(model, tmp_path / "new", item=Method("mixed", by=by))
    for parts in (1, 17):
        with pytest.raises(InvalidArgument, match="give 2 to 16"):
            made(model, tmp_path / "new", item=Method("mixed", parts=parts, by="change"))
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoints", "out"}


def test_a_damaged_copy_is_not_served(model: Any, tmp_path: Path) -> None:
    made(model, tmp_path / "out", item=Method("pq"))
    manifest = model.store.load_manifest(None)

    def damaged(change: Any) -> Compressed:
        shutil.rmtree(tmp_path / "bad", ignore_errors=True)
        shutil.copytree(tmp_path / "out", tmp_path / "bad")
        change(tmp_path / "bad")
        return Compressed(tmp_path / "bad")

    def flip(name: str, at: int) -> Any:
        def change(folder: Path) -> None:
            data = bytearray((folder / name).read_bytes())
            data[at] ^= 1
            (folder / name).write_bytes(data)

        return change

    def edit(**values: Any) -> Any:
        def change(folder: Path) -> None:
            document = json.loads((folder / COMPRESSED).read_text())
            document.pop("checksum")
            for path, value in values.items():
                *parents, last = path.split("__")
                inner = document
                for parent in parents:
                    inner = inner[parent]
                inner[last] = value
            (folder / COMPRESSED).write_text(json.dumps({**document, "checksum": checksum_of(document)}))

        return change

    def retell(keys: dict[str, Any]) -> Any:
        def change(folder: Path) -> None:
            path = folder / "tables/item.safetensors"
            data = path.read_bytes()
            (length,) = struct.unpack("<Q", data[:8])
            header = json.loads(data[8 : 8 + length])
            del header["__metadata__"]  # room for other numbers
            header["keys"] |= keys
            text = json.dumps(header, separators=(",", ":")).encode().ljust(length)
            path.write_bytes(data[:8] + text + data[8 + length :])

        return change

    for change, words in (
        (flip("tables/item.safetensors", 20), "altered"),
        (flip("tables/item.safetensors", -1), "altered"),
        (flip("tables/source.json", 5), "altered"),
        (flip(COMPRESSED, 100), "altered"),
        (lambda folder: (folder / COMPRESSED).unlink(), "missing"),
        (lambda folder: (folder / "tables/user.safetensors").unlink(), "cannot be read"),
        (lambda folder: (folder / "tables/user.safetensors").write_bytes(b"1"), "bytes"),
        (edit(tables__item__form="zip"), "not told whole"),
        (edit(tables__item__block_rows=[200]), "not told whole"),
        (edit(tables__item__block_rows=[0, 200]), "of another block|ascending"),
        (edit(tables__item__parts=5), "rows of"),
        (edit(tables__item__parts="5"), "damaged"),
        (edit(tables__item__block_rows=[-1, 201]), "damaged"),
        (edit(tables__item__file="../x/y"), "does not know"),
        (edit(tables=5), "damaged"),
    ):
        bad = damaged(change)
        with pytest.raises(CorruptCheckpoint, match=words):
            Serving(bad).load()
        if words == "of another block|ascending":
            with pytest.raises(CorruptCheckpoint):
                open_snapshot(bad, manifest, trust=True)
    for keys, words in (
        ({"shape": [], "data_offsets": [0, 8]}, "its keys are"),
        ({"shape": [100, 2]}, "its keys are"),
        ({"shape": [1e400]}, "its header is damaged"),
        ({"shape": [201]}, "does not lie in it"),
        ({"dtype": "F64"}, "its header is damaged"),
    ):
        bad = damaged(retell(keys))
        with pytest.raises(CorruptCheckpoint, match=words):
            open_snapshot(bad, manifest, trust=True)
    with pytest.raises(VersionMismatch, match="compress the cut anew"):
        Serving(damaged(edit(format_version="2.0"))).load()
    with pytest.raises(NotFound, match="made of cut 2"):
        Serving(Compressed(tmp_path / "out")).load(1)


def test_a_damaged_mixed_copy_is_not_served(model: Any, tmp_path: Path) -> None:
    """The kernel believes what a row and the header say of lines, so nothing of it is believed before."""
    made(model, tmp_path / "out", item=Method("mixed", by="change"))
    manifest, path = model.store.load_manifest(None), tmp_path / "out/tables/item.safetensors"
    document, data = json.loads((tmp_path / "out" / COMPRESSED).read_text()), path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    begin = 8 + length + header["rows"]["data_offsets"][0]
    words = np.frombuffer(data[begin:], np.uint32).reshape(200, 4)
    (number,) = np.flatnonzero(words[:, 1] == 19)  # the last of the 20 that are whole
    del document["checksum"], header["__metadata__"]

    def refused(words: str, *, parts: int = 4, data: bytes = data, **tensors: Any) -> None:
        document["tables"]["item"]["parts"] = parts
        (tmp_path / "out" / COMPRESSED).write_text(json.dumps({**document, "checksum": checksum_of(document)}))
        text = json.dumps(header | tensors, separators=(",", ":")).encode().ljust(length)
        path.write_bytes(data[:8] + text + data[8 + length :])
        with pytest.raises(CorruptCheckpoint, match=words):
            open_snapshot(Compressed(tmp_path / "out"), manifest, trust=True)

    for parts in (0, 1, 17, 1 << 39):
        refused("give 2 to 16", parts=parts)
    refused("rows of 16 bytes for 20", parts=5)
    for line in (20, 1 << 31, (1 << 32) - 1):
        at = begin + int(number) * 16 + 4
        refused("beyond the 20", data=data[:at] + struct.pack("<I", line) + data[at + 4 :])
    book = header["codebook"]
    first, last = book["data_offsets"]
    refused("beyond the 19", codebook={**book, "shape": [23, 16], "data_offsets": [first, last - 64]})
    refused("lines of", codebook={**book, "shape": [48, 8]})
    refused("lines of", codebook={**book, "shape": [3, 16], "data_offsets": [first, first + 192]})
    refused("lines of", codebook={**book, "shape": [24 * 16]})
    refused("its header is damaged", codebook={**book, "shape": [25, 16]})


def test_evaluation_is_that_of_training_and_smaller_rows_cost_little(trained: Any, tmp_path: Path) -> None:
    for recipe in ("dlrm", "ncf"):
        folder = trained(recipe)
        spec = read_spec(folder)
        store, manifest = open_checkpoint(folder / "checkpoints")
        parameters = dense_values(store, manifest)
        found = evaluate(spec, open_snapshot(store, manifest).tables, parameters)
        assert list(found) == list(spec.metrics)
        for name, value in found.items():
            assert value == pytest.approx(manifest.metrics[name], abs=1e-6), name
        small = compress(store, manifest, dict.fromkeys(manifest.table_specs(), Method("int8")), tmp_path / recipe)
        # What its dense parameters are it knows by itself.
        again = dense_values(small, small.load_manifest())
        assert {n: v.tobytes() for n, v in again.items()} == {n: v.tobytes() for n, v in parameters.items()}
        snapshot = open_snapshot(small, small.load_manifest())
        other = evaluate(spec, snapshot.tables, again)
        metric = spec.metrics[0]
        assert other != found or recipe == "ncf"  # ranks may all be the same
        assert other[metric] == pytest.approx(found[metric], abs=0.02)
        for table in snapshot.tables.values():
            told = cost(table, turns=1)
            assert (told.rows, told.row_bytes, told.bytes) == (table.rows, table.row_bytes, table.nbytes)
            assert told.lookup_us > 0
