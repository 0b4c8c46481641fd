# SPDX-License-Identifier: Apache-2.0
"""A push is applied exactly once to every block, whatever is repeated, moved, refused or malformed."""

import asyncio

import hypothesis.strategies as st
import numpy as np
import pytest
import rig
from hypothesis import given, settings

from oarlock.client.closed import ClosedSet
from oarlock.client.push import PushIdentity, RowGradients, cut_push
from oarlock.embedding.spec import OptimizerSpec, TableSpec
from oarlock.proto.arrays import pack, unpack
from oarlock.proto.errors import InvalidArgument
from oarlock.proto.rpc import GrpcServer, GrpcTransport
from oarlock.proto.shard_pb2 import PullRequest, PushRequest, TableGradients

RAW = tuple(range(40))


@pytest.fixture
def job():
    return rig.Job(rig.spec_of(), shards=1).place()


def push(job, request):
    return job.services[0].push(request)


def test_a_group_is_applied_to_rows_and_dense_at_once(job):
    reply = push(job, rig.request_of(job, 3, 0))
    assert (reply.applied, reply.skipped, reply.refused, len(unpack(reply.moved, np.int32, "m"))) == (17, 0, 0, 0)
    assert np.array_equal(job.rows("user", RAW), np.full((40, 2), -1))
    assert np.array_equal(job.rows("item", RAW), np.full((40, 3), -1))
    assert np.array_equal(job.dense(), np.full(14, -1))
    assert job.shards[0].sequence.tolist() == [1] * 17
    assert [job.shards[0].marks.of_block(b) for b in range(17)] == [{3: 0}] * 17


def test_repetitions_are_skipped_in_any_order(job):
    requests = [rig.request_of(job, 3, g, value=1 << g, dense=1 << g) for g in range(4)]
    for request in (requests[0], requests[0], requests[1], requests[0], requests[2], requests[1], requests[3]):
        push(job, request)
    after = rig.state(job)
    for request in requests:
        reply = push(job, request)
        assert (reply.applied, reply.skipped) == (0, 17)
    assert rig.state(job) == after
    assert np.array_equal(job.dense(), np.full(14, -15))
    assert np.array_equal(job.rows("user", RAW), np.full((40, 2), -15))
    assert job.shards[0].sequence.tolist() == [4] * 17
    assert job.shards[0].counters["pushes"] == 4


def test_blocks_that_have_it_are_skipped_and_the_others_take_it(job):
    push(job, rig.request_of(job, 3, 5, tables=("item",), dense=None))
    reply = push(job, rig.request_of(job, 3, 5))
    assert (reply.applied, reply.skipped) == (13, 4)
    assert np.array_equal(job.rows("item", RAW), np.full((40, 3), -1))
    assert np.array_equal(job.rows("user", RAW), np.full((40, 2), -1))


def test_some_blocks_of_one_table_have_it(job):
    some = rig.request_of(job, 3, 5, tables=("user",), raw=[1], dense=None)
    push(job, some)
    (block,) = unpack(some.tables[0].keys.blocks, np.int32, "b").tolist()
    reply = push(job, rig.request_of(job, 3, 5, tables=("user",), value=2.0, dense=None))
    assert (reply.applied, reply.skipped) == (7, 1)
    keyset = rig.group_keys(job.layout, job.routes(), "user", RAW)
    mine = np.repeat(keyset.blocks == block, keyset.counts)
    rows = job.rows("user", keyset.keys)
    assert rows[keyset.keys == 1].tolist() == [[-1, -1]]
    assert not rows[mine & (keyset.keys != 1)].any()
    assert np.all(rows[~mine] == -2)


def test_splits_are_counted_apart(job):
    for split in (0, 7, 1023):
        assert push(job, rig.request_of(job, split, 2)).applied == 17
        assert push(job, rig.request_of(job, split, 1)).skipped == 17
    assert np.array_equal(job.dense(), np.full(14, -3))
    assert job.shards[0].next_groups([0, 7, 1023, 8]) == [3, 3, 3, 0]


def test_groups_may_have_gaps(job):
    """A group that touches a block not at all leaves no trace there."""
    push(job, rig.request_of(job, 3, 0, dense=None, raw=[1]))
    assert push(job, rig.request_of(job, 3, 900, dense=None)).skipped == 0
    assert job.shards[0].next_groups([3]) == [901]


def test_a_closed_split_is_skipped_and_its_marks_are_dropped(job):
    for split in (0, 3):
        push(job, rig.request_of(job, split, 1))
    after = rig.state(job)
    job.shards[0].close_splits(ClosedSet(0, [3]))
    assert job.shards[0].next_groups([0, 3]) == [2, 0]
    for group in (0, 1, 2):
        reply = push(job, rig.request_of(job, 3, group))
        assert (reply.applied, reply.skipped) == (0, 17)
    assert [s[3:] for s in rig.state(job)] == [s[3:] for s in after]
    assert [s[2] for s in rig.state(job)] == [{0: 1}] * 17
    assert job.shards[0].stats()["marks_bytes"] == 17 * 4
    # Closing again, or less, changes nothing.
    job.shards[0].close_splits(ClosedSet(0, [3]))
    job.shards[0].close_splits(ClosedSet(0))
    assert push(job, rig.request_of(job, 3, 2)).applied == 0
    assert push(job, rig.request_of(job, 0, 2)).applied == 17


def test_moved_blocks_are_named_and_the_others_are_applied():
    job = rig.Job(rig.spec_of(), shards=2)
    job.place([0] * 17)
    request = rig.request_of(job, 3, 0)
    gone = [2, 9, 13, 16]
    job.place([1 if n in gone else 0 for n in range(17)])
    reply = push(job, request)
    assert unpack(reply.moved, np.int32, "moved").tolist() == gone
    assert (reply.applied, reply.skipped) == (13, 0)
    assert [n for n in range(17) if not job.shards[0].marks.of_block(n)] == gone
    assert job.shards[0].sequence.tolist() == [0 if n in gone else 1 for n in range(17)]
    # Of all blocks elsewhere, nothing is here to change.
    job.place([1] * 17)
    reply = push(job, request)
    assert (reply.applied, reply.skipped) == (0, 0)
    assert unpack(reply.moved, np.int32, "moved").tolist() == list(range(17))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 3e38])
def test_gradients_that_are_no_numbers_are_refused_counted_and_marked(job, bad):
    request = rig.request_of(job, 3, 0)
    for part in request.tables:
        values = unpack(part.gradients, np.float32, "g", dims=2).copy()
        values[5, 1] = bad
        part.gradients.CopyFrom(pack(values))
    dense = unpack(request.dense[0].gradients, np.float32, "g").copy()
    dense[13] = bad
    request.dense[0].gradients.CopyFrom(pack(dense))
    reply = push(job, request)
    assert (reply.applied, reply.refused) == (17, 3)
    assert job.shards[0].next_groups([3]) == [1]
    assert push(job, request).skipped == 17
    for name in ("user", "item"):
        keyset = rig.group_keys(job.layout, job.routes(), name, RAW)
        rows = job.rows(name, keyset.keys)
        assert not rows[5].any()
        assert np.all(np.delete(rows, 5, axis=0) == -1)
    assert job.dense().tolist() == [-1] * 12 + [0] * 2
    counted = job.shards[0].stats()
    assert (counted["rows_pushed"], counted["rows_refused"], counted["dense_refused"]) == (80, 2, 1)
    assert counted["rows"] == 78


def test_a_group_beyond_all_limits_is_refused(job):
    request = rig.request_of(job, 3, 0)
    request.group = 1 << 31
    with pytest.raises(InvalidArgument, match="over the limit of 2\\^31 groups"):
        push(job, request)
    request.group = (1 << 31) - 1
    assert push(job, request).applied == 17
    assert job.shards[0].next_groups([3]) == [1 << 31]


def test_an_empty_push_is_nothing(job):
    before = rig.state(job)
    for request in (
        PushRequest(header=job.header(0), split=9),
        PushRequest(header=job.header(0), split=9, tables=[TableGradients()]),
    ):
        reply = push(job, request)
        assert (reply.applied, reply.skipped) == (0, 0)
    assert rig.state(job) == before
    assert job.shards[0].stats()["marks_bytes"] == 0
    assert job.shards[0].next_groups([9]) == [0]


@pytest.mark.parametrize("victim", range(5))
def test_memory_that_runs_out_at_any_step_of_a_push_harms_nothing(job, monkeypatch, victim):
    """A push has four steps: room for marks, two tables, the dense blocks. Sent again, it ends as if nothing had happened."""
    request = rig.request_of(job, 3, 0)
    shard = job.shards[0]
    calls = []

    def fails(real):
        def inside(*args, **kwargs):
            calls.append(real)
            if len(calls) == victim + 1:
                raise MemoryError
            return real(*args, **kwargs)

        return inside

    with monkeypatch.context() as patch:
        patch.setattr("oarlock.ps.marks.np.full", fails(np.full))
        for each in (*shard.tables, shard.dense_group):
            patch.setattr(each, "push", fails(each.push))
        if victim < 4:
            with pytest.raises(MemoryError):
                push(job, request)
        else:
            push(job, request)
    assert len(calls) == min(victim + 1, 4)
    push(job, request)
    assert shard.sequence.tolist() == [1] * 17
    assert np.array_equal(job.dense(), np.full(14, -1))
    assert np.array_equal(job.rows("user", RAW), np.full((40, 2), -1))
    assert np.array_equal(job.rows("item", RAW), np.full((40, 3), -1))


GROUPS = 4


@st.composite
def schedules(draw):
    """A few splits' pushes, each group after the one before it, with repetitions of anything sent so far."""
    order, sent, at = [], [], dict.fromkeys(range(3), 0)
    while any(n < GROUPS for n in at.values()):
        if sent and draw(st.booleans()):
            order.append(draw(st.sampled_from(sent)))
        else:
            split = draw(st.sampled_from([s for s, n in at.items() if n < GROUPS]))
            sent.append((split, at[split]))
            order.append(sent[-1])
            at[split] += 1
    return order


@given(schedules(), st.integers(0, 1 << 32))
@settings(max_examples=30)
def test_any_order_of_pushes_and_repetitions_gives_the_exact_sums(schedule, number):
    job = rig.Job(rig.spec_of(), shards=3).place()
    rng = np.random.default_rng(number)
    messages, rows, total = {}, np.zeros((60, 2)), np.zeros(14)
    for split in range(3):
        for group in range(GROUPS):
            raw = rng.choice(60, rng.integers(0, 30), replace=False)
            keyset = rig.group_keys(job.layout, job.routes(), "user", raw)
            values = rng.integers(-9, 10, (len(keyset.keys), 2)).astype(np.float32)
            flat = rng.integers(-9, 10, 14).astype(np.float32)
            part = {"user": RowGradients(keyset, values, 1.0)}
            messages[split, group] = cut_push(job.layout, job.routes(), PushIdentity(split, group), part, flat, 1.0)
            rows[keyset.keys.astype(int)] -= values
            total -= flat
    for split, group in schedule:
        for message in messages[split, group]:
            message.request.header.CopyFrom(job.header(message.shard.id))
            job.services[message.shard.id].push(message.bulk)
    assert np.array_equal(job.rows("user", range(60)), rows)
    assert np.array_equal(job.dense(), total)


def test_workers_that_push_to_one_shard_at_once_lose_nothing(job):
    """Over gRPC, each worker on streams of its own; each repeats its pushes, and all pull meanwhile."""
    server = GrpcServer(job.services[0], "Shard", listen="127.0.0.1:0")
    address = server.start()
    numbers = pack(np.array([12], np.int32))
    torn = []

    async def work(transport, split):
        for group in range(25):
            request = rig.request_of(job, split, group, value=group % 5, dense=group % 5)
            old = rig.request_of(job, split, max(0, group - 3), value=50, dense=50)
            again = [request, *([old] if group else [])]
            await asyncio.gather(*(transport.call(address, "Shard.Push", r, timeout_seconds=20) for r in again))
            pulled = PullRequest(header=job.header(0), dense=numbers)
            reply = await transport.call(address, "Shard.Pull", pulled, timeout_seconds=20)
            torn.append(len(set(unpack(reply.dense, np.float32, "d").tolist())))

    async def body():
        transports = [GrpcTransport() for _ in range(4)]
        try:
            await asyncio.gather(*(work(t, s) for s, t in enumerate(transports)))
        finally:
            await asyncio.gather(*(t.close() for t in transports))

    try:
        asyncio.run(body())
    finally:
        server.stop(0)
    shard = job.shards[0]
    assert set(torn) == {1}, "a block is read whole"
    assert shard.sequence.tolist() == [100] * 17
    assert (shard.counters["pushes"], shard.counters["pulls"], shard.counters["rows_pushed"]) == (100, 100, 8000)
    assert np.array_equal(job.dense(), np.full(14, -200))
    assert np.array_equal(job.rows("user", RAW), np.full((40, 2), -200))


def test_rows_start_at_their_first_value_and_a_pull_shows_it_before():
    spec = rig.spec_of(tables=(TableSpec("user", 2, OptimizerSpec("adagrad"), blocks=8),))
    job = rig.Job(spec, shards=1).place()
    before = job.rows("user", RAW)
    assert np.all(before != 0)
    push(job, rig.request_of(job, 0, 0, tables=("user",), value=0.0))
    assert np.array_equal(job.rows("user", RAW), before)
    assert job.shards[0].stats()["tables"] == {"user": 40}
