# SPDX-License-Identifier: Apache-2.0
"""Transforms beside the cuts: written once, found by what a manifest says, and never others than it says."""

import hashlib
import os
from pathlib import Path
from typing import Any

import pytest
from checkpoint_story import SPEC, block

from oarlock.checkpoint import transforms_file
from oarlock.checkpoint.files import LocalFiles
from oarlock.checkpoint.line import PLAN
from oarlock.checkpoint.manifest import Manifest
from oarlock.checkpoint.store import CheckpointStore, open_store
from oarlock.checkpoint.transforms_file import FOLDER, digest_of, read_transforms, write_transforms
from oarlock.cli.main import main
from oarlock.proto.errors import CorruptCheckpoint, NotFound

TEXT = '{"columns": ["größe"]}'


@pytest.fixture
def files(tmp_path: Path) -> LocalFiles:
    found = LocalFiles(tmp_path / "root")
    write_transforms(found, TEXT)
    return found


@pytest.fixture
def path(files: LocalFiles) -> Path:
    (name,) = files.list(FOLDER)
    return Path(files.root) / FOLDER / name


@pytest.fixture
def naming(make_manifest: Any) -> Any:
    """Make the manifest of a cut that says ``digest`` of its job's transforms."""

    def make(digest: object) -> Manifest:
        found: Manifest = make_manifest(3, [], tables=(), dense=(), metrics={PLAN: {"transforms": digest}})
        return found

    return make


def test_what_is_written_is_read(files: LocalFiles, naming: Any) -> None:
    assert read_transforms(files, naming(digest_of(TEXT))) == TEXT
    assert read_transforms(files, naming(digest_of(""))) == ""


def test_they_may_lie_under_a_url(naming: Any) -> None:
    files = open_store("memory://transforms").files
    with pytest.raises(NotFound, match="are not in memory"):
        read_transforms(files, naming(digest_of(TEXT)))
    write_transforms(files, TEXT)
    write_transforms(files, TEXT)
    assert read_transforms(files, naming(digest_of(TEXT))) == TEXT


def test_damage_is_told_and_is_none_of_the_blocks(
    files: LocalFiles, path: Path, make_manifest: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    store = CheckpointStore(files)
    entries = [store.write_block(1, block(number, 1, [number])) for number in (0, 1)]
    plan = {PLAN: {"transforms": digest_of(TEXT)}}
    store.commit(make_manifest(1, entries, tables=(SPEC,), dense=(), metrics=plan))
    assert main(["checkpoint", "verify", files.root]) == 0
    assert "cut 1 is whole" in capsys.readouterr().out
    path.write_bytes(path.read_bytes().replace(b"c", b"k"))
    assert main(["checkpoint", "verify", files.root]) == 1
    first, last = capsys.readouterr().out.splitlines()
    assert path.name in first
    assert last.endswith("it can be restored, but predictions want the job's folder")


def test_it_is_written_once(files: LocalFiles, path: Path) -> None:
    before = path.stat()
    write_transforms(files, TEXT)
    assert path.stat() == before
    write_transforms(files, "")
    assert os.listdir(path.parent) == [path.name]


def test_what_was_cut_short_by_a_crash_is_written_again(files: LocalFiles, path: Path, naming: Any) -> None:
    path.write_bytes(path.read_bytes()[:-1])
    write_transforms(files, TEXT)
    assert read_transforms(files, naming(digest_of(TEXT))) == TEXT


def test_others_are_refused_by_name(files: LocalFiles, path: Path, naming: Any, monkeypatch: Any) -> None:
    path.write_bytes(path.read_bytes().replace(b"c", b"k"))
    with pytest.raises(CorruptCheckpoint, match=path.name):
        read_transforms(files, naming(digest_of(TEXT)))
    write_transforms(files, '{"other": 1}')
    monkeypatch.setattr(transforms_file, "MOST_BYTES", 5)
    with pytest.raises(CorruptCheckpoint, match="altered or truncated"):
        read_transforms(files, naming(digest_of('{"other": 1}')))


def test_what_is_no_text_is_refused(files: LocalFiles, naming: Any) -> None:
    data = b"\xff\xfe"
    digest = hashlib.sha256(data).hexdigest()
    files.write_file(f"{FOLDER}/transforms-{digest}.json", [data])
    with pytest.raises(CorruptCheckpoint, match="no text"):
        read_transforms(files, naming(digest))


@pytest.mark.parametrize("digest", [None, 7, "", "../" * 21 + "x", "A" * 64, "0" * 63, "0" * 64, ["0" * 64]])
def test_what_no_manifest_of_ours_says_is_not_there(files: LocalFiles, naming: Any, digest: object) -> None:
    with pytest.raises(NotFound):
        read_transforms(files, naming(digest))


def test_collection_leaves_them(files: LocalFiles, make_manifest: Any) -> None:
    store = CheckpointStore(files)
    for cut in (1, 2):
        entries = [store.write_block(cut, block(number, cut, [number])) for number in (0, 1)]
        store.commit(make_manifest(cut, entries, tables=(SPEC,), dense=()))
    assert store.keep_last(1) == [1]
    store.discard_incomplete()
    assert sorted(files.folders()) == ["cut-000002", FOLDER]
