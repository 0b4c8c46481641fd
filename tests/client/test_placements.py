# SPDX-License-Identifier: Apache-2.0
"""How a member learns what changes of a placement, in virtual time."""

import asyncio

import numpy as np
import pytest
import rig
from membership_rig import Coordinator, member_of

from oarlock.client.router import Changes, pack_changes, pack_placement
from oarlock.proto.errors import LeaseLost


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
def telling():
    return Telling()


@pytest.fixture
def member(telling):
    return member_of(telling)


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
