# SPDX-License-Identifier: Apache-2.0
"""A blocking call ends in time, at whatever moment and however slowly the other side goes on."""

import contextlib
import socket
import threading
import time

import pytest
from scripted_rig import scripted
from security_rig import opened, tls_fields

from oarlock.proto import frames
from oarlock.proto.common_pb2 import SocketsReply
from oarlock.proto.errors import DeadlineExceeded, Unavailable
from oarlock.proto.methods import METHODS
from oarlock.proto.rpc.blocking import _Peer
from oarlock.proto.rpc.exchange import Exchange, opened_exchange
from oarlock.proto.rpc.tls_socket import wrapped
from oarlock.proto.security import Security
from oarlock.proto.serving_pb2 import LookupRequest

# How long the answer is waited for, and what is much longer than that on any machine.
SECONDS, FAR_TOO_LONG = 1.0, 6.0
ANSWER = b"".join(bytes(each) for each in frames.encode(frames.REPLY, b"answer", [b"x" * 1000]))


@contextlib.contextmanager
def dripping(connection, whole):
    """Send ``whole`` bytes of an answer at once, and then one now and then, always before the system would give up."""
    over = threading.Event()

    def drip():
        with contextlib.suppress(OSError):
            frames.Receiver(connection).receive()
            connection.sendall(ANSWER[:whole])
            for at in range(whole, len(ANSWER)):
                if over.wait(0.9 * SECONDS):
                    return
                connection.sendall(ANSWER[at : at + 1])

    thread = threading.Thread(target=drip)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@pytest.fixture(params=["clear", "tls"])
def ends(request, tmp_path):
    """Both ends of a connection: a server's and a client's."""
    made = list(socket.socketpair())
    if request.param == "tls":
        security = opened(**tls_fields(tmp_path))
        made[0] = wrapped(made[0], security.frames_context())
        made[1] = wrapped(made[1], security.calling_context(), name="localhost")
        thread = threading.Thread(target=made[0].do_handshake)
        thread.start()
        made[1].do_handshake()
        thread.join()
    yield made
    for each in made:
        each.close()


@pytest.mark.parametrize("whole", [0, 30], ids=["head", "body"])
def test_an_answer_that_comes_byte_by_byte_is_given_up_in_time(ends, whole):
    exchange = Exchange(ends[1])
    begun = time.monotonic()
    with dripping(ends[0], whole):
        exchange.start(frames.encode(frames.LOOKUP, b"question"), begun + SECONDS)
        with pytest.raises(TimeoutError):
            exchange.finish(begun + SECONDS)
        assert time.monotonic() - begun < FAR_TOO_LONG
        exchange.end()


def test_a_handshake_that_nobody_answers_is_given_up_in_time(tmp_path, monkeypatch):
    monkeypatch.setattr("oarlock.proto.rpc.sockets.HELLO_SECONDS", 2 * FAR_TOO_LONG)
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        offer = SocketsReply(addresses=[f"127.0.0.1:{deaf.getsockname()[1]}"], token=b"x")
        begun = time.monotonic()
        security = opened(**tls_fields(tmp_path))
        assert opened_exchange(offer, "localhost:1", begun + SECONDS, security) is None
        assert time.monotonic() - begun < FAR_TOO_LONG


def silent(connection, reader):
    connection.recv(1 << 20)
    connection.recv(1)


def test_who_waits_for_no_time_says_nothing_about_the_other_side():
    """It is asked by frames the next time."""
    with scripted(silent, hello=False) as server:
        peer = _Peer("127.0.0.1:1", Security())
        peer._asked = lambda roles, until: server.offer
        with pytest.raises(DeadlineExceeded, match=r"127\.0\.0\.1:1: no answer in time"):
            peer.begin_framed(METHODS["Serving.Lookup"], LookupRequest(), time.monotonic() + 0.02)
        assert peer._absent_until == 0
        peer.close()


def test_who_has_others_to_hear_waits_for_a_connection_no_longer_than_it_says(monkeypatch):
    """A process that hangs takes connections and greets nobody."""
    waits = []

    def opened_in_vain(offer, called, until, security):
        waits.append(until - time.monotonic())
        threading.Event().wait(max(0.0, until - time.monotonic()))

    monkeypatch.setattr("oarlock.proto.rpc.blocking.opened_exchange", opened_in_vain)
    peer = _Peer("127.0.0.1:1", Security())
    offer = peer._offer = SocketsReply(addresses=["127.0.0.1:1"], token=b"t" * 16)
    try:
        with pytest.raises(Unavailable, match=r"127\.0\.0\.1:1: no connection after 0\.05 s"):
            peer.begin_framed(METHODS["Serving.Lookup"], LookupRequest(), time.monotonic() + 60.0, 0.05)
        assert 0 < waits[0] <= 0.05
        # It counts as one that takes frames: it may be back at any moment.
        assert peer._absent_until == 0.0
        peer._offer = offer
        with pytest.raises(DeadlineExceeded):
            peer.begin_framed(METHODS["Serving.Lookup"], LookupRequest(), time.monotonic() + 0.05, 60.0)
    finally:
        peer.close()
