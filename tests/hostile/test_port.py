# SPDX-License-Identifier: Apache-2.0
"""A port and people who do not speak as they should: each meets a clear error or a closed connection, and training goes on."""

import asyncio
import socket
import threading

import grpc
import h2
import ports
import pytest
import rig
from grpc.aio import AioRpcError, Metadata

from oarlock.proto.arrays import MAX_MESSAGE_BYTES
from oarlock.proto.common_pb2 import Empty
from oarlock.proto.errors import Internal, InvalidArgument, Malformed, NotFound, PSError, Unavailable
from oarlock.proto.methods import INFERENCE, METHODS
from oarlock.proto.rpc import GrpcServer, GrpcTransport, from_status
from oarlock.proto.rpc import places as places_module
from oarlock.proto.rpc import server as server_module
from oarlock.proto.rpc.client import error_of
from oarlock.proto.rpc.places import Places
from oarlock.proto.rpc.status import FAILURE_KEY, failure_of
from oarlock.proto.shard_pb2 import CloseRequest, MarksReply, MarksRequest, PullReply, PullRequest, PushReply

STREAM, SINGLE = "/oarlock.Shard/PullStream", "/oarlock.Shard/Marks"
# Twelve places for streams and two for single calls, which are free again soon.
SMALL = {"threads": 16, "stall_seconds": 0.05}


@pytest.fixture
def port():
    made = ports.Port(**SMALL)
    yield made
    made.stop()


@pytest.fixture
def coordinator(tmp_path):
    made = ports.CoordinatorPort(tmp_path / "state.sqlite", **SMALL)
    yield made
    made.stop()


@pytest.fixture
def connect(port):
    """Open connections by hand; they are closed at the end."""
    made = []

    def connection(address=None, **options):
        made.append(h2.Connection(address or port.address, **options))
        return made[-1]

    yield connection
    for one in made:
        one.close()


def raw(address, path, data, **options):
    """Make a single call of bytes; return the reply's bytes, or the error as a client of ours understands it."""
    with grpc.insecure_channel(address, options=[("grpc.max_send_message_length", -1)]) as channel:
        try:
            return channel.unary_unary(path)(data, timeout=20, **options)
        except grpc.RpcError as error:
            trailing = dict(error.trailing_metadata() or ())
            return from_status(error.code(), error.details(), trailing.get(FAILURE_KEY), address=address, method=path)


@pytest.mark.parametrize(
    "garbage",
    [
        b"",
        b"\0" * 5000,
        b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03" + b"\xaa" * 200,
        b"GET /status HTTP/1.1\r\nHost: x\r\n\r\n",
        h2.PREFACE[:10],
        h2.PREFACE + b"\xff" * 9,
        h2.PREFACE + h2.settings() + h2.frame(h2.DATA, 0, 7, b"x"),
        h2.PREFACE + h2.settings() + h2.frame(h2.HEADERS, h2.END_HEADERS, 1, b"\xff" * 500),
        h2.PREFACE + h2.settings() + h2.frame(h2.HEADERS, 0, 1, b"\0" * 3, length=1 << 23),
        h2.PREFACE + h2.settings() + h2.frame(9, 0, 1, b"\0" * 100) * 50,
        h2.PREFACE + h2.settings() + h2.frame(h2.SETTINGS, 0, 0, b"\0\x04\xff\xff\xff\xff"),
        h2.PREFACE + h2.settings() + h2.headers(2, STREAM),
        h2.PREFACE + h2.settings() + h2.frame(h2.PING, 0, 0, b"12345678") * 2000,
        h2.PREFACE + h2.settings() + (h2.headers(1, STREAM) + h2.frame(h2.RST, 0, 1, b"\0\0\0\x08")),
        h2.PREFACE
        + h2.settings()
        + b"".join(h2.headers(n, STREAM) + h2.frame(h2.RST, 0, n, b"\0\0\0\x08") for n in range(1, 2001, 2)),
    ],
    ids=range(15),
)
def test_what_is_no_call_closes_that_connection_at_most(port, garbage):
    host, number = port.address.split(":")
    with socket.create_connection((host, int(number)), timeout=20) as connection:
        try:
            connection.sendall(garbage)
            assert port.trains(2)
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(65536):
                pass
        except ConnectionError:
            pass
    assert port.trains(1)


@pytest.mark.parametrize("path", ["/oarlock.Shard/Nothing", "/oarlock.Coordinator/Stop", "/x/y", "/", "/" + "x" * 2000])
def test_methods_that_there_are_not(port, path):
    assert type(raw(port.address, path, b"")) is NotFound
    assert port.trains(1)


# What a serving process answers has tests beside it (tests/serving/test_fuzz.py).
@pytest.mark.parametrize("name", [n for n, method in METHODS.items() if method.service not in ("Serving", INFERENCE)])
def test_every_method_refuses_bytes_that_are_no_message(port, coordinator, name):
    target = port if name.startswith("Shard.") else coordinator
    got = raw(target.address, METHODS[name].path, b"\xff" * 20)
    assert type(got) is Malformed
    assert got.message == f"{name}: 20 bytes that are no such message"


@pytest.mark.parametrize("path", [SINGLE, STREAM])
@pytest.mark.parametrize("length", [MAX_MESSAGE_BYTES + 1, (1 << 32) - 1])
def test_a_message_that_says_it_is_over_the_limit(port, connect, path, length):
    """Refused by its length alone, in the trailers (status 8): nobody waits for the rest, or makes room for it."""
    one = connect()
    one.call(path, h2.message(b"x" * 100, length=length))
    seen = b""
    while b"grpc-status" not in seen:
        ((_, _, _, payload),) = one.frames(1)
        seen += payload
    assert b"\x018" in seen.split(b"grpc-status", 1)[1][:4]
    assert port.trains(1)


def test_a_message_over_the_limit_in_the_midst_of_a_stream(port):
    """What came before it is answered, and the stream ends with the reason."""
    good = port.pull_request().SerializeToString()
    with grpc.insecure_channel(port.address, options=[("grpc.max_send_message_length", -1)]) as channel:
        replies = channel.stream_stream(STREAM)(iter([good, bytes(MAX_MESSAGE_BYTES + 1), good]), timeout=20)
        assert len(PullReply.FromString(next(replies)).rows) == 1
        with pytest.raises(grpc.RpcError) as caught:
            list(replies)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert port.trains(1)


def test_a_compressed_message_is_refused(port):
    """A hundred kilobytes could stand for all that a message may hold."""
    got = raw(port.address, SINGLE, bytes(1 << 20), compression=grpc.Compression.Gzip)
    assert type(got) is NotFound
    assert "disabled" in got.message
    assert port.trains(1)


def test_a_call_without_a_message(port, connect):
    one = connect()
    one.call(SINGLE, end=True)
    while b"came without a message" not in one.frames(1)[0][3]:
        pass
    assert port.trains(1)


@pytest.mark.parametrize("half", [b"", b"\0", h2.message(b"x" * 10, length=1000)], ids=["nothing", "a byte", "half"])
@pytest.mark.parametrize("path", [SINGLE, STREAM, "/oarlock.Shard/PushStream", "/oarlock.Shard/Pull"])
def test_calls_that_stop_in_the_middle_keep_nobody_out(port, connect, path, half):
    """Forty of them, on a server of sixteen threads."""
    held = [connect() for _ in range(2)]
    for one in held:
        for _ in range(20):
            one.call(path, half)
        one.settled()
    assert port.trains(3)


@pytest.mark.parametrize("half", [b"", h2.message(b"x" * 10, length=1000)], ids=["nothing", "half"])
def test_calls_that_stop_in_the_middle_keep_nobody_from_the_coordinator(coordinator, connect, half):
    one = connect(coordinator.address)
    for _ in range(40):
        one.call("/oarlock.Coordinator/Heartbeat", half)
    one.settled()
    assert coordinator.trains()


@pytest.mark.parametrize("path", ["/oarlock.Shard/Pull", STREAM])
def test_answers_that_nobody_reads_keep_nobody_out(port, connect, path):
    """Not one byte of an answer is let through."""
    request = h2.message(port.pull_request().SerializeToString())
    one = connect(window=0)
    for _ in range(40):
        one.call(path, request * (3 if path == STREAM else 1))
    one.settled()
    assert port.trains(3)


def test_a_stream_that_was_idle_for_too_long_is_begun_anew(port, connect):
    """A good client whose place went to others notices nothing."""

    async def body():
        transport = GrpcTransport()
        try:
            await port.train(transport, 2)
            one = connect()
            for _ in range(40):
                await asyncio.to_thread(one.call, STREAM)
            await asyncio.to_thread(one.settled)
            await port.train(transport, 2)
        finally:
            await transport.close()

    asyncio.run(body())


class Busy:
    """Pulls and marks that take until ``gate`` opens; ``entered`` counts them."""

    def __init__(self):
        self.gate = threading.Event()
        self.entered = threading.Semaphore(0)

    def pull(self, request):
        self.entered.release()
        self.gate.wait(30)
        return PullReply(pushes=request.number)

    def marks(self, request):
        self.entered.release()
        self.gate.wait(30)
        return MarksReply(next=request.splits)

    def close(self, request):
        return Empty()


def test_a_stream_too_many_is_unavailable_and_orders_get_through():
    """None of the twelve stalls: the server works for all of them, so nobody is sent away for one more."""
    busy = Busy()
    server = GrpcServer(busy, "Shard", listen="127.0.0.1:0", threads=16, stall_seconds=0)
    address = server.start()

    async def body():
        held = [GrpcTransport(frames=False) for _ in range(13)]

        def pull(number):
            request = PullRequest(number=number)
            return held[number].call(address, "Shard.Pull", request, timeout_seconds=20)

        try:
            waiting = [asyncio.ensure_future(pull(n)) for n in range(12)]
            for _ in waiting:
                assert await asyncio.to_thread(busy.entered.acquire, timeout=20)
            # Sometimes gRPC tells only of its own failed write to the stream that was refused; that is Unavailable as well.
            for _ in range(30):
                with pytest.raises(Unavailable, match=r"all 12 streams of this process are taken|has ended the stream"):
                    await pull(12)
            await held[12].call(address, "Shard.Close", CloseRequest(), timeout_seconds=20)
            busy.gate.set()
            assert [r.pushes for r in await asyncio.gather(*waiting)] == list(range(12))
            # Their streams are idle now, so there is room.
            assert (await ports.again(lambda: pull(12))).pushes == 12
        finally:
            busy.gate.set()
            for one in held:
                await one.close()

    try:
        asyncio.run(body())
    finally:
        busy.gate.set()
        server.stop(0)


class Clock:
    """Stands for the module ``time``."""

    now = 100.0

    def monotonic(self):
        return self.now


def test_a_call_that_is_worked_for_is_not_sent_away(monkeypatch):
    """Two of five marks have a place; the others wait for it, and look again after a long time."""
    busy, clock, looked = Busy(), Clock(), threading.Semaphore(0)
    send_away = Places._send_away

    def look(self, now):
        send_away(self, now)
        if now > 1000:
            looked.release()

    monkeypatch.setattr(places_module, "time", clock)
    monkeypatch.setattr(Places, "_send_away", look)
    server = GrpcServer(busy, "Shard", listen="127.0.0.1:0", **SMALL)
    address = server.start()

    async def body():
        transport = GrpcTransport()
        try:
            requests = [MarksRequest(splits=[n]) for n in range(5)]
            calls = [transport.call(address, "Shard.Marks", r, timeout_seconds=20) for r in requests]
            waiting = [asyncio.ensure_future(call) for call in calls]
            for _ in range(2):
                assert await asyncio.to_thread(busy.entered.acquire, timeout=20)
            clock.now += 1000
            assert await asyncio.to_thread(looked.acquire, timeout=20)
            busy.gate.set()
            return [list((await one).next) for one in waiting]
        finally:
            busy.gate.set()
            await transport.close()

    try:
        assert asyncio.run(body()) == [[0], [1], [2], [3], [4]]
    finally:
        server.stop(0)


def test_a_call_that_ended_leaves_its_place():
    """One after another, many more than there are places, and none stalls for long enough to be sent away."""
    port = ports.Port(threads=16, stall_seconds=1000)
    data = port.pull_request().SerializeToString()
    try:
        with grpc.insecure_channel(port.address) as channel:
            for _ in range(30):
                assert channel.unary_unary("/oarlock.Shard/Pull")(data, timeout=20)
                assert len(list(channel.stream_stream(STREAM)(iter([data, data]), timeout=20))) == 2
    finally:
        port.stop()


@pytest.mark.parametrize(
    ("details", "failure", "kind"),
    [
        ("Internal error from Core", None, Unavailable),
        ("Internal error from Core", failure_of(Internal("a defect")).SerializeToString(), Internal),
        ("another", None, Internal),
    ],
)
def test_a_write_to_a_stream_that_was_ended_is_no_defect(details, failure, kind):
    """gRPC reports INTERNAL of its own in place of the status that the other side gave."""
    trailing = Metadata(*([(FAILURE_KEY, failure)] if failure else []))
    error = AioRpcError(grpc.StatusCode.INTERNAL, Metadata(), trailing, details)
    assert type(error_of(error, "a:1", "Shard.Pull")) is kind


def test_more_calls_than_a_server_keeps_waiting_are_unavailable(monkeypatch, connect):
    monkeypatch.setattr(server_module, "MAX_CALLS", 20)
    port = ports.Port(threads=16, stall_seconds=1000)
    try:
        one = connect(port.address)
        for _ in range(20):
            one.call(SINGLE)
        one.settled()
        got = raw(port.address, SINGLE, b"")
        assert type(got) is Unavailable
        assert "too many calls at once" in got.message
    finally:
        port.stop()


def test_a_server_ends_in_the_midst_of_those_who_stall(connect):
    """Nobody has stalled for long enough to be sent away, and some wait for a place."""
    port = ports.Port(threads=16, stall_seconds=1000)
    try:
        one = connect(port.address, window=0)
        for path in (SINGLE, STREAM, "/oarlock.Shard/Pull"):
            for _ in range(20):
                one.call(path, b"\0\0")
        one.settled()
    finally:
        port.stop()
    one.read_all()


def test_bytes_that_were_heard_on_the_wire_and_are_sent_again(port):
    """By another sender, on another connection, on the stream and as a single call."""
    assert port.trains(3)
    before = rig.state(port.job)
    replayed = [rig.request_of(port.job, 0, group).SerializeToString() for group in range(3)]
    for data in [*replayed, *reversed(replayed)]:
        reply = PushReply.FromString(raw(port.address, "/oarlock.Shard/Push", data))
        assert (reply.applied, reply.skipped) == (0, 17)
    with grpc.insecure_channel(port.address) as channel:
        assert len(list(channel.stream_stream("/oarlock.Shard/PushStream")(iter(replayed), timeout=20))) == 3
    assert rig.state(port.job) == before
    assert port.trains(1)


@pytest.mark.parametrize("forged", [{"job": b"\1" * 16}, {"run": 9}, {"target": 7}, {"protocol": 0}])
def test_forged_identities_over_the_wire(port, forged):
    request = MarksRequest(header=port.job.header(0, **forged))
    got = raw(port.address, SINGLE, request.SerializeToString())
    assert isinstance(got, PSError)
    assert not isinstance(got, InvalidArgument)
    assert not got.retryable
    assert port.trains(1)
