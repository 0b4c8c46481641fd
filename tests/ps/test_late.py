# SPDX-License-Identifier: Apache-2.0
"""A request whose caller has given up changes nothing, and is applied once when it comes again; one without memory for its answer
is refused before that is made."""

import time
from types import SimpleNamespace

import numpy as np
import pytest
import rig

from oarlock.proto.arrays import pack
from oarlock.proto.errors import DeadlineExceeded, Unavailable
from oarlock.proto.shard_pb2 import PullRequest
from oarlock.proto.work import Memory, Work


@pytest.fixture
def job():
    return rig.Job(rig.spec_of(), shards=1).place()


def test_a_push_that_waited_too_long_for_others_is_not_applied_and_then_once(job, monkeypatch):
    memory, request, before = Memory(), rig.request_of(job, 3, 0), rig.state(job)
    now = [time.monotonic()]
    monkeypatch.setattr("oarlock.proto.work.time", SimpleNamespace(monotonic=lambda: now[0]))

    class Taken:
        """Another push is applied for longer than the caller waits."""

        def __enter__(self):
            now[0] += 2.0
            real.acquire()

        def __exit__(self, *_):
            real.release()

    real = job.shards[0].push_lock
    monkeypatch.setattr(job.shards[0], "push_lock", Taken())
    with Work(memory, "Shard.Push", seconds=1.0) as work, work.here(), pytest.raises(DeadlineExceeded):
        job.services[0].push(request)
    assert rig.state(job) == before
    assert memory.refused["late"] == 1
    with Work(memory, "Shard.Push", seconds=60.0) as work, work.here():
        assert job.services[0].push(request).applied == 17
        assert job.services[0].push(request).skipped == 17


def test_a_pull_asks_for_memory_before_it_makes_its_answer(job, monkeypatch):
    monkeypatch.setattr("oarlock.proto.work.WAIT_SECONDS", 0.01)
    memory = Memory(1 << 20)
    keyset = rig.group_keys(job.layout, job.routes(), "user", range(20_000))
    request = PullRequest(header=job.header(0))
    table = request.tables.add(keys=pack(keyset.keys), blocks=pack(keyset.blocks), counts=pack(keyset.counts))
    assert np.prod(table.keys.shape) * 2 * 4 == 160_000
    claim = memory.answers.take(1 << 20)
    with Work(memory, "Shard.Pull") as work, work.here(), pytest.raises(Unavailable):
        job.services[0].pull(request)
    assert job.shards[0].counters["pulls"] == 0
    memory.answers.give(claim)
    with Work(memory, "Shard.Pull") as work, work.here():
        job.services[0].pull(request)
        assert memory.answers.taken == 160_000
    assert memory.answers.taken == 0
