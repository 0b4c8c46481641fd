# SPDX-License-Identifier: Apache-2.0
"""The wire of the simulation: answers that are given later."""

import asyncio
import random
from itertools import pairwise

import pytest

from oarlock.proto.errors import StalePlacement, Unavailable
from oarlock.proto.pending import Pending
from oarlock.proto.shard_pb2 import PushReply, PushRequest
from oarlock.simulation.faults import Fault
from oarlock.simulation.loop import Process, VirtualLoop
from oarlock.simulation.wire import Call, Wire


class Scene:
    """A client and a server whose handler is the scene itself."""

    def __init__(self) -> None:
        self.loop = VirtualLoop()
        self.asked: list[Pending] = []
        self.events: list[tuple[str, object]] = []
        self.wire = Wire(self.loop, random.Random(0), 0.01, self._event)
        self.client, self.server = Process("client"), Process("server")
        self.wire.serve(self.server, "here", self)

    def push(self, request: PushRequest) -> Pending:
        self.asked.append(Pending(so_far=PushReply(applied=2)))
        return self.asked[-1]

    def _event(self, process, call, request, reply) -> None:
        self.events.append(("client" if process is None else process.name, reply))

    def ask(self) -> asyncio.Task:
        asking = self.wire.link(self.client).call("here", "Shard.Push", PushRequest(), timeout_seconds=100.0)
        return self.loop.start(self.client, asking)

    def run(self, body):
        return self.loop.run_until_complete(body())


@pytest.fixture
def scene():
    made = Scene()
    yield made
    made.loop.dispose([made.client, made.server])
    made.loop.close()


def test_what_was_done_is_an_event_before_its_answer_is_given(scene: Scene) -> None:
    async def body() -> None:
        asking = scene.ask()
        await asyncio.sleep(5)
        assert scene.events == [("server", PushReply(applied=2))]
        scene.server.call(scene.asked[0].resolve, PushReply(applied=3))
        assert await asking == PushReply(applied=3)
        assert scene.events == [("server", PushReply(applied=2)), ("client", None)]
        assert scene.loop.now - 1000 < 5.1

    scene.run(body)


def test_an_error_may_come_later(scene: Scene) -> None:
    async def body() -> None:
        asking = scene.ask()
        await asyncio.sleep(1)
        scene.asked[0].fail(StalePlacement("moved"))
        with pytest.raises(StalePlacement):
            await asking
        assert [who for who, _ in scene.events] == ["server", "client"]

    scene.run(body)


def test_a_process_that_dies_first_answers_nobody(scene: Scene) -> None:
    async def body() -> None:
        asking = scene.ask()
        await asyncio.sleep(1)
        scene.server.alive = False
        with pytest.raises(Unavailable):
            await asking
        scene.asked[0].resolve(PushReply(applied=3))
        await asyncio.sleep(1)
        assert [who for who, _ in scene.events] == ["server", "client"]

    scene.run(body)


def test_a_paused_process_answers_once_it_goes_on(scene: Scene) -> None:
    async def body() -> None:
        asking = scene.ask()
        await asyncio.sleep(1)

        async def answer() -> None:
            await asyncio.sleep(1)
            scene.asked[0].resolve(PushReply(applied=3))

        answering = scene.loop.start(scene.server, answer())
        await asyncio.sleep(0.5)
        scene.server.paused = True
        await asyncio.sleep(10)
        assert not asking.done()
        scene.loop.resume(scene.server)
        assert await asking == PushReply(applied=3)
        await answering

    scene.run(body)


def test_a_late_answer_may_be_lost_or_slow(scene: Scene) -> None:
    async def body() -> None:
        for kind in ("deaf", "slow_reply"):
            scene.events.clear()
            scene.wire.armed.append(Fault(0, kind, 0, 3.0, "Shard.Push"))
            asking = scene.ask()
            await asyncio.sleep(1)
            begun = scene.loop.now
            scene.asked[-1].resolve(PushReply(applied=3))
            if kind == "deaf":
                with pytest.raises(Unavailable):
                    await asking
            else:
                assert await asking == PushReply(applied=3)
                assert scene.loop.now - begun >= 3
            await asyncio.sleep(1)
            assert ("server", PushReply(applied=2)) in scene.events

    scene.run(body)


def test_a_deaf_call_may_break_long_before_it_is_answered(scene: Scene) -> None:
    async def body() -> None:
        early = []
        for _ in range(20):
            scene.wire.armed.append(Fault(0, "deaf", 0, 0.0, "Shard.Push"))
            asking = scene.ask()
            await asyncio.sleep(50)
            early.append(asking.done())
            scene.asked[-1].resolve(PushReply())
            with pytest.raises(Unavailable):
                await asking
        assert 0 < sum(early) < len(early)

    scene.run(body)


def test_a_message_that_is_aimed_at_is_handled_once_more_or_later(scene: Scene) -> None:
    """What is held strikes nobody a second time, though it comes to its handler's door again."""
    seen: list[float] = []

    def before(process: Process, call: Call) -> bool:
        seen.append(scene.loop.now)
        if len(seen) == 1:
            call.held = 5.0
        elif len(seen) == 2:
            scene.wire.repeat(call, 3.0)
        return False

    scene.wire = Wire(scene.loop, random.Random(0), 0.01, scene._event, before)
    scene.wire.serve(scene.server, "here", scene)

    async def body() -> None:
        asking = scene.ask()
        await asyncio.sleep(4)
        assert not scene.asked
        await asyncio.sleep(2)
        assert len(scene.asked) == 1
        await asyncio.sleep(3)
        assert len(scene.asked) == 2
        assert [round(b - a, 1) for a, b in pairwise(seen)] == [5.0, 3.0]
        # Nobody waits for an answer to the second one.
        for each in scene.asked:
            each.resolve(PushReply(applied=3))
        assert await asking == PushReply(applied=3)

    scene.run(body)


def test_who_is_stunned_by_a_message_gets_it_when_it_goes_on(scene: Scene) -> None:
    def before(process: Process, call: Call) -> bool:
        process.paused = True
        return False

    scene.wire = Wire(scene.loop, random.Random(0), 0.01, scene._event, before)
    scene.wire.serve(scene.server, "here", scene)

    async def body() -> None:
        asking = scene.ask()
        await asyncio.sleep(4)
        assert not scene.asked
        scene.wire._before = lambda process, call: False
        scene.loop.resume(scene.server)
        scene.wire.resume(scene.server)
        await asyncio.sleep(0.1)
        scene.asked[0].resolve(PushReply(applied=3))
        assert await asking == PushReply(applied=3)

    scene.run(body)
