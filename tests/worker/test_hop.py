# SPDX-License-Identifier: Apache-2.0
"""Where work is done: long work in a thread, short work at once, and never both at a time."""

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from oarlock.worker import hop
from oarlock.worker.hop import Hop


@pytest.fixture
def executor() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as made:
        yield made


class Clock:
    """The processor's time of whoever asks: each piece of work takes ``seconds``."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._now = 0.0

    def __call__(self) -> float:
        self._now += self.seconds
        return self._now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(hop.time, "thread_time", made)
    return made


def test_short_work_comes_to_the_loop_and_long_work_leaves_it(executor: ThreadPoolExecutor, clock: Clock) -> None:
    async def body() -> list[bool]:
        made, here = Hop(executor, 0.001), []
        for seconds in [0.01] * 3 + [0.0001] * 30 + [0.01] * 3:
            clock.seconds = seconds
            here.append(await made.call(threading.current_thread) is threading.main_thread())
        return here

    here = asyncio.run(body())
    assert not any(here[:4]), "the first ones are long"
    # It takes some short ones until the mean is short; then all the rest, and one long one, are done at once.
    assert here[10:34] == sorted(here[10:34])
    assert here[30:34] == [True] * 4
    assert not here[35]


def test_nothing_is_done_at_once_without_a_limit(executor: ThreadPoolExecutor, clock: Clock) -> None:
    async def body() -> list[bool]:
        made = Hop(executor, 0.0)
        return [await made.call(threading.current_thread) is threading.main_thread() for _ in range(20)]

    assert not any(asyncio.run(body()))


def test_while_a_thread_is_at_work_the_next_goes_to_a_thread_too(executor: ThreadPoolExecutor, clock: Clock) -> None:
    """What the work uses, a sorter's memory, is used by one at a time only if the executor has one thread."""
    gate = threading.Event()

    async def body() -> tuple[bool, bool]:
        made = Hop(executor, 0.001)
        slow = asyncio.ensure_future(made.call(lambda: gate.wait(30)))
        await asyncio.sleep(0)
        # By now the mean is short, but a thread is busy.
        made._seconds = 0.0
        beside = await made.call(threading.current_thread) is threading.main_thread()
        gate.set()
        await slow
        made._seconds = 0.0
        return beside, await made.call(threading.current_thread) is threading.main_thread()

    assert asyncio.run(body()) == (False, True)


def test_an_error_is_raised_and_frees_the_way(executor: ThreadPoolExecutor, clock: Clock) -> None:
    async def body() -> bool:
        made = Hop(executor, 0.001)
        for seconds in (float("inf"), 0.0):
            made._seconds = seconds
            with pytest.raises(ZeroDivisionError):
                await made.call(lambda: 1 // 0)
        return await made.call(threading.current_thread) is threading.main_thread()

    assert asyncio.run(body())
