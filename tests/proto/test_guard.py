# SPDX-License-Identifier: Apache-2.0
"""Every method of every service, called in every way it can be: nobody without a token of a role that may gets an answer."""

import asyncio
import contextlib
import random
import socket
import time

import grpc
import pytest
from security_rig import REFLECTION, Recorder, bearer, opened, paths_of, raw, serve, texts_of, write_tokens

from oarlock.proto import frames
from oarlock.proto.common_pb2 import HelloReply, HelloRequest, SocketsReply, SocketsRequest
from oarlock.proto.coordinator_pb2 import StatusRequest
from oarlock.proto.errors import PermissionDenied, Unauthenticated, Unavailable
from oarlock.proto.methods import METHODS, PROTOCOL, SOCKETS, methods_of
from oarlock.proto.roles import ROLES
from oarlock.proto.rpc import GrpcTransport
from oarlock.proto.rpc.health import CHECK, WATCH
from oarlock.proto.rpc.sockets import connect
from oarlock.proto.shard_pb2 import GET, UNDO, PullReply, PullRequest, RowsRequest

SERVICES = ("Shard", "Coordinator", "Serving")
SERVES = b"\x08\x01"
DENIED, UNKNOWN = grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNAUTHENTICATED


@pytest.fixture(params=SERVICES)
def guarded(request, tmp_path):
    """A server of each service with tokens, and a channel to it."""
    handler = Recorder()
    path = write_tokens(tmp_path / "tokens")
    server = serve(handler, request.param, token_file=path, read_requests_per_second=0.0)
    with grpc.insecure_channel(server.address) as channel:
        yield request.param, server, handler, channel, texts_of(path)
    server.stop(0)


def test_the_list_of_ways_is_complete():
    ways = {path for service in SERVICES for _, path in paths_of(service)}
    assert {m.path for m in METHODS.values()} <= ways
    assert sum(path.endswith("Stream") for path in ways) == sum(m.streamed for m in METHODS.values()) == 4


def test_nothing_but_health_answers_without_a_token(guarded):
    service, server, handler, channel, texts = guarded
    wrong = (
        (),
        bearer("x" * 43),
        bearer(""),
        (("authorization", texts["admin"]),),
        (("authorization", f"Basic {texts['admin']}"),),
        (("authorization", "Bearer"),),
        (("token", texts["admin"]),),
        (*bearer(texts["admin"]), *bearer(texts["admin"])),
        (*bearer("x" * 43), *bearer(texts["admin"])),
    )
    called = [*paths_of(service), (None, "/oarlock.Nobody/Nothing"), (None, REFLECTION), (None, "/")]
    words = set()
    for number, (_, path) in enumerate(called):
        # All of them for some methods, one each for the others.
        for metadata in wrong if number < 3 else (wrong[number % len(wrong)],):
            status, answers = raw(channel, path, metadata)
            assert (status, answers) == (UNKNOWN, []), (path, metadata)
    for metadata in wrong:
        call = channel.stream_stream(called[0][1])(iter([b""]), metadata=metadata)
        with pytest.raises(grpc.RpcError):
            list(call)
        words.add(call.details())
    assert len(words) == 1, "which part was wrong is nobody's business"
    assert handler.asked == []
    assert set(server.denied) == {"token"}
    assert raw(channel, CHECK) == (grpc.StatusCode.OK, [SERVES])
    watching = channel.stream_stream(WATCH)(iter([b""]), timeout=20)
    assert next(watching) == SERVES
    watching.cancel()


def test_each_role_does_what_it_may_and_nothing_else(guarded):
    service, server, handler, channel, texts = guarded
    for method, path in paths_of(service):
        data = SocketsRequest(protocol=PROTOCOL).SerializeToString() if method.name.startswith("Wire.") else b""
        for role in ROLES:
            handler.asked.clear()
            status, answers = raw(channel, path, bearer(texts[role]), data)
            if role in method.roles:
                assert (status, len(answers)) == (grpc.StatusCode.OK, 1), (path, role)
                assert handler.asked == [method.attribute] or method.name.startswith("Wire.")
            else:
                assert (status, answers, handler.asked) == (DENIED, [], []), (path, role)
    assert server.denied["role"] > 0


def test_a_listener_that_is_nobodys_is_open_as_before():
    handler = Recorder()
    server = serve(handler)
    with grpc.insecure_channel(server.address) as channel:
        status, answers = raw(channel, METHODS["Shard.Hello"].path)
    server.stop(0)
    assert (status, len(answers), handler.asked) == (grpc.StatusCode.OK, 1, ["hello"])


def test_hostile_metadata_is_refused_and_harms_nobody(guarded, seed):
    service, _, handler, channel, texts = guarded
    rng = random.Random(seed)
    path = METHODS["Serving.Describe" if service == "Serving" else f"{service}.Hello"].path
    hostile = [
        (("authorization", "Bearer " + "x" * 7000),),
        (("authorization", "x" * 100_000),),
        tuple(("authorization", f"Bearer {i}") for i in range(50)),
        (("authorization-bin", bytes(range(256))),),
        (("authorization", "Bearer   " + texts["read"]),),
        (("authorization", "bearer  " + texts["read"]),),
        *(
            (("authorization", "Bearer " + "".join(chr(rng.randrange(32, 127)) for _ in range(rng.randrange(200)))),)
            for _ in range(30)
        ),
    ]
    for metadata in hostile:
        status, answers = raw(channel, path, metadata)
        # Headers of 16 KiB and more gRPC refuses by itself.
        assert status in (UNKNOWN, grpc.StatusCode.RESOURCE_EXHAUSTED), metadata
        assert answers == []
    # What no client of gRPC sends, but a peer may: bytes that are no ASCII.
    for value in ("é" * 30, "\x00", "Bearer \udce9"):
        with pytest.raises((grpc.RpcError, ValueError, TypeError, UnicodeError)):
            list(channel.stream_stream(path)(iter([b""]), metadata=(("authorization", value),), timeout=5))
    assert handler.asked == []
    assert raw(channel, path, bearer(texts["read"]))[0] is grpc.StatusCode.OK


def test_frames_open_to_none_who_was_not_told_their_token(tmp_path):
    path = write_tokens(tmp_path / "tokens")
    handler = Recorder()
    server = serve(handler, token_file=path)
    hello = METHODS["Wire.Sockets"].path
    with grpc.insecure_channel(server.address) as channel:
        for role in ("read", "admin"):
            assert raw(channel, hello, bearer(texts_of(path)[role]))[0] is DENIED
        data = SocketsRequest(protocol=PROTOCOL).SerializeToString()
        offer = SocketsReply.FromString(raw(channel, hello, bearer(texts_of(path)["train"]), data)[1][0])
    assert len(offer.addresses) == 2
    for address in offer.addresses:
        for token in (b"", bytes(16), texts_of(path)["admin"].encode()[:16], offer.token[:-1], offer.token + b"x"):
            for kind in (frames.HELLO, frames.PULL):
                with connect(address, server.address) as connection:
                    frames.send(connection, frames.encode(kind, token))
                    with pytest.raises((frames.Closed, ConnectionError)):
                        frames.Receiver(connection).receive()
        with connect(address, server.address) as connection:
            frames.send(connection, frames.encode(frames.HELLO, offer.token))
            assert frames.Receiver(connection).receive().kind == frames.REPLY
    server.stop(0)
    assert handler.asked == []


def test_sockets_of_frames_are_for_who_may_send_all_that_travels_on_them(tmp_path):
    path = write_tokens(tmp_path / "tokens")
    allowed = {"Shard": {"train"}, "Serving": set(ROLES)}
    for service, roles in allowed.items():
        server = serve(Recorder(), service, token_file=path)
        data = SocketsRequest(protocol=PROTOCOL).SerializeToString()
        offers = {}
        with grpc.insecure_channel(server.address) as channel:
            for role in ROLES:
                status, answers = raw(channel, METHODS[SOCKETS].path, bearer(texts_of(path)[role]), data)
                assert status is (grpc.StatusCode.OK if role in roles else DENIED), (service, role)
                offers[role] = SocketsReply.FromString(answers[0]) if answers else None
        for role in roles:
            kinds = {m.frame for m in METHODS.values() if m.frame and m.service == service and role in m.roles}
            for kind in (frames.PULL, frames.PUSH, frames.REPLICATE, frames.LOOKUP):
                with connect(offers[role].addresses[0], server.address) as connection:
                    frames.send(connection, frames.encode(frames.HELLO, offers[role].token))
                    receiver = frames.Receiver(connection)
                    receiver.receive()
                    frames.send(connection, frames.stamped(frames.encode(kind, b""), 10.0))
                    if kind in kinds:
                        assert receiver.receive().kind == frames.REPLY
                    else:
                        with pytest.raises((frames.Closed, ConnectionError)):
                            receiver.receive()
        server.stop(0)


def test_a_service_of_several_roles_tells_its_sockets_to_none_of_less():
    """Whoever is let in there may send frames of every kind."""
    assert {service: methods_of(service)[-1].roles for service in SERVICES} == {
        "Shard": frozenset({"train"}),
        "Coordinator": frozenset(ROLES),  # it has none, and says so
        "Serving": frozenset(ROLES),
    }
    for service in SERVICES:
        bulk = [m.roles for m in methods_of(service) if m.frame]
        assert all(methods_of(service)[-1].roles <= roles for roles in bulk)


def test_look_ups_are_what_role_read_is_for_and_not_counted(tmp_path):
    path = write_tokens(tmp_path / "tokens")
    server = serve(Recorder(), "Serving", token_file=path, read_requests_per_second=0.001)
    with grpc.insecure_channel(server.address) as channel:

        def codes(method):
            return [raw(channel, METHODS[method].path, bearer(texts_of(path)["read"]))[0].name for _ in range(5)]

        assert codes("Serving.Lookup") == ["OK"] * 5
        assert codes("Serving.Nearest") == ["OK"] * 5
        assert codes("Serving.Describe") == ["OK"] + ["UNAVAILABLE"] * 4
    server.stop(0)


@pytest.mark.parametrize("by_frames", [True, False])
def test_a_client_with_tokens_does_its_work(tmp_path, by_frames):
    path = write_tokens(tmp_path / "tokens")
    server = serve(Recorder(), token_file=path)

    async def asked(transport, method, request):
        # A stream that was refused before the first message was written has lost its status in grpc.aio: it is asked again.
        for _ in range(20):
            with contextlib.suppress(Unavailable):
                return await transport.call(server.address, method, request, timeout_seconds=10)
        return None

    async def body():
        transport = GrpcTransport(frames=by_frames, security=opened(token_file=path))
        stranger = GrpcTransport(frames=by_frames)
        wrong = GrpcTransport(frames=by_frames, security=opened(token_file=write_tokens(tmp_path / "other")))
        try:
            for method, request in (("Shard.Hello", HelloRequest(protocol=PROTOCOL)), ("Shard.Pull", PullRequest())):
                answer = await transport.call(server.address, method, request, timeout_seconds=10)
                assert isinstance(answer, (HelloReply, PullReply))
                for other in (stranger, wrong):
                    with pytest.raises(Unauthenticated, match=r"give --token-file FILE, the job's"):
                        await asked(other, method, request)
        finally:
            for each in (transport, stranger, wrong):
                await each.close()

    asyncio.run(body())
    server.stop(0)


def test_rows_are_looked_at_with_role_read_and_changed_with_role_admin(tmp_path):
    path = write_tokens(tmp_path / "tokens")
    looker = write_tokens(tmp_path / "read", f'read = "{texts_of(path)["read"]}"')
    handler = Recorder()
    server = serve(handler, token_file=path)
    with grpc.insecure_channel(server.address) as channel:
        for role, verb, expected in (("read", GET, "OK"), ("read", UNDO, "PERMISSION_DENIED"), ("admin", UNDO, "OK")):
            handler.asked.clear()
            data = RowsRequest(verb=verb).SerializeToString()
            status, _ = raw(channel, METHODS["Shard.Rows"].path, bearer(texts_of(path)[role]), data)
            assert (status.name, bool(handler.asked)) == (expected, expected == "OK")

    async def body():
        for file, verb in ((path, UNDO), (looker, GET)):
            transport = GrpcTransport(security=opened(token_file=file))
            await transport.call(server.address, "Shard.Rows", RowsRequest(verb=verb), timeout_seconds=10)
            await transport.close()
        transport = GrpcTransport(security=opened(token_file=looker))
        with pytest.raises(PermissionDenied, match="role admin"):
            await transport.call(server.address, "Shard.Rows", RowsRequest(verb=UNDO), timeout_seconds=10)
        await transport.close()

    asyncio.run(body())
    server.stop(0)


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


def test_a_token_is_replaced_without_a_pause(tmp_path):
    path = write_tokens(tmp_path / "tokens")
    old = texts_of(path)
    server = serve(Recorder(), token_file=path, look_seconds=0.0)
    new = {role: text[::-1] for role, text in old.items()}
    hello = METHODS["Shard.Hello"].path
    with grpc.insecure_channel(server.address) as channel:

        def let_in():
            return [raw(channel, hello, bearer(t["admin"]))[0] is grpc.StatusCode.OK for t in (old, new)]

        assert let_in() == [True, False]
        write_tokens(path, "".join(f'{r} = ["{new[r]}", "{old[r]}"]\n' for r in ROLES))
        assert let_in() == [True, True]
        write_tokens(path, "".join(f'{r} = "{new[r]}"\n' for r in ROLES))
        assert let_in() == [False, True]
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
