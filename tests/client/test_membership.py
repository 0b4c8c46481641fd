# SPDX-License-Identifier: Apache-2.0
"""Joining, keeping the lease and learning placements, in virtual time, against a coordinator of a few lines."""

import asyncio
import json
import random
from itertools import pairwise

import numpy as np
import pytest
import rig

from oarlock.client.membership import Membership
from oarlock.client.retry import Retry
from oarlock.client.router import Changes, pack_changes, pack_placement
from oarlock.proto.common_pb2 import Empty
from oarlock.proto.coordinator_pb2 import WORKER, HeartbeatReply, JoinReply
from oarlock.proto.errors import DeadlineExceeded, LeaseLost, Unavailable, WrongRun


class Coordinator:
    """``failing`` holds errors that are raised first, one a call."""

    def __init__(self):
        self.job = rig.Job(rig.spec_of())
        self.failing = []
        self.joins, self.beats, self.asked, self.left = [], [], 0, []
        self.phase, self.generation = "training", 0

    def _maybe_fail(self):
        if self.failing:
            raise self.failing.pop(0)

    def join(self, request):
        self.joins.append(request)
        self._maybe_fail()
        return JoinReply(
            job=self.job.spec.job_bytes,
            run=3,
            id=2,
            incarnation=77,
            spec=self.job.spec.to_json(),
            lease_seconds=5,
            heartbeat_seconds=0.5,
        )

    def heartbeat(self, request):
        self.beats.append((asyncio.get_running_loop().time(), request))
        self._maybe_fail()
        return HeartbeatReply(phase=self.phase, generation=self.generation, step=12)

    def placement(self, request):
        self.asked += 1
        self._maybe_fail()
        return pack_placement(self.generation, self.job.owners, self.job.addresses)

    def leave(self, request):
        self.left.append(request)
        self._maybe_fail()
        return Empty()


@pytest.fixture
def coordinator():
    return Coordinator()


@pytest.fixture
def member(coordinator):
    coordinator.job.transport.serve(coordinator, "coordinator")
    retry = Retry(deadline_seconds=20)
    return Membership(
        coordinator.job.transport, "coordinator", WORKER, rng=random.Random(1), address="a", reader="arrow", retry=retry
    )


def test_joining_takes_the_identity_that_was_given(coordinator, member):
    async def body():
        assert await member.join() == coordinator.job.spec

    rig.run(body())
    (request,) = coordinator.joins
    assert (request.protocol, request.role, request.address, request.reader) == (1, WORKER, "a", "arrow")
    assert request.nonce
    header = member.header(5)
    assert (header.job, header.run, header.sender, header.target, header.generation) == (
        coordinator.job.spec.job_bytes,
        3,
        77,
        5,
        0,
    )
    assert member.routes is None


def test_a_join_is_repeated_with_the_same_nonce(coordinator, member):
    coordinator.failing = [Unavailable("starting"), DeadlineExceeded("x")]
    rig.run(member.join())
    assert len({r.nonce for r in coordinator.joins}) == 1
    assert len(coordinator.joins) == 3


def test_a_heartbeat_renews_and_tells(coordinator, member):
    async def body():
        await member.join()
        keeping = asyncio.ensure_future(member.keep(lambda: {"batches": 4}))
        await asyncio.sleep(2.6)
        assert (member.phase, member.step, member.stopping.is_set()) == ("training", 12, False)
        coordinator.phase = "stopping"
        await asyncio.sleep(0.6)
        assert (member.stopping.is_set(), member.over.is_set()) == (True, False)
        coordinator.phase = "done"
        await asyncio.sleep(0.6)
        assert member.over.is_set()
        keeping.cancel()

    rig.run(body())
    times = [t for t, _ in coordinator.beats]
    assert all(abs(b - a - 0.5) < 1e-6 for a, b in pairwise(times))
    assert json.loads(coordinator.beats[0][1].stats) == {"batches": 4}


def test_a_silent_coordinator_is_waited_for(coordinator, member):
    async def body():
        await member.join()
        coordinator.failing = [Unavailable("restarting")] * 5
        keeping = asyncio.ensure_future(member.keep(dict))
        await asyncio.sleep(4)
        assert not keeping.done()
        assert member.phase == "training"
        keeping.cancel()

    rig.run(body())


@pytest.mark.parametrize("error", [LeaseLost("join anew"), WrongRun("the job was restored")])
def test_work_ends_when_the_coordinator_puts_the_member_out(coordinator, member, error):
    ended = []

    async def work():
        async with member.kept(dict):
            coordinator.failing = [error]
            try:
                await asyncio.sleep(1e9)
            finally:
                ended.append("work")

    async def body():
        await member.join()
        with pytest.raises(type(error), match=str(error)):
            await work()
        # The task is not cancelled for good: it may say so and go.
        await asyncio.sleep(1)
        ended.append("told")

    rig.run(body())
    assert ended == ["work", "told"]


def test_work_that_ends_stops_the_heartbeats(coordinator, member):
    async def fail():
        async with member.kept(dict):
            await asyncio.sleep(1)
            raise ZeroDivisionError

    async def body():
        await member.join()
        async with member.kept(dict):
            await asyncio.sleep(1.1)
        count = len(coordinator.beats)
        await asyncio.sleep(10)
        assert len(coordinator.beats) == count
        with pytest.raises(ZeroDivisionError):
            await fail()

    rig.run(body())


def test_a_cancelled_member_stays_cancelled(coordinator, member):
    async def inside():
        async with member.kept(dict):
            await asyncio.sleep(1e9)

    async def body():
        await member.join()
        task = asyncio.ensure_future(inside())
        await asyncio.sleep(3)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    rig.run(body())


def test_a_newer_placement_is_fetched_once_for_all_who_wait(coordinator, member):
    async def body():
        await member.join()
        waiting = [asyncio.ensure_future(member.newer_routes(1)) for _ in range(5)]
        await asyncio.sleep(1)
        assert not any(w.done() for w in waiting)
        asked = coordinator.asked
        # Not asked five times as often as one would.
        assert asked <= 12
        coordinator.generation = 2
        found = await asyncio.gather(*waiting)
        assert {id(f) for f in found} == {id(member.routes)}
        assert member.routes.generation == 2
        assert (await member.newer_routes(1)).generation == 2
        # A placement only gets newer.
        coordinator.generation = 1
        await member.refresh()
        assert member.routes.generation == 2
        coordinator.generation = 3
        coordinator.failing = [Unavailable("x")]
        await member.refresh()
        assert member.routes.generation == 2
        await member.refresh()
        assert member.routes.generation == 3

    rig.run(body())


def test_heartbeats_bring_newer_placements(coordinator, member):
    async def body():
        await member.join()
        async with member.kept(dict):
            coordinator.generation = 4
            await asyncio.sleep(2)
            assert member.routes.generation == 4
            assert member.header().generation == 4

    rig.run(body())


def test_leaving_is_said_once_and_needs_no_answer(coordinator, member):
    async def body():
        await member.join()
        coordinator.failing = [Unavailable("gone"), LeaseLost("who?")]
        await member.leave("disk full")
        await member.leave()

    rig.run(body())
    assert [r.error for r in coordinator.left] == ["disk full", ""]


# Changes of a placement


class Telling(Coordinator):
    """Tells what changed since the generation that it is asked with, as far back as it knows."""

    def __init__(self):
        super().__init__()
        self.owners = np.zeros(17, np.int32)
        self.generations = np.ones(17, np.int64)
        self.generation = 1
        self.since = 0
        self.questions = []

    def move(self, block, to):
        self.generation += 1
        self.owners[block], self.generations[block] = to, self.generation

    def placement(self, request):
        known = request.header.generation
        self.questions.append((known, request.whole))
        self._maybe_fail()
        shards = self.job.addresses
        if request.whole or not known:
            return pack_placement(self.generation, self.owners, shards, generations=self.generations)
        since = max(known, self.since)
        blocks = np.flatnonzero(self.generations > since).astype(np.int32)
        owners = self.owners[blocks]
        told = self.generations[blocks]
        return pack_changes(Changes(self.generation, since, False, blocks, owners, told, owners[:, None], shards))


@pytest.fixture
def telling(member, coordinator):
    made = Telling()
    made.job = coordinator.job
    coordinator.job.transport.serve(made, "coordinator")
    return made


def knows(member, telling):
    assert member.routes.generation == telling.generation
    assert np.array_equal(member.routes.owners, telling.owners)
    assert np.array_equal(member.routes.generations, telling.generations)
    return True


def test_a_member_asks_for_what_changed_since_it_knew(telling, member):
    async def body():
        await member.join()
        await member.newer_routes(1)
        telling.move(3, 1)
        telling.move(16, 2)
        await member.refresh()
        assert knows(member, telling)
        before = member.routes
        await member.refresh()
        assert member.routes is before
        telling.move(3, 0)
        await member.newer_routes(4)
        assert knows(member, telling)

    rig.run(body())
    assert telling.questions == [(0, False), (1, False), (3, False), (3, False)]


@pytest.mark.parametrize("way", ["refresh", "newer_routes"])
def test_where_changes_leave_a_gap_all_is_asked_for(telling, member, way):
    async def body():
        await member.join()
        await member.newer_routes(1)
        telling.move(3, 1)
        telling.move(4, 2)
        telling.since = 2
        await (member.refresh() if way == "refresh" else member.newer_routes(3))
        assert knows(member, telling)

    rig.run(body())
    assert telling.questions == [(0, False), (1, False), (1, True)]


def test_who_knows_nothing_takes_no_change(telling, member):
    async def body():
        await member.join()
        real, telling.placement = (
            telling.placement,
            lambda request: pack_changes(
                Changes(
                    9,
                    0,
                    False,
                    *(np.zeros(0, d) for d in (np.int32, np.int32, np.int64)),
                    np.zeros((0, 1), np.int32),
                    {},
                )
            ),
        )
        await member.refresh()
        assert member.routes is None
        telling.placement = real
        await member.newer_routes(1)
        assert knows(member, telling)

    rig.run(body())


def test_the_word_of_a_shard_is_taken_but_all_is_still_asked_for(telling, member):
    async def body():
        await member.join()
        telling.move(5, 1)
        nothing = Changes(
            9,
            9,
            False,
            np.array([3], np.int32),
            *(np.array([1], d) for d in (np.int32, np.int64)),
            np.array([[1]], np.int32),
            telling.job.addresses,
        )
        # Before anything is known it says nothing.
        member.learn(pack_changes(nothing))
        assert member.routes is None
        await member.newer_routes(2)
        telling.move(3, 1)
        telling.move(4, 2)
        record = Changes(
            3,
            3,
            False,
            np.array([3], np.int32),
            np.array([1], np.int32),
            np.array([3], np.int64),
            np.array([[1]], np.int32),
            telling.job.addresses,
        )
        member.learn(pack_changes(record))
        assert (member.routes.generation, member.routes.owners[3], member.routes.owners[4]) == (2, 1, 0)
        await member.refresh()
        assert knows(member, telling)

    rig.run(body())
    assert telling.questions == [(0, False), (2, False)]


def test_who_asks_at_once_asks_once(telling, member):
    async def body():
        await member.join()
        await asyncio.gather(*(member.refresh() for _ in range(5)))
        assert knows(member, telling)
        assert len(telling.questions) == 1
        telling.failing = [LeaseLost("join anew")]
        got = await asyncio.gather(*(member.refresh() for _ in range(3)), return_exceptions=True)
        assert [type(e) for e in got] == [LeaseLost] * 3

    rig.run(body())


def test_who_has_no_patience_goes_on_and_the_answer_is_taken_when_it_comes(telling, member):
    class Slow:
        async def call(self, address, method, request, *, timeout_seconds):
            await asyncio.sleep(0.8)
            return await telling.job.transport.call(address, method, request, timeout_seconds=timeout_seconds)

    async def body():
        await member.join()
        member.transport = Slow()
        await member.refresh(0.1)
        assert member.routes is None
        begun = asyncio.get_running_loop().time()
        await member.placement_changed(10)
        assert asyncio.get_running_loop().time() - begun == pytest.approx(0.7)
        assert knows(member, telling)
        await member.placement_changed(3)
        assert asyncio.get_running_loop().time() - begun == pytest.approx(3.7)

    rig.run(body())
