# SPDX-License-Identifier: Apache-2.0
"""Fail at operation 1, 2, 3, ... until nothing fails: a cut is there whole or not at all, and the earlier one stays."""

from pathlib import Path
from typing import Any

import pytest

from oarlock.checkpoint.files import LocalFiles
from oarlock.checkpoint.store import CheckpointStore


def version_of(store: CheckpointStore, images: Any, same: Any, versions: dict[int, int]) -> int:
    """Return the newest cut after reading all of it and comparing every block with what was written."""
    manifest = store.latest()
    assert manifest is not None
    for cut in store.cuts():  # also one that was being deleted: whole, or none
        store.verify(store.load_manifest(cut))
    written = {(image.kind, image.name, image.block): image for image in images(versions[manifest.cut])}
    assert len(written) == len(manifest.blocks)
    for entry in manifest.blocks:
        assert same(store.load_block(manifest, entry), written[entry.kind, entry.name, entry.block])
    return manifest.cut


@pytest.mark.parametrize("mode", ["error", "kill", "power", "torn", "scattered"])
def test_every_step_of_a_cut(
    tmp_path: Path, mode: str, quick: Any, faulty_disk: Any, images: Any, same: Any, write: Any
) -> None:
    versions = {1: 1, 2: 2, 3: 3, 4: 4}
    seen = set()
    for fail_at in range(1, 1000):
        root = tmp_path / str(fail_at)
        write(quick(root), 1, 1)
        disk = faulty_disk(fail_at, mode)
        store = CheckpointStore(LocalFiles(root, calls=disk))
        done = 0
        try:
            write(store, 2, 2)
            done = 2
            store.keep_last(1)
            write(store, 3, 3)
            done = 3
        except OSError:
            pass
        disk.lose_power()

        reopened = quick(root)
        newest = version_of(reopened, images, same, versions)
        # What was promised is there; what was not may be there only whole, and only the very next one.
        assert newest in (max(done, 1), max(done, 1) + 1), disk.log[-1]
        if done < 2 and "rename" not in " ".join(disk.log[: fail_at - 1]):
            assert newest == 1
        seen.add(newest)

        # The next attempt has a new number and is not hindered by what is left.
        reopened.discard_incomplete()
        assert reopened.cuts()[-1] == newest
        write(reopened, 4, 4)
        reopened.keep_last(1)
        assert version_of(reopened, images, same, versions) == 4
        assert [path.name for path in root.iterdir()] == ["cut-000004"]
        assert len(list((root / "cut-000004").iterdir())) == 6
        if disk.operations < fail_at:
            break
    assert fail_at > 40
    assert seen == {1, 2, 3}


@pytest.mark.parametrize("mode", ["error", "kill", "power", "torn", "scattered"])
def test_every_step_of_the_first_cut(tmp_path: Path, mode: str, quick: Any, faulty_disk: Any, write: Any) -> None:
    for fail_at in range(1, 1000):
        root = tmp_path / "new" / str(fail_at)
        disk = faulty_disk(fail_at, mode)
        done = False
        try:
            write(CheckpointStore(LocalFiles(root, calls=disk)), 0, 1)
            done = True
        except OSError:
            pass
        disk.lose_power()
        store = quick(root)
        manifest = store.latest()
        if manifest is not None:
            store.verify(manifest)
        assert manifest is not None or not done
        if disk.operations < fail_at:
            break
    assert manifest is not None


@pytest.mark.parametrize("mode", ["kill", "power", "torn", "scattered"])
def test_a_manifest_seen_before_a_crash_becomes_durable_when_committed_again(
    tmp_path: Path, mode: str, quick: Any, faulty_disk: Any, images: Any, make_manifest: Any
) -> None:
    """The coordinator dies between the rename and its own record, finds the manifest, and commits it again."""
    disk = faulty_disk(10**9, mode)
    store = CheckpointStore(LocalFiles(tmp_path / "whole", calls=disk))
    manifest = make_manifest(2, [store.write_block(2, image) for image in images(1)])
    store.commit(manifest)
    assert disk.log[-2].startswith("rename")
    last = disk.operations

    disk = faulty_disk(last, mode)
    store = CheckpointStore(LocalFiles(tmp_path / "cut", calls=disk))
    for image in images(1):
        store.write_block(2, image)
    with pytest.raises(OSError, match="sync_folder"):
        store.commit(manifest)
    disk.fail_at = 10**9
    store.commit(store.load_manifest(2))
    disk.lose_power()
    assert quick(tmp_path / "cut").latest() == manifest
