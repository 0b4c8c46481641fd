# SPDX-License-Identifier: Apache-2.0
"""Turns at a few places: by arrival while there is time, the newest first once there is not, and no place is ever lost."""

import asyncio
import random

import pytest

from oarlock.proto.rpc.turns import Turns

# Who waits until then has all the time in the world, or more than half of it is over.
AMPLE, SHORT = 1000.0, -1.0


class Order:
    """Callers of one place, and in which order they got it."""

    def __init__(self, places=1):
        self.turns = Turns(places)
        self.served = []
        self.tasks = {}

    async def come(self, name, seconds):
        async def one():
            await self.turns.acquire(asyncio.get_running_loop().time() + seconds)
            self.served.append(name)

        self.tasks[name] = asyncio.ensure_future(one())
        await asyncio.sleep(0)

    async def release(self):
        self.turns.release()
        await asyncio.sleep(0)


def test_turns_go_by_arrival_while_there_is_time():
    async def body():
        order = Order()
        for name in "abcd":
            await order.come(name, AMPLE)
        for _ in "bcd":
            await order.release()
        return order.served

    assert asyncio.run(body()) == list("abcd")


def test_the_newest_comes_first_once_the_oldest_has_waited_for_half_of_its_time():
    async def body():
        order = Order()
        await order.come("holds", AMPLE)
        await order.come("old", SHORT)
        for name in ("new", "newer", "newest"):
            await order.come(name, AMPLE)
        await order.release()
        assert order.served == ["holds", "newest"]
        await order.release()
        # Those that came early give up at some time, and then turns go by arrival again.
        order.tasks["old"].cancel()
        await asyncio.sleep(0)
        await order.come("last", AMPLE)
        for _ in range(2):
            await order.release()
        return order.served

    assert asyncio.run(body()) == ["holds", "newest", "newer", "new", "last"]


def test_who_is_late_gets_a_place_that_nobody_else_wants():
    async def body():
        order = Order()
        for name in ("holds", "old", "older"):
            await order.come(name, SHORT)
        for _ in range(2):
            await order.release()
        return order.served

    assert sorted(asyncio.run(body())) == ["holds", "old", "older"]


@pytest.mark.parametrize("woken", [False, True])
def test_who_is_cancelled_leaves_its_place_to_the_next(woken):
    async def body():
        order = Order()
        for name in "abc":
            await order.come(name, AMPLE)
        if woken:
            # It has the place, and is cancelled before it knows.
            order.turns.release()
            order.tasks["b"].cancel()
            await asyncio.sleep(0)
        else:
            order.tasks["b"].cancel()
            order.turns.release()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        return order.served

    assert asyncio.run(body()) == list("ac")


def test_no_place_is_lost_or_given_twice(seed):
    """Callers come, leave and give up at random: as many as there are places are served at a time, and in the end all."""
    rng = random.Random(seed)
    places, callers = 3, 200

    async def body():
        turns = Turns(places)
        inside = 0

        async def one():
            nonlocal inside
            await turns.acquire(asyncio.get_running_loop().time() + rng.choice((AMPLE, SHORT)))
            try:
                inside += 1
                assert inside <= places
                for _ in range(rng.randrange(4)):
                    await asyncio.sleep(0)
            finally:
                inside -= 1
                turns.release()

        tasks = []
        for _ in range(callers):
            tasks.append(asyncio.ensure_future(one()))
            if rng.random() < 0.5:
                await asyncio.sleep(0)
            if rng.random() < 0.3:
                rng.choice(tasks).cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert all(t.cancelled() or t.exception() is None for t in tasks)
        # All places are there again.
        for _ in range(places):
            await asyncio.wait_for(turns.acquire(0.0), 30)
        waits = asyncio.ensure_future(turns.acquire(0.0))
        await asyncio.sleep(0)
        assert not waits.done()
        waits.cancel()

    asyncio.run(body())
