# SPDX-License-Identifier: Apache-2.0
"""How much a server does for whom, with tokens and without: so many answers a second, so many connections, few lines of log."""

import asyncio
import socket
import time
from threading import Event

import grpc
import pytest
from security_rig import Recorder, bearer, opened, raw, serve, texts_of, write_tokens

from oarlock.proto.common_pb2 import HelloRequest
from oarlock.proto.coordinator_pb2 import StatusRequest
from oarlock.proto.errors import Unavailable
from oarlock.proto.methods import METHODS, PROTOCOL
from oarlock.proto.rpc import GrpcTransport
from oarlock.proto.rpc.health import CHECK, WATCH

SERVES = b"\x08\x01"


def test_callers_of_role_read_get_so_many_answers_a_second_and_training_all(tmp_path):
    path = write_tokens(tmp_path / "tokens")
    server = serve(Recorder(), token_file=path, read_requests_per_second=3.0)
    texts = texts_of(path)
    with grpc.insecure_channel(server.address) as channel:

        def codes(role, count):
            return [raw(channel, METHODS["Shard.Hello"].path, bearer(texts[role]))[0].name for _ in range(count)]

        begun = time.monotonic()
        of_read, of_train = codes("read", 40), codes("train", 40)
        most = 3 + 3 * (time.monotonic() - begun) + 1
    server.stop(0)
    assert 3 <= of_read.count("OK") <= most
    assert set(of_read) <= {"OK", "UNAVAILABLE"}
    assert of_train == ["OK"] * 40
    assert server.denied["rate"] == of_read.count("UNAVAILABLE")


def test_the_refusal_of_one_too_many_is_worth_another_try(tmp_path):
    path = write_tokens(tmp_path / "tokens")
    server = serve(Recorder(), token_file=path, read_requests_per_second=0.001)

    async def body():
        transport = GrpcTransport(security=opened(token_file=path))
        try:
            for _ in range(2):
                await transport.call(server.address, "Shard.Hello", HelloRequest(protocol=PROTOCOL), timeout_seconds=10)
        finally:
            await transport.close()

    with pytest.raises(Unavailable, match=r"more than 0\.001 things a second"):
        asyncio.run(body())
    server.stop(0)


def test_the_jobs_own_processes_do_not_wait_for_who_looks(tmp_path):
    """Else a tool that asks without end would have the launcher believe that the coordinator is gone."""
    path = write_tokens(tmp_path / "tokens")
    server = serve(Recorder(), "Coordinator", token_file=path, read_requests_per_second=0.001)

    async def body():
        tool, own = (GrpcTransport(security=opened(token_file=path, own=each)) for each in (False, True))
        await tool.call(server.address, "Coordinator.Status", StatusRequest(), timeout_seconds=10)
        with pytest.raises(Unavailable, match="role read"):
            await tool.call(server.address, "Coordinator.Status", StatusRequest(), timeout_seconds=10)
        for _ in range(3):
            await own.call(server.address, "Coordinator.Status", StatusRequest(), timeout_seconds=10)
            await own.call(server.address, "Coordinator.Hello", HelloRequest(protocol=PROTOCOL), timeout_seconds=10)
        for each in (tool, own):
            await each.close()

    asyncio.run(body())
    server.stop(0)


def test_many_who_are_turned_away_are_counted_and_fill_no_log(tmp_path, caplog):
    server = serve(Recorder(), token_file=write_tokens(tmp_path / "tokens"))
    begun = time.monotonic()
    with grpc.insecure_channel(server.address) as channel:
        for i in range(200):
            raw(channel, METHODS["Shard.Hello"].path, bearer(f"secret-of-somebody-{i}" * 3))
    seconds = time.monotonic() - begun
    server.stop(0)
    lines = [r for r in caplog.records if "call_denied" in r.getMessage()]
    assert server.denied == {"token": 200}
    assert 1 <= len(lines) <= 2 + seconds
    assert "secret-of-somebody" not in caplog.text


def test_half_a_question_about_health_holds_nobody(tmp_path):
    """More of them than there are threads, none of which ever says what it asks."""
    path = write_tokens(tmp_path / "tokens")
    server = serve(Recorder(), token_file=path)
    over = Event()

    def never():
        over.wait()
        yield from ()

    with grpc.insecure_channel(server.address) as channel:
        grpc.channel_ready_future(channel).result(20)
        calls = [channel.stream_stream(way)(never(), timeout=60) for way in (WATCH, CHECK) for _ in range(40)]
        assert raw(channel, CHECK) == (grpc.StatusCode.OK, [SERVES])
        assert raw(channel, METHODS["Shard.Hello"].path, bearer(texts_of(path)["train"]))[0] is grpc.StatusCode.OK
        for call in calls:
            call.cancel()
        over.set()
    server.stop(0)


def test_a_server_takes_no_more_connections_than_it_has_files_for(tmp_path, monkeypatch):
    monkeypatch.setattr("oarlock.proto.rpc.server.MAX_CONNECTIONS", 4)
    server = serve(Recorder(), token_file=write_tokens(tmp_path / "tokens"))
    host, _, port = server.address.rpartition(":")
    held = [socket.create_connection((host, int(port)), timeout=10) for _ in range(12)]
    try:
        # Who is let in hears the server's settings; the others are closed.
        heard = [_first(each) for each in held]
        assert 1 <= sum(heard) <= 4
    finally:
        for each in held:
            each.close()
        server.stop(0)


def _first(connection):
    connection.settimeout(5)
    try:
        return bool(connection.recv(1))
    except OSError:
        return False
