# SPDX-License-Identifier: Apache-2.0
"""Exchanges in virtual time: what is sent again, what is raised, and when."""

import asyncio

import numpy as np
import pytest
import rig

from oarlock.client.client import Client
from oarlock.client.push import RowGradients
from oarlock.client.retry import Retry
from oarlock.proto.arrays import unpack
from oarlock.proto.bulk import inlined
from oarlock.proto.common_pb2 import Header
from oarlock.proto.errors import (
    DeadlineExceeded,
    LeaseLost,
    Malformed,
    OutOfMemory,
    StalePlacement,
    Unavailable,
    WrongIncarnation,
)
from oarlock.proto.shard_pb2 import PushReply, PushRequest


@pytest.mark.parametrize("error", [Unavailable("x"), DeadlineExceeded("x"), StalePlacement("x"), WrongIncarnation("x")])
def test_a_push_is_sent_again_to_those_that_did_not_answer(job, spy, error):
    failures = {"shard-1": 2}

    def answer(address, method, request):
        if failures.get(address, 0) and method == "Shard.Push":
            failures[address] -= 1
            return error
        return None

    spy.answers.append(answer)

    async def body():
        return await rig.push(Client(job.member(spy)), job)

    counts, _ = rig.run(body())
    assert sorted(c[0] for c in spy.sent("Shard.Push")) == ["shard-0", "shard-1", "shard-1", "shard-1", "shard-2"]
    assert len({c[2] for c in spy.sent("Shard.Push") if c[0] == "shard-1"}) == 1, "the same bytes"
    assert (counts.applied, counts.skipped) == (total(job), 0)
    assert np.array_equal(job.rows("user", range(1, 9)), np.full((8, 2), -1))


def total(job):
    """Blocks that have a mark of split 0."""
    return sum(1 for s in job.shards.values() for b in range(job.layout.blocks) if s.marks.of_block(b))


def test_a_push_whose_answer_was_lost_is_skipped_the_second_time(job, spy):
    lost = []

    class Deaf(rig.Spy):
        async def call(self, address, method, request, *, timeout_seconds):
            reply = await super().call(address, method, request, timeout_seconds=timeout_seconds)
            if method == "Shard.Push" and address not in lost:
                lost.append(address)
                raise DeadlineExceeded("no answer in time")
            return reply

    async def body():
        return await rig.push(Client(job.member(Deaf(job.transport))), job)

    counts, _ = rig.run(body())
    assert (counts.applied, counts.skipped) == (0, total(job))
    assert np.array_equal(job.rows("user", range(1, 9)), np.full((8, 2), -1))


def test_what_is_sent_again_is_what_was_pushed_whatever_became_of_the_buffers(job, spy):
    failing = [True]
    spy.answers.append(lambda a, m, r: Unavailable("x") if m == "Shard.Push" and failing[0] else None)

    async def body():
        client = Client(job.member(spy))
        keyset = rig.group_keys(job.layout, client.routes, "user", range(1, 9))
        gradients = np.ones((8, 2), np.float32)
        dense = np.ones(14, np.float32)
        part = RowGradients(keyset, gradients, 1.0)
        waiting = asyncio.ensure_future(client.push(0, 0, {"user": part}, dense=dense, dense_rate=1.0))
        gradients[:] = 99
        dense[:] = 99
        keyset.keys[:] = 99
        await asyncio.sleep(5)
        assert not waiting.done()
        job.move(0, (int(job.owners[0]) + 1) % 3)
        failing[0] = False
        await waiting

    rig.run(body())
    assert np.array_equal(job.rows("user", range(1, 9)), np.full((8, 2), -1))
    assert np.array_equal(job.dense(), np.full(14, -1))


def test_only_blocks_that_moved_are_sent_elsewhere(job, spy):
    async def body():
        client = Client(job.member(spy))
        waiting = rig.push(client, job, keys=range(100))
        job.move(3, (int(job.owners[3]) + 1) % 3)
        await waiting
        return client.routes.generation

    generation, _ = rig.run(body())
    assert generation == 2
    pushes = [PushRequest.FromString(c[2]) for c in spy.sent("Shard.Push")]
    blocks = [unpack(p.tables[0].keys.blocks, np.int32, "b").tolist() for p in pushes]
    assert len(blocks) == 4
    assert blocks[3] == [3]
    assert sorted(block for part in blocks[:3] for block in part) == list(range(8))
    assert np.array_equal(job.rows("user", range(100)), np.full((100, 2), -1))


@pytest.mark.parametrize("kind", [LeaseLost, Malformed, OutOfMemory])
def test_an_error_for_good_is_raised_after_all_answers_came(job, spy, kind):
    spy.answers.append(lambda a, m, r: kind("for good") if a == "shard-0" and m == "Shard.Push" else None)

    async def body():
        with pytest.raises(kind, match=r"^for good$"):
            await rig.push(Client(job.member(spy)), job)

    rig.run(body())
    assert len(spy.sent("Shard.Push")) == 3
    assert job.shards[1].counters["pushes"] == job.shards[2].counters["pushes"] == 1


def test_a_job_that_put_the_worker_out_ends_the_push(job, spy):
    spy.answers.append(lambda a, m, r: Unavailable("x") if m == "Shard.Push" else None)
    spy.answers.append(lambda a, m, r: LeaseLost("join anew") if m == "Coordinator.Placement" else None)

    async def body():
        with pytest.raises(LeaseLost, match=r"^join anew$"):
            await rig.push(Client(job.member(spy)), job)

    rig.run(body())
    assert len(spy.sent("Shard.Push")) == 3


def test_an_exchange_ends_at_the_deadline_with_the_last_error(job, spy):
    spy.answers.append(lambda a, m, r: Unavailable("gone", shard=1) if a == "shard-1" else None)

    async def body():
        with pytest.raises(Unavailable) as caught:
            await rig.push(Client(job.member(spy, retry=Retry(deadline_seconds=5))), job)
        return caught.value

    error, passed = rig.run(body())
    assert str(error) == "gone (given up after 5 s)"
    assert error.details == {"shard": 1}
    assert 4 <= passed < 5


def test_blocks_that_keep_moving_are_given_up_with_a_retryable_error(job, spy):
    def moved(address, method, request):
        return PushReply(moved=inlined(request).tables[0].keys.blocks) if method == "Shard.Push" else None

    spy.answers.append(moved)

    async def body():
        with pytest.raises(StalePlacement, match=r"blocks kept moving \(given up after 5 s\)"):
            await rig.push(Client(job.member(spy, retry=Retry(deadline_seconds=5))), job)

    rig.run(body())


def test_blocks_that_nobody_owns_yet_are_waited_for(job, spy):
    async def body():
        settled = job.owners.copy()
        client = Client(job.member(spy))
        job.place([-1] * 12 + settled[12:].tolist(), adopt=False)
        await client._member.refresh()
        waiting = [asyncio.ensure_future(rig.push(client, job)), asyncio.ensure_future(rig.pull_all(client, job))]
        await asyncio.sleep(3)
        assert not any(w.done() for w in waiting)
        assert spy.sent("Shard.Push") == []
        job.place(settled)
        await asyncio.gather(*waiting)

    rig.run(body())
    assert np.array_equal(job.rows("user", range(1, 9)), np.full((8, 2), -1))


def test_blocks_that_belong_to_nobody_in_the_middle_of_an_exchange_are_waited_for(job, spy):
    failing = [True]
    spy.answers.append(lambda a, m, r: StalePlacement("x") if m == "Shard.Push" and failing[0] else None)

    async def body():
        settled = job.owners.copy()
        waiting = asyncio.ensure_future(rig.push(Client(job.member(spy)), job))
        await asyncio.sleep(1)
        job.place([-1] * 17, adopt=False)
        await asyncio.sleep(3)
        failing[0] = False
        assert not waiting.done()
        job.place(settled)
        await waiting

    rig.run(body())
    assert np.array_equal(job.rows("user", range(1, 9)), np.full((8, 2), -1))


def test_a_silent_coordinator_does_not_stop_an_exchange(job, spy):
    failing = [True, True, True]

    def answer(address, method, request):
        if address == "coordinator":
            return Unavailable("restarting")
        return Unavailable("x") if failing and failing.pop() else None

    spy.answers.append(answer)

    async def body():
        await rig.push(Client(job.member(spy)), job)

    rig.run(body())
    assert np.array_equal(job.rows("user", range(1, 9)), np.full((8, 2), -1))


def test_headers_name_the_shard_that_they_are_for(job, spy):
    async def body():
        await rig.push(Client(job.member(spy)), job)

    rig.run(body())
    for address, method, data, _ in spy.sent("Shard.Push"):
        header = PushRequest.FromString(data).header
        target = next(s.incarnation for s in job.addresses.values() if s.address == address)
        assert header == Header(protocol=1, job=job.spec.job_bytes, run=1, sender=9, target=target, generation=1), (
            method
        )
