# SPDX-License-Identifier: Apache-2.0
"""What a server makes of garbage, of silence and of a place that is taken; and what a client makes of a server that goes."""

import asyncio
import socket
import threading

import grpc
import pytest

from oarlock.proto.common_pb2 import Header, HelloReply, HelloRequest
from oarlock.proto.errors import (
    DeadlineExceeded,
    InvalidArgument,
    Malformed,
    NotFound,
    OutOfMemory,
    PSError,
    Unavailable,
)
from oarlock.proto.rpc import GrpcServer, GrpcTransport
from oarlock.proto.rpc.options import CLIENT_OPTIONS
from oarlock.proto.rpc.status import FAILURE_KEY, from_status
from oarlock.proto.shard_pb2 import MarksReply, MarksRequest, PullReply, PullRequest


class Handler:
    """Pulls and marks wait for ``gate`` when ``slow``."""

    def __init__(self):
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Semaphore(0)

    def hello(self, request):
        return HelloReply(version=request.version)

    def marks(self, request):
        self.entered.release()
        self.gate.wait(30)
        return MarksReply(next=request.splits)

    def pull(self, request):
        self.entered.release()
        self.gate.wait(30)
        return PullReply(pushes=request.header.run)


def call(address, body, *, frames=True):
    async def inside():
        transport = GrpcTransport(frames=frames)
        try:
            return await body(transport)
        finally:
            await transport.close()

    return asyncio.run(inside())


async def failure(awaitable):
    try:
        await awaitable
    except PSError as error:
        return error
    raise AssertionError("no error came")


def pull(transport, address, run=1, seconds=10):
    return transport.call(address, "Shard.Pull", PullRequest(header=Header(run=run)), timeout_seconds=seconds)


def answers(server):
    """Ask the server something; True if it is well."""

    async def body(transport):
        reply = await pull(transport, server.address, 5)
        return reply.pushes

    return call(server.address, body) == 5


def raw(server, path, data, *, stream=False):
    """Send bytes as a request; return (status, text, trailing metadata) or the bytes of the replies."""
    with grpc.insecure_channel(server.address, options=[("grpc.max_send_message_length", -1)]) as channel:
        try:
            if stream:
                return list(channel.stream_stream(path)(iter(data), timeout=10))
            return channel.unary_unary(path)(data, timeout=10)
        except grpc.RpcError as error:
            return error.code(), error.details(), dict(error.trailing_metadata() or ())


@pytest.mark.parametrize(
    "garbage",
    [b"\xff" * 1000, b"\x00", b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\xff" * 99],
)
def test_garbage_on_the_port_closes_that_connection_only(server, garbage):
    host, port = server.address.split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(garbage)
        connection.shutdown(socket.SHUT_WR)
        try:
            while connection.recv(4096):
                pass
        except ConnectionResetError:
            pass
    assert answers(server)


def test_garbage_as_a_request_is_malformed(server):
    code, text, trailing = raw(server, "/oarlock.Shard/Marks", b"\xff" * 10)
    got = from_status(code, text, trailing[FAILURE_KEY], address="a", method="Shard.Marks")
    assert type(got) is Malformed
    assert got.message == "Shard.Marks: 10 bytes that are no such message"
    assert answers(server)


def test_garbage_on_a_stream_is_malformed_and_the_stream_goes_on(server):
    good = PullRequest(header=Header(run=7)).SerializeToString()
    first, second, third = raw(server, "/oarlock.Shard/PullStream", [good, b"\xff" * 10, good], stream=True)
    assert PullReply.FromString(first).pushes == PullReply.FromString(third).pushes == 7
    failed = PullReply.FromString(second).failure
    assert (failed.code, failed.message) == (Malformed.code, "Shard.Pull: 10 bytes that are no such message")
    assert answers(server)


@pytest.mark.parametrize("stream", [False, True])
def test_a_message_over_the_limit_is_refused_unread(server, stream):
    data = bytes((128 << 20) + 1)
    path = "/oarlock.Shard/PullStream" if stream else "/oarlock.Shard/Marks"
    code, text, trailing = raw(server, path, [data] if stream else data, stream=stream)
    got = from_status(code, text, trailing.get(FAILURE_KEY), address=server.address, method="Shard.Pull")
    assert type(got) is OutOfMemory
    assert "over the limit of 134217728 bytes" in got.message
    assert "\n" not in got.message
    assert answers(server)


def test_a_method_of_another_service_is_not_found(server):
    async def body(transport):
        return await failure(transport.call(server.address, "Coordinator.Hello", HelloRequest(), timeout_seconds=10))

    got = call(server.address, body)
    assert type(got) is NotFound
    assert "is it an Oarlock process of this version?" in got.message


def test_another_program_on_the_port_is_unavailable():
    """Something that is no gRPC server: it answers every connection with a line of text."""
    listener = socket.create_server(("127.0.0.1", 0))
    address = f"127.0.0.1:{listener.getsockname()[1]}"

    def serve():
        try:
            while True:
                connection, _ = listener.accept()
                with connection:
                    connection.sendall(b"220 mail ready\r\n")
        except OSError:
            pass

    thread = threading.Thread(target=serve)
    thread.start()

    async def body(transport):
        marks = transport.call(address, "Shard.Marks", MarksRequest(), timeout_seconds=10)
        return await failure(marks), await failure(pull(transport, address))

    try:
        got = call(address, body)
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join()
    assert [type(e) for e in got] == [Unavailable, Unavailable]
    assert all(address in e.message for e in got)


def test_replies_that_are_no_such_message_are_malformed(handler):
    """A newer server, or a broken one, under the right name."""

    class Broken(GrpcServer):
        def _begun(self, method, data, work, role=""):
            return lambda: b"\xff\xff"

    server = Broken(handler, "Shard", listen="127.0.0.1:0")
    server.start()

    async def body(transport):
        marks = transport.call(server.address, "Shard.Marks", MarksRequest(), timeout_seconds=10)
        return (
            await failure(marks),
            await failure(pull(transport, server.address)),
            await failure(pull(transport, server.address)),
        )

    try:
        got = call(server.address, body)
    finally:
        server.stop(0)
    assert [type(e) for e in got] == [Malformed] * 3


@pytest.mark.parametrize("stream", [False, True])
def test_no_answer_in_time_is_a_deadline(server, handler, stream):
    handler.gate.clear()

    async def body(transport):
        if stream:
            slow = pull(transport, server.address, seconds=0.05)
        else:
            slow = transport.call(server.address, "Shard.Marks", MarksRequest(), timeout_seconds=0.05)
        got = await failure(slow)
        handler.gate.set()
        return got, await pull(transport, server.address, 3)

    got, after = call(server.address, body)
    assert type(got) is DeadlineExceeded
    assert got.retryable
    assert "no answer in time" in got.message
    assert after.pushes == 3


def test_who_waits_behind_a_late_answer_is_told_to_come_again(server, handler):
    """After a timeout the order of answers cannot be trusted, so nobody gets another one's answer."""
    handler.gate.clear()

    async def body(transport):
        late = asyncio.ensure_future(failure(pull(transport, server.address, 1, seconds=0.05)))
        behind = [asyncio.ensure_future(failure(pull(transport, server.address, r))) for r in (2, 3)]
        errors = [await late, *[await b for b in behind]]
        handler.gate.set()
        again = await asyncio.gather(*(pull(transport, server.address, r) for r in (2, 3)))
        return errors, [a.pushes for a in again]

    errors, again = call(server.address, body, frames=False)
    assert [type(e) for e in errors] == [DeadlineExceeded, Unavailable, Unavailable]
    assert again == [2, 3]


def test_a_caller_that_gives_up_does_not_shift_the_answers(server, handler):
    handler.gate.clear()

    async def body(transport):
        first = asyncio.ensure_future(pull(transport, server.address, 1))
        given_up = asyncio.ensure_future(pull(transport, server.address, 2))
        third = asyncio.ensure_future(pull(transport, server.address, 3))
        assert await asyncio.to_thread(handler.entered.acquire, timeout=10)
        (lane,) = transport._lanes.values()
        while len(lane._waiting) < 3 or lane._writing.locked():
            await asyncio.sleep(0)
        given_up.cancel()
        handler.gate.set()
        answers = await asyncio.gather(first, third)
        with pytest.raises(asyncio.CancelledError):
            await given_up
        return [a.pushes for a in answers]

    assert call(server.address, body, frames=False) == [1, 3]


def test_calls_in_flight_end_when_the_transport_is_closed(server, handler):
    handler.gate.clear()

    async def body(transport):
        marks = transport.call(server.address, "Shard.Marks", MarksRequest(), timeout_seconds=10)
        waiting = [asyncio.ensure_future(failure(c)) for c in (marks, pull(transport, server.address))]
        for _ in waiting:
            assert await asyncio.to_thread(handler.entered.acquire, timeout=10)
        await transport.close()
        handler.gate.set()
        return await asyncio.gather(*waiting)

    assert [type(e) for e in call(server.address, body)] == [Unavailable, Unavailable]


def test_a_server_that_comes_back_is_found_again(handler):
    first = GrpcServer(handler, "Shard", listen="127.0.0.1:0")
    address = first.start()
    second = GrpcServer(handler, "Shard", listen=address)

    async def body(transport):
        assert (await pull(transport, address, 1)).pushes == 1
        await asyncio.to_thread(first.stop, 0)
        gone = await failure(pull(transport, address, 2))
        await asyncio.to_thread(second.start)
        end = asyncio.get_running_loop().time() + 10
        while True:
            try:
                return gone, (await pull(transport, address, 3)).pushes
            except Unavailable:
                assert asyncio.get_running_loop().time() < end
                await asyncio.sleep(0.01)

    try:
        gone, after = call(address, body)
    finally:
        first.stop(0)
        second.stop(0)
    assert type(gone) is Unavailable
    assert after == 3


def test_a_server_stops_once_and_may_be_told_twice(handler):
    server = GrpcServer(handler, "Shard", listen="127.0.0.1:0")
    server.stop()
    address = server.start()
    assert address == server.address
    assert not address.endswith(":0")
    server.stop()
    server.stop()
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.1", int(address.split(":")[1])), timeout=5)


def test_a_taken_port_is_an_error(server, handler):
    other = GrpcServer(handler, "Shard", listen=server.address)
    with pytest.raises(InvalidArgument, match=f"cannot listen on {server.address}: taken"):
        other.start()
    other.stop()
    assert answers(server)


def test_a_taken_socket_is_not_taken_away(handler, tmp_path):
    path = f"unix:{tmp_path}/s"
    first, second = (GrpcServer(handler, "Shard", listen=path) for _ in range(2))
    first.start()
    try:
        with pytest.raises(InvalidArgument, match="taken by another process"):
            second.start()
        assert answers(first)
    finally:
        first.stop(0)
    second.start()
    try:
        assert answers(second)
    finally:
        second.stop(0)


def test_a_socket_that_a_dead_process_left_is_replaced(handler, tmp_path):
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(f"{tmp_path}/s")
    server = GrpcServer(handler, "Shard", listen=f"unix:{tmp_path}/s")
    server.start()
    try:
        assert answers(server)
    finally:
        server.stop(0)


@pytest.mark.parametrize(
    "listen",
    [
        "localhost",
        "",
        "127.0.0.1:65536",
        "127.0.0.1:abc",
        "127.0.0.1:-1",
        ":",
        "203.0.113.1:0",
        "unix:/nosuch/folder/s",
    ],
)
def test_an_address_that_is_none_is_an_error(handler, listen):
    server = GrpcServer(handler, "Shard", listen=listen)
    with pytest.raises(InvalidArgument, match="cannot listen on"):
        server.start()
    server.stop()


def test_limits_are_the_same_on_both_sides():
    assert dict(CLIENT_OPTIONS)["grpc.max_receive_message_length"] == 128 << 20
    assert dict(CLIENT_OPTIONS)["grpc.enable_retries"] == 0
