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
from oarlock.client.router import ShardAddress
from oarlock.cluster.carrying import Carrying
from oarlock.cluster.coordinator import Coordinator
from oarlock.cluster.cutting import Cutting
from oarlock.proto.common_pb2 import Header
from oarlock.proto.errors import PSError
from oarlock.proto.methods import PROTOCOL
from oarlock.proto.shard_pb2 import CloseRequest
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
        self._told_run = 0
        self._told_floor = 0
        self._tell_again = 0.0
        # (order, "done" or "failed"), of this process; one that comes before its time is neither.
        self.counts: Counter[tuple[str, str]] = Counter()
        self.stages = Stages()
        self.cutting = Cutting(coordinator, checkpoints, self._send, self._header, self.stages, executor)
        self.carrying = Carrying(coordinator, self._send, self._header)

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
        if c.placed:
            await self._tell_closed()
        # An epoch that is all evaluated is not left open by its last moment.
        if c.phase == STOPPING and c.stop_wanted is False and not c.members.alive("worker") and not c.merging:
            c.set_phase(STOPPED, c.stop_reason)

    async def _tell_closed(self) -> None:
        """Tell shards which splits are closed, so that they forget the marks; a lost message is sent with the next one."""
        c = self._coordinator
        with c.lock:
            now = ClosedSet(c.work.closed.floor, c.work.closed.above)
            if self._told_run != c.run:
                self._told, self._told_run = {}, c.run
            behind = [s for s in c.shards.values() if self._told.get(s.incarnation) != now]
            # Marks are kept a little longer for it; shards refuse pushes too far above what they know to be closed.
            soon = c.clock() < self._tell_again and c.phase == TRAINING
            if not behind or (soon and now.floor - self._told_floor < SPLIT_WINDOW // 8):
                return
            self._tell_again, self._told_floor = c.clock() + c.spec.heartbeat_seconds, now.floor

        async def one(shard: ShardAddress) -> None:
            request = CloseRequest(header=self._header(shard), closed=now.pack())
            await self._send(shard, "Close", request, ORDER_SECONDS)
            self._told[shard.incarnation] = now

        for result in await asyncio.gather(*map(one, behind), return_exceptions=True):
            if isinstance(result, BaseException) and not isinstance(result, PSError):
                raise result
