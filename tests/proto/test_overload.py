# SPDX-License-Identifier: Apache-2.0
"""A server with more requests than memory for them: each is answered or refused so that it may be sent again, whoever stalls
makes way, what nobody waits for is not done, and all that was taken comes back."""

import asyncio
import contextlib
import threading
import time

import numpy as np
import pytest
from frame_rig import SECONDS, Handler, Raw, call, offer_of, serve

from oarlock.proto import frames, work
from oarlock.proto.arrays import pack, unpack
from oarlock.proto.bulk import Bulk, opened
from oarlock.proto.common_pb2 import Header
from oarlock.proto.errors import DeadlineExceeded, Unavailable
from oarlock.proto.rpc import GrpcTransport
from oarlock.proto.rpc.status import from_failure
from oarlock.proto.shard_pb2 import PullReply, PullRequest

# Three frames of BODY fit into what is for frames; an answer of them into what is for answers.
LIMIT = 1 << 20
BODY = 30_000


@pytest.fixture
def server(handler, monkeypatch):
    monkeypatch.setattr(work, "WAIT_SECONDS", 0.02)
    made = serve(handler, threads=64, stall_seconds=0.02, request_memory_bytes=LIMIT)
    yield made
    handler.gate.set()
    made.stop(0)


def sent(values=BODY, **fields):
    """Return a pull of 120 KB, and its parts."""
    beside = []
    request = PullRequest(header=Header(run=5), dense=pack(np.arange(values, dtype=np.float32), beside), **fields)
    return request, beside


def ask(raw, *, milliseconds=0, **fields):
    request, parts = sent(**fields)
    buffers = frames.encode(frames.PULL | frames.BESIDE, request.SerializeToString(), parts)
    if milliseconds:
        buffers = frames.stamped(buffers, milliseconds / 1000)
    frames.send(raw.socket, buffers)


def answer(raw):
    """Return how many values came, or the error."""
    frame = raw.receiver.receive()
    reply = PullReply.FromString(frame.message)
    if reply.HasField("failure"):
        return from_failure(reply.failure)
    return len(unpack(reply.dense, np.float32, "dense", parts=frame.parts))


def nothing_taken(server):
    """Whether all comes back; a thread gives its claims back after the last byte has gone."""
    until(lambda: not any(server.memory.nbytes[name] for name in ("received", "answers")))
    return True


@contextlib.contextmanager
def full(server, handler):
    """All memory for frames is taken by requests that are worked on within the body."""
    handler.gate.clear()
    with contextlib.ExitStack() as stack:
        held = [stack.enter_context(Raw(server).in_()) for _ in range(3)]
        for one in held:
            ask(one)
        for _ in held:
            assert handler.entered.acquire(timeout=SECONDS)
        yield held
        handler.gate.set()
        assert [answer(one) for one in held] == [BODY] * 3


def test_a_frame_for_which_there_is_no_memory_is_refused_and_its_connection_serves_the_next_one(server, handler):
    with Raw(server).in_() as one:
        with full(server, handler):
            ask(one)
            refused = answer(one)
            assert isinstance(refused, Unavailable)
            assert "request_memory_bytes" in str(refused)
            assert not handler.entered.acquire(blocking=False)
            # None of it was kept, and a small one needs no memory.
            assert server.memory.received.taken <= LIMIT // 8 * 3
            one.send(frames.PUSH)
            assert one.receiver.receive().kind == frames.REPLY
        ask(one)
        assert answer(one) == BODY
    assert server.memory.refused == {"memory": 1, "late": 0}
    assert server.counts.of("Shard.Pull").failures == {"Unavailable": 1}
    assert nothing_taken(server)


def test_a_frame_waits_for_memory(server, handler, monkeypatch):
    monkeypatch.setattr(work, "WAIT_SECONDS", SECONDS)
    with Raw(server).in_() as one:
        with full(server, handler):
            ask(one)
            until(lambda: server.memory.received.waiting == 1)
        assert answer(one) == BODY
    assert server.memory.refused == {"memory": 0, "late": 0}


def until(there):
    end = time.monotonic() + SECONDS
    pause = threading.Event()
    while not there():
        assert time.monotonic() < end
        # The threads that it waits for need the interpreter.
        pause.wait(0.001)


def test_claims_without_bodies_make_way(server):
    """Three heads that announce all there is, and nothing after them."""
    request, parts = sent()
    head = frames.encode(frames.PULL | frames.BESIDE, request.SerializeToString(), parts)[0]
    with contextlib.ExitStack() as stack:
        silent = [stack.enter_context(Raw(server).in_()) for _ in range(3)]
        for one in silent:
            one.socket.sendall(head)
        until(lambda: server.memory.received.taken > LIMIT // 8 * 3 - BODY * 4)
        assert pulled(server) == BODY
        # Only as many as were in the way.
        assert sum(one.ended() for one in silent if has_ended(one)) >= 1
    assert nothing_taken(server)


def has_ended(raw):
    raw.socket.settimeout(0.0)
    try:
        return raw.socket.recv(1) == b""
    except BlockingIOError:
        return False
    except ConnectionError:
        return True


def pulled(server, **options):
    """Return what a good client gets, which comes again when it is refused."""

    async def body(transport):
        while True:
            try:
                request, beside = sent(**options)
                reply = await transport.call(
                    server.address, "Shard.Pull", Bulk(request, beside), timeout_seconds=SECONDS
                )
                return len(unpack(reply.message.dense, np.float32, "dense", parts=reply.parts))
            except Unavailable:
                continue

    return call(server, body)


def test_answers_that_nobody_reads_make_way():
    """A handler that says what its answers need; three of them are all there is for answers."""
    values = 1 << 20

    class Large:
        def pull(self, sent):
            work.expects(4 * values)
            return Bulk(PullReply(dense=pack(np.zeros(values, np.float32), beside := [])), beside)

    server = serve(Large(), threads=64, stall_seconds=0.02, request_memory_bytes=8 * 4 * values)
    try:
        with contextlib.ExitStack() as stack:
            for _ in range(3):
                ask(stack.enter_context(Raw(server).in_()), values=10)
            until(lambda: server.memory.answers.taken == 3 * 4 * values)
            assert pulled(server, values=10) == values
        assert nothing_taken(server)
    finally:
        server.stop(0)


def test_an_answer_for_which_there_is_no_memory_is_refused(server, handler, monkeypatch):
    monkeypatch.setattr(Handler, "pull", lambda self, sent: work.expects(LIMIT // 4))
    claim = server.memory.answers.take(LIMIT)
    with Raw(server).in_() as one:
        ask(one)
        assert isinstance(answer(one), Unavailable)
    server.memory.answers.give(claim)
    assert nothing_taken(server)


def test_what_its_caller_no_longer_waits_for_is_not_done(server, handler, monkeypatch):
    monkeypatch.setattr(work, "WAIT_SECONDS", SECONDS)
    with Raw(server).in_() as one:
        with full(server, handler):
            ask(one, milliseconds=20)
            # It waited for its own time, not for that of one who says nothing.
            assert isinstance(answer(one), DeadlineExceeded | Unavailable)
            assert not handler.entered.acquire(blocking=False)
        ask(one, milliseconds=60_000)
        assert answer(one) == BODY


def test_a_request_that_was_long_on_its_way_is_not_done(server, handler):
    request, parts = sent()
    head, *rest = frames.stamped(frames.encode(frames.PULL | frames.BESIDE, request.SerializeToString(), parts), 0.001)
    with Raw(server).in_() as one:
        one.socket.sendall(head)
        # Its time begins with its head.
        until(lambda: server.memory.received.taken)
        begun = time.monotonic()
        until(lambda: time.monotonic() > begun + 0.002)
        frames.send(one.socket, rest)
        assert isinstance(answer(one), DeadlineExceeded)
    assert not handler.entered.acquire(blocking=False)
    assert server.memory.refused["late"] == 1


def test_a_client_says_how_long_it_waits(server, monkeypatch):
    """What is left of it when the frame leaves."""
    said = []
    inner = frames.read_head

    def read_head(head, most=None):
        found = inner(head, most)
        said.append(found.seconds)
        return found

    monkeypatch.setattr(frames, "read_head", read_head)
    request, beside = sent()

    async def body(transport):
        await transport.call(server.address, "Shard.Pull", Bulk(request, beside), timeout_seconds=7.5)

    call(server, body)
    (seconds,) = (s for s in said if s is not None)
    assert 0 < seconds <= 7.5


@pytest.mark.parametrize("method", ["stream", "single"])
def test_a_message_of_grpc_for_which_there_is_no_memory_is_refused(server, handler, monkeypatch, method):
    if method == "single":
        # Any other method travels so.
        monkeypatch.setattr("oarlock.proto.methods.Method.streamed", False)
    request, _ = sent()
    request.dense.data = bytes(BODY * 4)
    request.dense.part = 0
    # Not from within the loop.
    offer_of(server)

    async def body():
        transport = GrpcTransport(frames=False)
        try:
            with full(server, handler), pytest.raises(Unavailable, match="request_memory_bytes"):
                await transport.call(server.address, "Shard.Pull", request, timeout_seconds=SECONDS)
            reply = await transport.call(server.address, "Shard.Pull", request, timeout_seconds=SECONDS)
            return len(unpack(reply.dense, np.float32, "dense"))
        finally:
            await transport.close()

    assert asyncio.run(body()) == BODY
    assert nothing_taken(server)


def test_the_greedy_have_one_turn_each_and_the_others_too(monkeypatch):
    """Twelve connections that ask again at once, and one that asks for itself: nobody is refused, and it comes to its turns."""
    monkeypatch.setattr(work, "WAIT_SECONDS", SECONDS)
    # Nobody stalls here, however slow this machine is.
    server = serve(Handler(), threads=64, stall_seconds=SECONDS, request_memory_bytes=LIMIT)
    stop = threading.Event()
    counts = [0] * 12

    def greedy(number):
        with Raw(server).in_() as one:
            while not stop.is_set():
                ask(one)
                assert answer(one) == BODY
                counts[number] += 1

    threads = [threading.Thread(target=greedy, args=(n,)) for n in range(len(counts))]
    for thread in threads:
        thread.start()
    try:
        with Raw(server).in_() as one:
            for _ in range(20):
                ask(one)
                assert answer(one) == BODY
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    try:
        assert all(counts)
        assert server.memory.refused == {"memory": 0, "late": 0}
        assert nothing_taken(server)
    finally:
        server.stop(0)


def test_stopping_waits_for_nobody_who_waits_for_memory(server, handler, monkeypatch):
    monkeypatch.setattr(work, "WAIT_SECONDS", 1e6)
    with Raw(server).in_() as one, full(server, handler):
        ask(one)
        until(lambda: server.memory.received.waiting == 1)
        server.memory.close()
        assert isinstance(answer(one), Unavailable)


def test_a_slow_process_keeps_no_calls_from_others(handler):
    """More calls than there are connections to the slow one, all pending; those to the other come to their end."""
    slow, fast = serve(handler), serve(Handler())
    handler.gate.clear()
    request, beside = sent()

    async def pull(transport, server):
        reply, _ = opened(
            await transport.call(server.address, "Shard.Pull", Bulk(request, beside), timeout_seconds=SECONDS)
        )
        return reply.dense.shape[0]

    async def body():
        transport = GrpcTransport()
        try:
            pending = [asyncio.create_task(pull(transport, slow)) for _ in range(20)]
            while not handler.entered.acquire(blocking=False):
                await asyncio.sleep(0)
            found = await asyncio.gather(*(pull(transport, fast) for _ in range(20)))
            assert not any(task.done() for task in pending)
            handler.gate.set()
            return found + await asyncio.gather(*pending)
        finally:
            handler.gate.set()
            await transport.close()

    try:
        assert asyncio.run(body()) == [BODY] * 40
    finally:
        slow.stop(0)
        fast.stop(0)
