# SPDX-License-Identifier: Apache-2.0
"""Clients over the wire: the same rows by frames and by gRPC, blocking and not; what breaks is mended or named in time."""

import asyncio
import socket
import threading

import grpc
import numpy as np
import pytest
import serving_rig

from oarlock.proto.errors import (
    DeadlineExceeded,
    InvalidArgument,
    Malformed,
    NotFound,
    PSError,
    Unavailable,
    UnknownTable,
)
from oarlock.proto.health_pb2 import HealthCheckRequest, HealthCheckResponse
from oarlock.proto.rpc import BlockingTransport, GrpcServer
from oarlock.proto.rpc.health import MAX_WATCHES
from oarlock.proto.serving_pb2 import LookupReply, LookupRequest, TableFound, TableLookup
from oarlock.serving.client import AsyncClient, Client, lookup_request, read_found
from oarlock.serving.service import ServingService
from oarlock.serving.swap import Serving


@pytest.fixture
def address(model, serve):
    serving = Serving(model.store)
    serving.load()
    return serve(serving)[1]


async def by_loop(address, frames, tables):
    async with AsyncClient(address, frames=frames) as client:
        return await client.lookup(tables), await client.describe()


@pytest.mark.parametrize("frames", [True, False], ids=["frames", "grpc"])
@pytest.mark.parametrize("kind", ["blocking", "asyncio"])
def test_rows_come_as_they_are_served(address, model, kind, frames):
    many = np.random.default_rng(0).choice(model.keys, 20_000)
    tables = {"user": many, "item": model.keys[:3]}
    if kind == "blocking":
        with Client(address, frames=frames) as client:
            found, described = client.lookup(tables), client.describe()
    else:
        found, described = asyncio.run(by_loop(address, frames, tables))
    assert list(found) == ["user", "item"]
    assert (found["user"] == serving_rig.value_of(1, many)[:, None]).all()
    assert found["item"].shape == (3, 16)
    assert found.missing == {"user": 0, "item": 0}
    assert (found.version.run, found.version.cut) == (0, 1)
    found["user"][0, 0] = 5.0  # whose they are now
    assert described.version.cut == 1
    assert "user: [20000, 4]" in repr(found)


def test_answers_are_not_changed_by_later_ones(address, model):
    with Client(address) as client:
        kept = [client.lookup({"item": np.full(2000, key)})["item"] for key in model.keys[:40]]
    for key, rows in zip(model.keys, kept, strict=False):
        assert (rows == serving_rig.value_of(1, np.array([key], np.uint64))).all()


def test_keys_are_any_integers_from_0_to_2_64(address):
    with Client(address) as client:
        for keys in ([7, 8], (7, 8), np.array([7, 8], np.int32), np.array([7, 8], np.uint8), range(7, 9)):
            assert client.lookup({"user": keys})["user"][:, 0].tolist() == [1007.0, 1008.0]
        assert client.lookup({"user": [0, (1 << 64) - 1]}).missing == {"user": 2}
        assert client.lookup({"user": []})["user"].shape == (0, 4)
        assert len(client.lookup({})) == 0
        for wrong in ([-1], [1 << 64], ["a"], [1.5], [[1]], np.zeros((2, 2), np.uint64), [None]):
            with pytest.raises(InvalidArgument, match="keys of user: give integers"):
                client.lookup({"user": wrong})


@pytest.mark.parametrize("frames", [True, False], ids=["frames", "grpc"])
def test_errors_are_the_servers_own(address, frames):
    with Client(address, frames=frames) as client:
        with pytest.raises(UnknownTable, match="its tables are: user, item"):
            client.lookup({"shop": [1]})
        with pytest.raises(NotFound, match="no cut older than 1"):
            client.rollback()
        assert client.lookup({"user": [7]}).version.cut == 1


def test_a_server_that_is_still_opening_is_waited_for(model, serve):
    serving = Serving(model.store)
    _, address = serve(serving)
    with Client(address, timeout_seconds=0.2) as client:
        with pytest.raises(DeadlineExceeded, match="still opening"):
            client.lookup({"user": [7]})
        opening = threading.Timer(0.05, serving.load)
        opening.start()
        assert client.lookup({"user": [7]}, timeout_seconds=60.0).version.cut == 1
        opening.join()


def test_a_server_that_comes_back_is_found_again(model):
    serving = Serving(model.store)
    serving.load()
    first = GrpcServer(ServingService(serving), "Serving", listen="127.0.0.1:0")
    address = first.start()
    with Client(address, timeout_seconds=60.0) as client:
        client.lookup({"user": [7]})
        first.stop()
        again = GrpcServer(ServingService(serving), "Serving", listen=address)
        coming = threading.Timer(0.1, again.start)
        coming.start()
        assert client.lookup({"user": [7]}).version.cut == 1
        coming.join()
        again.stop()
        with pytest.raises(DeadlineExceeded, match="the last try"):
            client.lookup({"user": [7]}, timeout_seconds=0.3)


def test_nobody_there_is_said_in_time():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with Client(address, timeout_seconds=0.3) as client, pytest.raises(DeadlineExceeded, match="in time"):
            client.lookup({"user": [1]})


class Stuck:
    """Answers nothing until it may."""

    def __init__(self):
        self.go = threading.Event()

    def lookup(self, request):
        self.go.wait(60)
        return LookupReply()


def test_a_call_ends_at_its_time_and_the_next_one_gets_its_own_answer(serve):
    stuck = Stuck()
    server = GrpcServer(stuck, "Serving", listen="127.0.0.1:0")
    address = server.start()
    transport = BlockingTransport()
    try:
        for _ in range(2):
            with pytest.raises(DeadlineExceeded):
                transport.call(address, "Serving.Lookup", lookup_request({"a": [1]}), timeout_seconds=0.1)
        stuck.go.set()
        answer = transport.call(address, "Serving.Lookup", lookup_request({}), timeout_seconds=30)
        assert answer.message == LookupReply()
        with pytest.raises(NotFound):
            transport.call(address, "Serving.Nothing", LookupRequest(), timeout_seconds=1)
    finally:
        stuck.go.set()
        transport.close()
        transport.close()
        server.stop()
    with pytest.raises(Unavailable, match="closed"):
        transport.call(address, "Serving.Lookup", LookupRequest(), timeout_seconds=1)


def test_threads_share_a_client(address, model):
    wrong = []
    with Client(address, timeout_seconds=60) as client:

        def ask(seed):
            keys = np.random.default_rng(seed).choice(model.keys, 300)
            for _ in range(20):
                if not (client.lookup({"user": keys})["user"] == serving_rig.value_of(1, keys)[:, None]).all():
                    wrong.append(seed)

        threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []


def test_an_answer_that_does_not_fit_the_question_is_refused():
    tables = {"user": np.arange(2, dtype=np.uint64)}
    with pytest.raises(Malformed, match="0 tables came, 1"):
        read_found(tables, LookupReply())
    with pytest.raises(Malformed, match="0 rows of user came for 2 keys"):
        read_found(tables, LookupReply(tables=[TableFound()]))


def test_a_client_of_other_make_needs_no_frames_and_says_no_version(address):
    with grpc.insecure_channel(address) as channel:
        lookup = channel.unary_unary(
            "/oarlock.Serving/Lookup",
            request_serializer=LookupRequest.SerializeToString,
            response_deserializer=LookupReply.FromString,
        )
        keys = lookup_request({"user": [7]}).message.tables[0].keys
        reply = lookup(LookupRequest(tables=[TableLookup(table="user", keys=keys)]), timeout=30)
    assert np.frombuffer(reply.tables[0].rows.data, "<f4").tolist() == [1007.0] * 4


def health(channel, name):
    return channel.unary_unary(
        "/grpc.health.v1.Health/Check",
        request_serializer=HealthCheckRequest.SerializeToString,
        response_deserializer=HealthCheckResponse.FromString,
    )(HealthCheckRequest(service=name), timeout=30).status


def test_health_is_that_of_the_model(model, serve):
    serving = Serving(model.store)
    _, address = serve(serving)
    with grpc.insecure_channel(address) as channel:
        watch = channel.unary_stream(
            "/grpc.health.v1.Health/Watch",
            request_serializer=HealthCheckRequest.SerializeToString,
            response_deserializer=HealthCheckResponse.FromString,
        )
        watching = watch(HealthCheckRequest(), timeout=60)
        assert next(watching).status == HealthCheckResponse.NOT_SERVING
        assert health(channel, "") == health(channel, "oarlock.Serving") == HealthCheckResponse.NOT_SERVING
        serving.load()
        assert next(watching).status == HealthCheckResponse.SERVING
        assert health(channel, "oarlock.Serving") == HealthCheckResponse.SERVING
        with pytest.raises(grpc.RpcError) as unknown:
            health(channel, "shop")
        assert unknown.value.code() is grpc.StatusCode.NOT_FOUND
        others = [watch(HealthCheckRequest(), timeout=60) for _ in range(MAX_WATCHES - 1)]
        for each in others:
            next(each)
        with pytest.raises(grpc.RpcError) as full:
            next(watch(HealthCheckRequest(), timeout=60))
        assert full.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        for each in (watching, *others):
            each.cancel()


def test_reflection_tells_of_the_service_where_it_is_installed(address):
    reflection = pytest.importorskip("grpc_reflection.v1alpha.proto_reflection_descriptor_database")
    with grpc.insecure_channel(address) as channel:
        assert "oarlock.Serving" in reflection.ProtoReflectionDescriptorDatabase(channel).get_services()


@pytest.mark.parametrize("method", ["Lookup", "Describe", "Rollback"])
def test_bytes_that_are_no_message_are_refused_by_every_method(address, method):
    with grpc.insecure_channel(address) as channel:
        with pytest.raises(grpc.RpcError) as refused:
            channel.unary_unary(f"/oarlock.Serving/{method}")(b"\xff" * 20, timeout=30)
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert f"Serving.{method}: 20 bytes that are no such message" in refused.value.details()


@pytest.mark.parametrize("frames", [True, False], ids=["frames", "grpc"])
def test_what_is_no_message_harms_nobody(address, frames):
    transport = BlockingTransport(frames=frames)

    class Garbage:
        def SerializeToString(self):
            return b"\xff\xff\xff"

    try:
        with pytest.raises(PSError) as refused:
            transport.call(address, "Serving.Lookup", Garbage(), timeout_seconds=30)  # type: ignore[arg-type]
        assert isinstance(refused.value, Malformed)
    finally:
        transport.close()
    with Client(address) as client:
        assert client.lookup({"user": [7]}).version.cut == 1
