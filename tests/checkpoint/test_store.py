# SPDX-License-Identifier: Apache-2.0
"""The store: what is committed is there, for any number of shards, and stays; what is not is not."""

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from oarlock.checkpoint.block_file import BlockImage
from oarlock.checkpoint.files import LocalFiles
from oarlock.checkpoint.store import CheckpointStore, LocalStore, open_checkpoint
from oarlock.proto.errors import CorruptCheckpoint, InvalidArgument, NotFound, VersionMismatch


@pytest.fixture
def store(tmp_path: Path, quick: Any) -> CheckpointStore:
    result: CheckpointStore = quick(tmp_path / "ckpt")
    return result


def test_a_cut_comes_back(tmp_path: Path, images: Any, same: Any, write: Any) -> None:
    manifest = write(LocalStore(tmp_path / "a" / "b"), 12, 1)
    store, found = open_checkpoint(tmp_path / "a" / "b")
    assert found == manifest
    assert open_checkpoint(tmp_path / "a" / "b" / "cut-000012")[1] == manifest
    seen: list[tuple[int, int]] = []
    store.verify(found, progress=lambda done, total: seen.append((done, total)))
    total = sum(entry.bytes for entry in found.blocks)
    assert [done for done, _ in seen] == list(np.cumsum([entry.bytes for entry in found.blocks]))
    assert {of for _, of in seen} == {total}
    loaded = {(entry.kind, entry.name, entry.block): store.load_block(found, entry) for entry in found.blocks}
    assert len(loaded) == 5
    for image in images(1):
        assert same(loaded[image.kind, image.name, image.block], image)


def test_a_constructor_touches_nothing(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "none")
    assert store.cuts() == []
    assert store.latest() is None
    assert store.discard_incomplete() == []
    assert not (tmp_path / "none").exists()
    with pytest.raises(NotFound, match=r"no checkpoint in .*none"):
        store.load_manifest()
    with pytest.raises(NotFound, match=r"no committed cut 3 in .*; there is: none"):
        store.load_manifest(3)


def test_shards_write_at_once_and_others_read(
    store: CheckpointStore, images: Any, same: Any, make_manifest: Any
) -> None:
    """Three writers with a store each; then five readers. The number of shards is not part of a checkpoint."""
    parts = [images(1)[i::3] for i in range(3)]
    root = store.files.root

    def shard(part: list[BlockImage]) -> list[Any]:
        own = LocalStore(root)
        return [own.write_block(1, image) for image in part]

    with ThreadPoolExecutor(3) as pool:
        entries = [entry for part in pool.map(shard, parts) for entry in part]
    assert store.latest() is None
    store.commit(make_manifest(1, entries))
    manifest = store.load_manifest()
    with ThreadPoolExecutor(5) as pool:
        loaded = list(pool.map(lambda entry: LocalStore(root).load_block(manifest, entry), manifest.blocks))
    by_name = {(image.kind, image.name, image.block): image for image in images(1)}
    assert all(same(image, by_name[image.kind, image.name, image.block]) for image in loaded)


def test_equal_content_gives_equal_files(store: CheckpointStore, write: Any) -> None:
    one, again, other = (
        [replace(entry, folder="") for entry in write(store, cut, version).blocks]
        for cut, version in ((1, 1), (2, 1), (3, 2))
    )
    assert one == again != other


def test_without_a_manifest_nothing_is_there(store: CheckpointStore, images: Any, write: Any) -> None:
    write(store, 1, 1)
    for image in images(2):
        store.write_block(2, image)
    assert store.cuts() == [1]
    assert store.load_manifest().cut == 1
    with pytest.raises(NotFound, match=r"no committed cut 2 .* there is: 1"):
        store.load_manifest(2)


def test_a_block_is_written_again(store: CheckpointStore, images: Any, same: Any, make_manifest: Any) -> None:
    """A shard that repeats itself replaces its file, and a reader of the old one keeps what it has."""
    old = [store.write_block(1, image) for image in images(1)]
    reader = store.files.read_file(f"cut-000001/{old[0].file}")
    before = bytes(reader)
    new = [store.write_block(1, image) for image in images(2)]
    assert new != old
    assert bytes(reader) == before
    store.commit(make_manifest(1, new))
    manifest = store.load_manifest()
    assert same(store.load_block(manifest, new[0]), images(2)[0])


def test_a_committed_cut_does_not_change(store: CheckpointStore, images: Any, make_manifest: Any, write: Any) -> None:
    manifest = write(store, 1, 1)
    with pytest.raises(InvalidArgument, match=r"cut 1 is committed and cannot change"):
        store.write_block(1, images(2)[0])
    with pytest.raises(InvalidArgument, match=r"cut 1 is committed already"):
        store.commit(make_manifest(1, list(manifest.blocks), step=9))
    store.commit(manifest)
    assert store.load_manifest() == manifest
    store.verify(manifest)


def test_commit_looks_for_every_file(store: CheckpointStore, images: Any, make_manifest: Any) -> None:
    entries = [store.write_block(1, image) for image in images(1)]
    path = Path(store.files.root, "cut-000001", entries[2].file)
    os.truncate(path, 100)
    with pytest.raises(
        CorruptCheckpoint, match=rf"{entries[2].file}: truncated: it has 100 of {entries[2].bytes} bytes"
    ):
        store.commit(make_manifest(1, entries))
    path.unlink()
    with pytest.raises(CorruptCheckpoint, match=f"{entries[2].file}: missing"):
        store.commit(make_manifest(1, entries))
    assert store.latest() is None


def test_values_that_are_not_finite_spare_the_earlier_cut(store: CheckpointStore, images: Any, write: Any) -> None:
    write(store, 1, 1)
    bad = images(2)[0]
    bad.weights[2, 1] = np.nan
    with pytest.raises(InvalidArgument, match=r"table user, block 0: key 18446744073709551615: weights"):
        store.write_block(2, bad)
    assert store.load_manifest().cut == 1


def test_keep_last(store: CheckpointStore, images: Any, write: Any) -> None:
    for cut in (1, 2, 3, 5, 8):
        write(store, cut, cut)
    for image in images(9):
        store.write_block(9, image)  # being written: not to be touched
    assert store.keep_last(2, pinned=(2,)) == [1, 3]
    assert store.cuts() == [2, 5, 8]
    assert not Path(store.files.root, "cut-000001").exists()
    for cut in store.cuts():
        store.verify(store.load_manifest(cut))
    assert store.keep_last(7) == []
    assert len(os.listdir(Path(store.files.root, "cut-000009"))) == 5
    with pytest.raises(InvalidArgument, match=r"at least one"):
        store.keep_last(0)


def test_a_damaged_cut_does_not_count_as_kept(store: CheckpointStore, write: Any) -> None:
    for cut in (1, 2, 3):
        write(store, cut, cut)
    os.truncate(Path(store.files.root, "cut-000003", "manifest.json"), 100)
    assert store.keep_last(1) == [1]
    assert store.cuts() == [2, 3]
    assert store.load_manifest().cut == 2


def test_discard_incomplete(store: CheckpointStore, images: Any, write: Any) -> None:
    write(store, 1, 1)
    for cut in (2, 3, 4):
        store.write_block(cut, images(2)[0])
    Path(store.files.root, "cut-000003", "manifest.json.tmp").write_bytes(b"{")
    Path(store.files.root, "notes").mkdir()
    Path(store.files.root, "cut-000007").write_bytes(b"not a folder")
    assert store.discard_incomplete(below=4) == [2, 3]
    assert store.discard_incomplete() == [4]
    assert sorted(os.listdir(store.files.root)) == ["cut-000001", "cut-000007", "notes"]
    store.verify(store.load_manifest())


def test_a_newer_format_is_not_passed_over(store: CheckpointStore, write: Any, make_manifest: Any) -> None:
    """Falling back to an older cut, only because the program is older, would lose work in silence."""
    write(store, 1, 1)
    manifest = write(store, 2, 2)
    path = Path(store.files.root, "cut-000002", "manifest.json")
    newer = make_manifest(2, list(manifest.blocks), format_version="1.7", config={"x": 1})
    path.write_bytes(newer.encode())
    assert store.load_manifest() == newer
    document = newer.encode().replace(b'"1.7"', b'"2.0"')
    plain = json.loads(document)
    plain.pop("checksum")
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"))
    old = json.loads(newer.encode())["checksum"]
    path.write_bytes(document.replace(old.encode(), hashlib.sha256(text.encode()).hexdigest().encode()))
    with pytest.raises(VersionMismatch, match=r"cut-000002/manifest.json: checkpoint format 2.0"):
        store.latest()


def test_a_disk_that_fails_for_the_moment_is_not_a_missing_cut(
    store: CheckpointStore, write: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(store, 1, 1)
    manifest = write(store, 2, 2)

    def fail(self: LocalFiles, path: str) -> Any:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(LocalFiles, "read_file", fail)
    with pytest.raises(OSError, match=r"Input/output error"):
        store.latest()
    with pytest.raises(OSError, match=r"Input/output error"):
        store.load_block(manifest, manifest.blocks[0])


# Paths


@pytest.mark.parametrize("path", ["../x/y", "a/../b", "a/b/c", "/etc/passwd", "a/", "a", "./b", "a/.", "a/\0"])
def test_paths_stay_below_the_root(tmp_path: Path, path: str) -> None:
    files = LocalFiles(tmp_path)
    for action in (files.read_file, files.size, files.delete, lambda p: files.write_file(p, b"x")):
        with pytest.raises(InvalidArgument, match=r"not the plain name"):
            action(path)
    assert list(tmp_path.iterdir()) == []


def test_links_are_not_followed(store: CheckpointStore, tmp_path: Path, images: Any, write: Any) -> None:
    manifest = write(store, 1, 1)
    root, entry = Path(store.files.root), manifest.blocks[0]
    file = root / "cut-000001" / entry.file
    outside = tmp_path / "outside.arrow"
    file.rename(outside)
    file.symlink_to(outside)
    with pytest.raises(CorruptCheckpoint, match=rf"{entry.file}: cannot be read: .*symbolic links"):
        store.load_block(manifest, entry)

    # A folder that is a link is no cut, and what it leads to is neither read nor deleted nor written.
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "precious").write_bytes(b"1")
    (root / "cut-000005").symlink_to(elsewhere)
    assert store.cuts() == [1]
    assert store.discard_incomplete() == []
    with pytest.raises(OSError, match=r"symbolic links"):
        store.write_block(5, images(1)[0])
    assert os.listdir(elsewhere) == ["precious"]

    (root / "cut-000001").rename(elsewhere / "moved")
    (root / "cut-000001").symlink_to(elsewhere / "moved")
    with pytest.raises(NotFound, match=r"no committed cut 1"):
        store.load_manifest(1)
    with pytest.raises(CorruptCheckpoint, match=r"cannot be read: Not a directory"):
        store.load_block(manifest, manifest.blocks[1])

    # A link where a block's file goes is replaced, what it leads to is left alone.
    (root / "cut-000006").mkdir()
    (root / "cut-000006" / entry.file).symlink_to(elsewhere / "precious")
    store.write_block(6, next(image for image in images(1) if image.kind == entry.kind))
    assert (elsewhere / "precious").read_bytes() == b"1"
    assert not (root / "cut-000006" / entry.file).is_symlink()


@pytest.mark.parametrize("what", ["folder", "pipe"])
def test_what_is_no_file_is_refused(store: CheckpointStore, write: Any, what: str) -> None:
    manifest = write(store, 1, 1)
    for name in (manifest.blocks[1].file, "manifest.json"):
        path = Path(store.files.root, "cut-000001", name)
        path.unlink()
        path.mkdir() if what == "folder" else os.mkfifo(path)
    with pytest.raises(CorruptCheckpoint, match=r"not a regular file|Is a directory"):
        store.verify(manifest)
    with pytest.raises(CorruptCheckpoint, match=r"manifest.json: cannot be read"):
        store.load_manifest(1)
    assert store.latest() is None
