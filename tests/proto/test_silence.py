# SPDX-License-Identifier: Apache-2.0
"""A link that is cut says nothing: how soon that is noticed, and that asking whether somebody is there annoys no server.

What real links do is tested over network namespaces (tests/chaos/test_networks.py).
"""

import asyncio
import contextlib
import socket
import struct
import threading
import time

import pytest
from client_rig import SECONDS, entered, failure, pull, run

from oarlock.proto.errors import Unavailable
from oarlock.proto.rpc import options, sockets

# In place of 10 s and 5 s.
SOON = {"grpc.keepalive_time_ms": 200, "grpc.keepalive_timeout_ms": 500, "grpc.http2.ping_timeout_ms": 500}


@pytest.fixture
def hasty(monkeypatch):
    changed = [(name, SOON.get(name, value)) for name, value in options.CLIENT_OPTIONS]
    assert changed != options.CLIENT_OPTIONS
    monkeypatch.setattr("oarlock.proto.rpc.credentials.CLIENT_OPTIONS", changed)


class Forwarder:
    """Hands on what goes to ``address`` and back, until it is ``stopped``; then it is silent, and ends no connection."""

    def __init__(self, address):
        host, _, port = address.rpartition(":")
        self._to = host, int(port)
        self._listening = socket.create_server(("127.0.0.1", 0))
        self._open = [self._listening]
        self.address = f"127.0.0.1:{self._listening.getsockname()[1]}"
        self.stopped = threading.Event()
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def _accept(self):
        while True:
            try:
                one = self._listening.accept()[0]
            except OSError:
                return
            other = socket.create_connection(self._to)
            self._open += [one, other]
            for pair in ((one, other), (other, one)):
                self._threads.append(threading.Thread(target=self._hand_on, args=pair))
                self._threads[-1].start()

    def _hand_on(self, one, other):
        with contextlib.suppress(OSError):
            while data := one.recv(1 << 16):
                if not self.stopped.is_set():
                    other.sendall(data)

    def close(self):
        for each in self._open:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()
        for thread in self._threads:
            thread.join()


def test_a_call_over_a_connection_that_is_silent_fails_before_its_time_is_over(server, handler, hasty):
    handler.hold(7)
    between = Forwarder(server.address)

    async def body(transport):
        assert await pull(transport, between.address, 1) == 1
        waiting = asyncio.ensure_future(pull(transport, between.address, 7, seconds=600))
        await entered(handler)
        between.stopped.set()
        # A connection of which a minute long nobody notices that it is of no use is what gRPC has by default.
        async with asyncio.timeout(SECONDS / 2):
            assert type(await failure(waiting)) is Unavailable

    try:
        run(body, frames=False)
    finally:
        handler.gate.set()
        between.close()


def test_a_server_is_asked_often_whether_it_is_there_and_does_not_mind(server, handler, hasty):
    handler.hold(7)

    async def body(transport):
        assert await pull(transport, server.address, 1) == 1
        waiting = asyncio.ensure_future(pull(transport, server.address, 7, seconds=600))
        await entered(handler)
        # By default gRPC takes two questions for an attack.
        await asyncio.wait([waiting], timeout=10 * SOON["grpc.keepalive_time_ms"] / 1000)
        handler.gate.set()
        assert await waiting == 7

    run(body, frames=False)


def info(retransmits, probes, milliseconds):
    found = bytearray(232)
    found[2], found[3] = retransmits, probes
    struct.pack_into("=I", found, 56, milliseconds)
    return bytes(found)


class Told:
    """A connection of which the system says this."""

    family = socket.AF_INET

    def __init__(self, said):
        self._said = said

    def getsockopt(self, level, option, size):
        assert (level, option) == (socket.IPPROTO_TCP, socket.TCP_INFO)
        return self._said[:size]


LONG = options.SILENT_SECONDS * 1000


@pytest.mark.parametrize(
    ("said", "silent"),
    [
        (info(4, 0, LONG), True),
        (info(0, 2, LONG), True),
        (info(4, 0, LONG - 1), False),
        # Nothing was asked: who has nothing to say is not silent.
        (info(0, 0, 100 * LONG), False),
        # A window that was shut for long is asked about now and then.
        (info(0, 1, 100 * LONG), False),
        # Of another system.
        (b"\x09" * 40, False),
    ],
)
def test_silence_is_what_is_asked_and_not_confirmed(said, silent):
    assert sockets.silent(Told(said)) is silent


def test_what_the_system_says_of_a_connection_stands_where_it_is_looked_for():
    with socket.create_server(("127.0.0.1", 0)) as listening, socket.socket() as one:
        one.connect(listening.getsockname())
        other = listening.accept()[0]
        with other:
            one.sendall(b"x")
            assert other.recv(1) == b"x"
            begun = time.monotonic()
            while time.monotonic() - begun < 0.3:
                threading.Event().wait(0.05)
            said = one.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 60)
            quiet = struct.unpack_from("=I", said, 56)[0]
            assert (said[2], said[3]) == (0, 0)
            assert 200 <= quiet < 60_000, "milliseconds since the last confirmation"
            assert not sockets.silent(one)
