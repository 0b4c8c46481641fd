# SPDX-License-Identifier: Apache-2.0
"""Sync on the worker's side of the wire: a rank's pull as its commit, and what a successor asks (SEMANTICS section 5).

Invariant: a pull for step t + 1 goes to every shard, with or without keys, and is complete only when every block was reported at
step t by its open owner. Who finds a block past it is behind: another process has the rank, too, and is further. One event loop.

A shard's answer names a generation G. That stands for: it has adopted every change of the placement up to G, also those that do
not concern it (it is told of them as cheaply as that), and each block that is its own by them is at step t: also one that is
closed to be handed over, while one that it should own and lacks makes it wait. So the answer holds for the blocks whose record
names the shard and is not newer than G. A block that was reported stays reported, whoever owns it afterwards: blocks only go on.
For the others their owners are asked again, by a placement that is as new as all answers.
"""

import asyncio
from typing import Any

import numpy as np
from numpy.typing import NDArray

from oarlock.client.everyone import ask_everyone, is_there
from oarlock.client.exchange import NOBODY
from oarlock.client.membership import Membership
from oarlock.client.router import Routes, ShardAddress
from oarlock.proto.arrays import unpack
from oarlock.proto.bulk import Bulk, opened
from oarlock.proto.errors import Malformed, PSError, StalePlacement, Unavailable
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
        # Shards that were told, and those of them that did not answer when they were told last.
        self._told: set[ShardAddress] = set()
        self._untold: set[ShardAddress] = set()
        # The newest placement by which each shard has reported its blocks at the step.
        self._reported: dict[ShardAddress, int] = {}
        # What is known of blocks by placements before ``_routes``: bool[blocks].
        self._before: NDArray[np.bool_] | None = None
        self._routes: Routes | None = None

    async def newest(self, member: Membership) -> Routes:
        """Return a placement that is as new as all answers."""
        return await member.newer_routes(max(self._reported.values(), default=0))

    def missing(self, routes: Routes) -> list[ShardAddress]:
        """Return the shards that were not told yet, and the owners of blocks that were not reported; NOBODY among them."""
        if self._routes is not None and self._routes is not routes:
            self._before = self._covered(self._routes)
        self._routes = routes
        if self._before is None and all(
            self._reported.get(s) in (None, routes.generation) for s in routes.shards.values()
        ):
            # As most of the time: no shard has to be looked at block by block.
            found = [s for _, s in sorted(routes.shards.items()) if s not in self._reported]
            return [*found, NOBODY] if (routes.owners < 0).any() else found
        lacking = set(np.unique(routes.owners[~self._covered(routes)]).tolist())
        found = [s for _, s in sorted(routes.shards.items()) if s.id in lacking or s not in self._reported]
        return [*found, NOBODY] if NOBODY.id in lacking else found

    def _covered(self, routes: Routes) -> NDArray[np.bool_]:
        """Return bool[blocks]: which were reported."""
        covered = np.zeros(len(routes.owners), np.bool_) if self._before is None else self._before.copy()
        for shard, generation in self._reported.items():
            # What changed after the placement that is known here is not known here.
            if is_there(routes, shard) and generation <= routes.generation:
                covered |= (routes.owners == shard.id) & (routes.generations <= generation)
        return covered

    async def ask(self, member: Membership, shard: ShardAddress, sent: Bulk, timeout: float) -> Any:
        """Send a pull to a shard until it has all blocks at the step; return its answer."""
        request: PullRequest = sent.message
        self._write(request)
        while True:
            answered = await self._tell(member, shard, sent, timeout)
            reply: PullReply = opened(answered)[0]
            if not reply.waits:
                break
            await self._wait(member, shard, timeout)
        self._check(member, shard, sent, reply)
        return answered

    async def _tell(self, member: Membership, shard: ShardAddress, sent: Bulk, timeout: float) -> Any:
        """Send a request to a shard, and remember if it did not hear it."""
        self._told.add(shard)
        self._untold.discard(shard)
        try:
            return await member.transport.call(shard.address, "Shard.Pull", sent, timeout_seconds=timeout)
        except PSError:
            self._untold.add(shard)
            self._news.tell()
            raise

    def strangers(self, routes: Routes) -> list[ShardAddress]:
        """Return the shards that nobody has tried to tell so far."""
        return [s for _, s in sorted(routes.shards.items()) if s not in self._told]

    def _write(self, request: PullRequest) -> None:
        request.rank, request.state, request.samples = 1 + self.rank, self.state, self.samples

    async def _wait(self, member: Membership, shard: ShardAddress, timeout: float) -> None:
        """Ask without keys, which is little to say again and again, until the shard waits no more.

        Unavailable once there is one that did not hear of the commit, or is new: two ranks that wait where the other one was not
        heard would wait for ever.
        """
        clock = asyncio.get_running_loop().time
        begun, most = clock(), member.spec.heartbeat_seconds / 4
        while True:
            routes = member.routes
            deaf = [s.id for s in self._untold if routes is None or is_there(routes, s)]
            if deaf := deaf + [s.id for s in (self.strangers(routes) if routes is not None else ())]:
                raise Unavailable(f"shard {shard.id} waits for a step, of which shard {deaf[0]} has not heard")
            await self._news.heard(min(most, max(FIRST_SECONDS, (clock() - begun) / PART_OF_WAIT)))
            request = PullRequest(header=member.header(shard.incarnation))
            self._write(request)
            answered = await self._tell(member, shard, Bulk(request, []), timeout)
            if not opened(answered)[0].waits:
                return

    def _check(self, member: Membership, shard: ShardAddress, sent: Bulk, reply: PullReply) -> None:
        if reply.highest > self.state:
            raise Behind(f"rank {self.rank} wants step {self.state}, shard {shard.id} has blocks at {reply.highest}")
        if reply.generation > self._reported.get(shard, -1):
            self._reported[shard] = reply.generation
            self._news.tell()
        asked: PullRequest = sent.message
        routes = member.routes
        if asked.tables or any(asked.dense.shape) or routes is None or reply.generation >= routes.generation:
            return
        if shard in self.missing(routes):
            # Nothing came of it that could be used: it is asked again.
            raise StalePlacement(f"shard {shard.id} answered by placement {reply.generation}, before it got its blocks")


async def latest_step(member: Membership, routes: Routes, rank: int) -> int:
    """Return the step from which a successor of ``rank`` goes on: the highest that the rank committed, or that a block is at.

    A block that changed hands meanwhile may be missed. Its owner had the commits of what it applied, and has answered; where none
    are left of before a restore, the rank is found behind by its first pull, and asks again.
    """

    async def ask(shard: ShardAddress, timeout: float) -> int:
        request = RanksRequest(header=member.header(shard.incarnation))
        reply: RanksReply = await member.transport.call(shard.address, "Shard.Ranks", request, timeout_seconds=timeout)
        steps = unpack(reply.commits.steps, np.uint64, "commits of ranks")
        if not rank < len(steps):
            raise Malformed(f"shard {shard.id} answered commits of {len(steps)} ranks, asked for rank {rank}")
        return max(int(steps[rank]), reply.highest)

    # One that has no blocks yet may have been told of a commit, too.
    await member.refresh()
    return max(await ask_everyone(member, member.routes or routes, ask), default=0)
