# SPDX-License-Identifier: Apache-2.0
"""The virtual loop: time jumps, and processes stop between two steps."""

import asyncio
import threading

import pytest

from oarlock.simulation.loop import Process, Stalled, VirtualLoop


@pytest.fixture
def loop():
    made = VirtualLoop()
    yield made
    made.close()


def test_time_passes_only_when_nothing_else_can_happen(loop: VirtualLoop) -> None:
    async def both() -> list[float]:
        begun = loop.time()
        await asyncio.gather(asyncio.sleep(1e6), asyncio.sleep(3))
        assert loop.time() - begun == 1e6
        return [loop.time()]

    assert loop.run_until_complete(both()) == [loop.now]


def test_what_would_be_done_in_a_thread_is_done_at_once(loop: VirtualLoop) -> None:
    """Another thread would take real time, and two runs of a seed would differ."""

    async def body() -> int:
        begun = loop.time()
        found = await loop.run_in_executor(None, threading.get_ident)
        assert loop.time() == begun
        return found

    assert loop.run_until_complete(body()) == threading.get_ident()


def test_waiting_for_nothing_is_an_error(loop: VirtualLoop) -> None:
    with pytest.raises(Stalled):
        loop.run_until_complete(loop.create_future())
    loop.dispose([])


async def _count(seen: list[float], ended: list[str]) -> None:
    try:
        while True:
            seen.append(asyncio.get_running_loop().time() - 1000)
            await asyncio.sleep(1)
    finally:
        ended.append("finally")


def test_a_killed_process_takes_no_further_step(loop: VirtualLoop) -> None:
    process, seen, ended = Process("p"), [], []
    loop.start(process, _count(seen, ended))

    async def scene() -> None:
        await asyncio.sleep(2.5)
        process.alive = False
        await asyncio.sleep(10)

    loop.run_until_complete(scene())
    assert seen == [0, 1, 2]
    assert ended == [], "what is killed cleans nothing up"
    loop.dispose([process])
    assert ended == ["finally"]


def test_a_paused_process_goes_on_where_it_was(loop: VirtualLoop) -> None:
    process, seen, ended = Process("p"), [], []
    loop.start(process, _count(seen, ended))

    async def scene() -> None:
        await asyncio.sleep(1.5)
        process.paused = True
        await asyncio.sleep(5)
        assert seen == [0, 1]
        loop.resume(process)
        await asyncio.sleep(1.2)

    loop.run_until_complete(scene())
    assert seen == [0, 1, 6.5, 7.5]
    loop.dispose([process])


def test_tasks_and_timers_belong_to_the_process_that_made_them(loop: VirtualLoop) -> None:
    process, seen = Process("p"), []

    async def parent() -> None:
        asyncio.get_running_loop().call_later(2, seen.append, "timer")
        child = asyncio.ensure_future(_count([], seen))
        await asyncio.sleep(2)
        seen.append("slept")
        child.cancel()

    loop.start(process, parent())

    async def scene() -> None:
        await asyncio.sleep(1)
        process.alive = False
        await asyncio.sleep(5)

    loop.run_until_complete(scene())
    assert seen == []
    loop.dispose([process])
