# SPDX-License-Identifier: Apache-2.0
"""Joining, keeping the lease and learning placements, in virtual time, against a coordinator of a few lines."""

import asyncio
import json
from itertools import pairwise

import pytest
import rig
from membership_rig import Coordinator, member_of

from oarlock.proto.coordinator_pb2 import WORKER, Clock
from oarlock.proto.errors import DeadlineExceeded, LeaseLost, Unavailable, WrongRun


@pytest.fixture
def coordinator():
    return Coordinator()


@pytest.fixture
def member(coordinator):
    return member_of(coordinator)


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


def test_a_minimum_that_was_told_is_told_again_before_there_is_work(coordinator, member):
    """A coordinator that begins anew learns it from whoever lives, and that may be somebody who has just joined."""

    async def body():
        await member.join()
        coordinator.minimum = 3
        await member.beat()
        coordinator.minimum = 0
        await member.beat()
        member.about = lambda request: request.clock.CopyFrom(Clock(active=True, acknowledged=4, heard=3))
        await member.beat()

    rig.run(body())
    told = [request.clock for _, request in coordinator.beats]
    assert told == [Clock(), Clock(heard=3), Clock(active=True, acknowledged=4, heard=3)]


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


@pytest.mark.parametrize(
    ("asked", "told", "stays"),
    [
        (WrongRun("from the coordinator", stays=True), [], True),
        (WrongRun("from a shard"), [Unavailable("between two runs"), WrongRun("yes", stays=True)], True),
        (WrongRun("from a shard"), [WrongRun("others were started")], False),
        (WrongRun("from a shard"), [WrongRun("nonsense", stays="true")], False),
        # The coordinator knows of no other run.
        (WrongRun("from a shard"), [], False),
    ],
)
def test_only_the_coordinator_says_who_is_in_the_next_run(coordinator, member, asked, told, stays):
    async def body():
        await member.join()
        coordinator.failing = told
        assert await member.is_in_the_next_run(asked) is stays

    rig.run(body())
