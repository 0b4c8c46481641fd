# SPDX-License-Identifier: Apache-2.0
"""Frames over TLS: nothing of them is on the wire in the clear, who is not whom it should be is not talked to, and who keeps a
handshake waiting keeps nobody else."""

import asyncio
import contextlib
import select
import socket
import ssl
import threading

import numpy as np
import pytest
from client_rig import by_frames, entered, failure, pull, until
from frame_rig import Handler
from security_rig import Authority, from_elsewhere, opened, serve, tls_fields, write_tokens

from oarlock.proto import frames
from oarlock.proto.arrays import pack, unpack
from oarlock.proto.bulk import Bulk
from oarlock.proto.common_pb2 import Header
from oarlock.proto.errors import DeadlineExceeded, Unavailable
from oarlock.proto.rpc import BlockingTransport, GrpcTransport, sockets
from oarlock.proto.rpc.tls_socket import RECORD_BYTES, TlsSocket
from oarlock.proto.shard_pb2 import PullRequest

SECONDS = 30
CONNECT = sockets.connect
# What is looked for on the wire.
WORD = b"nobody else is to read this"


class Relay:
    """Hands on what goes to ``port`` of this machine and back, and keeps it; ``spoil``: of each piece from the server."""

    def __init__(self, port, spoil=lambda data: data):
        self._to = ("127.0.0.1", port)
        self._spoil = spoil
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = self._listening.getsockname()[1]
        self.seen = bytearray()
        self._open = [self._listening]
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                one = self._listening.accept()[0]
                other = socket.create_connection(self._to)
                self._open += [one, other]
                for pair in ((one, other, lambda data: data), (other, one, self._spoil)):
                    self._threads.append(threading.Thread(target=self._hand_on, args=pair))
                    self._threads[-1].start()

    def _hand_on(self, one, other, change):
        with contextlib.suppress(OSError):
            while data := one.recv(1 << 16):
                self.seen += data
                other.sendall(change(data))
        with contextlib.suppress(OSError):
            other.shutdown(socket.SHUT_WR)

    def close(self):
        for each in self._open:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()
        for thread in self._threads:
            thread.join()


@pytest.fixture
def fields(tmp_path):
    return {**tls_fields(tmp_path), "token_file": write_tokens(tmp_path / "t")}


@pytest.fixture
def handler():
    made = Handler()
    yield made
    made.gate.set()


@pytest.fixture
def server(handler, fields):
    made = serve(handler, **fields)
    yield made
    handler.gate.set()
    made.stop(0)


@pytest.fixture
def far(monkeypatch):
    return from_elsewhere(monkeypatch)


def port_of(server):
    return next(int(a[1:]) for a in server._frames.addresses if a.startswith(":"))


def secured_call(fields, body):
    async def inside():
        transport = GrpcTransport(security=opened(own=True, **fields))
        try:
            return await body(transport)
        finally:
            await transport.close()

    return asyncio.run(inside())


def test_large_and_small_ones_go_over_tls_and_come_back(server, fields, far):
    """Three million floats are more than any socket holds: both sides wait for each other in between. Two thousand are one
    record of TLS that is taken in in pieces."""

    async def body(transport):
        for values in (3, 1000, 2000, RECORD_BYTES // 4, 3_000_000):
            await asyncio.gather(*(pull(transport, server.address, run, values=values) for run in range(1, 4)))
        return by_frames(server)

    connections, streams = secured_call(fields, body)
    assert 1 <= connections <= 4
    assert streams == 0
    assert far
    assert all(isinstance(each, TlsSocket) for each in far)


def test_threads_that_wait_go_over_tls_too(server, fields, far):
    transport = BlockingTransport(security=opened(own=True, **fields))
    try:
        for run, values in enumerate((3, 1000, 3_000_000), start=1):
            beside = []
            sent = np.full(values, run, np.float32)
            request = Bulk(PullRequest(header=Header(run=run), dense=pack(sent, beside)), beside)
            reply = transport.call(server.address, "Shard.Pull", request, timeout_seconds=SECONDS)
            found = unpack(reply.message.dense, np.float32, "dense", parts=reply.parts)
            assert np.array_equal(found, sent * 2)
        assert [type(each) for each in far] == [TlsSocket]
    finally:
        transport.close()


@pytest.mark.parametrize("blocking", [True, False])
def test_who_waits_too_long_is_told_so_and_the_next_call_is_answered(server, handler, fields, far, blocking):
    handler.hold(1)
    if blocking:
        transport = BlockingTransport(security=opened(own=True, **fields))
        late, good = (
            Bulk(PullRequest(header=Header(run=run), dense=pack(np.ones(3, np.float32))), ()) for run in (1, 2)
        )
        try:
            with pytest.raises(DeadlineExceeded):
                transport.call(server.address, "Shard.Pull", late, timeout_seconds=0.2)
            assert transport.call(server.address, "Shard.Pull", good, timeout_seconds=SECONDS).message.pushes == 2
        finally:
            transport.close()
    else:

        async def body(transport):
            waiting = asyncio.ensure_future(failure(pull(transport, server.address, 1, seconds=1.0)))
            await entered(handler)
            assert isinstance(await waiting, DeadlineExceeded)
            return await pull(transport, server.address, 2)

        assert secured_call(fields, body) == 2
    assert len(far) == 2


def test_a_call_that_was_begun_can_be_waited_for_beside_others(server, handler, fields, far):
    """What TLS itself has to say on a new connection is no answer: who waits for several would stay with the slow one."""
    handler.hold(1)
    transport = BlockingTransport(security=opened(own=True, **fields))
    try:
        request = Bulk(PullRequest(header=Header(run=1), dense=pack(np.ones(3, np.float32))), ())
        begun = transport.begin(server.address, "Shard.Pull", request, timeout_seconds=SECONDS)
        poll = select.poll()
        poll.register(begun.fileno(), select.POLLIN)
        assert poll.poll(200) == []
        handler.gate.set()
        assert poll.poll(1000 * SECONDS)
        assert begun.take().message.pushes == 1
        assert [type(each) for each in far] == [TlsSocket]
    finally:
        transport.close()


def test_nothing_is_on_the_wire_in_the_clear(server, fields, monkeypatch):
    relay = Relay(port_of(server))

    def through(address, called, security):
        if address.startswith(sockets.ABSTRACT):
            raise ConnectionRefusedError
        return CONNECT(f":{relay.port}", called, security)

    async def body(transport):
        dense = pack(np.frombuffer(WORD + b"!", np.float32))
        await transport.call(server.address, "Shard.Pull", PullRequest(dense=dense), timeout_seconds=SECONDS)

    try:
        monkeypatch.setattr(sockets, "connect", through)
        secured_call(fields, body)
    finally:
        relay.close()
    assert len(relay.seen) > 1000
    for secret in (WORD, b"OARF", server._frames.token):
        assert secret not in relay.seen


def test_a_byte_that_is_changed_on_the_way_ends_the_connection_and_nothing_of_it_is_believed(
    server, handler, fields, monkeypatch
):
    changing = threading.Event()

    def spoil(data):
        return data[:-1] + bytes([data[-1] ^ 1]) if changing.is_set() else data

    relay = Relay(port_of(server), spoil)

    def through(address, called, security):
        if address.startswith(sockets.ABSTRACT):
            raise ConnectionRefusedError
        return CONNECT(f":{relay.port}", called, security)

    async def body(transport):
        await pull(transport, server.address, 1, values=1000)
        changing.set()
        error = await failure(pull(transport, server.address, 2, values=1000))
        changing.clear()
        assert type(error) is Unavailable
        return await pull(transport, server.address, 3, values=1000)

    try:
        monkeypatch.setattr(sockets, "connect", through)
        assert secured_call(fields, body) == 3
    finally:
        relay.close()


def test_a_name_or_an_authority_that_is_not_ours_is_not_talked_to(tmp_path, fields, server):
    address = f":{port_of(server)}"
    (tmp_path / "o").mkdir()
    with pytest.raises(ssl.SSLCertVerificationError):
        CONNECT(address, server.address, opened(tls_ca=Authority(tmp_path / "o", "other").path))
    with pytest.raises(ssl.SSLCertVerificationError):
        CONNECT(address, server.address, opened(tls_ca=fields["tls_ca"], tls_name="other.example"))
    # Whom the system trusts has not signed it.
    with pytest.raises(ssl.SSLCertVerificationError):
        CONNECT(address, server.address, opened(tls_cert=fields["tls_cert"], tls_key=fields["tls_key"]))
    CONNECT(address, server.address, opened(tls_ca=fields["tls_ca"])).close()


def greeted(one, hello):
    frames.send(one, hello)
    return one.recv_into(bytearray(1))


def test_mutual_tls_asks_for_a_certificate_here_too(tmp_path, handler):
    authority = Authority(tmp_path)
    fields = tls_fields(tmp_path, authority)
    server = serve(handler, mutual_tls=True, **fields)
    (tmp_path / "o").mkdir()
    cert, key = Authority(tmp_path / "o", "other").issue("stranger")
    address = f":{port_of(server)}"
    hello = frames.encode(frames.HELLO, server._frames.token)
    for given in ({"tls_ca": authority.path}, {"tls_ca": authority.path, "tls_cert": cert, "tls_key": key}):
        # A client is through with its handshake before the server has seen what it shows.
        one = CONNECT(address, server.address, opened(**given))
        with one, pytest.raises((ssl.SSLError, ConnectionError)):
            greeted(one, hello)
    with CONNECT(address, server.address, opened(**fields)) as one:
        assert greeted(one, hello)
    server.stop(0)


def test_a_newer_certificate_is_shown_to_newcomers(tmp_path, handler):
    authority = Authority(tmp_path)
    server = serve(handler, look_seconds=0.0, **tls_fields(tmp_path, authority))
    shown = []
    for _ in range(2):
        with CONNECT(f":{port_of(server)}", server.address, opened(tls_ca=authority.path)) as connection:
            shown.append(connection.getpeercert()["serialNumber"])
        authority.issue("server", into=(tmp_path / "server.pem", tmp_path / "server.key"))
    assert shown[0] != shown[1]
    server.stop(0)


GARBAGE = [
    b"\0" * 200,
    b"GET / HTTP/1.1\r\n\r\n" * 5,
    b"\x16\x03\x01\x00\x05\x01\x00\x00\x01\xff",
    b"\x16\x03\x01\xff\xff" + b"\x01" * 200,
    b"\x15\x03\x01\x00\x02\x02\x28",
]


@pytest.mark.parametrize("said", [*GARBAGE, "hello of frames"], ids=range(len(GARBAGE) + 1))
def test_who_does_not_speak_tls_is_not_heard(server, handler, fields, far, said):
    """Nor is the token of frames in the clear."""
    if isinstance(said, str):
        said = b"".join(bytes(b) for b in frames.encode(frames.HELLO, server._frames.token))
    with socket.create_connection(("127.0.0.1", port_of(server))) as one:
        one.settimeout(SECONDS)
        one.sendall(said)
        # An alert of TLS at most.
        with contextlib.suppress(ConnectionError):
            assert len(one.recv(1000)) < 20
            assert one.recv(1000) == b""
    assert secured_call(fields, lambda transport: pull(transport, server.address, 5)) == 5


def test_half_a_handshake_has_a_time_and_gives_its_place_to_others(tmp_path, handler, fields, far, monkeypatch):
    monkeypatch.setattr(sockets, "HELLO_SECONDS", 0.3)
    server = serve(handler, **fields)
    one = socket.create_connection(("127.0.0.1", port_of(server)))
    # As of a long record of which more is to come.
    one.sendall(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc")
    assert secured_call(fields, lambda transport: pull(transport, server.address, 5)) == 5
    one.settimeout(SECONDS)
    with contextlib.suppress(ConnectionError):
        assert len(one.recv(1000)) < 20
        assert one.recv(1000) == b""
    one.close()

    async def left(_):
        await until(lambda: by_frames(server)[0] == 0)

    asyncio.run(left(None))
    server.stop(0)


def test_a_crowd_that_says_nothing_keeps_nobody_out(handler, fields, far):
    """Places are few: those who stall give theirs up."""
    server = serve(handler, **fields)
    places = server._frames._places._limit
    crowd = [socket.create_connection(("127.0.0.1", port_of(server)), timeout=30) for _ in range(places)]

    async def body(transport):
        await until(lambda: by_frames(server)[0] == places)
        for _ in range(places):
            # Nobody has stalled for long enough yet.
            late = socket.create_connection(("127.0.0.1", port_of(server)), timeout=30)
            with late, contextlib.suppress(ConnectionResetError):
                assert late.recv(1) == b""
        for place in tuple(server._frames._places._held):
            place.stalled_since -= 10
        return await pull(transport, server.address, 5), by_frames(server)[1]

    assert secured_call(fields, body) == (5, 0)
    for each in crowd:
        each.close()
    server.stop(0)


def test_without_tls_there_is_none(handler):
    plain = serve(handler)
    with CONNECT(f":{port_of(plain)}", plain.address, opened()) as one:
        assert type(one) is socket.socket
    plain.stop(0)
