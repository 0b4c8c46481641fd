# SPDX-License-Identifier: Apache-2.0
"""Connections for frames and their threads: who has to go when somebody else comes, and that nothing is left at the end."""

import errno
import socket
import threading

import numpy as np
import pytest
from frame_rig import SECONDS, Raw, answers, call, let_in, offer_of, serve

from oarlock.proto import frames
from oarlock.proto.arrays import pack
from oarlock.proto.bulk import Bulk
from oarlock.proto.common_pb2 import Header
from oarlock.proto.rpc import frame_server
from oarlock.proto.rpc.sockets import ABSTRACT, connect
from oarlock.proto.shard_pb2 import PullReply, PullRequest, PushRequest


def test_who_stalls_makes_room_and_who_works_does_not(handler):
    """Twelve places."""
    server = serve(handler, threads=16, stall_seconds=0.05)
    try:
        idle = [Raw(server).in_() for _ in range(12)]
        busy = idle.pop()
        handler.gate.clear()
        busy.pull(9)
        assert handler.entered.acquire(timeout=SECONDS)
        half = idle.pop()
        half.socket.sendall(b"OARF")
        # A newcomer is let in as soon as one of them has stalled for long enough.
        for _ in range(11):
            idle.append(let_in(server))
        handler.gate.set()
        assert PullReply.FromString(busy.receiver.receive().message).pushes == 9
        for one in (*idle, half, busy):
            one.socket.close()
        assert answers(server)
    finally:
        server.stop(0)


def test_more_connections_than_places_travel_by_grpc(handler):
    """All twelve hold their places: a client that finds none is served by streams, which have places of their own."""
    server = serve(handler, threads=16, stall_seconds=3600)
    try:
        held = [Raw(server).in_() for _ in range(12)]
        with Raw(server) as refused:
            assert refused.ended()

        async def body(transport):
            reply = await transport.call(
                server.address, "Shard.Pull", PullRequest(header=Header(run=3)), timeout_seconds=SECONDS
            )
            return reply.pushes, server.open_calls()["stream"]

        assert call(server, body) == (3, 1)
        for one in held:
            one.socket.close()
    finally:
        server.stop(0)


def test_replies_that_nobody_reads_keep_nobody_out(handler):
    server = serve(handler, threads=16, stall_seconds=0.05)
    large = pack(np.zeros(5 << 18, np.float32))
    held = []
    try:
        for _ in range(12):
            one = let_in(server)
            one.pull(dense=large)
            assert handler.entered.acquire(timeout=SECONDS)
            held.append(one)
        assert answers(server)
    finally:
        for one in held:
            one.socket.close()
        server.stop(0)


def test_stop_with_calls_in_flight_ends_everything(server, handler):
    """One is idle, one in the midst of a frame, one does not read, one is being answered: its answer comes within the grace."""
    before = set(threading.enumerate())
    idle, half, deaf, working = (Raw(server, kind=k).in_() for k in (ABSTRACT, "tcp", ABSTRACT, "tcp"))
    half.socket.sendall(b"OARF\1")
    deaf.pull(dense=pack(np.zeros(3 << 20, np.float32)))
    assert handler.entered.acquire(timeout=SECONDS)
    handler.gate.clear()
    working.pull(4)
    assert handler.entered.acquire(timeout=SECONDS)
    stopping = threading.Thread(target=server.stop, args=(0.5,))
    stopping.start()
    # Told to hear nothing more.
    assert idle.ended()
    assert half.ended()
    handler.gate.set()
    assert PullReply.FromString(working.receiver.receive().message).pushes == 4
    stopping.join()
    assert working.ended()
    frames_left = [t for t in set(threading.enumerate()) - before if t.name == "oarlock-frames" and t.is_alive()]
    assert not frames_left
    for one in (idle, half, deaf, working):
        one.socket.close()
    server.stop(0)


def test_stop_waits_for_what_is_being_answered(server, handler):
    """Its tables may be closed after that."""
    handler.gate.clear()
    with Raw(server).in_() as one:
        one.pull(4)
        assert handler.entered.acquire(timeout=SECONDS)
        stopping = threading.Thread(target=server._frames.stop)
        stopping.start()
        assert one.ended()
        assert stopping.is_alive()
        handler.gate.set()
        stopping.join()
        assert not [t for t in threading.enumerate() if t.name == "oarlock-frames"]


def test_nothing_is_left_of_a_server(handler):
    """That no file stays open is looked at after every test."""
    before = set(threading.enumerate())
    server = serve(handler)
    held = [Raw(server, kind=k).in_() for k in (ABSTRACT, "tcp")]
    name = offer_of(server).addresses[0].removeprefix(ABSTRACT)
    server.stop(0)
    for one in held:
        assert one.ended()
        one.socket.close()
    assert not [t for t in threading.enumerate() if t not in before and t.name == "oarlock-frames"]
    with socket.socket(socket.AF_UNIX) as late, pytest.raises(ConnectionRefusedError):
        late.connect("\0" + name)


def test_a_door_that_fails_is_tried_again_after_a_rest(server, monkeypatch):
    """Without files nobody is let in, and the newcomer stays at the door: the processor must have something else to do."""
    calls = []
    monkeypatch.setattr(frame_server, "REST_SECONDS", 0.02)

    class Failing:
        def __init__(self, listening):
            self._listening = listening

        def fileno(self):
            return self._listening.fileno()

        def close(self):
            self._listening.close()

        def accept(self):
            calls.append(1)
            if len(calls) <= 5:
                raise OSError(errno.EMFILE, "too many open files")
            return self._listening.accept()

    inner = server._frames
    # The thread begins anew, with doors that fail.
    inner.stop()
    failing = frame_server.FrameServer(inner._methods, inner._answer, host="", connections=4)
    rests = []

    class Selector(frame_server.selectors.DefaultSelector):
        def select(self, timeout=None):
            if timeout is not None:
                rests.append(timeout)
            return super().select(timeout)

    monkeypatch.setattr(frame_server.selectors, "DefaultSelector", Selector)
    listen = failing._listen

    def listen_and_wrap(*arguments):
        listen(*arguments)
        failing._listening[:] = [each if isinstance(each, Failing) else Failing(each) for each in failing._listening]

    monkeypatch.setattr(failing, "_listen", listen_and_wrap)
    failing.start()
    try:
        with connect(failing.addresses[0], "127.0.0.1:1") as one:
            one.settimeout(SECONDS)
            frames.send(one, frames.encode(frames.HELLO, failing.token))
            assert frames.Receiver(one).receive().kind == frames.REPLY
        assert rests == [0.02] * 5
    finally:
        failing.stop()


def test_a_thread_that_cannot_begin_lets_go_of_its_place(server, monkeypatch):
    started = threading.Thread.start

    def start(thread):
        if thread.name == "oarlock-frames":
            raise RuntimeError("can't start new thread")
        started(thread)

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", start)
        with Raw(server) as one:
            assert one.ended()
    assert server.open_calls()["frames"] == 0
    assert answers(server)


def test_a_server_without_frames_offers_none(handler):
    server = serve(handler, frames=False)
    try:
        assert not offer_of(server).addresses

        async def body(transport):
            sent = Bulk(PushRequest(group=3), [])
            return (await transport.call(server.address, "Shard.Push", sent, timeout_seconds=SECONDS)).message.applied

        assert call(server, body) == 3
    finally:
        server.stop(0)
