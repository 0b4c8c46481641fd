# SPDX-License-Identifier: Apache-2.0
"""The client's side of frames: what it makes of servers that are slow, gone, new, deaf or elsewhere, and that nobody gets the
answer of somebody else."""

import asyncio
import contextlib
import gc
import os
import random
import socket
import threading

import numpy as np
import pytest

from oarlock.proto import frames
from oarlock.proto.arrays import pack, unpack
from oarlock.proto.bulk import Bulk, opened
from oarlock.proto.common_pb2 import Header, SocketsReply
from oarlock.proto.errors import DeadlineExceeded, Malformed, PSError, StalePlacement, Unavailable
from oarlock.proto.rpc import GrpcServer, GrpcTransport, frame_client, sockets
from oarlock.proto.rpc.frame_client import CONNECTIONS, Connection, FramePeer
from oarlock.proto.rpc.sockets import ABSTRACT, Shared, connect
from oarlock.proto.shard_pb2 import PullReply, PullRequest, PushReply

SECONDS = 30


class Handler:
    """Answers with the run and twice the values; runs in ``held`` wait for ``gate``."""

    def __init__(self):
        self.gate = threading.Event()
        self.entered = threading.Semaphore(0)
        self.held = set()
        self.over = "frames"

    def pull(self, sent):
        request, parts = opened(sent)
        if request.header.run in self.held:
            self.entered.release()
            assert self.gate.wait(SECONDS)
        if request.number == 7:
            raise StalePlacement("moved")
        beside = [] if isinstance(sent, Bulk) else None
        values = unpack(request.dense, np.float32, "dense", parts=parts)
        reply = PullReply(pushes=request.header.run, dense=pack(values * 2, beside))
        return reply if beside is None else Bulk(reply, beside)

    def push(self, sent):
        return PushReply(applied=opened(sent)[0].group)


@pytest.fixture
def handler():
    made = Handler()
    yield made
    made.gate.set()


def serve(handler, listen="127.0.0.1:0", **options):
    server = GrpcServer(handler, "Shard", listen=listen, **options)
    server.start()
    return server


@pytest.fixture
def server(handler):
    made = serve(handler)
    yield made
    handler.gate.set()
    made.stop(0)


def run(body, **options):
    async def inside():
        transport = GrpcTransport(**options)
        try:
            return await body(transport)
        finally:
            await transport.close()

    return asyncio.run(inside())


async def pull(transport, address, run=5, *, values=3, seconds=SECONDS, **fields):
    """Pull; check that the answer is this call's own; return its number."""
    beside = []
    sent = np.full(values, run, np.float32)
    request = PullRequest(header=Header(run=run), dense=pack(sent, beside), **fields)
    answer = await transport.call(address, "Shard.Pull", Bulk(request, beside), timeout_seconds=seconds)
    reply, parts = opened(answer)
    assert np.array_equal(unpack(reply.dense, np.float32, "dense", parts=parts), sent * 2)
    assert reply.pushes == run
    return run


async def failure(awaitable):
    with pytest.raises(PSError) as caught:
        await awaitable
    return caught.value


async def again(ask, times=100):
    """Return ``await ask()``, asked anew where the connection had broken."""
    for _ in range(times - 1):
        try:
            return await ask()
        except Unavailable:
            await asyncio.sleep(0)
    return await ask()


async def until(condition):
    """Wait for what another thread does."""
    async with asyncio.timeout(SECONDS):
        while not condition():
            await asyncio.sleep(0)


async def entered(handler):
    await until(lambda: handler.entered.acquire(blocking=False))


def by_frames(server):
    """Return how many connections for frames, and how many streams, are open."""
    calls = server.open_calls()
    return calls["frames"], calls["stream"]


def test_calls_travel_on_a_few_connections(server):
    async def body(transport):
        got = await asyncio.gather(*(pull(transport, server.address, n, values=2000) for n in range(1, 60)))
        assert got == list(range(1, 60))
        return by_frames(server)

    connections, streams = run(body)
    assert 1 <= connections <= CONNECTIONS
    assert streams == 0


def test_answers_never_shift_between_callers(server, handler, seed):
    """Sizes, timeouts, cancellations and failures drawn at random: whoever gets an answer gets their own."""
    rng = random.Random(seed)
    handler.held = set(range(1000, 1012))

    async def one(transport, number):
        kind = rng.random()
        values = rng.choice((1, 300, 5000, 400_000))
        if kind < 0.1:
            assert type(await failure(pull(transport, server.address, number, values=values, seconds=1e-4))) in (
                DeadlineExceeded,
                Unavailable,
            )
        elif kind < 0.3:
            task = asyncio.ensure_future(pull(transport, server.address, number, values=values))
            for _ in range(rng.randrange(40)):
                await asyncio.sleep(0)
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, Unavailable):
                await task
        elif kind < 0.4:
            assert type(await failure(pull(transport, server.address, number, number=7))) is StalePlacement
        else:
            await again(lambda: pull(transport, server.address, number, values=values))

    async def body(transport):
        await asyncio.gather(*(one(transport, n) for n in range(1, 250)))
        await pull(transport, server.address, 9)
        return by_frames(server)

    assert run(body)[1] == 0


def test_a_timeout_closes_its_connection_alone(server, handler):
    handler.held = {3}

    async def body(transport):
        await pull(transport, server.address)
        error = await failure(pull(transport, server.address, 3, seconds=0.05))
        assert type(error) is DeadlineExceeded
        assert "Shard.Pull at" in error.message
        for number in range(10, 20):
            await pull(transport, server.address, number)
        handler.gate.set()
        await pull(transport, server.address, 21)
        assert by_frames(server)[1] == 0

    run(body)


@pytest.mark.parametrize("waiting", [1, CONNECTIONS, 3 * CONNECTIONS])
def test_cancelled_calls_give_back_their_places(server, handler, waiting):
    handler.held = {3}

    async def body(transport):
        calls = [asyncio.ensure_future(pull(transport, server.address, 3)) for _ in range(waiting)]
        for _ in range(min(waiting, CONNECTIONS)):
            await entered(handler)
        for each in calls:
            each.cancel()
        assert all(isinstance(e, asyncio.CancelledError) for e in await asyncio.gather(*calls, return_exceptions=True))
        handler.gate.set()
        await asyncio.gather(*(pull(transport, server.address, n) for n in range(10, 30)))

    run(body)


def test_a_slow_process_keeps_no_other_waiting(server, handler):
    """Each of 80 slow ones has all the calls that it takes, as many as 320 exchanges; another one answers at once."""
    handler.held = {3}
    deaf = socket.socket(socket.AF_UNIX)
    deaf.bind(f"\0oarlock-deaf-{random.getrandbits(64)}")
    deaf.listen(512)
    offer = SocketsReply(addresses=[ABSTRACT + deaf.getsockname()[1:].decode()], token=b"x")

    async def asked():
        return offer

    async def body(transport):
        slow = [FramePeer(f"slow-{n}", asked) for n in range(80)]
        calls = [asyncio.ensure_future(peer.call([], "m", SECONDS)) for peer in slow for _ in range(CONNECTIONS)]
        for _ in range(5):
            await asyncio.sleep(0)
        assert await pull(transport, server.address) == 5
        assert not any(c.done() for c in calls)
        for each in calls:
            each.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
        await asyncio.gather(*(peer.close() for peer in slow))

    with deaf:
        run(body)


def test_a_server_that_is_another_one_at_the_same_address(handler, tmp_path):
    listen = f"unix:{tmp_path}/s"
    first = serve(handler, listen)

    async def body(transport):
        await asyncio.gather(*(pull(transport, listen, n) for n in range(1, 9)))
        first.stop(0)
        second = serve(handler, listen)
        try:
            # One call notices, and ends all that were idle: nobody else meets a connection of the first one.
            assert type(await failure(pull(transport, listen))) is Unavailable
            await asyncio.gather(*(pull(transport, listen, n) for n in range(1, 9)))
            return by_frames(second)
        finally:
            second.stop(0)

    connections, streams = run(body)
    assert connections >= 1
    assert streams == 0


def test_an_offer_of_a_process_that_is_gone_is_asked_for_anew(server):
    """Nothing was open that could have told."""
    offers = []

    async def body(transport):
        async def ask():
            real = await transport._peers[server.address]._ask()
            if not offers:
                real = SocketsReply(addresses=real.addresses, token=b"y" * 16)
            offers.append(real)
            return real

        await pull(transport, server.address)
        peer = FramePeer(server.address, ask)
        peer._offer = await ask()
        try:
            request = PullRequest(header=Header(run=3)).SerializeToString()
            frame = await peer.call(frames.encode(frames.PULL, request), "Shard.Pull", SECONDS)
            assert PullReply.FromString(frame.message).pushes == 3
            assert len(offers) == 2
        finally:
            await peer.close()

    run(body)


class Offering(GrpcTransport):
    """Changes what is offered."""

    def __init__(self, change):
        super().__init__()
        self._change = change

    async def call(self, address, method, request, **options):
        reply = await super().call(address, method, request, **options)
        if method == "Wire.Sockets":
            found = self._change(list(reply.addresses))
            del reply.addresses[:]
            reply.addresses.extend(found)
        return reply


def offered(server, change):
    async def inside():
        transport = Offering(change)
        try:
            await asyncio.gather(*(pull(transport, server.address, n, values=1000) for n in range(1, 10)))
            return by_frames(server)
        finally:
            await transport.close()

    return asyncio.run(inside())


def test_tcp_where_the_abstract_one_cannot_be_reached(server):
    """As from another host or network namespace."""
    connections, streams = offered(server, lambda found: [ABSTRACT + "elsewhere", found[1]])
    assert (connections >= 1, streams) == (True, 0)


@pytest.mark.parametrize(
    "found",
    [
        [],
        [ABSTRACT + "elsewhere", ":1"],
        [ABSTRACT, ABSTRACT + "x" * 200, ABSTRACT + "\0" * 10],
        ["", ":", ":99999", ":x", "unix:/x", ":\u0665\u00b2", "[::1]:1", "no such host:1"],
    ],
    ids=["none", "refused", "odd names", "odd addresses"],
)
def test_grpc_where_no_socket_can_be_reached(server, found):
    assert offered(server, lambda _: found) == (0, 1)


def test_few_addresses_are_tried(server, monkeypatch):
    """A server that offers a million keeps nobody busy."""
    tried = []

    def refuse(address, called):
        tried.append(address)
        raise ConnectionRefusedError

    monkeypatch.setattr(sockets, "connect", refuse)
    assert offered(server, lambda _: [f":{n}" for n in range(1, 1000)]) == (0, 1)
    assert len(tried) == frame_client.MAX_ADDRESSES


def test_a_server_without_frames_is_called_by_grpc(handler):
    server = serve(handler, frames=False)
    try:
        assert offered(server, lambda found: found) == (0, 1)
    finally:
        server.stop(0)


def test_a_client_without_frames_calls_by_grpc(server):
    async def body(transport):
        await pull(transport, server.address, values=1000)
        return by_frames(server)

    assert run(body, frames=False) == (0, 1)


@pytest.mark.parametrize(
    ("address", "called", "host"),
    [
        (":5", "10.0.0.1:7", "10.0.0.1"),
        (":5", "[::1]:7", "::1"),
        (":5", "unixbox.example:7", "unixbox.example"),
        (":65535", "unix:7", None),
        (":5", "unix:/tmp/a:b", None),
        (":65536", "h:7", None),
        (":-1", "h:7", None),
        ("", "h:7", None),
    ],
)
def test_where_an_offer_leads(monkeypatch, address, called, host):
    asked = []

    def create(where, timeout):
        asked.append((where[0], timeout))
        raise ConnectionRefusedError

    monkeypatch.setattr(socket, "create_connection", create)
    with pytest.raises(Malformed if host is None else ConnectionRefusedError):
        connect(address, called)
    assert asked == ([] if host is None else [(host, sockets.CONNECT_SECONDS)])


@pytest.fixture
def ipv6():
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            pass
    except OSError:
        pytest.skip("this machine has no IPv6")


@pytest.mark.usefixtures("ipv6")
def test_ipv6(handler):
    server = serve(handler, "[::1]:0")
    try:
        assert offered(server, lambda found: [a for a in found if not a.startswith(ABSTRACT)])[1] == 0
    finally:
        server.stop(0)


class Scripted:
    """A server by hand: does ``script(connection)`` with every connection that said hello."""

    def __init__(self, script, *, hello=True):
        self._script = script
        self._hello = hello
        self.listening = socket.socket(socket.AF_UNIX)
        self.listening.bind("")
        self.listening.listen()
        self.offer = SocketsReply(addresses=[ABSTRACT + self.listening.getsockname()[1:].decode()], token=b"x")
        self.connections = []
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def _accept(self):
        while True:
            try:
                connection, _ = self.listening.accept()
            except OSError:
                return
            self.connections.append(connection)
            self._threads.append(threading.Thread(target=self._serve, args=(connection,)))
            self._threads[-1].start()

    def _serve(self, connection):
        with contextlib.suppress(OSError, frames.Closed), connection:
            reader = frames.Receiver(connection)
            if self._hello:
                reader.receive()
                frames.send(connection, frames.encode(frames.REPLY, b""))
            self._script(connection, reader)

    def peer(self):
        async def ask():
            return self.offer

        return FramePeer("scripted:1", ask)

    def close(self):
        with contextlib.suppress(OSError):
            self.listening.shutdown(socket.SHUT_RDWR)
        self.listening.close()
        self._threads[0].join()
        for each in self.connections:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()


@contextlib.contextmanager
def scripted(script, **options):
    made = Scripted(script, **options)
    try:
        yield made
    finally:
        made.close()


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
