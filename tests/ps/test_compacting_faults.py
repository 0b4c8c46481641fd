# SPDX-License-Identifier: Apache-2.0
"""Compaction that fails, or is overtaken, at any of its file operations: what is committed stays, and the next cut is right."""

import shutil

import pytest
from checkpoint_faulty_files import FaultyFiles
from checkpoint_story import check, write

from oarlock.checkpoint.files import Calls, LocalFiles
from oarlock.checkpoint.manifest import ClosedSet, Manifest
from oarlock.checkpoint.store import CheckpointStore
from oarlock.proto.errors import CorruptCheckpoint
from oarlock.ps.compacting import Compacting


class Quick(Calls):
    """Without waiting for the disk."""

    def sync(self, descriptor):
        pass

    def sync_folder(self, path):
        pass


def manifest_of(cut, entries, **changes):
    values = {"metrics": {}, "step": 0, **changes}
    return Manifest(
        job="00112233445566778899aabbccddeeff", run=1, cut=cut, created="2026-01-31T12:00:00Z", seed=7, recipe="none:none",
        config={}, files=(), closed=ClosedSet(0), open_splits=(), epoch=0, best={}, blocks=tuple(entries), **values,
    )  # fmt: skip


def files_in(folder):
    return LocalFiles(folder, calls=Quick())


def entries_of(store, cut):
    return dict(enumerate(store.load_manifest(cut).blocks))


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A folder with cuts 1 to 3 of two blocks, whose chains are of as many links."""
    folder = tmp_path_factory.mktemp("begun") / "checkpoints"
    store, before = CheckpointStore(files_in(folder)), None
    for cut in range(1, 4):
        before = list(write(store, manifest_of, cut, cut, before).blocks)
    return folder


def compact(compacting, cut):
    compacting.committed(cut)
    while compacting.due:
        compacting.step()


@pytest.mark.parametrize(
    "mode",
    [
        "error",
        "half",
        "full",
        pytest.param("late", marks=pytest.mark.slow),
        pytest.param("die", marks=pytest.mark.slow),
    ],
)
def test_fail_at_every_file_of_compaction(tmp_path, begun, mode):
    halves = 0
    for fail_at in range(1, 200):
        folder = shutil.copytree(begun, tmp_path / str(fail_at))
        store = CheckpointStore(files_in(folder))
        compacting = Compacting(links=3)
        files = FaultyFiles(files_in(folder), fail_at, mode)
        compacting.written(3, entries_of(store, 3), CheckpointStore(files))
        compact(compacting, 3)
        assert check(store) == [1, 2, 3]
        done = len(files.log) < fail_at
        cut = 4
        if mode == "half" and not done and files.log[fail_at - 1].startswith("write_file"):
            # Nobody has heard that half is missing. The commit of the cut that names it sees it, and the next one does not name
            # it again.
            after = compacting.rebased(3, entries_of(store, 3))
            with pytest.raises(CorruptCheckpoint, match=r"compact-000003/.*truncated"):
                write(store, manifest_of, 4, 4, list(after.values()))
            compacting.written(4, after, store)
            assert compacting.rebased(3, entries_of(store, 3)) == entries_of(store, 3)
            cut, halves = 5, halves + 1
        elif mode != "half":
            assert compacting.told()["failed"] == int(not done), files.log
            assert bool(compacting.trouble) != done
        for later in (cut, cut + 1):
            after = compacting.rebased(store.latest().cut, entries_of(store, store.latest().cut))
            made = write(store, manifest_of, later, store.latest().step + 1, list(after.values()))
            compacting.written(later, dict(enumerate(made.blocks)), store)
            compact(compacting, later)
            store.keep_last(1)
            assert check(store) == [later]
        assert not compacting.trouble
        assert {entry.links[0].folder[:7] for entry in store.latest().blocks} == {"compact"}
        if done:
            break
    assert fail_at > 8
    assert halves == (3 if mode == "half" else 0)


class Watched:
    """``files``, of which ``then`` is told before each operation."""

    def __init__(self, files, then):
        self.root, self._files, self._then = files.root, files, then

    def __getattr__(self, name):
        real = getattr(self._files, name)

        def call(*arguments, **options):
            self._then()
            return real(*arguments, **options)

        return call


@pytest.mark.parametrize("whole", [False, True])
def test_a_cut_and_a_collection_at_any_moment_of_it(tmp_path, begun, whole):
    """A newer cut, with increments or whole blocks, is committed and older ones are collected between two files of compaction."""
    for at in range(1, 200):
        folder = shutil.copytree(begun, tmp_path / str(at))
        store, compacting, count = CheckpointStore(files_in(folder)), Compacting(links=3), 0
        three = entries_of(store, 3)

        def commit(store=store, before=three):
            write(store, manifest_of, 4, 4, None if whole else list(before.values()))
            store.keep_last(1)
            store.discard_incomplete(below=4)

        def look(at=at, commit=commit):
            nonlocal count
            count += 1
            if count == at:
                commit()

        compacting.written(3, three, CheckpointStore(Watched(files_in(folder), look)))
        compact(compacting, 3)
        assert not compacting.trouble
        done = count < at
        if done:
            commit()
        assert check(store) == [4]
        compacting.written(4, entries_of(store, 4), store)
        compact(compacting, 4)
        write(store, manifest_of, 5, 5, list(compacting.rebased(4, entries_of(store, 4)).values()))
        store.keep_last(1)
        store.discard_incomplete()
        assert check(store) == [5]
        if done:
            break
    assert at > 8
