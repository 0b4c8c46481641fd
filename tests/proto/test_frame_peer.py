# SPDX-License-Identifier: Apache-2.0
"""A client's connections to servers made by hand, which break off, are deaf, or answer what is no answer."""

import asyncio
import contextlib
import gc
import os
import socket
import threading

import numpy as np
import pytest
from client_rig import SECONDS, failure, until
from scripted_rig import scripted

from oarlock.proto import frames
from oarlock.proto.common_pb2 import SocketsReply
from oarlock.proto.errors import DeadlineExceeded, Malformed, Unavailable
from oarlock.proto.rpc import sockets
from oarlock.proto.rpc.connection import Connection
from oarlock.proto.rpc.frame_client import CONNECTIONS
from oarlock.proto.rpc.sockets import ABSTRACT, Shared

ASKED = [memoryview(b)[:] for b in frames.encode(frames.PULL, b"question")]


def raw(data):
    def script(connection, reader):
        reader.receive()
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        reader.receive()

    return script


WHOLE = b"".join(bytes(b) for b in frames.encode(frames.REPLY, b"answer", [b"x" * 1000]))


@pytest.mark.parametrize("cut", [0, 1, 19, 20, 25, len(WHOLE) - 1])
def test_a_connection_that_dies_in_the_middle_is_unavailable(cut):
    async def body():
        peer = server.peer()
        try:
            for _ in range(3):
                error = await failure(peer.call(ASKED, "m", SECONDS))
                assert type(error) is Unavailable
                assert "the connection to scripted:1 broke" in error.message
        finally:
            await peer.close()

    with scripted(raw(WHOLE[:cut])) as server:
        asyncio.run(body())
        assert len(server.connections) == 3


@pytest.mark.parametrize(
    ("reply", "says"),
    [
        (b"HTTP/1.1 200 OK\r\n\r\n" + bytes(20), "no frame of version 1"),
        (b"".join(bytes(b) for b in frames.encode(frames.PULL, b"x")), "a frame of kind 2 came as an answer"),
        (b"".join(bytes(b) for b in frames.encode(frames.HELLO, b"x")), "a frame of kind 0 came as an answer"),
    ],
)
def test_an_answer_that_is_none_ends_its_connection(reply, says):
    async def body():
        peer = server.peer()
        try:
            for _ in range(2):
                error = await failure(peer.call(ASKED, "m", SECONDS))
                assert type(error) is Malformed
                assert says in error.message
        finally:
            await peer.close()

    with scripted(raw(reply)) as server:
        asyncio.run(body())
        assert len(server.connections) == 2


def answer_all(connection, reader):
    while True:
        frame = reader.receive()
        frames.send(connection, frames.encode(frames.REPLY, frame.message))


gone = threading.Event()


def deaf(connection, reader):
    """Read nothing after the hello."""
    gone.wait(SECONDS)


def test_a_request_that_nobody_reads_is_given_up():
    """Larger than what the system takes: its sender waits for room, on the event loop, until its time is over."""

    async def body():
        peer = server.peer()
        try:
            large = frames.encode(frames.PULL, b"", [np.zeros(16 << 20, np.uint8)])
            for _ in range(2):
                error = await failure(peer.call(large, "m", 0.1))
                assert type(error) is DeadlineExceeded
            calls = [asyncio.ensure_future(failure(peer.call(large, "m", SECONDS))) for _ in range(CONNECTIONS)]
            await until(lambda: len(server.connections) == 2 + CONNECTIONS)
        finally:
            await peer.close()
        assert {type(e) for e in await asyncio.gather(*calls)} == {Unavailable}

    gone.clear()
    with scripted(deaf) as server:
        asyncio.run(body())
        gone.set()


def test_an_answer_in_many_pieces():
    """A byte at a time for its beginning, and what is large as the system hands it out."""
    part = np.arange(3 << 20, dtype=np.uint8)

    def script(connection, reader):
        while True:
            frame = reader.receive()
            data = b"".join(bytes(b) for b in frames.encode(frames.REPLY, frame.message, [part]))
            for at in range(100):
                connection.sendall(data[at : at + 1])
            connection.sendall(data[100:])

    async def body():
        peer = server.peer()
        try:
            for n in range(3):
                frame = await peer.call(frames.encode(frames.PULL, b"%d" % n), "m", SECONDS)
                assert frame.message == b"%d" % n
                assert np.array_equal(np.frombuffer(frame.parts[0], np.uint8), part)
        finally:
            await peer.close()

    with scripted(script) as server:
        asyncio.run(body())


def test_a_server_with_room_for_one_more_is_called_on_that_one(monkeypatch):
    """The others' places are set aside; calls wait for the one connection and none fails. Later, there may be room."""
    room = threading.Semaphore(1)

    def script(connection, reader):
        if not room.acquire(blocking=False):
            return
        reader.receive()
        frames.send(connection, frames.encode(frames.REPLY, b""))
        answer_all(connection, reader)

    async def body():
        peer = server.peer()
        try:
            for _ in range(2):
                answers = await asyncio.gather(
                    *(peer.call(frames.encode(frames.PULL, b"%d" % n), "m", SECONDS) for n in range(20))
                )
                assert [a.message for a in answers] == [b"%d" % n for n in range(20)]
            assert len(server.connections) == 1 + (CONNECTIONS - 1)
            for _ in range(8):
                room.release()
            monkeypatch.setattr(peer, "_aside_until", 0.0)
            await asyncio.gather(*(peer.call(ASKED, "m", SECONDS) for _ in range(20)))
            assert len(server.connections) > CONNECTIONS
        finally:
            await peer.close()

    with scripted(script, hello=False) as server:
        asyncio.run(body())


def silent(connection, reader):
    connection.recv(1 << 20)
    connection.recv(1)


def test_a_process_that_does_not_say_hello_counts_as_absent(monkeypatch):
    """As one that was stopped: the system still takes its connections."""
    monkeypatch.setattr(sockets, "HELLO_SECONDS", 0.05)

    async def body():
        peer = server.peer()
        try:
            assert await peer.call(ASKED, "m", SECONDS) is None
            assert peer.absent
        finally:
            await peer.close()

    with scripted(silent, hello=False) as server:
        asyncio.run(body())


@pytest.mark.parametrize("hello", [False, True])
def test_close_ends_calls_that_wait_for_the_other_side(hello):
    """In the midst of a hello, or of an exchange; callers in the queue too. No thread and no file is left."""

    async def body():
        peer = server.peer()
        calls = [asyncio.ensure_future(failure(peer.call(ASKED, "m", SECONDS))) for _ in range(3 * CONNECTIONS)]
        await until(lambda: len(server.connections) >= (CONNECTIONS if hello else 1))
        await asyncio.wait_for(peer.close(), SECONDS)
        errors = await asyncio.gather(*calls)
        assert {type(e) for e in errors} == {Unavailable}
        await peer.close()
        assert type(await failure(peer.call(ASKED, "m", SECONDS))) is Unavailable

    with scripted(silent, hello=hello) as server:
        # The one that listens is among them.
        files = len(os.listdir("/proc/self/fd"))
        asyncio.run(body())
        assert not [t for t in threading.enumerate() if t.name.startswith("oarlock-exchange")]
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) < files


def test_an_abstract_socket_whose_queue_is_full_is_given_up(monkeypatch):
    """Connecting to it would wait without end."""
    monkeypatch.setattr(sockets, "CONNECT_SECONDS", 0.05)
    with socket.socket(socket.AF_UNIX) as listening, contextlib.ExitStack() as stack:
        listening.bind("")
        listening.listen(0)
        name = listening.getsockname()[1:].decode()
        for _ in range(2):
            filler = stack.enter_context(socket.socket(socket.AF_UNIX))
            filler.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                filler.connect("\0" + name)
        assert Connection().open(SocketsReply(addresses=[ABSTRACT + name], token=b"x"), "h:1") is False


def test_a_socket_is_closed_by_who_uses_it():
    """Its number must not be given to another one while a thread is in a call with it."""
    ours, theirs = socket.socketpair()
    shared = Shared(ours)
    with theirs, shared.used() as used:
        shared.end()
        assert used.fileno() >= 0
        assert used.recv(1) == b""
        shared.hush()
        assert theirs.recv(1) == b""
    assert ours.fileno() == -1
    with pytest.raises(ConnectionAbortedError), shared.used():
        pass
    shared.end()


def test_a_hushed_socket_still_sends():
    ours, theirs = socket.socketpair()
    shared = Shared(ours)
    with theirs:
        shared.hush()
        with shared.used() as used:
            assert used.recv(1) == b""
            used.sendall(b"x")
        assert theirs.recv(1) == b"x"
        shared.end()
    assert ours.fileno() == -1
