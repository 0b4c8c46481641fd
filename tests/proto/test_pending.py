# SPDX-License-Identifier: Apache-2.0
"""Answers that are not there yet: how they are given, and who waits for them, over every transport."""

import asyncio
import threading
import time

import frame_rig
import numpy as np
import pytest

from oarlock.proto import frames, work
from oarlock.proto.arrays import pack, unpack
from oarlock.proto.bulk import Bulk, opened
from oarlock.proto.errors import DeadlineExceeded, PSError, StalePlacement, Unavailable
from oarlock.proto.pending import Pending, Waits
from oarlock.proto.rpc import GrpcTransport
from oarlock.proto.shard_pb2 import MarksReply, MarksRequest, PullReply, PullRequest, PushReply, PushRequest

SECONDS = 30


class Handler:
    """Answers pushes and marks later, when somebody does it; pulls at once."""

    def __init__(self):
        self.gate = threading.Event()
        self.asked = []
        self.came = threading.Semaphore(0)

    def _later(self):
        pending = Pending()
        self.asked.append(pending)
        self.came.release()
        return pending

    def push(self, sent):
        # As an array that lies in what was received, of which nothing is kept.
        if opened(sent)[0].dense:
            assert len(unpack(opened(sent)[0].dense[0].gradients, np.float32, "g", parts=opened(sent)[1]))
        return self._later()

    def marks(self, request):
        return self._later()

    def pull(self, sent):
        return PullReply(pushes=5)

    def answered(self, number=1):
        """Wait until so many more were asked; return all that were."""
        for _ in range(number):
            assert self.came.acquire(timeout=SECONDS)
        return self.asked


async def outcome(transport, address, method, request, seconds=SECONDS):
    try:
        return await transport.call(address, method, request, timeout_seconds=seconds)
    except PSError as error:
        return error


REPLIES = {"Shard.Push": (PushRequest(), PushReply(applied=3)), "Shard.Marks": (MarksRequest(), MarksReply(next=[7]))}


def test_it_is_answered_once():
    pending, heard = Pending(), []
    pending.add_done_callback(lambda: heard.append(pending.result()))
    assert not pending.done
    pending.resolve(1)
    pending.resolve(2)
    pending.fail(Unavailable("late"))
    pending.add_done_callback(lambda: heard.append("at once"))
    assert (pending.done, pending.result(), pending.wait(0)) == (True, 1, 1)
    assert heard == [1, "at once"]


def test_it_may_fail_and_then_does_so_for_all():
    pending = Pending()
    pending.fail(StalePlacement("moved", block=3))
    pending.resolve(1)
    for ask in (pending.result, lambda: pending.wait(0)):
        with pytest.raises(StalePlacement):
            ask()


def test_a_callback_that_fails_keeps_nobody_from_the_answer(caplog):
    pending, heard = Pending(), []
    pending.add_done_callback(lambda: 1 / 0)
    pending.add_done_callback(lambda: heard.append(1))
    pending.resolve(None)
    assert heard == [1]
    assert "event=callback_failed" in caplog.text


def test_a_callback_that_was_taken_back_is_not_called():
    pending, heard = Pending(), []

    def hear():
        heard.append(1)

    pending.add_done_callback(hear)
    pending.remove_done_callback(hear)
    pending.remove_done_callback(hear)
    pending.resolve(None)
    assert heard == []


def test_a_thread_waits_no_longer_than_it_said():
    with pytest.raises(DeadlineExceeded, match=r"Shard\.Push"):
        Pending().wait(0.01, "Shard.Push")


def test_nobody_waits_after_the_end():
    waits, pending = Waits(), Pending()
    ended = []

    def wait():
        try:
            waits.wait(pending, SECONDS)
        except Unavailable as error:
            ended.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    while not len(waits):
        time.sleep(0)
    waits.close()
    thread.join(SECONDS)
    wait()
    assert len(ended) == 2
    done = Pending()
    done.resolve(4)
    assert waits.wait(done, SECONDS) == 4


@pytest.mark.parametrize("method", REPLIES)
def test_an_answer_that_another_thread_gives_later_arrives(run, method):
    handler = Handler()
    request, reply = REPLIES[method]

    async def body(transport, address):
        asking = [asyncio.ensure_future(outcome(transport, address, method, request)) for _ in range(2)]
        await asyncio.to_thread(handler.answered)
        assert not any(each.done() for each in asking)
        await asyncio.to_thread(handler.asked[0].resolve, reply)
        # Over gRPC's stream the second comes once the first was answered.
        await asyncio.to_thread(handler.answered)
        await asyncio.to_thread(handler.asked[1].fail, StalePlacement("moved", block=3))
        return await asyncio.gather(*asking)

    # Which of them came first is not said.
    first, second = sorted(run(handler, body), key=lambda answer: isinstance(answer, PSError))
    assert first == reply
    assert (type(second), second.details) == (StalePlacement, {"block": 3})


def test_an_answer_that_is_there_already_arrives(run):
    class There(Handler):
        def _later(self):
            pending = Pending()
            pending.resolve(PushReply(applied=3))
            return pending

    async def body(transport, address):
        return await outcome(transport, address, "Shard.Push", PushRequest())

    assert run(There(), body) == PushReply(applied=3)


@pytest.mark.parametrize("method", REPLIES)
def test_who_waits_gives_up_in_time_and_the_others_go_on(run, method):
    handler = Handler()

    async def body(transport, address):
        late = await outcome(transport, address, method, REPLIES[method][0], 0.2)
        handler.asked[0].resolve(REPLIES[method][1])
        return late, await outcome(transport, address, "Shard.Pull", PullRequest())

    late, after = run(handler, body)
    assert type(late) is DeadlineExceeded
    assert after.pushes == 5


def test_an_answer_with_parts_may_come_later(run):
    class Parted(Handler):
        def pull(self, sent):
            beside = [] if isinstance(sent, Bulk) else None
            reply = PullReply(dense=pack(np.arange(3000, dtype=np.float32), beside))
            pending = Pending()
            threading.Timer(0.01, pending.resolve, [reply if beside is None else Bulk(reply, beside)]).start()
            return pending

    async def body(transport, address):
        reply, parts = opened(await outcome(transport, address, "Shard.Pull", Bulk(PullRequest(), [])))
        assert np.array_equal(unpack(reply.dense, np.float32, "d", parts=parts), np.arange(3000, dtype=np.float32))

    run(Parted(), body)


# The server


WAYS = [("Shard.Push", True), ("Shard.Push", False), ("Shard.Marks", True)]


@pytest.mark.parametrize(("method", "by_frames"), WAYS)
def test_a_server_that_stops_waits_for_no_answer(handler, method, by_frames):
    server = frame_rig.serve(handler)

    async def body():
        transport = GrpcTransport(frames=by_frames)
        try:
            asking = asyncio.ensure_future(outcome(transport, server.address, method, REPLIES[method][0]))
            await asyncio.to_thread(handler.answered)
            await asyncio.wait_for(asyncio.to_thread(server.stop, 0.05), SECONDS)
            return await asking
        finally:
            await transport.close()

    before = threading.active_count()
    got = asyncio.run(body())
    assert type(got) is Unavailable
    assert sum(server.open_calls().values()) == 0
    assert threading.active_count() <= before
    handler.asked[0].resolve(REPLIES[method][1])


@pytest.mark.parametrize(("method", "by_frames"), WAYS)
def test_an_answer_within_the_grace_is_still_given(handler, method, by_frames):
    server = frame_rig.serve(handler)

    async def body():
        transport = GrpcTransport(frames=by_frames)
        try:
            asking = asyncio.ensure_future(outcome(transport, server.address, method, REPLIES[method][0]))
            (pending,) = await asyncio.to_thread(handler.answered)
            stopping = asyncio.ensure_future(asyncio.to_thread(server.stop, SECONDS))
            while server._frames._accepting is not None:
                await asyncio.sleep(0)
            pending.resolve(REPLIES[method][1])
            got = await asking
            await transport.close()
            await asyncio.wait_for(stopping, SECONDS)
            return got
        finally:
            await transport.close()

    assert asyncio.run(body()) == REPLIES[method][1]


@pytest.mark.parametrize(("method", "by_frames"), WAYS)
def test_a_caller_that_went_away_is_not_waited_for(monkeypatch, handler, method, by_frames):
    monkeypatch.setattr("oarlock.proto.pending.LOOK_SECONDS", 0.01)
    server = frame_rig.serve(handler)

    async def body():
        transport = GrpcTransport(frames=by_frames)
        try:
            asking = asyncio.ensure_future(outcome(transport, server.address, method, REPLIES[method][0]))
            await asyncio.to_thread(handler.answered)
            assert sum(server.open_calls().values()) > 0
            asking.cancel()
        finally:
            await transport.close()

    try:
        asyncio.run(body())
        end = time.monotonic() + SECONDS
        while sum(server.open_calls().values()) and time.monotonic() < end:
            time.sleep(0)
        assert sum(server.open_calls().values()) == 0
        assert server.counts.of(method).failures == {"Unavailable": 1}
    finally:
        server.stop(0)


def test_who_waits_for_an_answer_is_not_sent_away_for_a_newcomer(handler):
    """16 threads: 12 connections."""
    server = frame_rig.serve(handler, threads=16, stall_seconds=0.01)
    try:
        waiting = [frame_rig.let_in(server) for _ in range(12)]
        for each in waiting:
            each.send(frames.PUSH, PushRequest().SerializeToString())
        handler.answered(12)
        end = time.monotonic() + 0.05
        while time.monotonic() < end:
            with frame_rig.Raw(server) as newcomer:
                assert newcomer.ended()
        for pending in handler.asked:
            pending.resolve(PushReply(applied=1))
        for each in waiting:
            with each:
                assert PushReply.FromString(each.receiver.receive().message).applied == 1
    finally:
        server.stop(0)


@pytest.mark.parametrize("by_frames", [True, False])
def test_who_waits_holds_no_memory_for_what_it_was_sent(handler, by_frames):
    server = frame_rig.serve(handler)
    beside = []
    gradients = pack(np.ones(1 << 20, np.float32), beside)
    request = Bulk(PushRequest(dense=[{"gradients": gradients}]), beside)

    async def body():
        transport = GrpcTransport(frames=by_frames)
        try:
            asking = asyncio.ensure_future(outcome(transport, server.address, "Shard.Push", request))
            (pending,) = await asyncio.to_thread(handler.answered)
            end = time.monotonic() + SECONDS
            while server.memory.received.taken and time.monotonic() < end:
                await asyncio.sleep(0)
            assert server.memory.received.taken == 0
            pending.resolve(PushReply(applied=1))
            assert opened(await asking)[0].applied == 1
        finally:
            await transport.close()

    try:
        asyncio.run(body())
    finally:
        server.stop(0)


@pytest.mark.parametrize(("method", "by_frames"), WAYS)
def test_the_time_of_an_answer_includes_the_wait(handler, method, by_frames):
    server = frame_rig.serve(handler)

    async def body():
        transport = GrpcTransport(frames=by_frames)
        try:
            asking = asyncio.ensure_future(outcome(transport, server.address, method, REPLIES[method][0]))
            (pending,) = await asyncio.to_thread(handler.answered)
            assert server.counts.of(method).requests == 0
            threading.Timer(0.1, pending.resolve, [REPLIES[method][1]]).start()
            assert await asking == REPLIES[method][1]
        finally:
            await transport.close()

    try:
        asyncio.run(body())
        count = server.counts.of(method)
        assert (count.requests, count.failures) == (1, {})
        assert count.seconds > 0.09
    finally:
        server.stop(0)


def test_where_nobody_says_how_long_an_answer_is_waited_for_there_is_an_end(monkeypatch, handler):
    monkeypatch.setattr(work, "PENDING_SECONDS", 0.05)
    server = frame_rig.serve(handler)

    async def body(transport):
        return await outcome(transport, server.address, "Shard.Push", PushRequest())

    async def streamed():
        transport = GrpcTransport(frames=False)
        try:
            return await body(transport)
        finally:
            await transport.close()

    try:
        assert type(asyncio.run(streamed())) is DeadlineExceeded
    finally:
        server.stop(0)
