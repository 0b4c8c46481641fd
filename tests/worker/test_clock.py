# SPDX-License-Identifier: Apache-2.0
"""The worker's side of ssp, alone and in whole jobs."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from oarlock.proto.coordinator_pb2 import HeartbeatReply
from oarlock.proto.errors import InvalidArgument, Unavailable
from oarlock.simulation.loop import VirtualLoop
from oarlock.worker.clock import WorkerClock

Make = Callable[..., Any]


class Member:
    """Answers heartbeats with a minimum that rises by one with each."""

    def __init__(self, mode: str = "ssp", staleness: int = 2) -> None:
        self.spec = type("Spec", (), {"mode": mode, "staleness": staleness, "heartbeat_seconds": 0.5})()
        self.minimum = 0
        self.beats = 0
        self.unheard = 0

    async def beat(self) -> HeartbeatReply:
        await asyncio.sleep(0.01)
        self.beats += 1
        if self.beats <= self.unheard:
            raise Unavailable("nobody answers")
        self.minimum += 1
        return HeartbeatReply()


def play(scene: Any) -> Any:
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(scene)


def test_a_group_pulls_once_all_are_within_s() -> None:
    async def scene() -> None:
        member = Member()
        member.unheard = 3
        clock = WorkerClock(member)  # type: ignore[arg-type]
        for number in range(3):
            await clock.may_pull(number)
        assert member.beats == 0
        await asyncio.gather(*(clock.may_pull(n) for n in (3, 4, 5)))
        assert member.minimum == 3
        # One asks for all that wait: three times in vain, three times with an answer.
        assert member.beats == 6

    play(scene())


def test_acknowledgements_count_in_order_and_are_told() -> None:
    async def scene() -> None:
        member = Member(staleness=0)
        clock = WorkerClock(member)  # type: ignore[arg-type]
        assert [clock.number() for _ in range(4)] == [0, 1, 2, 3]
        clock.acknowledged(2)
        clock.acknowledged(1)
        assert clock.message(active=True).acknowledged == 0
        clock.acknowledged(0)
        await asyncio.sleep(0.1)
        assert member.beats == 1, "others may wait for it, though it waits for nobody"
        told = clock.message(active=True)
        assert (told.acknowledged, told.heard, told.active) == (3, 1, True)
        clock.begin(9)
        assert clock.number() == 9
        assert clock.on_wire(9) == 10
        clock.acknowledged(9)
        # Never back: a late heartbeat says what was done by the numbers of before.
        clock.begin(5)
        assert clock.number() == 10

    play(scene())


def test_outside_ssp_nothing_waits_and_nothing_is_told() -> None:
    async def scene() -> None:
        member = Member(mode="async", staleness=0)
        clock = WorkerClock(member)  # type: ignore[arg-type]
        await clock.may_pull(1000)
        clock.acknowledged(clock.number())
        assert clock.on_wire(5) == 0
        assert member.beats == 0

    play(scene())


def test_under_geo_a_group_pulls_once_all_before_it_are_acknowledged() -> None:
    async def scene() -> None:
        member = Member(mode="geo", staleness=0)
        clock = WorkerClock(member)  # type: ignore[arg-type]
        pulls = [asyncio.ensure_future(clock.may_pull(clock.number())) for _ in range(4)]

        async def may_pull() -> int:
            await asyncio.sleep(0.1)
            return sum(pull.done() for pull in pulls)

        assert await may_pull() == 1
        clock.acknowledged(1)
        assert await may_pull() == 1
        clock.acknowledged(0)
        assert await may_pull() == 3
        clock.acknowledged(2)
        assert await may_pull() == 4
        # Nobody else is asked or told.
        assert member.beats == 0

    play(scene())


@pytest.mark.parametrize("staleness", [0, 1, 5])
def test_workers_stay_within_s_of_each_other(make_job: Make, staleness: int) -> None:
    # One split for each, as long as the others': nobody is idle before it has done all.
    job = make_job(
        workers=3,
        epochs=1,
        mode="ssp",
        staleness=staleness,
        open_splits=1,
        prefetch=4,
        rows_per_split=80,
        group_rows=80,
    )
    numbers: dict[int, int] = {}
    furthest = 0

    async def slow(method: str, request: Any) -> None:
        nonlocal furthest
        if method == "Shard.Pull" and request.number:
            numbers[request.header.sender] = request.number
            furthest = max(furthest, max(numbers.values()) - min(numbers.values()))
        if method == "Shard.Push" and request.header.sender == min(numbers):
            await asyncio.sleep(1.0)

    job.wire.bend = slow
    job.run(lambda job: job.to_the_end())
    job.check_counted_once()
    # The slow one's pull in flight is of a group that it has not acknowledged: one more than s lies between the pulls.
    assert 0 < furthest <= staleness + 1


def test_staleness_without_ssp_names_both(make_job: Make) -> None:
    with pytest.raises(InvalidArgument, match=r"staleness = 3 and mode = 'async' contradict"):
        make_job(staleness=3)
