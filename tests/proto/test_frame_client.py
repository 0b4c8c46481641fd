# SPDX-License-Identifier: Apache-2.0
"""The client's side of frames: calls that end early, servers that are slow or new, and that nobody gets the answer of somebody
else."""

import asyncio
import contextlib
import random
import socket

import pytest
from client_rig import SECONDS, again, by_frames, entered, failure, pull, run
from frame_rig import serve

from oarlock.proto import frames
from oarlock.proto.common_pb2 import Header, SocketsReply
from oarlock.proto.errors import DeadlineExceeded, StalePlacement, Unavailable
from oarlock.proto.rpc.frame_client import CONNECTIONS, FramePeer
from oarlock.proto.rpc.sockets import ABSTRACT
from oarlock.proto.shard_pb2 import PullReply, PullRequest


def test_calls_travel_on_a_few_connections(server):
    async def body(transport):
        got = await asyncio.gather(*(pull(transport, server.address, n, values=2000) for n in range(1, 60)))
        assert got == list(range(1, 60))
        return by_frames(server)

    connections, streams = run(body)
    assert 1 <= connections <= CONNECTIONS
    assert streams == 0


def test_answers_never_shift_between_callers(server, handler, seed):
    """Sizes, timeouts, cancellations and failures drawn at random: whoever gets an answer gets their own."""
    rng = random.Random(seed)
    handler.hold(*range(1000, 1012))

    async def one(transport, number):
        kind = rng.random()
        values = rng.choice((1, 300, 5000, 400_000))
        if kind < 0.1:
            assert type(await failure(pull(transport, server.address, number, values=values, seconds=1e-4))) in (
                DeadlineExceeded,
                Unavailable,
            )
        elif kind < 0.3:
            task = asyncio.ensure_future(pull(transport, server.address, number, values=values))
            for _ in range(rng.randrange(40)):
                await asyncio.sleep(0)
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, Unavailable):
                await task
        elif kind < 0.4:
            assert type(await failure(pull(transport, server.address, number, number=7))) is StalePlacement
        else:
            await again(lambda: pull(transport, server.address, number, values=values))

    async def body(transport):
        await asyncio.gather(*(one(transport, n) for n in range(1, 250)))
        await pull(transport, server.address, 9)
        return by_frames(server)

    assert run(body)[1] == 0


def test_a_timeout_closes_its_connection_alone(server, handler):
    handler.hold(3)

    async def body(transport):
        await pull(transport, server.address)
        error = await failure(pull(transport, server.address, 3, seconds=0.05))
        assert type(error) is DeadlineExceeded
        assert "Shard.Pull at" in error.message
        for number in range(10, 20):
            await pull(transport, server.address, number)
        handler.gate.set()
        await pull(transport, server.address, 21)
        assert by_frames(server)[1] == 0

    run(body)


@pytest.mark.parametrize("waiting", [1, CONNECTIONS, 3 * CONNECTIONS])
def test_cancelled_calls_give_back_their_places(server, handler, waiting):
    handler.hold(3)

    async def body(transport):
        calls = [asyncio.ensure_future(pull(transport, server.address, 3)) for _ in range(waiting)]
        for _ in range(min(waiting, CONNECTIONS)):
            await entered(handler)
        for each in calls:
            each.cancel()
        assert all(isinstance(e, asyncio.CancelledError) for e in await asyncio.gather(*calls, return_exceptions=True))
        handler.gate.set()
        await asyncio.gather(*(pull(transport, server.address, n) for n in range(10, 30)))

    run(body)


def test_a_slow_process_keeps_no_other_waiting(server, handler):
    """Each of 80 slow ones has all the calls that it takes, as many as 320 exchanges; another one answers at once."""
    handler.hold(3)
    deaf = socket.socket(socket.AF_UNIX)
    deaf.bind(f"\0oarlock-deaf-{random.getrandbits(64)}")
    deaf.listen(512)
    offer = SocketsReply(addresses=[ABSTRACT + deaf.getsockname()[1:].decode()], token=b"x")

    async def asked():
        return offer

    async def body(transport):
        slow = [FramePeer(f"slow-{n}", asked) for n in range(80)]
        calls = [asyncio.ensure_future(peer.call([], "m", SECONDS)) for peer in slow for _ in range(CONNECTIONS)]
        for _ in range(5):
            await asyncio.sleep(0)
        assert await pull(transport, server.address) == 5
        assert not any(c.done() for c in calls)
        for each in calls:
            each.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
        await asyncio.gather(*(peer.close() for peer in slow))

    with deaf:
        run(body)


def test_a_server_that_is_another_one_at_the_same_address(handler, tmp_path):
    listen = f"unix:{tmp_path}/s"
    first = serve(handler, listen)

    async def body(transport):
        await asyncio.gather(*(pull(transport, listen, n) for n in range(1, 9)))
        first.stop(0)
        second = serve(handler, listen)
        try:
            # One call notices, and ends all that were idle: nobody else meets a connection of the first one.
            assert type(await failure(pull(transport, listen))) is Unavailable
            await asyncio.gather(*(pull(transport, listen, n) for n in range(1, 9)))
            return by_frames(second)
        finally:
            second.stop(0)

    connections, streams = run(body)
    assert connections >= 1
    assert streams == 0


def test_an_offer_of_a_process_that_is_gone_is_asked_for_anew(server):
    """Nothing was open that could have told."""
    offers = []

    async def body(transport):
        async def ask():
            real = await transport._peers[server.address]._ask()
            if not offers:
                real = SocketsReply(addresses=real.addresses, token=b"y" * 16)
            offers.append(real)
            return real

        await pull(transport, server.address)
        peer = FramePeer(server.address, ask)
        peer._offer = await ask()
        try:
            request = PullRequest(header=Header(run=3)).SerializeToString()
            frame = await peer.call(frames.encode(frames.PULL, request), "Shard.Pull", SECONDS)
            assert PullReply.FromString(frame.message).pushes == 3
            assert len(offers) == 2
        finally:
            await peer.close()

    run(body)
