# SPDX-License-Identifier: Apache-2.0
"""A shard's side of a cut: its view is of one instant, and pushes of before it are told from those of after."""

import json
from concurrent.futures import ThreadPoolExecutor
from threading import Event

import numpy as np
import pytest
import rig

from oarlock.checkpoint.manifest import BlockEntry
from oarlock.checkpoint.store import LocalStore
from oarlock.proto.errors import InvalidArgument, LeaseLost, PSError, Unavailable
from oarlock.proto.shard_pb2 import AbortRequest, CutRequest, DigestRequest, WriteRequest
from oarlock.ps.cuts import Cuts

STOOD, OTHER = 7, 9


@pytest.fixture
def job():
    return rig.Job(rig.spec_of(), shards=1).place()


def push(job, split, group, *, sender=STOOD, cut=0):
    request = rig.request_of(job, split, group)
    request.header.sender, request.header.cut = sender, cut
    return job.services[0].push(request)


def begin(job, cut, *, workers=(STOOD,)):
    request = CutRequest(header=job.header(0), cut=cut, workers=workers)
    return job.services[0].cut(request)


def write(job, cut, root):
    return job.services[0].write(WriteRequest(header=job.header(0), cut=cut, root=str(root)))


def written(root, reply, cut):
    """Return what the files of a cut hold, in the form of ``rig.state``."""
    store, out = LocalStore(root), []
    from oarlock.checkpoint.block_file import decode

    for number, values in enumerate(json.loads(reply.entries)):
        entry = BlockEntry(**values)
        image = decode(store.files.read_file(f"cut-{cut:06d}/{entry.file}"))
        parts = (image.keys.tobytes(), image.weights.tobytes(), image.state.tobytes())
        out.append((number, image.seq, image.marks, *parts))
    return out


def by_key(state):
    """Return a state whose rows are in the order of their keys, as files have them."""
    out = []
    for number, seq, marks, keys, weights, columns in state:
        found = np.frombuffer(keys, np.uint64)
        order = np.argsort(found)
        rows = [
            np.frombuffer(part, np.uint8).reshape(max(1, len(found)), -1)[order if len(found) else [0]].tobytes()
            for part in (weights, columns)
        ]
        out.append((number, seq, marks, found[order].tobytes(), *rows))
    return out


def test_a_cut_holds_what_was_there_when_it_began(job, tmp_path):
    push(job, 0, 0)
    push(job, 1, 0)
    begin(job, 1)
    before = by_key(rig.state(job))
    push(job, 0, 1, cut=1)
    push(job, 2, 0, cut=1)
    assert by_key(rig.state(job)) != before
    reply = write(job, 1, tmp_path)
    assert not reply.torn
    assert written(tmp_path, reply, 1) == before


def test_a_worker_that_opened_its_gate_by_itself_tears_the_view_until_it_is_asked_for(job, tmp_path):
    begin(job, 1)
    push(job, 0, 0, cut=0)
    assert write(job, 1, tmp_path).torn
    begin(job, 2)
    push(job, 0, 1, cut=2)
    reply = write(job, 2, tmp_path)
    assert not reply.torn
    push(job, 0, 2, cut=1)
    assert write(job, 2, tmp_path).entries == reply.entries


def test_a_push_of_before_the_cut_by_whoever_did_not_stand_at_the_gate_is_refused(job):
    push(job, 0, 0, sender=OTHER)
    begin(job, 1)
    before = rig.state(job)
    with pytest.raises(LeaseLost, match="before cut 1, for which its worker did not wait: join anew"):
        push(job, 0, 1, sender=OTHER)
    assert rig.state(job) == before
    assert push(job, 0, 1, sender=OTHER, cut=1).applied


def test_a_cut_that_was_given_up_is_not_begun_by_a_late_order(job, tmp_path):
    service = job.services[0]
    begin(job, 1)
    service.abort(AbortRequest(header=job.header(0), cut=1))
    with pytest.raises(InvalidArgument, match="no view of cut 1: it was given up"):
        write(job, 1, tmp_path)
    with pytest.raises(InvalidArgument, match="cut 1 was given up, cut 1 is the newest one here"):
        begin(job, 1)
    # The word that it is given up may come before the order itself.
    service.abort(AbortRequest(header=job.header(0), cut=3))
    with pytest.raises(InvalidArgument, match="cut 2 was given up, cut 3"):
        begin(job, 2)
    push(job, 0, 0, sender=STOOD, cut=1)
    begin(job, 4)
    service.abort(AbortRequest(header=job.header(0), cut=3))
    assert not write(job, 4, tmp_path).torn


def test_an_order_that_is_repeated_does_not_begin_a_new_view(job, tmp_path):
    begin(job, 1)
    before = by_key(rig.state(job))
    push(job, 0, 0, cut=1)
    begin(job, 1)
    assert written(tmp_path, write(job, 1, tmp_path), 1) == before


class Hanging:
    """A store whose next write hangs until it is ``back``, and then does as it is told: writes, or fails."""

    def __init__(self, monkeypatch, fails):
        self.hangs, self.back, self._fails = Event(), Event(), fails
        self._write = LocalStore.write_block
        monkeypatch.setattr(LocalStore, "write_block", lambda *given, **more: self._written(*given, **more))

    def _written(self, *given, **more):
        if not self.hangs.is_set():
            self.hangs.set()
            assert self.back.wait(60)
            if self._fails:
                raise OSError(5, "Input/output error")
        return self._write(*given, **more)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("aborted", [False, True])
def test_a_store_that_hangs_keeps_one_thread_and_what_comes_later_is_refused_at_once(
    job, tmp_path, monkeypatch, fails, aborted
):
    """The next cut is begun as ever, so training goes on; its order is given again, and done once the store is back."""
    store = Hanging(monkeypatch, fails)
    push(job, 0, 0)
    begin(job, 1)
    with ThreadPoolExecutor(1) as pool:
        try:
            first = pool.submit(write, job, 1, tmp_path)
            assert store.hangs.wait(60)
            if aborted:
                job.services[0].abort(AbortRequest(header=job.header(0), cut=1))
            else:
                with pytest.raises(Unavailable, match="cut 1 is still under way here"):
                    write(job, 1, tmp_path)
            push(job, 1, 0, cut=1)
            begin(job, 2)
            before = by_key(rig.state(job))
            for order in (
                lambda: write(job, 2, tmp_path),
                lambda: job.services[0].digest(DigestRequest(header=job.header(0), cut=2)),
            ):
                with pytest.raises(Unavailable, match="cut 1 is still under way here: if that lasts") as refused:
                    order()
                assert refused.value.details == {"cut": 1, "not_yet": True}
            push(job, 0, 1, cut=2)
        finally:
            store.back.set()
        # Its view was let go: whatever comes of it is of a cut that was given up.
        assert first.exception() is None or isinstance(first.exception(), PSError)
        assert written(tmp_path, write(job, 2, tmp_path), 2) == before


@pytest.mark.parametrize("number", [0, 4])
def test_numbers_that_are_not_newer_are_refused(number):
    cuts = Cuts()
    assert cuts.begin(5, [1])
    assert not cuts.begin(5, [1])
    with pytest.raises(InvalidArgument):
        cuts.begin(number, [1])
