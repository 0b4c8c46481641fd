# SPDX-License-Identifier: Apache-2.0
"""The worker's gate in virtual time: it shuts when announced, waits for its pushes, opens when told so or by itself."""

import asyncio
import random
from types import SimpleNamespace

import pytest
import rig

from oarlock.client.acknowledged import Acknowledged
from oarlock.client.gate import Gate
from oarlock.proto.common_pb2 import Header
from oarlock.proto.coordinator_pb2 import GateReply
from oarlock.proto.errors import LeaseLost, Unavailable

GATE_SECONDS = 2.0


class Member:
    """What a gate needs of a membership; ``answers`` are given one a question, the last one again and again."""

    def __init__(self, *answers):
        self.spec = SimpleNamespace(gate_seconds=GATE_SECONDS, workers=4)
        self.coordinator = "coordinator"
        self.transport = self
        self.asked = []
        self._answers = list(answers)
        self.acknowledged = Acknowledged(1)
        self.gate = Gate(self)

    def header(self):
        return Header(cut=self.gate.cut)

    async def call(self, address, method, request, *, timeout_seconds):
        self.asked.append((asyncio.get_running_loop().time(), method, request.cut, request.header.cut))
        await asyncio.sleep(0.001)
        answer = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]
        if isinstance(answer, Exception):
            raise answer
        return GateReply(opened=answer)


def now():
    return asyncio.get_running_loop().time()


async def until(condition, seconds=30.0):
    end = now() + seconds
    while not condition():
        assert now() < end
        await asyncio.sleep(0.001)


def test_it_shuts_at_the_announced_moment_and_says_so_until_it_is_opened():
    async def body():
        member = Member(0, 0, 0, 1)
        begun = now()
        member.gate.hear(0, gate=1, seconds=0.5)
        member.gate.hear(0, gate=1, seconds=0.2)
        await until(lambda: not member.gate.is_open)
        assert now() - begun == pytest.approx(0.5, abs=0.002), "the first word of it counts"
        await until(lambda: member.gate.is_open)
        assert [asked[1:] for asked in member.asked] == [("Coordinator.Gate", 1, 0)] * 4
        assert member.gate.cut == 1

    rig.run(body())


def test_a_question_at_the_gate_before_that_ends_late_opens_none():
    """It is cancelled when the next gate is announced, and may take its time with that; by then the next one is shut."""

    class Slow(Member):
        async def call(self, address, method, request, *, timeout_seconds):
            try:
                return await super().call(address, method, request, timeout_seconds=timeout_seconds)
            except asyncio.CancelledError:
                await asyncio.sleep(0.5)
                raise

    async def body():
        member = Slow(0)
        member.gate.hear(0, gate=1)
        await until(lambda: member.asked)
        member.gate.hear(1, gate=2)
        await until(lambda: member.asked[-1][2] == 2)
        end = now() + 1.5
        while now() < end:
            assert not member.gate.is_open
            await asyncio.sleep(0.01)
        member.gate.hear(2)
        await until(lambda: member.gate.is_open)
        member.gate.hear(2, gate=3)
        await until(lambda: not member.gate.is_open)
        member.gate.forget()
        await until(lambda: member.gate.is_open)

    rig.run(body())


def test_pushes_that_are_under_way_end_first_and_later_ones_wait():
    async def body():
        member, log = Member(0, 0, 1), []

        async def push(name, seconds):
            async with member.gate.passed():
                log.append(f"{name} begins")
                await asyncio.sleep(seconds)
                log.append(f"{name} ends")

        first = asyncio.ensure_future(push("first", 1.0))
        await asyncio.sleep(0)
        member.gate.hear(0, gate=1, seconds=0.1)
        await until(lambda: not member.gate.is_open)
        second = asyncio.ensure_future(push("second", 0.1))
        await asyncio.sleep(0.5)
        assert (log, member.asked) == (["first begins"], [])
        await asyncio.gather(first, second)
        assert log == ["first begins", "first ends", "second begins", "second ends"]
        assert member.gate.cut == 1

    rig.run(body())


@pytest.mark.parametrize("opened", [1, 2])
def test_word_that_it_is_open_counts_wherever_it_comes_from(opened):
    async def body():
        member = Member(0)
        member.gate.hear(0, gate=1, seconds=0.0)
        await until(lambda: not member.gate.is_open)
        asked = now()
        member.gate.hear(opened)
        await until(lambda: member.gate.is_open)
        assert now() - asked < 0.01
        assert member.gate.cut == opened

    rig.run(body())


def test_a_push_that_never_ends_does_not_keep_it_shut_once_the_cut_was_given_up():
    async def body():
        member = Member(0)

        async def stuck():
            async with member.gate.passed():
                await asyncio.Event().wait()

        pushing = asyncio.ensure_future(stuck())
        await asyncio.sleep(0)
        member.gate.hear(0, gate=1)
        await until(lambda: not member.gate.is_open)
        member.gate.hear(1)
        await until(lambda: member.gate.is_open)
        assert member.asked == []
        pushing.cancel()

    rig.run(body())


def test_it_opens_by_itself_after_a_long_silence_and_keeps_the_old_number():
    async def body():
        member = Member(0, Unavailable("away"))
        member.gate.hear(3)
        member.gate.hear(3, gate=4)
        await until(lambda: not member.gate.is_open)
        shut = now()
        await until(lambda: member.gate.is_open)
        assert now() - shut == pytest.approx(2 * GATE_SECONDS, abs=0.1)
        assert member.gate.cut == 3
        # The same cut does not shut it again.
        member.gate.hear(3, gate=4)
        await asyncio.sleep(1)
        assert member.gate.is_open

    rig.run(body())


def test_an_answer_within_that_time_keeps_it_shut():
    async def body():
        member = Member(*[Unavailable("away")] * 200, 0, *[Unavailable("away")] * 200, 5)
        member.gate.hear(0, gate=5)
        await until(lambda: member.gate.is_open and member.gate.cut == 5)
        assert len(member.asked) == 402

    rig.run(body())


def test_a_refusal_opens_it_and_is_left_to_the_heartbeat():
    async def body():
        member = Member(LeaseLost("join anew"))
        member.gate.hear(0, gate=1)
        await until(lambda: member.asked)
        await until(lambda: member.gate.is_open)
        assert member.gate.cut == 0

    rig.run(body())


def test_many_pushes_and_gates_in_any_order_never_meet():
    """No push is under way between the first question and the opening."""

    async def body(seed):
        rng = random.Random(seed)
        member, under_way = Member(0), 0

        async def push():
            nonlocal under_way
            await asyncio.sleep(rng.random())
            async with member.gate.passed():
                under_way += 1
                await asyncio.sleep(rng.random() / 5)
                under_way -= 1

        async def call(*_, timeout_seconds, **__):
            assert under_way == 0
            await asyncio.sleep(rng.random() / 10)
            assert under_way == 0
            return GateReply(opened=member.gate._announced if rng.random() < 0.2 else member.gate.cut)

        member.call = call
        pushes = [asyncio.ensure_future(push()) for _ in range(200)]
        for cut in range(1, 6):
            await asyncio.sleep(rng.random() / 5)
            member.gate.hear(member.gate.cut, gate=cut, seconds=rng.random() / 20)
            await until(lambda cut=cut: member.gate.cut == cut)
        await asyncio.gather(*pushes)

    for seed in range(20):
        rig.run(body(seed))
