# SPDX-License-Identifier: Apache-2.0
"""Checkpoints as each version of the format wrote them: readable for ever; those of the present one also written the same.

Another version of pyarrow may lay out the frame around the same columns differently; then the contents are compared.

The files are made once, by ``write_cut(LocalStore(GOLDEN), 12, 3)`` of this folder's conftest, and never made anew; those of
1.1 by ``write_full_cut``, those of 1.2 by ``write_chained_cuts(LocalStore(NEWEST), LocalStore(NEWEST, compress="zstd"))``.
"""

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pytest

from oarlock.checkpoint.block_file import BlockImage, decode, encode
from oarlock.checkpoint.manifest import ClosedSet
from oarlock.checkpoint.store import LocalStore
from oarlock.checkpoint.waiting_file import knows_waiting

GOLDEN = Path(__file__).parent / "golden" / "format-1.0"
NEWER = Path(__file__).parent / "golden" / "format-1.1"
NEWEST = Path(__file__).parent / "golden" / "format-1.2"


@pytest.fixture
def store() -> LocalStore:
    return LocalStore(GOLDEN)


def test_it_is_read(store: LocalStore, images: Any, same: Any) -> None:
    manifest = store.load_manifest()
    assert (manifest.format_version, manifest.cut, manifest.run, manifest.seed) == ("1.0", 12, 2, 42)
    assert manifest.job == "0123456789abcdef0123456789abcdef"
    assert manifest.closed == ClosedSet(5, (6, 9))
    assert manifest.open_splits == (7, 1 << 40)
    assert manifest.config == {"batch_size": 512, "learning_rate": 1e-05, "label": "clické"}
    assert manifest.table_specs()["user"].optimizer.name == "adagrad"
    assert manifest.dense_specs()["tower.0-w"].slice == 4
    store.verify(manifest)
    loaded = {(entry.kind, entry.name, entry.block): store.load_block(manifest, entry) for entry in manifest.blocks}
    for image in images(3):
        assert same(loaded.pop((image.kind, image.name, image.block)), image)
    assert not loaded


def test_what_it_says_is_written_again(store: LocalStore, images: Any, same: Any, tmp_path: Path) -> None:
    """In the present format, from what was read and from the values: equal files, and the manifest as it was."""
    manifest = store.load_manifest(12)
    loaded = [store.load_block(manifest, entry) for entry in manifest.blocks]
    for name, blocks in (("read", loaded), ("made", images(3))):
        other = LocalStore(tmp_path / name)
        again = replace(manifest, blocks=tuple(other.write_block(12, image) for image in blocks))
        other.commit(again)
        for entry in again.blocks:
            assert same(other.load_block(again, entry), next(i for i in images(3) if i.where == entry.where))
    files = [sorted((tmp_path / name / "cut-000012").iterdir()) for name in ("read", "made")]
    assert [path.name for path in files[0]] == sorted(path.name for path in (GOLDEN / "cut-000012").iterdir())
    assert [path.read_bytes() for path in files[0]] == [path.read_bytes() for path in files[1]]
    assert manifest.encode() == (GOLDEN / "cut-000012" / "manifest.json").read_bytes()


def test_it_is_read_without_oarlock() -> None:
    folder = GOLDEN / "cut-000012"
    document = json.loads((folder / "manifest.json").read_bytes())
    checksum = document.pop("checksum")
    canonical = json.dumps(document, sort_keys=True, separators=(",", ":"))
    assert hashlib.sha256(canonical.encode()).hexdigest() == checksum
    for entry in document["blocks"]:
        data = (folder / entry["file"]).read_bytes()
        assert hashlib.sha256(data).hexdigest() == entry["sha256"]
        assert len(data) == entry["bytes"]
    with pa.memory_map(str(folder / "rows-user-00000.arrow")) as source:
        table = pa.ipc.open_file(source).read_all()
    assert table.column("key").to_pylist() == [0, 8, (1 << 64) - 1]
    assert table.column("weights").to_pylist()[1] == [3.75, 4.75, 5.75]
    assert table.column("state").to_pylist() == [[3.5] * 3] * 3
    assert table.schema.metadata[b"oarlock.marks"] == b'{"7":6,"1099511627776":3}'


def test_it_is_small_and_complete() -> None:
    files = sorted(path.name for path in (GOLDEN / "cut-000012").iterdir())
    assert files == [
        "dense-tower.0-w-00000.arrow",
        "dense-tower.0-w-00001.arrow",
        "manifest.json",
        "rows-item=1-00000.arrow",
        "rows-user-00000.arrow",
        "rows-user-00001.arrow",
    ]
    assert sum(path.stat().st_size for path in (GOLDEN / "cut-000012").iterdir()) < 20_000


def test_damage_to_it_is_seen(tmp_path: Path, store: LocalStore) -> None:
    """The golden files are under test here, so that a change to the reader cannot make it blind."""
    shutil.copytree(GOLDEN, tmp_path / "copy")
    path = tmp_path / "copy" / "cut-000012" / "manifest.json"
    path.write_bytes(path.read_bytes().replace(b'"seed": 42', b'"seed": 43'))
    assert LocalStore(tmp_path / "copy").latest() is None


def test_what_came_with_1_1_is_read(whole_images: Any, same: Any) -> None:
    store = LocalStore(NEWER)
    manifest = store.load_manifest()
    assert manifest.format_version == "1.1"
    store.verify(manifest)
    loaded = {(entry.kind, entry.name, entry.block): store.load_block(manifest, entry) for entry in manifest.blocks}
    for image in whole_images(3):
        found = loaded.pop((image.kind, image.name, image.block))
        assert found.keys.tolist() == sorted(image.keys.tolist())
        assert same(found, decode(encode(image)) if not knows_waiting(image) else sorted_image(image))
    assert not loaded
    assert manifest.encode() == (NEWER / "cut-000012" / "manifest.json").read_bytes()


def sorted_image(image: BlockImage) -> BlockImage:
    order = np.argsort(image.waiting)
    return replace(decode(encode(image)), waiting=image.waiting[order], waited=image.waited[order], sketch=image.sketch)


def test_what_came_with_1_1_is_read_without_oarlock() -> None:
    folder = NEWER / "cut-000012"
    with pa.memory_map(str(folder / "rows-seen-00000.arrow")) as source:
        table = pa.ipc.open_file(source).read_all()
    assert table.column("key").to_pylist() == [4, 303]
    assert table.column("counters").to_pylist() == [[(3 << 28) + i for i in row] for row in ([0, 1, 2], [3, 4, 5])]
    assert table.schema.metadata[b"oarlock.format"] == b"1.1"
    with pa.memory_map(str(folder / "waiting-seen-00000.arrow")) as source:
        table = pa.ipc.open_file(source).read_all()
    assert table.to_pydict() == {"key": [3, 9, 1 << 63], "count": [3, 1, (1 << 30) - 1]}
    assert table.schema.metadata[b"oarlock.seq"] == b"30"
    with pa.memory_map(str(folder / "waiting-drawn=1-00000.arrow")) as source:
        sketch = pa.ipc.open_file(source).read_all().column("sketch").to_numpy()
    assert sketch.view(np.int64).tolist() == [3 * i for i in range(24)]
    assert len(list(folder.iterdir())) == 13


def test_what_came_with_1_2_is_read_and_written_again(write_chained: Any, same: Any, tmp_path: Path) -> None:
    store = LocalStore(NEWEST)
    manifest = store.load_manifest()
    assert (manifest.format_version, manifest.cut) == ("1.2", 12)
    store.verify(manifest)
    again, wanted = write_chained(LocalStore(tmp_path), LocalStore(tmp_path, compress="zstd"))
    for entry in manifest.blocks:
        image = store.load_block(manifest, entry)
        found = wanted.get((entry.name, entry.block))
        assert len(entry.links) == (1 if found is None else 2)
        if found is not None:
            assert same(image, found), entry.where
        else:
            assert entry.folder == "cut-000011"
    if pa.__version__.startswith("14."):
        assert again == manifest
        for path in NEWEST.rglob("*.*"):
            assert (tmp_path / path.relative_to(NEWEST)).read_bytes() == path.read_bytes(), path
    assert manifest.encode() == (NEWEST / "cut-000012" / "manifest.json").read_bytes()
    assert sorted(path.name for path in (NEWEST / "cut-000012").iterdir()) == [
        "gone-seen-00000.arrow",
        "gone-user-00000.arrow",
        "manifest.json",
        "rows-drawn=1-00000.arrow",
        "rows-seen-00000.arrow",
        "rows-user-00000.arrow",
        "rows-user-00001.arrow",
        "waiting-drawn=1-00000.arrow",
        "waiting-seen-00000.arrow",
    ]


def test_what_came_with_1_2_is_read_without_oarlock() -> None:
    folder = NEWEST / "cut-000012"
    tables = {path.name: pa.ipc.open_file(path.read_bytes()).read_all() for path in folder.glob("*.arrow")}
    assert tables["gone-user-00000.arrow"].to_pydict() == {"key": [0]}
    rows = tables["rows-user-00000.arrow"]
    assert (rows.column("key").to_pylist(), rows.column("weights").to_pylist()) == ([8], [[103.75, 104.75, 105.75]])
    assert rows.schema.metadata[b"oarlock.after"] == b"30"
    assert rows.schema.metadata[b"oarlock.marks"] == b'{"7":8}'
    assert list(json.loads(rows.schema.metadata[b"oarlock.columns"])) == ["key", "weights", "state"]
    assert tables["waiting-seen-00000.arrow"].to_pydict() == {"key": [3, 303], "count": [4, 1]}
    line = next(e for e in json.loads((folder / "manifest.json").read_bytes())["blocks"] if "gone_bytes" in e)
    assert [link["folder"] for link in line["base"]] == ["cut-000011"]
    beside = (folder / line["file"].replace("rows-", "gone-", 1)).read_bytes()
    assert (len(beside), hashlib.sha256(beside).hexdigest()) == (line["gone_bytes"], line["gone_sha256"])
