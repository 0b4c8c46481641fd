# SPDX-License-Identifier: Apache-2.0
"""A real shard with a small memory for requests, and those who want all of it: large frames, claims without bodies, frames that
stop before their last byte, readers that never read. Its resident memory stays below what docs/wire.md says, and workers are
served."""

import asyncio
import contextlib
import resource
import threading
import time

import numpy as np
import pytest

from oarlock.benchmarks import overload, overload_peer
from oarlock.proto import frames
from oarlock.proto.arrays import pack
from oarlock.proto.common_pb2 import SocketsRequest
from oarlock.proto.errors import DeadlineExceeded, Unavailable
from oarlock.proto.methods import PROTOCOL
from oarlock.proto.rpc import GrpcTransport
from oarlock.proto.rpc.sockets import connect
from oarlock.proto.shard_pb2 import PushRequest, TableGradients, TableKeys

pytestmark = pytest.mark.slow

LIMIT = 64 << 20
# Above tables and limit: kept buffers of answers, threads, and what one large message needs above its share.
BESIDE = 128 << 20
LARGE = 48 << 20


@pytest.fixture(autouse=True)
def many_files():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 4096)), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.fixture
def shard():
    peer = overload.Peer("shard", str(LIMIT))
    address = peer.hear()
    first = peer.resident()
    watched = overload.Watched(peer)
    try:
        yield address, lambda: watched.most - first - peer.ask(0.0)["tables"]
    finally:
        watched.close()
        peer.close()


def offer_of(address):
    async def ask():
        transport = GrpcTransport()
        try:
            request = SocketsRequest(protocol=PROTOCOL)
            return await transport.call(address, "Wire.Sockets", request, timeout_seconds=20)
        finally:
            await transport.close()

    return asyncio.run(ask())


def dial(offer, address, number):
    """Return a connection that was let in."""
    made = connect(offer.addresses[number % 2], address)
    frames.send(made, frames.encode(frames.HELLO, offer.token))
    assert frames.Receiver(made).receive().kind == frames.REPLY
    made.settimeout(30)
    return made


def trains(address, calls=20):
    """A worker pushes and pulls; it is answered, or refused and comes again."""

    async def body():
        caller = overload_peer.Caller(address, 7)
        done = 0
        end = time.monotonic() + 60
        try:
            while done < calls:
                try:
                    await caller.call()
                    done += 1
                except (Unavailable, DeadlineExceeded):
                    # The errors that are sent again; any other one ends the test.
                    pass
                assert time.monotonic() < end
        finally:
            await caller.transport.close()

    asyncio.run(body())
    return True


def large_frame():
    """A push that is believed until it is read, of 48 MiB."""
    beside = []
    keys = pack(np.arange(LARGE // 8, dtype=np.uint64), beside)
    return frames.encode(
        frames.PUSH | frames.BESIDE,
        PushRequest(split=1, tables=[TableGradients(keys=TableKeys(keys=keys))]).SerializeToString(),
        beside,
    )


def beside_attackers(number, attack):
    """Run ``attack(n)`` in a thread each while the caller goes on; its end is theirs."""

    @contextlib.contextmanager
    def running():
        threads = [threading.Thread(target=attack, args=(n,)) for n in range(number)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            for thread in threads:
                thread.join()

    return running()


def test_a_crowd_of_large_frames(shard):
    """Forty at a time, three each: more than a gigabyte."""
    address, grown = shard
    offer, frame = offer_of(address), large_frame()

    def attack(number):
        with contextlib.suppress(OSError, frames.Closed), dial(offer, address, number) as one:
            for _ in range(3):
                frames.send(one, frame)
                assert frames.Receiver(one).receive().kind == frames.REPLY

    with beside_attackers(40, attack):
        assert trains(address)
    assert trains(address)
    print(f"large frames: {grown() >> 20} MiB")
    assert grown() < LIMIT + BESIDE


@pytest.mark.parametrize("missing", ["all", "one byte"])
def test_claims_whose_bodies_do_not_come(shard, missing):
    """Sixty connections, most of which have sent all of 48 MiB but the last byte, or nothing at all."""
    address, grown = shard
    offer = offer_of(address)
    head, *rest = large_frame()
    with contextlib.ExitStack() as stack:
        made = [stack.enter_context(dial(offer, address, n)) for n in range(60)]

        def attack(number):
            with contextlib.suppress(OSError):
                made[number].settimeout(10)
                frames.send(made[number], [head, *rest[:-1], rest[-1][:-1]] if missing == "one byte" else [head])

        with beside_attackers(60, attack):
            assert trains(address)
        assert trains(address)
    print(f"claims without {missing}: {grown() >> 20} MiB")
    assert grown() < LIMIT + BESIDE


def test_readers_that_never_read(shard):
    """Two hundred answers of 1 MiB and more that nobody takes."""
    address, grown = shard
    offer = offer_of(address)
    caller = overload_peer.Caller(address, 3)
    pull = caller._pull
    buffers = frames.encode(frames.PULL | frames.BESIDE, pull.message.SerializeToString(), pull.parts)
    with contextlib.ExitStack() as stack:
        for number in range(120):
            one = stack.enter_context(dial(offer, address, number))
            # All that the system takes.
            one.settimeout(0)
            with contextlib.suppress(OSError):
                while True:
                    frames.send(one, buffers)
        assert trains(address)
    asyncio.run(caller.transport.close())
    assert trains(address)
    print(f"readers that never read: {grown() >> 20} MiB")
    assert grown() < LIMIT + BESIDE
