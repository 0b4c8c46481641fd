# SPDX-License-Identifier: Apache-2.0
"""A socket with TLS does what frames ask of one: nothing in the clear after an end was shut, pieces for who does not wait, and
nothing kept back that nobody is told of."""

import asyncio
import contextlib
import socket
import threading

import numpy as np
import pytest
from security_rig import opened, tls_fields

from oarlock.proto import frames
from oarlock.proto.common_pb2 import SocketsReply
from oarlock.proto.errors import Malformed
from oarlock.proto.rpc.connection import Connection
from oarlock.proto.rpc.tls_socket import wrapped

SECONDS = 30
WORD = b"nobody else is to read this"


@pytest.fixture
def fields(tmp_path):
    return tls_fields(tmp_path)


def pair(fields):
    """Return both ends of a connection: a server's and a client's."""
    security = opened(**fields)
    ends = [None, None]
    one, other = socket.socketpair()

    def shake(number, bare, context, name):
        ends[number] = wrapped(bare, context, name=name)
        ends[number].settimeout(SECONDS)
        ends[number].do_handshake()

    threads = [
        threading.Thread(target=shake, args=(0, one, security.frames_context(), None)),
        threading.Thread(target=shake, args=(1, other, security.calling_context(), "localhost")),
    ]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    return ends


def test_what_is_sent_after_an_end_was_shut_is_encrypted_still(fields):
    """As when a process ends: it hears nothing more, and sends what it was sending."""
    one, other = pair(fields)
    with one, other:
        one.shutdown(socket.SHUT_RD)
        frames.send(one, frames.encode(frames.REPLY, WORD))
        bare = socket.socket.recv(other, 1000, socket.MSG_PEEK)
        assert WORD not in bare
        assert frames.Receiver(other).receive().message == WORD


def test_who_does_not_wait_sends_and_receives_the_same_bytes_in_pieces(fields):
    one, other = pair(fields)
    for each in (one, other):
        each.setblocking(False)
        each.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 13)
    sent = np.random.default_rng(1).integers(0, 256, 700_001, np.uint8)
    pieces = [sent[:3], sent[3:20], sent[20:40_000], sent[40_000:40_001], sent[40_001:]]
    left, more, waited = frames.Sending([memoryview(each) for each in pieces]), True, 0
    came = np.zeros(len(sent) + 7, np.uint8)
    rooms, at = [memoryview(came)[i : i + 100_001] for i in range(0, len(came), 100_001)], 0
    with one, other:
        while at < len(sent):
            try:
                more = more and left.some(one)
            except BlockingIOError:
                waited += 1
            with contextlib.suppress(BlockingIOError):
                got = other.recvmsg_into(rooms)[0]
                at += got
                while rooms and got >= rooms[0].nbytes:
                    got -= rooms.pop(0).nbytes
                if rooms:
                    rooms[0] = rooms[0][got:]
        assert not more
        assert waited > 3
        assert np.array_equal(came[: len(sent)], sent)
        with pytest.raises(BlockingIOError):
            other.recv_into(bytearray(10))
        one.shutdown(socket.SHUT_RDWR)
        assert other.recvmsg_into([memoryview(bytearray(10))])[0] == 0


@pytest.mark.parametrize("parts", [0, 1], ids=["small", "with a part"])
def test_what_follows_an_answer_in_the_same_record_ends_the_connection(fields, parts):
    """It is in TLS' hands already, so nothing would tell of it; the next question would get it for an answer."""
    security = opened(**fields)
    answer = b"".join(bytes(b) for b in frames.encode(frames.REPLY, b"answer", [b"x" * 9000] * parts))
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def script():
            with wrapped(listening.accept()[0], security.frames_context()) as one:
                one.do_handshake()
                reader = frames.Receiver(one)
                reader.receive()
                frames.send(one, frames.encode(frames.REPLY, b""))
                reader.receive()
                one.sendall(answer + answer[:30])
                with contextlib.suppress(frames.Closed, OSError):
                    reader.receive()

        thread = threading.Thread(target=script)
        thread.start()
        port = listening.getsockname()[1]
        connection = Connection(security)
        offer = SocketsReply(addresses=[f":{port}"], token=b"x")

        async def body():
            assert await asyncio.to_thread(connection.open, offer, "127.0.0.1:1")
            with pytest.raises(Malformed):
                await connection.exchange(frames.encode(frames.PULL, b"question"))
            assert connection.ended

        asyncio.run(body())
        thread.join()
