# SPDX-License-Identifier: Apache-2.0
"""What a server has beside its methods: health, which is open to everybody, and reflection, which is not."""

import sys
from threading import Event
from types import SimpleNamespace

import grpc
from security_rig import REFLECTION, Recorder, bearer, opened, raw, serve, texts_of, write_tokens

from oarlock.proto.methods import METHODS
from oarlock.proto.rpc import GrpcServer
from oarlock.proto.rpc.health import CHECK, MAX_WATCHES, WATCH
from oarlock.proto.rpc.reflection import MAX_STREAMS

UNKNOWN = grpc.StatusCode.UNAUTHENTICATED
SERVES = b"\x08\x01"


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


def test_strangers_who_watch_keep_out_nobody_with_a_token(tmp_path):
    path = write_tokens(tmp_path / "tokens")
    server = serve(Recorder(), token_file=path)
    full = grpc.StatusCode.RESOURCE_EXHAUSTED
    with grpc.insecure_channel(server.address) as channel:
        watch = channel.unary_stream(WATCH)
        strangers = [watch(b"", timeout=60, metadata=m) for m in ((), bearer("x" * 43)) * (MAX_WATCHES // 2)]
        assert [next(call) for call in strangers] == [SERVES] * MAX_WATCHES
        for metadata in ((), bearer("x" * 43)):
            assert raw(channel, WATCH, metadata) == (full, [])
        known = [watch(b"", timeout=60, metadata=bearer(texts_of(path)["read"])) for _ in range(MAX_WATCHES)]
        assert [next(call) for call in known] == [SERVES] * MAX_WATCHES
        # They are bounded as well, and nobody else is kept out.
        assert raw(channel, WATCH, bearer(texts_of(path)["admin"])) == (full, [])
        assert raw(channel, CHECK) == (grpc.StatusCode.OK, [SERVES])
        assert raw(channel, METHODS["Shard.Hello"].path, bearer(texts_of(path)["train"]))[0] is grpc.StatusCode.OK
        for call in (*strangers, *known):
            call.cancel()
    server.stop(0)


def test_what_reflection_adds_is_behind_the_guard_and_holds_few_threads(tmp_path, monkeypatch):
    """As the code that gRPC generates has it: methods are added in two ways, one of which goes round every guard."""
    name, over = REFLECTION.split("/")[1], Event()

    def answer(requests, context):
        yield next(requests)
        over.wait(20)

    def enable(names, server):
        handlers = {"ServerReflectionInfo": grpc.stream_stream_rpc_method_handler(answer)}
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(name, handlers),))
        server.add_registered_method_handlers(name, handlers)

    found = SimpleNamespace(SERVICE_NAME=name, enable_server_reflection=enable)
    monkeypatch.setitem(sys.modules, "grpc_reflection.v1alpha.reflection", found)
    monkeypatch.setitem(sys.modules, "grpc_reflection.v1alpha", SimpleNamespace(reflection=found))
    monkeypatch.setitem(sys.modules, "grpc_reflection", SimpleNamespace(v1alpha=found))
    path = write_tokens(tmp_path / "tokens")
    security = opened(token_file=path)
    server = GrpcServer(Recorder(), "Serving", listen="127.0.0.1:0", threads=16, security=security, stall_seconds=60)
    server.start()
    metadata = bearer(texts_of(path)["read"])
    with grpc.insecure_channel(server.address) as channel:
        for wrong in ((), bearer("x" * 43)):
            assert raw(channel, REFLECTION, wrong) == (UNKNOWN, [])
        calls = [channel.stream_stream(REFLECTION)(iter([b"x"]), metadata=metadata) for _ in range(MAX_STREAMS)]
        assert [next(call) for call in calls] == [b"x"] * MAX_STREAMS
        assert raw(channel, REFLECTION, metadata)[0] is grpc.StatusCode.RESOURCE_EXHAUSTED
        # None of them holds a thread of another call.
        assert raw(channel, METHODS["Serving.Describe"].path, metadata)[0] is grpc.StatusCode.OK
        over.set()
    server.stop(0)
