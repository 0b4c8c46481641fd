# SPDX-License-Identifier: Apache-2.0
"""Damage to any file, at any place: CorruptCheckpoint names the file; never a crash, never a wrong load."""

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oarlock.checkpoint.manifest import Manifest
from oarlock.checkpoint.store import CheckpointStore
from oarlock.proto.errors import CorruptCheckpoint

FILES = (
    "manifest.json",
    "rows-user-00000.arrow",
    "rows-user-00001.arrow",
    "rows-item=1-00000.arrow",
    "dense-tower.0-w-00001.arrow",
    "rows-seen-00000.arrow",
    "waiting-seen-00000.arrow",
    "waiting-drawn=1-00000.arrow",
)


class Damaged:
    """Cuts 1 and 2; a file of cut 2 is changed, looked at, and put back."""

    def __init__(self, store: CheckpointStore, manifest: Manifest) -> None:
        self.store, self.manifest = store, manifest
        self.folder = Path(store.files.root, "cut-000002")
        self.original = {path.name: path.read_bytes() for path in self.folder.iterdir()}

    def check(self, file: str, data: bytes | None, says: str) -> None:
        path = self.folder / file
        path.unlink()
        if data is not None:
            path.write_bytes(data)
        try:
            self._check(file, says)
        finally:
            path.write_bytes(self.original[file])

    def _check(self, file: str, says: str) -> None:
        if file == "manifest.json":
            with pytest.raises(CorruptCheckpoint) as caught:
                self.store.load_manifest(2)
            older = self.store.latest()
            assert older is not None
            assert older.cut == 1
        else:
            with pytest.raises(CorruptCheckpoint) as caught:
                self.store.verify(self.manifest)
            assert caught.value.details["older"] == 1
            assert "cut 1 is the next older one" in str(caught.value)
            entry = next(entry for entry in self.manifest.blocks if file in (entry.file, entry.waiting_file))
            with pytest.raises(CorruptCheckpoint):
                self.store.load_block(self.manifest, entry)
        assert caught.value.details["file"] == f"cut-000002/{file}"
        assert str(caught.value).startswith(f"cut-000002/{file}: ")
        assert says in str(caught.value)


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory, quick: Any, write_whole: Any) -> Iterator[Damaged]:
    root = tmp_path_factory.mktemp("damage")
    store = quick(root)
    write_whole(store, 1, 1)
    yield Damaged(store, write_whole(store, 2, 2))
    shutil.rmtree(root)


@given(file=st.sampled_from(FILES), place=st.integers(0, 10**6), bit=st.integers(0, 7))
@settings(max_examples=200)
def test_a_flipped_bit(damaged: Damaged, file: str, place: int, bit: int) -> None:
    data = bytearray(damaged.original[file])
    data[place % len(data)] ^= 1 << bit
    damaged.check(file, bytes(data), "altered")


@given(file=st.sampled_from(FILES), start=st.integers(0, 10**6), noise=st.binary(min_size=1, max_size=40))
@settings(max_examples=80)
def test_a_stretch_of_noise(damaged: Damaged, file: str, start: int, noise: bytes) -> None:
    data = bytearray(damaged.original[file])
    start %= len(data)
    data[start : start + len(noise)] = noise[: len(data) - start]
    if bytes(data) != damaged.original[file]:
        damaged.check(file, bytes(data), "altered")


@pytest.mark.parametrize("file", FILES)
def test_many_lengths(damaged: Damaged, file: str) -> None:
    whole = damaged.original[file]
    for length in sorted({*range(0, len(whole), 30), 1, 2, 7, 8, len(whole) - 1}):
        says = "truncated" if file != "manifest.json" else "altered"
        damaged.check(file, whole[:length], says)
    if file != "manifest.json":
        damaged.check(file, whole[:100], f"truncated: it has 100 of {len(whole)} bytes")


@pytest.mark.parametrize("file", FILES)
def test_too_long(damaged: Damaged, file: str) -> None:
    damaged.check(file, damaged.original[file] + b"\0", "altered" if file == "manifest.json" else "too long")


@pytest.mark.parametrize("file", FILES[1:])
def test_missing(damaged: Damaged, file: str) -> None:
    damaged.check(file, None, "missing")


def test_a_file_of_the_other_cut(damaged: Damaged) -> None:
    """The same block of an older cut is a good file, but not the one that was committed."""
    for file in FILES:
        older = Path(damaged.store.files.root, "cut-000001", file).read_bytes()
        damaged.check(file, older, "the manifest of cut 1" if file == "manifest.json" else "altered")


def test_a_manifest_that_names_the_wrong_file(damaged: Damaged, make_manifest: Any) -> None:
    """Two blocks' files exchanged under valid checksums: the files themselves say whose they are."""
    first, second, *rest = sorted(damaged.manifest.blocks, key=lambda entry: entry.name != "user")
    crossed = [
        replace(a, file=b.file, sha256=b.sha256, bytes=b.bytes, rows=b.rows, seq=b.seq)
        for a, b in ((first, second), (second, first))
    ]
    manifest = make_manifest(2, [*crossed, *rest], tables=damaged.manifest.tables)
    with pytest.raises(
        CorruptCheckpoint, match=f"{second.file}: it holds {second.where} .* the manifest says {first.where}"
    ):
        damaged.store.load_block(manifest, next(entry for entry in manifest.blocks if entry.file == second.file))


def test_rows_that_are_not_as_long_as_the_spec_says(damaged: Damaged, make_manifest: Any) -> None:
    tables = [dict(spec) for spec in damaged.manifest.tables]
    tables[0]["dim"] = 4
    manifest = make_manifest(2, list(damaged.manifest.blocks), tables=tables)
    entry = next(entry for entry in manifest.blocks if entry.name == "user")
    with pytest.raises(CorruptCheckpoint, match=rf"{entry.file}: its rows have 3 weights, unlike the spec"):
        damaged.store.load_block(manifest, entry)


def test_nothing_is_loaded_before_all_sizes_fit(damaged: Damaged, monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing last file is found before the first one is read."""
    last = damaged.manifest.blocks[-1].file
    path = damaged.folder / last
    path.unlink()
    try:
        with pytest.raises(CorruptCheckpoint, match=f"{last}: missing"):
            damaged.store.verify(damaged.manifest, progress=lambda done, total: pytest.fail("read before checked"))
    finally:
        path.write_bytes(damaged.original[last])


def test_the_oldest_cut_has_nothing_older(tmp_path: Path, quick: Any, write: Any) -> None:
    store = quick(tmp_path)
    manifest = write(store, 4, 1)
    (tmp_path / "cut-000004" / manifest.blocks[0].file).unlink()
    with pytest.raises(CorruptCheckpoint, match="no older cut can be read"):
        store.verify(manifest)
