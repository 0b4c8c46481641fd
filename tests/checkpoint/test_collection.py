# SPDX-License-Identifier: Apache-2.0
"""Garbage collection by reference; and chained cuts, compaction and collection, failing at each step: kept cuts stay whole."""

import contextlib
import os
from pathlib import Path
from typing import Any

import pytest
from checkpoint_story import SPEC, block, check, files_of, story, write

from oarlock.checkpoint.chain import rebase
from oarlock.checkpoint.files import LocalFiles
from oarlock.checkpoint.manifest import Manifest
from oarlock.checkpoint.store import CheckpointStore
from oarlock.proto.errors import CorruptCheckpoint, VersionMismatch


@pytest.fixture
def store(tmp_path: Path, quick: Any, make_manifest: Any) -> CheckpointStore:
    """Cuts 1 to 4, one chain: 1 is whole."""
    result: CheckpointStore = quick(tmp_path / "root")
    before = None
    for cut in (1, 2, 3, 4):
        before = list(write(result, make_manifest, cut, cut, before).blocks)
    return result


def test_files_that_a_newer_chain_needs_stay(store: CheckpointStore, make_manifest: Any) -> None:
    all_files = files_of(store)
    assert store.keep_last(1) == [1, 2, 3]
    assert all_files - files_of(store) == {f"cut-00000{cut}/manifest.json" for cut in (1, 2, 3)}
    assert check(store) == [4]
    # A new beginning frees them: all but those of the cut before.
    write(store, make_manifest, 5, 5, None)
    assert store.keep_last(1, pinned=[4]) == []
    assert check(store) == [4, 5]
    assert store.keep_last(1) == [4]
    assert check(store) == [5]
    assert sorted(os.listdir(store.files.root)) == ["cut-000005"]


def test_only_what_is_not_named_goes(store: CheckpointStore, make_manifest: Any) -> None:
    """Block 0 begins anew, block 1 goes on: of the older cuts block 1's files stay."""
    (_, one) = store.load_manifest().blocks
    entries = [store.write_block(5, block(0, 5, [])), store.write_block(5, block(1, 5, [105]), after=one)]
    store.commit(make_manifest(5, entries, tables=(SPEC,), dense=()))
    assert store.keep_last(1) == [1, 2, 3, 4]
    assert {name for name in files_of(store) if not name.startswith("cut-000005")} == {
        "cut-000001/rows-user-00001.arrow",
        "cut-000002/rows-user-00001.arrow",
        "cut-000003/rows-user-00001.arrow",
        "cut-000003/gone-user-00001.arrow",
        "cut-000004/rows-user-00001.arrow",
        "cut-000004/gone-user-00001.arrow",
    }
    store.verify(store.load_manifest())


def test_discarding_spares_what_a_chain_names(store: CheckpointStore) -> None:
    store.keep_last(1)
    store.write_block(5, block(0, 5, [1]))
    store.write_block(6, block(0, 6, [1]))
    before = files_of(store)
    assert store.discard_incomplete(below=6) == [5]
    assert store.discard_incomplete() == [6]
    assert before - files_of(store) == {"cut-000005/rows-user-00000.arrow", "cut-000006/rows-user-00000.arrow"}
    assert check(store) == [4]


def test_nothing_that_a_damaged_manifest_may_name_goes(store: CheckpointStore, make_manifest: Any) -> None:
    """It may be repaired, or only have been read wrongly; what is deleted is gone."""
    path = Path(store.files.root, "cut-000003", "manifest.json")
    data = path.read_bytes()
    path.write_bytes(data[:-9])
    write(store, make_manifest, 5, 5, None)
    store.write_block(6, block(0, 6, [1]))
    assert store.keep_last(1) == [1, 2, 4]
    assert store.discard_incomplete() == [6], "newer than what is damaged"
    path.write_bytes(data)
    assert check(store) == [3, 5]


def test_a_newer_format_stops_collection(store: CheckpointStore, monkeypatch: pytest.MonkeyPatch) -> None:
    real = store.read_manifest

    def newer(cut: int) -> Manifest:
        if cut == 4:
            raise VersionMismatch("a newer one")
        return real(cut)

    monkeypatch.setattr(store, "read_manifest", newer)
    before = files_of(store)
    for action in (lambda: store.keep_last(1), store.discard_incomplete):
        with pytest.raises(VersionMismatch):
            action()
    assert files_of(store) == before


def test_what_compaction_wrote_stays_while_it_can_stand_in(store: CheckpointStore, make_manifest: Any) -> None:
    manifest = store.load_manifest()
    compacted = store.compact(manifest)
    new = {
        f"compact-000004/{name}-0000{at}.arrow"
        for name, at in (("rows-user", 0), ("rows-user", 1), ("waiting-user", 0))
    }
    assert {name for name in files_of(store) if name.startswith("compact")} == new
    store.keep_last(1)
    store.discard_incomplete()
    assert new < files_of(store), "no cut names it, but the next one may"
    five = write(store, make_manifest, 5, 5, [rebase(e, c) for e, c in zip(manifest.blocks, compacted, strict=True)])
    assert [len(entry.links) for entry in five.blocks] == [2, 2]
    assert store.keep_last(1) == [4]
    assert sorted(os.listdir(store.files.root)) == ["compact-000004", "cut-000005"]
    assert check(store) == [5]
    write(store, make_manifest, 6, 6, None)
    store.keep_last(1)
    assert sorted(os.listdir(store.files.root)) == ["cut-000006"]


def test_what_compaction_left_that_nobody_can_use_goes(store: CheckpointStore, make_manifest: Any) -> None:
    store.compact(store.load_manifest())
    Path(store.files.root, "compact-000002").mkdir()
    Path(store.files.root, "compact-000002", "rows-user-00007.arrow").write_bytes(b"half")
    store.discard_incomplete()
    assert sorted(os.listdir(store.files.root))[0] == "compact-000004"
    write(store, make_manifest, 5, 5, None)
    store.discard_incomplete()
    assert not list(Path(store.files.root).glob("compact-*"))
    assert check(store) == [1, 2, 3, 4, 5]


def test_a_cut_on_a_chain_that_is_gone_is_refused(store: CheckpointStore, make_manifest: Any) -> None:
    """A shard that has not heard of the newest cut builds on an older one, of which that left nothing."""
    older = list(store.load_manifest().blocks)
    write(store, make_manifest, 5, 5, None)
    store.keep_last(1)
    with pytest.raises(
        CorruptCheckpoint, match=r"cut-000001/rows-user-00000.arrow: missing .*; cut 5 is the next older one"
    ):
        write(store, make_manifest, 6, 6, older)
    assert check(store) == [5]


def test_the_best_cuts(store: CheckpointStore, make_manifest: Any) -> None:
    assert store.best_cuts(2, "auc") == [1, 2]
    assert store.best_cuts(2, "auc", smallest=True) == [4, 3]
    assert store.best_cuts(9, "loss") == store.best_cuts(0, "auc") == []
    write(store, make_manifest, 5, 1, None)
    assert store.best_cuts(2, "auc") == [5, 1], "of equal ones the newest first"
    assert store.keep_last(1, pinned=store.best_cuts(2, "auc")) == [2, 3, 4]
    assert check(store) == [1, 5]


def test_a_shard_that_still_writes_to_an_aborted_cut_hinders_nobody(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.write_block(5, block(0, 5, [1]))
    real = LocalFiles.delete

    def delete(self: LocalFiles, path: str, *, durable: bool = False) -> None:
        real(self, path, durable=durable)
        Path(store.files.root, "cut-000005", "rows-user-00001.arrow").write_bytes(b"late")

    with monkeypatch.context() as patch:
        patch.setattr(LocalFiles, "delete", delete)
        assert store.discard_incomplete() == []
    assert store.discard_incomplete() == [5]


MODES = ["error", "kill", "power", "torn", "scattered"]


@pytest.mark.parametrize("mode", MODES)
def test_some_steps(tmp_path: Path, mode: str, quick: Any, faulty_disk: Any, make_manifest: Any) -> None:
    fail_at_steps(range(3 + 5 * MODES.index(mode), 1000, 23), tmp_path, mode, quick, faulty_disk, make_manifest)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_every_step(tmp_path: Path, mode: str, quick: Any, faulty_disk: Any, make_manifest: Any) -> None:
    assert fail_at_steps(range(1, 1000), tmp_path, mode, quick, faulty_disk, make_manifest) == {1, 2, 3}


def fail_at_steps(
    steps: range, tmp_path: Path, mode: str, quick: Any, faulty_disk: Any, make_manifest: Any
) -> set[int]:
    """Fail at those steps of the story, each in a folder of its own; return the cuts at which jobs went on."""
    seen = set()
    for fail_at in steps:
        root = tmp_path / str(fail_at)
        write(quick(root), make_manifest, 1, 1, None)
        disk = faulty_disk(fail_at, mode)
        done = [1]
        with contextlib.suppress(OSError):
            story(CheckpointStore(LocalFiles(root, calls=disk)), make_manifest, done)
        disk.lose_power()

        reopened = quick(root)
        cuts = check(reopened)
        assert cuts[-1] in (done[-1], done[-1] + 1), disk.log[-1]
        seen.add(cuts[-1])

        # Whatever is left, the job goes on from there, and in the end nothing is left of it.
        newest = reopened.load_manifest()
        reopened.discard_incomplete()
        assert check(reopened) == cuts
        compacted = {(e.name, e.block): e for e in reopened.compact(newest)}
        before = [rebase(e, compacted.get((e.name, e.block), e)) for e in newest.blocks]
        write(reopened, make_manifest, 7, newest.step + 1, before)
        reopened.keep_last(1)
        assert check(reopened) == [7]
        write(reopened, make_manifest, 8, 8, None)
        reopened.keep_last(1)
        reopened.discard_incomplete()
        assert check(reopened) == [8]
        assert [path.name for path in root.iterdir()] == ["cut-000008"]
        if disk.operations < fail_at:
            break
    assert fail_at > 60
    return seen


@pytest.mark.parametrize("limit", [*range(1, 60, 8), 1000])
def test_reading_fails_at_every_step(store: CheckpointStore, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that answers no more, in the midst of a restore or a collection: an error, and no wrong block."""
    count = 0

    def failing(real: Any) -> Any:
        def call(self: LocalFiles, path: str) -> Any:
            nonlocal count
            count += 1
            if count == limit:
                raise OSError(5, "Input/output error")
            return real(self, path)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(LocalFiles, "read_file", failing(LocalFiles.read_file))
        patch.setattr(LocalFiles, "size", failing(LocalFiles.size))
        failed = []
        for action in (lambda: check(store), lambda: store.keep_last(2), store.discard_incomplete):
            count = 0
            try:
                action()
            except OSError as error:
                failed.append((error.errno, count))
            else:
                assert count < limit
        assert set(failed) <= {(5, limit)}
    assert check(store)[-2:] == [3, 4]
