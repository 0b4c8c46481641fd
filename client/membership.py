# SPDX-License-Identifier: Apache-2.0
"""Membership: how a shard or a worker joins the job, keeps its lease, and learns newer placements.

Invariant: identities (job, run, incarnation) come from the coordinator's answer to Join and do not change after it; term and
placement only get newer, and what a coordinator of an older term says is not heard. One event loop; ``holds_lease`` may be
called from any thread.
"""

import asyncio
import contextlib
import json
import logging
import os
import random
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import numpy as np

from oarlock.client.acknowledged import Acknowledged
from oarlock.client.gate import Gate
from oarlock.client.job import OVER, STOPPING, JobSpec
from oarlock.client.layout import Layout
from oarlock.client.push_notes import PushNotes
from oarlock.client.retry import Retry
from oarlock.client.router import Routes, routes_of, unpack_changes, unpack_placement
from oarlock.proto.common_pb2 import Header, Placement
from oarlock.proto.coordinator_pb2 import (
    WORKER,
    HeartbeatReply,
    HeartbeatRequest,
    JoinReply,
    JoinRequest,
    LeaveRequest,
    PlacementRequest,
    Role,
)
from oarlock.proto.errors import PSError, Unavailable, WrongRun
from oarlock.proto.methods import PROTOCOL
from oarlock.proto.transport import Transport

logger = logging.getLogger(__name__)

# What a WrongRun of the coordinator says, true, to a process that is to take part in the next run.
STAYS = "stays"


class Membership:
    """A process's place in a job: ``join()``, then ``keep()`` as a task beside the work, then ``leave()``."""

    def __init__(
        self,
        transport: Transport,
        coordinator: str,
        role: Role,
        *,
        rng: random.Random,
        address: str = "",
        reader: str = "",
        signature: str = "",
        retry: Retry | None = None,
    ) -> None:
        self.transport = transport
        self.coordinator = coordinator
        self.role = role
        self.rng = rng
        self.retry = retry or Retry()
        self.phase = "joining"
        # Groups of all closed splits, and ssp's minimum, as the coordinator last told.
        self.step = 0
        self.minimum = 0
        # Adds to every heartbeat what only the work knows: a worker's splits and its clock.
        self.about: Callable[[HeartbeatRequest], None] = lambda request: None
        # Set once the job wants its workers to leave, and once it is over, or needs this shard no more.
        self.stopping = asyncio.Event()
        self.over = asyncio.Event()
        self.spec: JobSpec
        self.layout: Layout
        self.routes: Routes | None = None
        self.id = -1
        self.incarnation = 0
        self.run = 0
        # The newest cut of the run that is committed, as far as is known here.
        self.committed = 0
        self.term = 0
        self.gate = Gate(self)
        # Where each acknowledged push is noted, if somebody wants to know.
        self.push_notes: PushNotes | None = None
        # How many pushes were acknowledged to this process, by block.
        self.acknowledged: Acknowledged
        self._address = address
        self._reader = reader
        self._signature = signature
        self._heartbeat_seconds = 0.5
        self._lease_seconds = 5.0
        self._lease_ends = 0.0
        self._clock: Callable[[], float] = lambda: 0.0
        self._fetching: asyncio.Task[None] | None = None
        self._refreshing: asyncio.Task[None] | None = None
        # Set, and made anew, whenever something newer is known of the placement.
        self._moved = asyncio.Event()

    async def call(self, method: str, request: Any) -> Any:
        """Call the coordinator, waiting for it while it is away (it may be restarted at any time).

        A request's header is made anew for every attempt: the term may have changed.
        """
        headed = "header" in request.DESCRIPTOR.fields_by_name

        async def attempt(timeout: float) -> Any:
            if headed:
                request.header.CopyFrom(self.header())
            return await self.transport.call(self.coordinator, method, request, timeout_seconds=timeout)

        return await self.retry.run(attempt, rng=self.rng)

    def header(self, target: int = 0) -> Header:
        """Return a message's header, meant for incarnation ``target`` (0: the coordinator)."""
        return Header(
            protocol=PROTOCOL,
            job=self.spec.job_bytes,
            run=self.run,
            sender=self.incarnation,
            target=target,
            generation=self.routes.generation if self.routes else 0,
            term=self.term,
            cut=self.gate.cut,
        )

    def holds_lease(self) -> bool:
        """Whether the lease runs by this process's own clock, counted from the sending of the last answered heartbeat."""
        return self._clock() < self._lease_ends

    def lease_left(self) -> float:
        """Return the seconds for which the lease still runs, negative if it has ended."""
        return self._lease_ends - self._clock()

    async def join(self) -> JobSpec:
        """Join and return the job's spec."""
        request = JoinRequest(
            protocol=PROTOCOL,
            role=self.role,
            address=self._address,
            nonce=self.rng.getrandbits(63) | 1,
            pid=os.getpid(),
            host=socket.gethostname(),
            reader=self._reader,
            signature=self._signature,
        )
        self._clock = asyncio.get_running_loop().time
        sent = self._clock()
        reply: JoinReply = await self.call("Coordinator.Join", request)
        self.take_up(JobSpec.from_json(reply.spec))
        self.id, self.incarnation, self.run, self.term = reply.id, reply.incarnation, reply.run, reply.term
        self._heartbeat_seconds, self._lease_seconds = reply.heartbeat_seconds, reply.lease_seconds
        self._lease_ends = sent + self._lease_seconds
        self.gate.hear(reply.opened)
        if reply.placement.generation:
            self.routes = unpack_placement(self.layout, reply.placement)
        logger.info(
            "event=joined role=%s id=%d incarnation=%d run=%d",
            Role.Name(self.role),
            self.id,
            self.incarnation,
            self.run,
        )
        return self.spec

    def take_up(self, spec: JobSpec) -> None:
        """Learn what the job is."""
        self.spec, self.layout = spec, Layout(spec.tables, spec.dense)
        self.acknowledged = Acknowledged(self.layout.blocks)

    async def keep(self, stats: Callable[[], dict[str, Any]]) -> None:
        """Renew the lease every heartbeat, for ever. Ends by raising what the coordinator refuses (LeaseLost, WrongRun, ...)."""
        while True:
            pause = self._heartbeat_seconds
            try:
                # Counts are compared by the clock of who counts, since heartbeats may be late.
                clock = {"clock": self._clock()} if self.spec.autoscale else {}
                reply = await self.beat({**stats(), **clock})
                if self.role == WORKER and reply.generation > (self.routes.generation if self.routes else 0):
                    await self._learn(reply.generation)
            except PSError as error:
                if not error.retryable:
                    raise
                logger.debug("event=heartbeat_unanswered error=%s", error)
                # The lease runs, and some of it went by with waiting for this answer.
                pause /= 4
            await asyncio.sleep(pause)

    async def beat(self, stats: dict[str, Any] | None = None) -> HeartbeatReply:
        """Send one heartbeat and take in what it answers. Also sent between others, when there is something to tell or to ask."""
        request = HeartbeatRequest(header=self.header(), stats="" if stats is None else json.dumps(stats))
        if self.minimum:
            # Also of a worker without work so far, which says no more: it may be who alone knows it once others died.
            request.clock.heard = self.minimum
        self.about(request)
        request.losses.extend(self.acknowledged.answers.values())
        sent = self._clock()
        reply: HeartbeatReply = await self.transport.call(
            self.coordinator, "Coordinator.Heartbeat", request, timeout_seconds=self._lease_seconds / 4
        )
        if reply.term < self.term:
            raise Unavailable(f"a coordinator of term {reply.term} answered, one of term {self.term} is in charge")
        self.term = reply.term
        self._lease_ends = max(self._lease_ends, sent + self._lease_seconds)
        self._in_phase(reply.phase)
        if reply.leave:
            self.over.set()
        self.step = reply.step
        self.minimum = max(self.minimum, reply.minimum)
        self.committed = max(self.committed, reply.committed)
        self.acknowledged.committed(self.committed)
        self.acknowledged.asked(reply.lost)
        self.gate.hear(reply.opened, reply.gate, reply.gate_seconds)
        return reply

    async def _learn(self, generation: int) -> None:
        """Fetch a newer placement. A refusal is not ours to judge: if it is for good, so is that of the next heartbeat."""
        try:
            await self.newer_routes(generation)
        except PSError as error:
            logger.debug("event=placement_refused error=%s", error)

    @asynccontextmanager
    async def kept(self, stats: Callable[[], dict[str, Any]]) -> AsyncIterator[None]:
        """Keep the lease while the body runs. When the coordinator refuses, the body is cancelled and the refusal raised."""
        body = asyncio.current_task()
        refused: list[BaseException] = []

        async def keep() -> None:
            try:
                await self.keep(stats)
            except Exception as error:
                refused.append(error)
                if body is not None:
                    body.cancel()

        keeping = asyncio.ensure_future(keep())
        try:
            yield
        except asyncio.CancelledError:
            if refused and body is not None:
                body.uncancel()
                raise refused[0] from None
            raise
        finally:
            keeping.cancel()
            self.gate.forget()

    def _in_phase(self, phase: str) -> None:
        self.phase = phase
        if phase in (STOPPING, *OVER):
            self.stopping.set()
        if phase in OVER:
            self.over.set()

    async def newer_routes(self, generation: int) -> Routes:
        """Return routes of at least ``generation``, asking the coordinator if need be (one question at a time)."""
        while self.routes is None or self.routes.generation < generation:
            if self._fetching is None:
                self._fetching = asyncio.ensure_future(self._fetch())
                self._fetching.add_done_callback(self._fetched)
            await asyncio.shield(self._fetching)
            if self.routes is None or self.routes.generation < generation:
                await asyncio.sleep(self._heartbeat_seconds / 5)
        return self.routes

    async def refresh(self, patience: float = 1.0) -> None:
        """Take a newer placement if the coordinator answers within ``patience`` that there is one; work goes on without it
        otherwise.

        One question at a time: who comes while one is on its way gets its answer.
        """
        if self._refreshing is None:
            self._refreshing = asyncio.ensure_future(self._refresh())
            self._refreshing.add_done_callback(self._refreshed)
        asking = self._refreshing
        await asyncio.wait([asking], timeout=patience)
        if asking.done():
            await asking

    async def _refresh(self) -> None:
        async def ask(whole: bool) -> Placement:
            request = PlacementRequest(header=self.header(), whole=whole)
            answer: Placement = await self.transport.call(
                self.coordinator, "Coordinator.Placement", request, timeout_seconds=1.0
            )
            return answer

        try:
            if not self._take(await ask(False)):
                self._take(await ask(True))
        except PSError as error:
            if not error.retryable:
                raise

    async def _fetch(self) -> None:
        """Take the newest placement, waiting for the coordinator while it is away."""
        if not self._take(await self.call("Coordinator.Placement", PlacementRequest(header=self.header()))):
            self._take(await self.call("Coordinator.Placement", PlacementRequest(header=self.header(), whole=True)))

    def _take(self, message: Placement) -> bool:
        """Take in what the coordinator tells of the placement; False if all of it has to be asked for. Malformed."""
        changes = unpack_changes(self.layout, message)
        if self.routes is None:
            if changes.whole:
                self._know(routes_of(self.layout, changes))
        elif not self.routes.lacks(changes):
            self._know(self.routes.after(changes))
        else:
            return False
        return self.routes is not None

    def learn(self, where: Placement) -> None:
        """Take in what a shard tells of blocks that left it. Malformed."""
        if self.routes is not None:
            self._know(self.routes.after(unpack_changes(self.layout, where), complete=False))

    def _know(self, routes: Routes) -> None:
        if routes is not self.routes:
            if self.routes is not None:
                moved = np.flatnonzero(routes.owners != self.routes.owners).astype(np.int32)
                self.acknowledged.moved(moved, routes.generations[moved])
            self.routes = routes
            self._moved.set()
            self._moved = asyncio.Event()

    async def placement_changed(self, seconds: float) -> None:
        """Wait until something newer is known of the placement, but no longer than ``seconds``."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._moved.wait(), seconds)

    def _fetched(self, task: "asyncio.Task[None]") -> None:
        self._fetching = None
        _heard(task)

    def _refreshed(self, task: "asyncio.Task[None]") -> None:
        self._refreshing = None
        _heard(task)

    async def is_in_the_next_run(self, refused: WrongRun) -> bool:
        """Whether this process is to take part in the run after its own. Only the coordinator knows, and is waited for."""
        if STAYS not in refused.details:
            try:
                await self.call("Coordinator.Placement", PlacementRequest(header=self.header()))
            except WrongRun as error:
                refused = error
        return refused.details.get(STAYS) is True

    async def leave(self, error: str = "") -> None:
        """Tell the coordinator that this process goes; not hearing it is no harm, the lease ends by itself."""
        try:
            await self.transport.call(
                self.coordinator,
                "Coordinator.Leave",
                LeaveRequest(header=self.header(), error=error),
                timeout_seconds=2.0,
            )
        except PSError as failed:
            logger.debug("event=leave_unheard error=%s", failed)


def _heard(task: "asyncio.Task[None]") -> None:
    """Whoever waits has what went wrong; if nobody does any more, it is no news."""
    if not task.cancelled():
        task.exception()
