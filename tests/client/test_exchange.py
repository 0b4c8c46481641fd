# SPDX-License-Identifier: Apache-2.0
"""Retries and exchanges in virtual time: what is sent again, what is raised, and when."""

import asyncio
import random

import numpy as np
import pytest
import rig

from oarlock.client.client import Client
from oarlock.client.push import RowGradients
from oarlock.client.retry import Retry
from oarlock.proto.arrays import unpack
from oarlock.proto.common_pb2 import Header
from oarlock.proto.errors import (
    CODES,
    DeadlineExceeded,
    LeaseLost,
    Malformed,
    OutOfMemory,
    StalePlacement,
    Unavailable,
    WrongIncarnation,
)
from oarlock.proto.shard_pb2 import MarksReply, PullReply, PushReply, PushRequest
from oarlock.proto.transport import InProcess


class Spy:
    """A transport that notes what goes through, and may answer or raise in another's place."""

    def __init__(self, inner):
        self.inner = inner
        self.calls = []
        self.answers = []

    async def call(self, address, method, request, *, timeout_seconds):
        self.calls.append((address, method, request.SerializeToString(), timeout_seconds))
        for answer in self.answers:
            found = answer(address, method, request)
            if isinstance(found, BaseException):
                raise found
            if found is not None:
                return found
        return await self.inner.call(address, method, request, timeout_seconds=timeout_seconds)

    async def close(self):
        pass

    def sent(self, method):
        return [c for c in self.calls if c[1] == method]


@pytest.fixture
def job():
    return rig.Job(rig.spec_of()).place()


@pytest.fixture
def spy(job):
    return Spy(job.transport)


def push(client, job, *, split=0, group=0, keys=(1, 2, 3, 4, 5, 6, 7, 8), value=1.0):
    keyset = rig.group_keys(job.layout, client.routes, "user", keys)
    gradients = np.full((len(keyset.keys), 2), value, np.float32)
    return client.push(split, group, {"user": RowGradients(keyset, gradients, 1.0)})


def attempts(failing, retry, seed=0):
    """Run a Retry over an attempt that fails as ``failing(number)`` says; return (result, starts, timeouts)."""
    starts, timeouts = [], []

    async def attempt(timeout):
        starts.append(asyncio.get_running_loop().time())
        timeouts.append(timeout)
        error = failing(len(starts))
        if error is not None:
            raise error
        return "done"

    result, _ = rig.run(retry.run(attempt, rng=random.Random(seed)))
    return result, starts, timeouts


def test_pauses_double_up_to_the_most_and_are_drawn_from_the_upper_half():
    retry = Retry(deadline_seconds=60, call_seconds=20, first_seconds=0.1, most_seconds=1.0)
    result, starts, timeouts = attempts(lambda n: Unavailable("x") if n < 10 else None, retry)
    assert result == "done"
    pauses = np.diff(starts)
    limits = np.minimum(0.1 * 2.0 ** np.arange(9), 1.0)
    assert np.all(pauses >= limits / 2 - 1e-9)
    assert np.all(pauses <= limits + 1e-9)
    assert len(set(pauses.tolist())) == 9
    assert timeouts == [20] * 10


@pytest.mark.parametrize("kind", [k for k in CODES.values() if not k.retryable], ids=lambda k: k.__name__)
def test_what_a_pause_cannot_mend_is_raised_at_once(kind):
    with pytest.raises(kind, match=r"^for good$"):
        attempts(lambda n: kind("for good"), Retry())


def test_the_deadline_ends_with_the_last_error_and_its_details():
    async def body():
        begin = asyncio.get_running_loop().time()
        timeouts = []

        async def attempt(timeout):
            timeouts.append(timeout)
            await asyncio.sleep(3)
            raise StalePlacement("moved", block=7, message="kept")

        with pytest.raises(StalePlacement) as caught:
            await Retry(deadline_seconds=10, call_seconds=5).run(attempt, rng=random.Random(0))
        return asyncio.get_running_loop().time() - begin, timeouts, caught.value

    (passed, timeouts, error), _ = rig.run(body())
    assert 9 < passed < 13
    assert str(error) == "moved (given up after 10 s)"
    assert error.details == {"block": 7, "message": "kept"}
    assert timeouts[0] == 5
    # No attempt is given more time than is left.
    assert timeouts[-1] < 5


def test_one_attempt_is_made_even_without_time():
    result, starts, timeouts = attempts(lambda n: None, Retry(deadline_seconds=0))
    assert (result, len(starts), timeouts) == ("done", 1, [0.001])


def test_errors_outside_the_tree_pass_through():
    with pytest.raises(ZeroDivisionError):
        attempts(lambda n: ZeroDivisionError(), Retry())


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
        return await push(Client(job.member(spy)), job)

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

    class Deaf(Spy):
        async def call(self, address, method, request, *, timeout_seconds):
            reply = await super().call(address, method, request, timeout_seconds=timeout_seconds)
            if method == "Shard.Push" and address not in lost:
                lost.append(address)
                raise DeadlineExceeded("no answer in time")
            return reply

    async def body():
        return await push(Client(job.member(Deaf(job.transport))), job)

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
        waiting = push(client, job, keys=range(100))
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
            await push(Client(job.member(spy)), job)

    rig.run(body())
    assert len(spy.sent("Shard.Push")) == 3
    assert job.shards[1].counters["pushes"] == job.shards[2].counters["pushes"] == 1


def test_a_job_that_put_the_worker_out_ends_the_push(job, spy):
    spy.answers.append(lambda a, m, r: Unavailable("x") if m == "Shard.Push" else None)
    spy.answers.append(lambda a, m, r: LeaseLost("join anew") if m == "Coordinator.Placement" else None)

    async def body():
        with pytest.raises(LeaseLost, match=r"^join anew$"):
            await push(Client(job.member(spy)), job)

    rig.run(body())
    assert len(spy.sent("Shard.Push")) == 3


def test_an_exchange_ends_at_the_deadline_with_the_last_error(job, spy):
    spy.answers.append(lambda a, m, r: Unavailable("gone", shard=1) if a == "shard-1" else None)

    async def body():
        with pytest.raises(Unavailable) as caught:
            await push(Client(job.member(spy, retry=Retry(deadline_seconds=5))), job)
        return caught.value

    error, passed = rig.run(body())
    assert str(error) == "gone (given up after 5 s)"
    assert error.details == {"shard": 1}
    assert 4 <= passed < 5


def test_blocks_that_keep_moving_are_given_up_with_a_retryable_error(job, spy):
    def moved(address, method, request):
        return PushReply(moved=request.tables[0].keys.blocks) if method == "Shard.Push" else None

    spy.answers.append(moved)

    async def body():
        with pytest.raises(StalePlacement, match=r"blocks kept moving \(given up after 5 s\)"):
            await push(Client(job.member(spy, retry=Retry(deadline_seconds=5))), job)

    rig.run(body())


def test_blocks_that_nobody_owns_yet_are_waited_for(job, spy):
    async def body():
        settled = job.owners.copy()
        client = Client(job.member(spy))
        job.place([-1] * 12 + settled[12:].tolist(), adopt=False)
        await client._member.refresh()
        waiting = [asyncio.ensure_future(push(client, job)), asyncio.ensure_future(pull_all(client, job))]
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
        waiting = asyncio.ensure_future(push(Client(job.member(spy)), job))
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
        await push(Client(job.member(spy)), job)

    rig.run(body())
    assert np.array_equal(job.rows("user", range(1, 9)), np.full((8, 2), -1))


async def pull_all(client, job, *, raw=range(1, 9)):
    """Pull some rows of both tables and all dense values into buffers of NaN; return (keys, rows, dense)."""
    keys = {name: rig.group_keys(job.layout, client.routes, name, raw) for name in ("user", "item")}
    rows = {t.name: np.full((len(keys[t.name].keys), t.dim), np.nan, np.float32) for t in job.layout.tables}
    dense = np.full(job.layout.dense_size, np.nan, np.float32)
    await client.pull(keys, rows, dense=dense)
    assert not any(np.isnan(r).any() for r in (*rows.values(), dense))
    return keys, rows, dense


def test_a_pull_fills_every_row_from_its_owner(job, spy):
    async def body():
        client = Client(job.member(spy))
        for group, key in enumerate(range(1, 9)):
            await push(client, job, group=group, keys=[key], value=-key)
        # Blocks that moved since the keys were grouped lie scattered.
        keys = {name: rig.group_keys(job.layout, client.routes, name, range(1, 9)) for name in ("user", "item")}
        for number in range(0, 17, 2):
            job.move(number, (int(job.owners[number]) + 1) % 3)
        rows = {t.name: np.full((8, t.dim), np.nan, np.float32) for t in job.layout.tables}
        dense = np.full(14, np.nan, np.float32)
        await client.pull(keys, rows, dense=dense)
        return keys, rows, dense

    (keys, rows, dense), _ = rig.run(body())
    assert np.array_equal(rows["user"], np.repeat(keys["user"].keys.astype(np.float32)[:, None], 2, axis=1))
    assert np.array_equal(rows["item"], np.zeros((8, 3)))
    assert np.array_equal(dense, np.zeros(14))


def test_a_pull_creates_nothing_and_leaves_dense_alone_if_not_asked(job, spy):
    async def body():
        client = Client(job.member(spy))
        keys = {"user": rig.group_keys(job.layout, client.routes, "user", range(1, 9))}
        await client.pull(keys, {"user": np.empty((8, 2), np.float32)})
        await client.pull({}, {})

    rig.run(body())
    assert sum(t.rows for s in job.shards.values() for t in s.tables) == 0
    assert len(spy.sent("Shard.Pull")) == 3


@pytest.mark.parametrize(
    ("reply", "problem"),
    [
        (PullReply(), "answered 0 tables of 2"),
        (PullReply(rows=[{}, {}]), "answered 0 rows of user, asked for"),
        (PullReply(rows=[{"data": b"1234", "dtype": 3, "shape": [1, 1]}, {}]), "rows of user: 1 columns, wanted 2"),
    ],
)
def test_an_answer_that_does_not_fit_the_question_is_malformed(job, spy, reply, problem):
    spy.answers.append(lambda a, m, r: reply if m == "Shard.Pull" else None)

    async def body():
        with pytest.raises(Malformed, match=problem):
            await pull_all(Client(job.member(spy)), job)

    rig.run(body())


def test_dense_values_that_do_not_fit_are_malformed(job, spy):
    class Short(Spy):
        async def call(self, address, method, request, *, timeout_seconds):
            reply = await super().call(address, method, request, timeout_seconds=timeout_seconds)
            if method == "Shard.Pull":
                reply.dense.Clear()
            return reply

    async def body():
        with pytest.raises(Malformed, match="0 dense values answered, asked for"):
            await pull_all(Client(job.member(Short(job.transport))), job)

    rig.run(body())


def test_headers_name_the_shard_that_they_are_for(job, spy):
    async def body():
        await push(Client(job.member(spy)), job)

    rig.run(body())
    for address, method, data, _ in spy.sent("Shard.Push"):
        header = PushRequest.FromString(data).header
        target = next(s.incarnation for s in job.addresses.values() if s.address == address)
        assert header == Header(protocol=1, job=job.spec.job_bytes, run=1, sender=9, target=target, generation=1), (
            method
        )


def test_the_next_group_is_the_highest_that_any_block_has(job, spy):
    async def body():
        client = Client(job.member(spy))
        assert await client.next_group(5) == 0
        await push(client, job, split=5, group=0)
        assert await client.next_group(5) == 0
        for group in range(1, 4):
            await push(client, job, split=5, group=group, keys=[1])
        await push(client, job, split=6, group=9, keys=[1])
        # Group 3 is known by one block only, and may be missing in others: it is sent again.
        return await client.next_group(5), await client.next_group(6), await client.next_group(7)

    assert rig.run(body())[0] == (3, 9, 0)


def test_a_successor_waits_for_every_shard(job, spy):
    failing = [True] * 5
    spy.answers.append(lambda a, m, r: Unavailable("x") if a == "shard-2" and failing and failing.pop() else None)

    async def body():
        client = Client(job.member(spy))
        return await client.next_group(5)

    assert rig.run(body())[0] == 0
    assert len(spy.sent("Shard.Marks")) == 3 + 5


def test_marks_that_were_not_asked_for_are_malformed(job, spy):
    spy.answers.append(lambda a, m, r: MarksReply(next=[1, 2]))

    async def body():
        with pytest.raises(Malformed, match="answered 2 marks, asked for one"):
            await Client(job.member(spy)).next_group(5)

    rig.run(body())


def test_a_client_without_a_placement_says_so():
    job = rig.Job(rig.spec_of())
    with pytest.raises(Unavailable, match="no placement yet"):
        _ = Client(job.member(InProcess())).routes
