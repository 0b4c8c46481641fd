# SPDX-License-Identifier: Apache-2.0
"""What both sides of the wire count of a request: bytes, failures by name, calls that are open."""

import asyncio
import threading

import pytest

from oarlock.proto.common_pb2 import HelloReply, HelloRequest
from oarlock.proto.errors import Malformed, NotFound, Unavailable
from oarlock.proto.rpc import GrpcServer, GrpcTransport
from oarlock.proto.rpc.counts import Counts
from oarlock.proto.shard_pb2 import PullReply, PullRequest


class Handler:
    def hello(self, request: HelloRequest) -> HelloReply:
        return HelloReply(role="shard")

    def pull(self, request: PullRequest) -> PullReply:
        if request.number:
            raise Malformed("no")
        return PullReply(pushes=3)


def test_both_sides_count_the_same_bytes() -> None:
    server = GrpcServer(Handler(), "Shard", listen="127.0.0.1:0", threads=16)
    address = server.start()
    transport = GrpcTransport()
    good, bad, hello = PullRequest(), PullRequest(number=5), HelloRequest(protocol=1)

    async def body() -> dict[str, int]:
        try:
            for request in (good, good, bad):
                try:
                    await transport.call(address, "Shard.Pull", request, timeout_seconds=30)
                except Malformed:
                    assert request is bad
            await transport.call(address, "Shard.Hello", hello, timeout_seconds=30)
            with pytest.raises(NotFound):
                await transport.call(address, "Shard.Nothing", hello, timeout_seconds=30)
            with pytest.raises(Unavailable):
                await transport.call("127.0.0.1:1", "Shard.Hello", hello, timeout_seconds=30)
            assert transport.connections == 2
            return server.open_calls()
        finally:
            await transport.close()

    try:
        assert asyncio.run(body())["frames"] == 1
    finally:
        server.stop()
    assert server.open_calls() == {"stream": 0, "single": 0, "frames": 0}
    served, called = server.counts.all(), transport.counts.all()
    assert sorted(served) == sorted(called) == ["Shard.Hello", "Shard.Pull", "Wire.Sockets"]
    pulls, asked = served["Shard.Pull"], called["Shard.Pull"]
    assert (pulls.requests, asked.requests) == (3, 3)
    assert pulls.failures == asked.failures == {"Malformed": 1}
    assert pulls.received == asked.sent == 2 * good.ByteSize() + bad.ByteSize()
    assert pulls.sent == 2 * PullReply(pushes=3).ByteSize()
    # A refusal's own bytes come on top where it travels as an answer.
    assert asked.received > pulls.sent
    assert 0 < pulls.seconds < asked.seconds
    greetings = called["Shard.Hello"]
    assert (greetings.requests, greetings.failures) == (2, {"Unavailable": 1})
    assert greetings.received == HelloReply(role="shard").ByteSize()


def test_no_count_is_lost_between_threads() -> None:
    counts = Counts()

    def count() -> None:
        for _ in range(2000):
            counts.of("Shard.Pull").add(2, 3, 0.5, Unavailable("not now"))

    threads = [threading.Thread(target=count) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = counts.all()["Shard.Pull"]
    assert (found.requests, found.received, found.sent, found.seconds) == (16000, 32000, 48000, 8000.0)
    assert found.failures == {"Unavailable": 16000}


def test_a_request_is_counted_under_the_lock() -> None:
    count = Counts().of("Shard.Pull")

    class Watched(int):
        """A number that sees whether it is added while others are kept out."""

        def __radd__(self, other: int) -> int:
            assert count.lock.locked()
            return other + int(self)

    count.add(Watched(2), Watched(3), 0.5)
    assert (count.received, count.sent) == (2, 3)
    assert not count.lock.locked()
