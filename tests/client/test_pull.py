# SPDX-License-Identifier: Apache-2.0
"""Pulls fill every row from its owner, and marks say where a successor begins."""

import numpy as np
import pytest
import rig

from oarlock.client.client import Client
from oarlock.client.push import RowGradients
from oarlock.proto.errors import Malformed, Unavailable
from oarlock.proto.shard_pb2 import MarksReply, PullReply
from oarlock.proto.transport import InProcess


def test_a_pull_fills_every_row_from_its_owner(job, spy):
    async def body():
        client = Client(job.member(spy))
        for group, key in enumerate(range(1, 9)):
            await rig.push(client, job, group=group, keys=[key], value=-key)
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


def test_only_what_was_not_answered_is_asked_for_again(job, spy):
    failing = [True, True]
    spy.answers.append(lambda a, m, r: Unavailable("x") if a == "shard-1" and failing and failing.pop() else None)

    async def body():
        await rig.pull_all(Client(job.member(spy)), job)

    rig.run(body())
    asked = sorted(call[0] for call in spy.sent("Shard.Pull"))
    assert asked == ["shard-0", "shard-1", "shard-1", "shard-1", "shard-2"]


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
            await rig.pull_all(Client(job.member(spy)), job)

    rig.run(body())


def test_dense_values_that_do_not_fit_are_malformed(job, spy):
    class Short(rig.Spy):
        async def call(self, address, method, request, *, timeout_seconds):
            reply = await super().call(address, method, request, timeout_seconds=timeout_seconds)
            if method == "Shard.Pull":
                reply.message.dense.Clear()
            return reply

    async def body():
        with pytest.raises(Malformed, match="0 dense values answered, asked for"):
            await rig.pull_all(Client(job.member(Short(job.transport))), job)

    rig.run(body())


def test_the_next_group_is_the_highest_that_any_block_has(job, spy):
    async def body():
        client = Client(job.member(spy))
        assert await client.next_group(5) == 0
        await rig.push(client, job, split=5, group=0)
        assert await client.next_group(5) == 0
        for group in range(1, 4):
            await rig.push(client, job, split=5, group=group, keys=[1])
        await rig.push(client, job, split=6, group=9, keys=[1])
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


def test_shards_count_the_pushes_between_a_pull_and_the_push_that_it_fed(job, spy):
    async def body():
        client = Client(job.member(spy))
        keys = {"user": rig.group_keys(job.layout, client.routes, "user", range(1, 65))}
        rows = {"user": np.empty((64, 2), np.float32)}
        seen = [await client.pull(keys, rows) for _ in range(1)]
        gradients = {"user": RowGradients(keys["user"], np.ones((64, 2), np.float32), 1.0)}
        for group in range(4):
            # The first two were fed by the first pull, the others by the one before the third.
            if group == 2:
                seen.append(await client.pull(keys, rows))
            await client.push(0, group, gradients, seen=seen[-1])
        # Sent again, and of unknown age: neither counts.
        await client.push(0, 3, gradients, seen=seen[0])
        await client.push(0, 4, gradients)
        return seen

    seen, _ = rig.run(body())
    assert seen == [{0: 0, 1: 0, 2: 0}, {0: 2, 1: 2, 2: 2}]
    for shard in job.shards.values():
        assert shard.stats()["staleness"] == {"count": 4, "mean": 0.5, "most": 1, "p99_at_most": 1}
        # A shard that began anew counts from zero: nothing is known of what was pulled before.
        shard.staleness.note(-2)
        assert shard.stats()["staleness"]["count"] == 4
