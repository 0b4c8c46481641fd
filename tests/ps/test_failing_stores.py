# SPDX-License-Identifier: Apache-2.0
"""Every file operation of cuts, compaction, commit and collection fails once, and every one of a restore: all or nothing."""

import errno
import os

import numpy as np
import pytest
import rig
from checkpoint_faulty_files import FaultyFiles
from compacting_rig import Job, by_block, chains

from oarlock.checkpoint.files import Calls, LocalFiles
from oarlock.checkpoint.store import CheckpointStore
from oarlock.proto.errors import PSError
from oarlock.proto.shard_pb2 import AbortRequest
from oarlock.ps import blocks

CUTS = 5


class Failing(Calls):
    """Operation ``at`` fails, and with ``full`` all later ones that need room until somebody clears it."""

    count, at, full = 0, 0, False
    log: list = []  # noqa: RUF012

    def _do(self, name, operation, *arguments):
        kind = type(self)
        kind.count += 1
        kind.log.append(name)
        if kind.count == kind.at or (kind.full and kind.count > kind.at > 0 and not name.startswith("remove")):
            if name == "write":
                os.write(arguments[0], memoryview(arguments[1])[: len(arguments[1]) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), name)
        return operation(*arguments)

    def create(self, path):
        return self._do("create", super().create, path)

    def write(self, descriptor, data):
        return self._do("write", super().write, descriptor, data)

    def sync(self, descriptor):
        self._do("sync", lambda _: None, descriptor)

    def sync_folder(self, path):
        self._do("sync_folder", lambda _: None, path)

    def rename(self, old, new):
        self._do("rename", super().rename, old, new)

    def make_folder(self, path):
        self._do("make_folder", super().make_folder, path)

    def remove(self, path):
        self._do("remove", super().remove, path)

    def remove_folder(self, path):
        self._do("remove_folder", super().remove_folder, path)


def story(job):
    """Make cuts and compact as a job does, whatever fails; return how many were given up."""
    failed = 0
    for cut in range(1, CUTS + 1):
        job.push(range(40) if cut == 1 else range(cut % 5, 3 + cut % 5))
        manifest = None
        try:
            manifest = job.write_cut(cut)
            job.store.commit(manifest)
        except (PSError, OSError):
            failed += 1
            # The coordinator asks what is there, as it does after a restart.
            if not job.store.is_committed(cut):
                for s, service in job.services.items():
                    service.abort(AbortRequest(header=job.header(s), cut=cut))
                Failing.full = False
                continue
        job.committed = cut
        job.check(manifest)
        try:
            job.store.keep_last(2)
            job.store.discard_incomplete(below=cut)
        except OSError:
            Failing.full = False
        job.compact()
        Failing.full = False
    return failed


@pytest.mark.parametrize(
    ("full", "stride"),
    [
        (False, 13),
        (True, 17),
        pytest.param(False, 1, marks=pytest.mark.slow),
        pytest.param(True, 1, marks=pytest.mark.slow),
    ],
)
def test_every_file_operation_of_cuts_fails_once(tmp_path, monkeypatch, full, stride):
    monkeypatch.setattr("oarlock.checkpoint.files.Calls", Failing)
    at, seen = 1, set()
    while True:
        Failing.count, Failing.at, Failing.full, Failing.log = 0, at, full, []
        job = Job(tmp_path / str(at), 1, links=3)
        try:
            failed = story(job)
            done = Failing.count < at
            assert failed <= 1
            if not done:
                seen.add(Failing.log[at - 1])
            Failing.at = 0
            newest = job.make(CUTS + 1)
            assert job.store.latest() == newest
            for cut in job.store.cuts():
                job.store.verify(job.store.load_manifest(cut))
            assert len(job.store.cuts()) == 2
            assert max(map(len, chains(newest))) <= 4
            assert by_block(job) == job.wanted
            # Nothing that was half done is left but what a chain may have use for.
            job.store.discard_incomplete()
            named = {file.path for c in job.store.cuts() for e in job.store.load_manifest(c).blocks for li in e.links
                     for file in li.files}  # fmt: skip
            there = {path.relative_to(job.root).as_posix() for path in job.root.rglob("*.arrow")}
            assert named <= there
            assert all(path.startswith("compact-") for path in there - named)
        finally:
            job.end()
        if done:
            break
        at += stride
    assert at > 100
    if stride == 1:
        assert seen == {"create", "write", "sync", "sync_folder", "rename", "make_folder", "remove", "remove_folder"}


def test_every_file_operation_of_a_restore_fails_once(tmp_path, monkeypatch):
    """A shard that cannot read has nothing, and takes all with the same order once it can."""
    source = Job(tmp_path / "checkpoints", 1)
    source.push(range(40))
    for cut in range(1, 4):
        source.make(cut)
    source.end()
    real = blocks.open_checkpoint
    for at in range(1, 200):
        files = FaultyFiles(LocalFiles(source.root), at, "error")
        job = rig.Job(source.spec, 1, run=2)
        try:
            job.place(adopt=False)
            order = job.adoption(0, restore=f"{source.root}@3")
            with monkeypatch.context() as patch:

                def opened(path, options=None, files=files):
                    _, manifest = real(path)
                    store = CheckpointStore(files)
                    return store, store.load_manifest(manifest.cut)

                patch.setattr(blocks, "open_checkpoint", opened)
                try:
                    job.services[0].adopt(order)
                except PSError:
                    assert not job.shards[0].owned.any(), at
                    assert sum(t.rows for t in job.shards[0].tables) == 0
            done = len(files.log) < at
            if not done:
                job.services[0].adopt(order)
            assert np.array_equal(job.shards[0].owned, source.shards[0].owned)
            assert by_block(job) == source.wanted
        finally:
            for service in job.services.values():
                service.end()
        if done:
            break
    assert at == 10  # operations, and one without a failure
