# SPDX-License-Identifier: Apache-2.0
"""Orders: what the coordinator wants of shards, sent until it is done or the shard is gone.

Invariant: an order names the placement generation, run and incarnation it is meant for, so a late one does no harm. One event
loop beside the service's threads.
"""

import asyncio
import logging
from collections import Counter
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

from oarlock.client.closed import SPLIT_WINDOW, ClosedSet
from oarlock.client.job import OVER, STOPPED, STOPPING, TRAINING
from oarlock.client.router import ShardAddress, pack_placement
from oarlock.cluster.coordinator import Coordinator
from oarlock.cluster.cutting import WRITE_SECONDS, Cutting
from oarlock.proto.common_pb2 import Header
from oarlock.proto.errors import PSError
from oarlock.proto.methods import PROTOCOL
from oarlock.proto.shard_pb2 import AdoptRequest, CloseRequest
from oarlock.proto.transport import Transport
from oarlock.telemetry.stages import Stages

logger = logging.getLogger(__name__)

ORDER_SECONDS = 30.0


class Orders:
    """Carries out the coordinator's decisions; ``step()`` looks once at what is to be done."""

    def __init__(
        self, coordinator: Coordinator, transport: Transport, checkpoints: Path, *, executor: Executor | None = None
    ) -> None:
        self._coordinator = coordinator
        self._transport = transport
        self._told: dict[int, ClosedSet] = {}
        self._told_generation = 0
        self._told_floor = 0
        self._tell_again = 0.0
        # (order, "done" or "failed"), of this process; one that comes before its time is neither.
        self.counts: Counter[tuple[str, str]] = Counter()
        self.stages = Stages()
        self.cutting = Cutting(coordinator, checkpoints, self._send, self._header, self.stages, executor)

    def _header(self, shard: ShardAddress) -> Header:
        c = self._coordinator
        return Header(
            protocol=PROTOCOL,
            job=c.spec.job_bytes,
            run=c.run,
            target=shard.incarnation,
            generation=c.generation,
            term=c.term,
        )

    async def _send(self, shard: ShardAddress, order: str, request: Any, seconds: float) -> Any:
        try:
            with self.stages.time(order.lower(), shard=shard.id):
                reply = await self._transport.call(shard.address, f"Shard.{order}", request, timeout_seconds=seconds)
        except PSError as error:
            # What only has to be waited for did not fail: it is asked again and again.
            if not error.details.get("not_yet"):
                self.counts[order.lower(), "failed"] += 1
            raise
        self.counts[order.lower(), "done"] += 1
        return reply

    async def step(self) -> None:
        """Do what is to be done now; errors that a later step may mend are logged."""
        c = self._coordinator
        if c.phase in OVER:
            return
        if c.shards and not c.placed:
            await self._adopt()
        if c.placed:
            await self._tell_closed()
        # An epoch that is all evaluated is not left open by its last moment.
        if c.phase == STOPPING and c.stop_wanted is False and not c.members.alive("worker") and not c.merging:
            c.set_phase(STOPPED, c.stop_reason)

    async def _adopt(self) -> None:
        c = self._coordinator
        with c.lock:
            generation = c.generation
            placement = pack_placement(generation, c.owners, c.shards)
            closed = c.work.closed.pack()
            waiting = [s for s in c.shards.values() if s.id not in c.adopted]

        async def one(shard: ShardAddress) -> None:
            request = AdoptRequest(header=self._header(shard), placement=placement, closed=closed, restore=c.restore)
            await self._send(shard, "Adopt", request, WRITE_SECONDS)
            c.has_adopted(shard.id, generation)

        for shard, result in zip(
            waiting, await asyncio.gather(*map(one, waiting), return_exceptions=True), strict=True
        ):
            if isinstance(result, PSError) and generation != c.generation:
                logger.info("event=order_outlived order=adopt shard=%d error=%s", shard.id, result)
            elif isinstance(result, PSError) and not result.retryable:
                c.fail(f"shard {shard.id} could not take its blocks: {result}")
            elif isinstance(result, PSError):
                logger.info("event=order_failed order=adopt shard=%d error=%s", shard.id, result)
            elif isinstance(result, BaseException):
                raise result

    async def _tell_closed(self) -> None:
        """Tell shards which splits are closed, so that they forget the marks; a lost message is sent with the next one."""
        c = self._coordinator
        with c.lock:
            now = ClosedSet(c.work.closed.floor, c.work.closed.above)
            if self._told_generation != c.generation:
                self._told, self._told_generation = {}, c.generation
            behind = [s for s in c.shards.values() if self._told.get(s.id) != now]
            # Marks are kept a little longer for it; shards refuse pushes too far above what they know to be closed.
            soon = c.clock() < self._tell_again and c.phase == TRAINING
            if not behind or (soon and now.floor - self._told_floor < SPLIT_WINDOW // 8):
                return
            self._tell_again, self._told_floor = c.clock() + c.spec.heartbeat_seconds, now.floor

        async def one(shard: ShardAddress) -> None:
            request = CloseRequest(header=self._header(shard), closed=now.pack())
            await self._send(shard, "Close", request, ORDER_SECONDS)
            self._told[shard.id] = now

        for result in await asyncio.gather(*map(one, behind), return_exceptions=True):
            if isinstance(result, BaseException) and not isinstance(result, PSError):
                raise result
