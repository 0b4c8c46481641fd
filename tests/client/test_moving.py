# SPDX-License-Identifier: Apache-2.0
"""Exchanges in virtual time while blocks move: who is asked, when, and by which placement."""

import asyncio

import numpy as np
import pytest
import rig

from oarlock.client.client import Client
from oarlock.client.router import Changes, pack_changes
from oarlock.proto.arrays import unpack
from oarlock.proto.bulk import opened
from oarlock.proto.common_pb2 import Placement
from oarlock.proto.errors import Malformed, StalePlacement, Unavailable
from oarlock.proto.shard_pb2 import PushReply, PushRequest


def where(job, blocks):
    """What a shard that gave blocks away tells of them."""
    blocks = np.array(blocks, np.int32)
    owners = job.owners[blocks]
    generations = np.full(len(blocks), job.generation, np.int64)
    shards = {s: job.addresses[s] for s in set(owners.tolist())}
    return pack_changes(
        Changes(job.generation, job.generation, False, blocks, owners, generations, owners[:, None].copy(), shards)
    )


class Telling(rig.Spy):
    """Shards that know where their blocks went, and notes of when they were asked."""

    def __init__(self, job):
        super().__init__(job.transport)
        self.job = job
        self.at = []

    async def call(self, address, method, request, *, timeout_seconds):
        self.at.append((asyncio.get_running_loop().time(), address, method))
        reply = await super().call(address, method, request, timeout_seconds=timeout_seconds)
        if method == "Shard.Push" and (moved := unpack(opened(reply)[0].moved, np.int32, "moved").tolist()):
            opened(reply)[0].where.CopyFrom(where(self.job, moved))
        return reply

    def times(self, method, address=None):
        return [at for at, who, what in self.at if what == method and address in (None, who)]


def all_rows_are(job, value, keys=range(1, 9)):
    return np.array_equal(job.rows("user", keys), np.full((len(keys), 2), value))


def test_blocks_are_sent_at_once_to_where_their_last_owner_says(job):
    wire = Telling(job)

    async def body():
        client = Client(job.member(wire))
        pushing = rig.push(client, job, keys=range(100))
        job.move(3, (int(job.owners[3]) + 1) % 3)
        await pushing
        return client.routes

    routes, passed = rig.run(body())
    assert passed == 0
    assert wire.sent("Coordinator.Placement") == []
    assert len(wire.sent("Shard.Push")) == 4
    assert all_rows_are(job, -1, range(100))
    # Of one block it is known; what else that generation brought is not.
    assert (routes.generation, routes.generations[3], routes.owners[3]) == (1, 2, job.owners[3])


def test_blocks_on_their_way_are_asked_for_within_milliseconds(job, spy):
    """Closed where they were, and not open yet where they will be."""
    closed = [True]
    times = []

    def answer(address, method, request):
        if method == "Shard.Push":
            times.append(asyncio.get_running_loop().time())
            keys = opened(request)[0].tables[0].keys
            return PushReply(moved=keys.blocks) if closed[0] and address == "shard-1" else None
        return None

    spy.answers.append(answer)

    async def body():
        pushing = asyncio.ensure_future(rig.push(Client(job.member(spy)), job, keys=range(100)))
        await asyncio.sleep(0.5)
        closed[0] = False
        opens = asyncio.get_running_loop().time()
        await pushing
        return asyncio.get_running_loop().time() - opens

    late, _ = rig.run(body())
    assert late <= 0.05
    again = times[2:]
    pauses = np.diff(again)
    assert 0.0025 <= pauses[0] <= 0.005
    assert (pauses[1:] > 0).all()
    assert pauses.max() <= 0.05
    assert 10 <= len(again) <= 30
    # The coordinator is asked each time.
    assert len(spy.sent("Coordinator.Placement")) == len(again) - 1
    assert all_rows_are(job, -1, range(100))


def test_a_pull_that_meets_moving_blocks_comes_again_as_soon(job, spy):
    closed = [True]
    spy.answers.append(
        lambda a, m, r: StalePlacement("closed") if m == "Shard.Pull" and a == "shard-1" and closed[0] else None
    )

    async def body():
        client = Client(job.member(spy))
        pulling = asyncio.ensure_future(rig.pull_all(client, job))
        await asyncio.sleep(0.5)
        closed[0] = False
        opens = asyncio.get_running_loop().time()
        await pulling
        return asyncio.get_running_loop().time() - opens

    late, _ = rig.run(body())
    assert late <= 0.05
    assert [len(spy.sent("Shard.Pull")) > 12, len(spy.sent("Shard.Pull")) < 35] == [True, True]


def test_a_dead_shard_does_not_hold_up_blocks_that_moved(job):
    wire = Telling(job)
    to = (int(job.owners[3]) + 1) % 3
    dead = f"shard-{3 - int(job.owners[3]) - to}"
    lives = [False]
    wire.answers.append(
        lambda a, m, r: Unavailable("dead") if m == "Shard.Push" and a == dead and not lives[0] else None
    )

    async def body():
        pushing = asyncio.ensure_future(rig.push(Client(job.member(wire)), job, keys=range(100)))
        job.move(3, to)
        await asyncio.sleep(0.01)
        assert all_rows_are(job, -1, [k for k in range(100) if rig_block(job, k) == 3])
        await asyncio.sleep(5)
        assert not pushing.done()
        lives[0] = True
        await pushing

    rig.run(body())
    # Pauses grow to a second, and the coordinator is asked at the end of each.
    asked = wire.times("Shard.Push", dead)
    assert len(asked) <= 14
    assert np.diff(asked).max() <= 1.0
    assert len(wire.sent("Coordinator.Placement")) == len(asked) - 1
    assert all_rows_are(job, -1, range(100))


def rig_block(job, key):
    return int(rig.group_keys(job.layout, job.routes(), "user", [key]).blocks[0])


def test_who_waits_for_a_dead_shard_goes_on_once_its_blocks_are_known_to_be_elsewhere(job, spy):
    """By a heartbeat, or by the word of another shard."""
    lives = [False]
    spy.answers.append(
        lambda a, m, r: Unavailable("dead") if m == "Shard.Push" and a == "shard-1" and not lives[0] else None
    )

    async def body():
        client = Client(job.member(spy))
        pushing = asyncio.ensure_future(rig.push(client, job, keys=range(100)))
        await asyncio.sleep(5)
        mine = np.flatnonzero(job.owners == 1).tolist()
        spy.answers.append(lambda a, m, r: Unavailable("away") if a == "coordinator" else None)
        asked = len(spy.sent("Shard.Push"))
        for block in mine[1:]:
            job.move(block, 0)
        client._member.learn(where(job, mine[1:]))
        await asyncio.sleep(0)
        await asyncio.sleep(0.001)
        # One that is not known to be elsewhere stays behind.
        assert len(spy.sent("Shard.Push")) == asked + 1
        assert not pushing.done()
        lives[0] = True
        await pushing

    rig.run(body())
    assert all_rows_are(job, -1, range(100))


def test_without_a_coordinator_the_last_owner_is_asked(job):
    """It may have been told of the new one, or may have opened again."""
    wire = Telling(job)
    closed = [True]

    def answer(address, method, request):
        if address == "coordinator":
            return Unavailable("away")
        if method == "Shard.Push" and closed[0] and address == f"shard-{job.owners[3]}":
            return PushReply(moved=opened(request)[0].tables[0].keys.blocks)
        return None

    wire.answers.append(answer)

    async def body():
        pushing = asyncio.ensure_future(rig.push(Client(job.member(wire)), job, keys=range(100)))
        await asyncio.sleep(0.2)
        closed[0] = False
        begun = asyncio.get_running_loop().time()
        await pushing
        return asyncio.get_running_loop().time() - begun

    late, _ = rig.run(body())
    assert late <= 0.05


def test_a_shard_that_tells_nonsense_of_blocks_is_refused(job, spy):
    odd = Placement(generation=3, blocks=where(job, [3]).blocks)
    spy.answers.append(
        lambda a, m, r: PushReply(moved=r.message.tables[0].keys.blocks, where=odd) if m == "Shard.Push" else None
    )

    async def body():
        with pytest.raises(Malformed, match="names 0 owners of 1 blocks"):
            await rig.push(Client(job.member(spy)), job)

    rig.run(body())


def test_two_shards_that_name_each_other_are_not_asked_without_end(job, spy):
    """Each knows an older record than the other: a record counts only if it is newer."""
    other = {0: 1, 1: 0, 2: 0}

    def answer(address, method, request):
        if method != "Shard.Push":
            return None
        moved = opened(request)[0].tables[0].keys.blocks
        blocks = unpack(moved, np.int32, "b").astype(np.int32)
        owners = np.full(len(blocks), other[int(address[-1])], np.int32)
        told = Changes(2, 2, False, blocks, owners, np.full(len(blocks), 2), owners[:, None], job.addresses)
        return PushReply(moved=moved, where=pack_changes(told))

    spy.answers.append(answer)

    async def body():
        pushing = asyncio.ensure_future(rig.push(Client(job.member(spy)), job))
        await asyncio.sleep(1)
        spy.answers.clear()
        asked = len(spy.sent("Shard.Push"))
        pushing.cancel()
        await asyncio.wait([pushing])
        return asked

    asked, _ = rig.run(body())
    assert asked < 100


def test_the_bytes_of_a_block_are_the_same_wherever_it_is_sent(job):
    wire = Telling(job)

    async def body():
        client = Client(job.member(wire))
        pushing = rig.push(client, job, keys=range(100))
        job.move(3, (int(job.owners[3]) + 1) % 3)
        await pushing

    rig.run(body())
    *first, last = (PushRequest.FromString(c[2]) for c in wire.sent("Shard.Push"))
    sent = unpack(last.tables[0].keys.keys, np.uint64, "keys")
    assert len(sent)
    (before,) = [p.tables[0].keys for p in first if 3 in unpack(p.tables[0].keys.blocks, np.int32, "b").tolist()]
    blocks, counts = unpack(before.blocks, np.int32, "b").tolist(), unpack(before.counts, np.int32, "c")
    at = int(counts[: blocks.index(3)].sum())
    assert np.array_equal(unpack(before.keys, np.uint64, "keys")[at : at + len(sent)], sent)
