# SPDX-License-Identifier: Apache-2.0
"""Sync on the worker's side of the wire: a rank's pull as its commit, and what a successor asks (SEMANTICS section 5).

Invariant: a pull for step t + 1 goes to every shard, with or without keys, and is complete only when every shard has answered
that all of its blocks, by the placement that the sender knows, are at step t. Who finds a block past it is behind: another
process has the rank, too, and is further. One event loop.
"""

import asyncio
from typing import Any

import numpy as np

from oarlock.client.membership import Membership
from oarlock.client.router import Routes, ShardAddress
from oarlock.proto.arrays import unpack
from oarlock.proto.bulk import Bulk, opened
from oarlock.proto.errors import Malformed, StalePlacement
from oarlock.proto.shard_pb2 import PullReply, PullRequest, RanksReply, RanksRequest

# The first pause before a shard is asked again; later ones are a part of the time waited, so that little is waited for nothing.
FIRST_SECONDS = 0.0005
PART_OF_WAIT = 8


class Behind(Exception):
    """The blocks are past the step that a rank wants the rows of: it has to begin again from where they are."""


class News:
    """Wakes those who wait for a step when one of them learns that it was applied somewhere."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def tell(self) -> None:
        self._event.set()
        self._event = asyncio.Event()

    async def heard(self, seconds: float) -> None:
        """Wait for news, but no longer than ``seconds``."""
        waiting = asyncio.ensure_future(self._event.wait())
        try:
            await asyncio.wait([waiting], timeout=seconds)
        finally:
            waiting.cancel()


class Commit:
    """The commit of step ``state`` by rank ``rank``, which trained ``samples`` at it; of one pull."""

    def __init__(self, rank: int, state: int, samples: int, news: News) -> None:
        self.rank = rank
        self.state = state
        self.samples = samples
        self._news = news
        # Shards all of whose blocks were reported at the step, and the placement by which they were.
        self._reported: set[int] = set()
        self._generation = -1

    def missing(self, routes: Routes) -> list[ShardAddress]:
        """Return the shards that have not yet reported their blocks of this placement."""
        if routes.generation != self._generation:
            self._reported.clear()
        return [shard for number, shard in sorted(routes.shards.items()) if number not in self._reported]

    async def ask(self, member: Membership, shard: ShardAddress, sent: Bulk, timeout: float) -> Any:
        """Send a pull to a shard until it has all blocks at the step; return its answer."""
        request: PullRequest = sent.message
        self._write(request)
        while True:
            answered = await member.transport.call(shard.address, "Shard.Pull", sent, timeout_seconds=timeout)
            reply: PullReply = opened(answered)[0]
            if not reply.waits:
                break
            await self._wait(member, shard, timeout)
        self._check(member, shard, reply)
        return answered

    def _write(self, request: PullRequest) -> None:
        request.rank, request.state, request.samples = 1 + self.rank, self.state, self.samples

    async def _wait(self, member: Membership, shard: ShardAddress, timeout: float) -> None:
        """Ask without keys, which is little to say again and again, until the shard waits no more."""
        clock = asyncio.get_running_loop().time
        begun, most = clock(), member.spec.heartbeat_seconds / 4
        while True:
            await self._news.heard(min(most, max(FIRST_SECONDS, (clock() - begun) / PART_OF_WAIT)))
            request = PullRequest(header=member.header(shard.incarnation))
            self._write(request)
            answered = await member.transport.call(
                shard.address, "Shard.Pull", Bulk(request, []), timeout_seconds=timeout
            )
            if not opened(answered)[0].waits:
                return

    def _check(self, member: Membership, shard: ShardAddress, reply: PullReply) -> None:
        if reply.highest > self.state:
            raise Behind(f"rank {self.rank} wants step {self.state}, shard {shard.id} has blocks at {reply.highest}")
        routes = member.routes
        if routes is None or reply.generation != routes.generation:
            raise StalePlacement(f"shard {shard.id} answered by placement {reply.generation}, not by the one asked by")
        if self._generation != routes.generation:
            self._reported.clear()
            self._generation = routes.generation
        self._reported.add(shard.id)
        self._news.tell()


async def latest_step(member: Membership, routes: Routes, rank: int) -> int:
    """Return the step from which a successor of ``rank`` goes on: the highest that the rank committed, or that a block is at."""

    async def ask(shard: ShardAddress) -> int:
        async def attempt(timeout: float) -> RanksReply:
            request = RanksRequest(header=member.header(shard.incarnation))
            reply: RanksReply = await member.transport.call(
                shard.address, "Shard.Ranks", request, timeout_seconds=timeout
            )
            return reply

        reply = await member.retry.run(attempt, rng=member.rng)
        steps = unpack(reply.commits.steps, np.uint64, "commits of ranks")
        if not rank < len(steps):
            raise Malformed(f"shard {shard.id} answered commits of {len(steps)} ranks, asked for rank {rank}")
        return max(int(steps[rank]), reply.highest)

    return max(await asyncio.gather(*map(ask, routes.shards.values())), default=0)
