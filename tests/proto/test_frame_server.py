# SPDX-License-Identifier: Apache-2.0
"""The server's sockets for frames: who is let in, what ends a connection, and that nothing is left at the end."""

import asyncio
import contextlib
import errno
import socket
import threading

import numpy as np
import pytest

from oarlock.proto import frames
from oarlock.proto.arrays import MAX_MESSAGE_BYTES, pack, unpack
from oarlock.proto.bulk import Bulk, Parts, inlined, opened
from oarlock.proto.common_pb2 import Array, Header, SocketsRequest
from oarlock.proto.errors import Malformed, OutOfMemory, StalePlacement
from oarlock.proto.methods import PROTOCOL
from oarlock.proto.rpc import GrpcServer, GrpcTransport, frame_server
from oarlock.proto.rpc.sockets import ABSTRACT, connect
from oarlock.proto.rpc.status import from_failure
from oarlock.proto.shard_pb2 import PullReply, PullRequest, PushReply, PushRequest

SECONDS = 30


class Handler:
    """Answers a pull with its own dense array; it waits for ``gate`` in the midst, and ``entered`` says so."""

    def __init__(self):
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Semaphore(0)

    def pull(self, sent):
        self.entered.release()
        assert self.gate.wait(SECONDS)
        request, parts = opened(sent)
        if request.number == 7:
            raise StalePlacement("moved", block=3)
        if request.number == 8:
            return Bulk(PullReply(), [np.zeros(MAX_MESSAGE_BYTES // 2, np.uint8)] * 3)
        beside = [] if isinstance(sent, Bulk) else None
        values = unpack(request.dense, np.float32, "dense", parts=parts)
        reply = PullReply(dense=pack(values * 2, beside), pushes=request.header.run)
        return reply if beside is None else Bulk(reply, beside)

    def push(self, sent):
        return PushReply(applied=opened(sent)[0].group)


@pytest.fixture
def handler():
    made = Handler()
    yield made
    made.gate.set()


def serve(handler, **options):
    server = GrpcServer(handler, "Shard", listen="127.0.0.1:0", **options)
    server.start()
    return server


@pytest.fixture
def server(handler):
    made = serve(handler)
    yield made
    handler.gate.set()
    made.stop(0)


def call(server, body):
    async def inside():
        transport = GrpcTransport()
        try:
            return await body(transport)
        finally:
            await transport.close()

    return asyncio.run(inside())


def offer_of(server):
    """Return what the server offers, asked once."""
    if server not in OFFERS:
        OFFERS.clear()
        OFFERS[server] = _ask(server)
    return OFFERS[server]


OFFERS = {}


def _ask(server):
    async def body(transport):
        request = SocketsRequest(protocol=PROTOCOL)
        return await transport.call(server.address, "Wire.Sockets", request, timeout_seconds=SECONDS)

    return call(server, body)


def answers(server):
    """A good client is served, over frames."""

    async def body(transport):
        values, beside = np.arange(3000, dtype=np.float32), []
        request = PullRequest(header=Header(run=5), dense=pack(values, beside))
        sent = Bulk(request, beside)
        reply, parts = opened(await transport.call(server.address, "Shard.Pull", sent, timeout_seconds=SECONDS))
        return len(parts) == 1 and np.array_equal(unpack(reply.dense, np.float32, "dense", parts=parts), values * 2)

    return call(server, body)


class Raw:
    """A connection made by hand."""

    def __init__(self, server, *, kind=ABSTRACT, token=None):
        offer = offer_of(server)
        (address,) = [a for a in offer.addresses if a.startswith(ABSTRACT) == (kind == ABSTRACT)]
        self.socket = connect(address, server.address)
        self.socket.settimeout(SECONDS)
        self.receiver = frames.Receiver(self.socket)
        if token is not False:
            # It may be sent away already.
            with contextlib.suppress(ConnectionError):
                self.send(frames.HELLO, offer.token if token is None else token)

    def send(self, kind, message=b"", parts=()):
        frames.send(self.socket, frames.encode(kind, message, parts))

    def in_(self):
        assert self.receiver.receive() == (frames.REPLY, b"", [])
        return self

    def pull(self, run=5, **fields):
        self.send(frames.PULL, PullRequest(header=Header(run=run), **fields).SerializeToString())

    def ended(self):
        """Whether the other side has closed it, and said nothing more."""
        try:
            return self.socket.recv(1) == b""
        except ConnectionError:
            return True

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.socket.close()


def let_in(server):
    """Return a connection; come again while the places are held by those that have not stalled for long enough."""
    while True:
        one = Raw(server)
        try:
            return one.in_()
        except (OSError, frames.Closed):
            one.socket.close()


@pytest.fixture(params=[ABSTRACT, "tcp"])
def kind(request):
    return request.param


def test_frames_are_offered_on_both_kinds_and_answered(server, kind):
    with Raw(server, kind=kind).in_() as one:
        for run in (1, 2):
            one.pull(run)
            assert PullReply.FromString(one.receiver.receive().message).pushes == run
    assert answers(server)


@pytest.mark.parametrize("token", [b"", b"\0" * 16, b"x" * 15, b"x" * 64])
def test_who_has_not_the_token_is_not_heard(server, handler, kind, token):
    with Raw(server, kind=kind, token=token) as one:
        assert one.ended()
    assert not handler.entered.acquire(blocking=False)
    assert answers(server)


@pytest.mark.parametrize(
    "garbage",
    [
        b"\0" * 200,
        b"GET / HTTP/1.1\r\n\r\n" * 5,
        b"OARF\x01\x00\x00\x00" + b"\xff" * 12,
        b"OARF\x02" + b"\0" * 100,
        b"".join(bytes(b) for b in frames.encode(frames.PULL, b"")),
        b"".join(bytes(b) for b in frames.encode(frames.REPLY, b"x" * 16)),
    ],
    ids=range(6),
)
def test_garbage_as_the_first_word(server, kind, garbage):
    with Raw(server, kind=kind, token=False) as one:
        one.socket.sendall(garbage)
        assert one.ended()
    assert answers(server)


@pytest.mark.parametrize("frame_kind", [0, 1, 4, 99, 127, 128, 131 + 4, 255])
def test_a_kind_that_there_is_not_ends_the_connection(server, frame_kind):
    with Raw(server).in_() as one:
        one.send(frame_kind, b"")
        assert one.ended()
    assert answers(server)


def closed_at(stage):
    """Go as far as ``stage`` and leave."""

    def go(server, handler):
        one = Raw(server, token=False)
        with one:
            if stage == "connected":
                return
            hello = b"".join(bytes(b) for b in frames.encode(frames.HELLO, offer_of(server).token))
            if stage == "half a hello":
                one.socket.sendall(hello[:25])
                return
            one.socket.sendall(hello)
            if stage == "hello":
                return
            one.in_()
            if stage == "idle":
                return
            request = PullRequest(dense=pack(np.zeros(1 << 20, np.float32))).SerializeToString()
            whole = b"".join(bytes(b) for b in frames.encode(frames.PULL, request))
            if stage == "half a head":
                one.socket.sendall(whole[:7])
            elif stage == "half a frame":
                one.socket.sendall(whole[: len(whole) // 2])
            elif stage == "asked":
                one.socket.sendall(whole)
            else:
                one.socket.sendall(whole)
                # The reply has begun to come.
                one.socket.recv(1)

    return go


@pytest.mark.parametrize(
    "stage", ["connected", "half a hello", "hello", "idle", "half a head", "half a frame", "asked", "answered"]
)
def test_a_connection_that_leaves_at_any_time(server, handler, stage):
    closed_at(stage)(server, handler)
    assert answers(server)
    server.stop(0)
    assert server.open_calls()["frames"] == 0


def test_failures_are_answers_and_the_connection_goes_on(server):
    with Raw(server).in_() as one:
        one.send(frames.PULL, b"\xff" * 20)
        assert type(from_failure(PullReply.FromString(one.receiver.receive().message).failure)) is Malformed
        one.pull(number=7)
        got = from_failure(PullReply.FromString(one.receiver.receive().message).failure)
        assert (type(got), got.details) == (StalePlacement, {"block": 3})
        one.pull(6)
        assert PullReply.FromString(one.receiver.receive().message).pushes == 6


def test_an_answer_over_the_limit_is_a_failure_and_the_connection_goes_on(server):
    """The handler's parts are three times half the limit."""
    with Raw(server).in_() as one:
        one.send(frames.PULL | frames.BESIDE, PullRequest(number=8).SerializeToString())
        got = from_failure(PullReply.FromString(one.receiver.receive().message).failure)
        assert type(got) is OutOfMemory
        one.pull(6)
        assert PullReply.FromString(one.receiver.receive().message).pushes == 6


@pytest.mark.parametrize("beside", [0, frames.BESIDE])
def test_parts_that_do_not_fit_their_message(server, beside):
    values = np.ones(300, np.float32)
    good = PullRequest(dense=Array(dtype=3, shape=[300], part=1))
    cases = [
        (PullRequest(dense=Array(dtype=3, shape=[300], part=2)), [values]),
        (PullRequest(dense=Array(dtype=3, shape=[300], part=(1 << 32) - 1)), [values]),
        (good, []),
        (good, [values[:-1]]),
        (good, [np.ones(301, np.float32)]),
    ]
    if beside:
        cases.append((PullRequest(dense=Array(dtype=3, shape=[300], part=1, data=b"x" * 1200)), [values]))
    with Raw(server).in_() as one:
        for request, parts in cases:
            one.send(frames.PULL | beside, request.SerializeToString(), parts)
            failure = PullReply.FromString(one.receiver.receive().message).failure
            assert type(from_failure(failure)) is Malformed
        one.send(frames.PULL | beside, good.SerializeToString(), [values])
        assert not PullReply.FromString(one.receiver.receive().message).HasField("failure")


def test_one_part_for_many_arrays_is_refused(server):
    """Else a message of 100 bytes and one part would stand for gigabytes."""
    part = np.zeros(1 << 16, np.float32)
    table = {"keys": Array(dtype=3, shape=[1 << 16], part=1)}
    request = PullRequest(tables=[table] * 2)
    with Raw(server).in_() as one:
        one.send(frames.PULL, request.SerializeToString(), [part])
        got = from_failure(PullReply.FromString(one.receiver.receive().message).failure)
        assert type(got) is Malformed
        assert got.message == "two arrays are said to be part 1"
    assert answers(server)


def test_parts_are_read_once_and_counted_any_number_of_times():
    parts = Parts([b"ab", b"cde"])
    assert (len(parts), Bulk(None, parts).nbytes, list(parts)) == (2, 5, [b"ab", b"cde"])
    assert parts[1] == b"cde"
    with pytest.raises(Malformed, match="two arrays are said to be part 2"):
        parts[1]
    assert parts[0:1] == [b"ab"]
    with pytest.raises(IndexError):
        parts[2]
    with pytest.raises(Malformed, match="part 3 of 2"):
        inlined(Bulk(PullRequest(dense=Array(part=3)), Parts([b"a", b"b"])))


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
