# SPDX-License-Identifier: Apache-2.0
"""The contract of a transport, over TCP and a unix socket, by frames and by gRPC alone, and in one process: the same calls give
the same results."""

import asyncio

import numpy as np
import pytest

from oarlock import __version__
from oarlock.proto.arrays import pack, unpack
from oarlock.proto.bulk import Bulk, opened
from oarlock.proto.common_pb2 import Header, HelloReply, HelloRequest
from oarlock.proto.errors import (
    CODES,
    Internal,
    LeaseLost,
    NotFound,
    OutOfMemory,
    PSError,
    StalePlacement,
    Unavailable,
    VersionMismatch,
)
from oarlock.proto.methods import METHODS, PROTOCOL
from oarlock.proto.shard_pb2 import MarksReply, MarksRequest, PullReply, PullRequest, PushReply, PushRequest
from oarlock.proto.version import hello


class Handler:
    """Answers some methods; ``failing`` is raised by pull (a stream) and marks (a call)."""

    def __init__(self, failing=None):
        self.failing = failing
        self.seen = []

    def hello(self, request):
        return hello(request, "shard", __version__)

    def marks(self, request):
        if self.failing:
            raise self.failing
        return MarksReply(next=[s + 1 for s in request.splits])

    def pull(self, request):
        self.seen.append(request.header.run)
        if self.failing and request.header.run == 0:
            raise self.failing
        return PullReply(rows=[t.keys for t in request.tables], dense=request.dense, pushes=request.header.run)

    def push(self, request):
        return PushReply(applied=request.group, moved=request.tables[0].keys.blocks if request.tables else None)


async def outcome(transport, address, method, request):
    try:
        return await transport.call(address, method, request, timeout_seconds=10)
    except PSError as error:
        return error


def test_a_call_and_a_stream_carry_messages_whole(run):
    values = np.arange(30000, dtype=np.float32).reshape(-1, 3)

    async def body(transport, address):
        dense = pack(values)
        pulled = await transport.call(address, "Shard.Pull", PullRequest(dense=dense), timeout_seconds=10)
        assert np.array_equal(unpack(pulled.dense, np.float32, "dense", dims=2), values)
        marks = await transport.call(address, "Shard.Marks", MarksRequest(splits=[3, 7]), timeout_seconds=10)
        assert list(marks.next) == [4, 8]

    run(Handler(), body)


class BulkHandler:
    """Answers with twice the dense array and the tables' keys, beside the message if that is how they came."""

    def pull(self, sent):
        request, parts = opened(sent)
        beside = [] if isinstance(sent, Bulk) else None
        reply = PullReply(dense=pack(unpack(request.dense, np.float32, "dense", parts=parts) * 2, beside))
        for table in request.tables:
            reply.rows.append(pack(unpack(table.keys, np.uint64, "keys", parts=parts), beside))
        return reply if beside is None else Bulk(reply, beside)


@pytest.mark.parametrize("bulk", [False, True])
@pytest.mark.parametrize("size", [0, 1, 255, 256, 100_000])
def test_arrays_beside_a_message_arrive_as_those_within(run, bulk, size):
    """255 float32 are copied into the message, 256 travel beside it."""
    values, keys = np.arange(size, dtype=np.float32), [np.arange(n, dtype=np.uint64) for n in (3, 2000)]

    async def body(transport, address):
        beside = [] if bulk else None
        request = PullRequest(dense=pack(values, beside), tables=[{"keys": pack(k, beside)} for k in keys])
        sent = Bulk(request, beside) if bulk else request
        answer = await transport.call(address, "Shard.Pull", sent, timeout_seconds=10)
        assert isinstance(answer, Bulk) is bulk
        reply, parts = opened(answer)
        assert np.array_equal(unpack(reply.dense, np.float32, "dense", parts=parts), values * 2)
        for row, wanted in zip(reply.rows, keys, strict=True):
            assert np.array_equal(unpack(row, np.uint64, "keys", parts=parts), wanted)

    run(BulkHandler(), body)


def test_many_calls_at_once_get_their_own_answers(run):
    async def body(transport, address):
        pulls = [outcome(transport, address, "Shard.Pull", PullRequest(header=Header(run=i))) for i in range(1, 101)]
        pushes = [outcome(transport, address, "Shard.Push", PushRequest(group=i)) for i in range(100)]
        answers = await asyncio.gather(*pulls, *pushes)
        assert [a.pushes for a in answers[:100]] == list(range(1, 101))
        assert [a.applied for a in answers[100:]] == list(range(100))

    handler = Handler()
    run(handler, body)
    assert sorted(handler.seen) == list(range(1, 101))


@pytest.mark.parametrize("method", ["Shard.Marks", "Shard.Pull"])
@pytest.mark.parametrize("kind", CODES.values(), ids=lambda kind: kind.__name__)
def test_every_error_arrives_as_it_was_raised(run, kind, method):
    sent = kind(
        "block 7 of tåble\n'user' is elsewhere", block=7, table="user", generation=1 << 40, message="x", self=None
    )
    request = MarksRequest() if method == "Shard.Marks" else PullRequest()

    async def body(transport, address):
        return await outcome(transport, address, method, request)

    got = run(Handler(sent), body)
    assert type(got) is kind
    assert (got.message, got.details, got.retryable) == (sent.message, sent.details, sent.retryable)


def test_numbers_of_numpy_arrive_as_numbers(run):
    sent = StalePlacement("moved", block=np.int32(7), share=np.float64(0.5))

    async def body(transport, address):
        return [await outcome(transport, address, m, r) for m, r in CALLS]

    for got in run(Handler(sent), body):
        assert got.details == {"block": 7, "share": 0.5}


CALLS = [("Shard.Marks", MarksRequest()), ("Shard.Pull", PullRequest())]


@pytest.mark.parametrize(
    "letter", ["x", "é", "\n", "\U0001f6a3", "\udc80"], ids=["x", "accent", "newline", "boat", "half"]
)
@pytest.mark.parametrize("length", [100, 3000, 100000])
def test_a_long_error_is_cut_but_keeps_its_class(run, letter, length):
    sent = LeaseLost(letter * length, block=3)

    async def body(transport, address):
        return [await outcome(transport, address, m, r) for m, r in CALLS]

    for got in run(Handler(sent), body):
        assert type(got) is LeaseLost
        assert got.details == {"block": 3}
        start = letter.encode("utf-8", "replace").decode()
        assert got.message[:100] == start * 100 or got.message == sent.message


@pytest.mark.parametrize(
    ("raised", "kind"), [(ValueError("odd"), Internal), (MemoryError(), OutOfMemory), (KeyError(3), Internal)]
)
def test_what_is_no_error_of_ours_becomes_one(run, raised, kind):
    async def body(transport, address):
        first = [await outcome(transport, address, m, r) for m, r in CALLS]
        # The server, and the same stream, live on.
        after = await outcome(transport, address, "Shard.Pull", PullRequest(header=Header(run=5)))
        return first, after

    first, after = run(Handler(raised), body)
    assert [type(e) for e in first] == [kind, kind]
    assert all("Shard." in e.message and "\n" not in e.message for e in first)
    assert after.pushes == 5


def test_a_failed_stream_call_fails_alone(run):
    async def body(transport, address):
        requests = [PullRequest(header=Header(run=i % 3)) for i in range(30)]
        return await asyncio.gather(*(outcome(transport, address, "Shard.Pull", r) for r in requests))

    answers = run(Handler(StalePlacement("moved", block=1)), body)
    assert [type(a) is StalePlacement for a in answers] == [i % 3 == 0 for i in range(30)]
    assert [a.pushes for i, a in enumerate(answers) if i % 3] == [i % 3 for i in range(30) if i % 3]


def test_a_method_that_the_process_has_not_is_not_found(run):
    async def body(transport, address):
        adopt = METHODS["Shard.Adopt"].request()
        return [
            await outcome(transport, address, "Shard.Adopt", adopt),
            await outcome(transport, address, "Shard.Nothing", adopt),
        ]

    got = run(Handler(), body)
    assert [type(e) for e in got] == [NotFound, NotFound]
    assert "Shard.Adopt" in got[0].message
    assert "Shard.Nothing" in got[1].message


def test_versions_must_agree(run):
    async def body(transport, address):
        return [
            await outcome(transport, address, "Shard.Hello", HelloRequest(protocol=p, version="9.9"))
            for p in (PROTOCOL, PROTOCOL + 1, 0)
        ]

    same, newer, absent = run(Handler(), body)
    assert same == HelloReply(protocol=PROTOCOL, version=__version__, role="shard")
    for got, number in ((newer, PROTOCOL + 1), (absent, 0)):
        assert type(got) is VersionMismatch
        assert f"protocol {number}" in got.message
        assert "install the same release" in got.message


def test_a_closed_transport_is_unavailable_and_may_be_closed_again(run):
    async def body(transport, address):
        assert (await outcome(transport, address, "Shard.Pull", PullRequest(header=Header(run=5)))).pushes == 5
        await transport.close()
        await transport.close()
        return [await outcome(transport, address, m, r) for m, r in CALLS]

    got = run(Handler(), body)
    assert [type(e) for e in got] == [Unavailable, Unavailable]


def test_nobody_at_the_address_is_unavailable(run):
    async def body(transport, address):
        nowhere = "nowhere" if address == "here" else f"unix:{address.replace(':', '_')}.none"
        return [await outcome(transport, nowhere, m, r) for m, r in CALLS]

    got = run(Handler(), body)
    assert [type(e) for e in got] == [Unavailable, Unavailable]
    assert all(e.retryable for e in got)


@pytest.fixture
def small_limit(monkeypatch):
    monkeypatch.setattr("oarlock.proto.arrays.MAX_MESSAGE_BYTES", 1 << 16)


@pytest.mark.usefixtures("small_limit")
def test_replies_too_large_for_a_message_fail_alone(tcp):
    class Large(Handler):
        def pull(self, request):
            return PullReply(pushes=5) if request.header.run else PullReply(dense={"data": bytes(1 << 16)})

    async def body(transport, address):
        runs = (1, 0, 1)
        calls = (outcome(transport, address, "Shard.Pull", PullRequest(header=Header(run=r))) for r in runs)
        return await asyncio.gather(*calls)

    first, large, last = tcp(Large(), body)
    assert (first.pushes, last.pushes) == (5, 5)
    assert type(large) is OutOfMemory
    assert "Shard.Pull: the reply is 65544 bytes, over the limit of 65536" in large.message


@pytest.mark.usefixtures("small_limit")
@pytest.mark.parametrize("method", ["Shard.Marks", "Shard.Pull"])
def test_requests_too_large_for_a_message_are_not_sent(tcp, method):
    async def body(transport, address):
        large = Header(job=bytes(1 << 16))
        request = MarksRequest(header=large) if method == "Shard.Marks" else PullRequest(header=large)
        waiting = asyncio.ensure_future(outcome(transport, address, "Shard.Pull", PullRequest(header=Header(run=6))))
        refused = await outcome(transport, address, method, request)
        return (
            refused,
            await waiting,
            await outcome(transport, address, "Shard.Pull", PullRequest(header=Header(run=5))),
        )

    refused, waiting, after = tcp(Handler(), body)
    assert type(refused) is OutOfMemory
    assert "over the limit of 65536 bytes" in refused.message
    assert "\n" not in refused.message
    assert (waiting.pushes, after.pushes) == (6, 5)
