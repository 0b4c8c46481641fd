# SPDX-License-Identifier: Apache-2.0
"""What the tests of the client's frames share: ways to ask frame_rig's handler, whose answers belong to their questions.

A conftest loads it as ``client_rig``. One event loop.
"""

import asyncio

import numpy as np
import pytest

from oarlock.proto.arrays import pack, unpack
from oarlock.proto.bulk import Bulk, opened
from oarlock.proto.common_pb2 import Header
from oarlock.proto.errors import PSError, Unavailable
from oarlock.proto.rpc import GrpcTransport
from oarlock.proto.shard_pb2 import PullRequest

SECONDS = 30


def run(body, **options):
    async def inside():
        transport = GrpcTransport(**options)
        try:
            return await body(transport)
        finally:
            await transport.close()

    return asyncio.run(inside())


async def pull(transport, address, run=5, *, values=3, seconds=SECONDS, **fields):
    """Pull; check that the answer is this call's own; return its number."""
    beside = []
    sent = np.full(values, run, np.float32)
    request = PullRequest(header=Header(run=run), dense=pack(sent, beside), **fields)
    answer = await transport.call(address, "Shard.Pull", Bulk(request, beside), timeout_seconds=seconds)
    reply, parts = opened(answer)
    assert np.array_equal(unpack(reply.dense, np.float32, "dense", parts=parts), sent * 2)
    assert reply.pushes == run
    return run


async def failure(awaitable):
    with pytest.raises(PSError) as caught:
        await awaitable
    return caught.value


async def again(ask, times=100):
    """Return ``await ask()``, asked anew where the connection had broken."""
    for _ in range(times - 1):
        try:
            return await ask()
        except Unavailable:
            await asyncio.sleep(0)
    return await ask()


async def until(condition):
    """Wait for what another thread does."""
    async with asyncio.timeout(SECONDS):
        while not condition():
            await asyncio.sleep(0)


async def entered(handler):
    await until(lambda: handler.entered.acquire(blocking=False))


def by_frames(server):
    """Return how many connections for frames, and how many streams, are open."""
    calls = server.open_calls()
    return calls["frames"], calls["stream"]
