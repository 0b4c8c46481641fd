# SPDX-License-Identifier: Apache-2.0
"""Carrying: what copies.py decides, sent to shards: the records that they have to know, questions, and orders about moves.

Invariant: one Adopt at a time is under way to each shard, and a shard that hangs holds up no other. An order is sent once; what
comes of it is reported, and what was lost is given again by who decided it. One event loop; whoever changes something wakes it.
"""

import asyncio
import contextlib
import logging
from collections import defaultdict
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np

from oarlock.client.job import GATHERING, OVER
from oarlock.client.router import ShardAddress
from oarlock.cluster.coordinator import Coordinator
from oarlock.cluster.moving import COPY, HAND, Order
from oarlock.proto.arrays import pack, unpack
from oarlock.proto.common_pb2 import Header
from oarlock.proto.errors import Malformed, PSError
from oarlock.proto.shard_pb2 import AdoptRequest, CopyRequest, HandOverRequest, HeldRequest, ReopenRequest

logger = logging.getLogger(__name__)

# Blocks are made, or loaded from a checkpoint, inside of the call.
CREATE_SECONDS = 600.0

Send = Callable[[ShardAddress, str, Any, float], Awaitable[Any]]


class Carrying:
    """Sends what is due; ``step()`` looks once and waits for no answer. ``send`` and ``header`` are those of orders."""

    def __init__(self, coordinator: Coordinator, send: Send, header: Callable[[ShardAddress], Header]) -> None:
        self._c = coordinator
        self._send = send
        self._header = header
        self._tasks: set[asyncio.Task[None]] = set()
        self._failure: BaseException | None = None
        self._woken = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None

    async def step(self) -> None:
        """Send what is due now."""
        c = self._c
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
            c.wake = self._wake
        if self._failure is not None:
            raise self._failure
        self._woken.clear()
        if c.phase in OVER:
            return
        with c.lock:
            orders = c.copies.step()
            if c.phase in OVER:
                return
            now = c.clock()
            tell = [c.records.shards[s] for s in c.copies.adoption.due(now)]
            ask = {c.records.shards[s]: blocks for s, blocks in c.copies.promotion.ask(now).items()}
            for shard in tell:
                self._start(self._adopt(shard, self._adoption(shard), c.generation, c.copies.adoption.listed))
        for shard, blocks in ask.items():
            self._start(self._ask(shard, blocks))
        for to, request, name, batch in self._requests(orders):
            self._start(self._order(to, name, request, batch))

    async def rest(self, seconds: float) -> None:
        """Wait until somebody wakes it, ``seconds`` at most."""
        if not self._woken.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._woken.wait(), seconds)

    async def close(self) -> None:
        """Let go of everything that is under way."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    def _wake(self) -> None:
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._woken.set)

    def _start(self, doing: Any) -> None:
        task: asyncio.Task[None] = asyncio.ensure_future(doing)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: "asyncio.Task[None]") -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            self._failure = task.exception()

    # Records

    def _adoption(self, shard: ShardAddress) -> AdoptRequest:
        c, copies = self._c, self._c.copies
        request = AdoptRequest(
            header=self._header(shard),
            placement=copies.records.message(copies.adoption.since(shard.id)),
            closed=c.work.closed.pack(),
            restore=c.restore,
        )
        if c.phase != GATHERING:
            # What a shard does not have by now it does not make up.
            request.restore = copies.created_from
            request.create.CopyFrom(pack(np.array(sorted(copies.creating), np.int32)))
        return request

    async def _adopt(self, shard: ShardAddress, request: AdoptRequest, generation: int, listed: int) -> None:
        c = self._c
        creates = c.phase == GATHERING or bool(c.copies.creating)
        adoption = c.copies.adoption
        try:
            await self._send(shard, "Adopt", request, CREATE_SECONDS if creates else c.spec.lease_seconds)
        except PSError as error:
            with c.lock:
                adoption.under_way.discard(shard.id)
                adoption.failed(shard.id, c.clock())
                self._not_adopted(shard, generation, error)
            return
        with c.lock:
            adoption.under_way.discard(shard.id)
            if c.records.shards.get(shard.id) == shard:
                c.has_adopted(shard.id, generation, listed)
        self._woken.set()

    def _not_adopted(self, shard: ShardAddress, generation: int, error: PSError) -> None:
        c = self._c
        if error.retryable:
            logger.info("event=order_failed order=adopt shard=%d error=%s", shard.id, error)
        elif generation != c.generation or c.shards.get(shard.id) != shard:
            logger.info("event=order_outlived order=adopt shard=%d error=%s", shard.id, error)
        elif c.phase == GATHERING or not c.spec.replicas:
            c.fail(f"shard {shard.id} could not take its blocks: {error}")
        else:
            c.member_gone(c.members.all[shard.incarnation], "dead", f"it could not take its blocks: {error}")

    # Questions

    async def _ask(self, shard: ShardAddress, blocks: list[int]) -> None:
        c, numbers = self._c, np.array(blocks, np.int32)
        request = HeldRequest(header=self._header(shard), blocks=pack(numbers))
        try:
            reply = await self._send(shard, "Held", request, c.spec.lease_seconds)
            generations = unpack(reply.generations, np.uint64, "generations of copies")
            sequences = unpack(reply.sequences, np.uint64, "operations of copies")
            if generations.shape != numbers.shape or sequences.shape != numbers.shape:
                raise Malformed(f"shard {shard.id} told of {generations.shape} copies, asked about {numbers.shape}")
        except PSError as error:
            logger.info("event=order_failed order=held shard=%d error=%s", shard.id, error)
            with c.lock:
                c.copies.promotion.failed(shard.id, c.clock())
            return
        with c.lock:
            if c.records.shards.get(shard.id) == shard:
                c.copies.promotion.answered(shard.id, blocks, generations.tolist(), sequences.tolist())
        self._woken.set()

    # Moves

    def _requests(self, orders: list[Order]) -> list[tuple[ShardAddress, Any, str, list[Order]]]:
        """Return each owner's messages: blocks that are told the same travel together."""
        batches: dict[tuple[Any, ...], list[Order]] = defaultdict(list)
        for order in orders:
            batches[order.owner, order.kind, order.shard, order.term, order.order, order.leisurely].append(order)
        found = []
        for (owner, kind, to, term, number, leisurely), batch in batches.items():
            shard = self._c.records.shards.get(owner)
            if shard is None:
                continue
            told: dict[str, Any] = {
                "blocks": pack(np.array([o.block for o in batch], np.int32)),
                "generations": pack(np.array([o.generation for o in batch], np.uint64)),
            }
            request: Any
            if kind == COPY:
                name, request = "Copy", CopyRequest(shard=to, leisurely=leisurely, **told)
            elif kind == HAND:
                name, request = "HandOver", HandOverRequest(shard=to, order=number, **told)
            else:
                name, request = "Reopen", ReopenRequest(term=term, order=number, **told)
            request.header.CopyFrom(self._header(shard))
            found.append((shard, request, name, batch))
        return found

    async def _order(self, shard: ShardAddress, name: str, request: Any, batch: list[Order]) -> None:
        c = self._c
        try:
            await self._send(shard, name, request, c.spec.lease_seconds)
        except PSError as error:
            logger.info("event=order_failed order=%s shard=%d error=%s", name.lower(), shard.id, error)
            return
        if name == "Reopen":
            with c.lock:
                for order in batch:
                    c.copies.moving.reopened(order)
