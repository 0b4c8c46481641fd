# SPDX-License-Identifier: Apache-2.0
"""Rows: single rows of a running job, asked for by a tool that is no member of it.

Invariant: each key is answered by the owner of its block; an undo is sent again only to the shard that may have done it, with
its number, and so is done once. One event loop, one call at a time.
"""

import asyncio
import json
import random
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from oarlock.client.job import JobSpec
from oarlock.client.layout import Layout
from oarlock.client.pieces import MESSAGE_BYTES
from oarlock.client.pull import table_number
from oarlock.client.retry import Retry
from oarlock.client.router import Routes, ShardAddress, unpack_placement
from oarlock.embedding.hashing import blocks_of, table_salt
from oarlock.embedding.spec import TableSpec
from oarlock.proto.arrays import pack, unpack
from oarlock.proto.common_pb2 import Header
from oarlock.proto.coordinator_pb2 import DescribeReply, DescribeRequest
from oarlock.proto.errors import Malformed, PSError, StalePlacement, Unavailable, WrongIncarnation, WrongJob, WrongRun
from oarlock.proto.methods import PROTOCOL
from oarlock.proto.shard_pb2 import EXPLAIN, EXPORT, GET, QUARANTINE, UNDO, RowsReply, RowsRequest, RowsVerb, TableKeys
from oarlock.proto.transport import Transport

Keys = NDArray[np.uint64]

# A person waits for the answer.
PATIENCE = Retry(deadline_seconds=20.0, call_seconds=10.0)
# Keys in one request; a shard takes no more (ps/rows.py).
REQUEST_KEYS = 4096
# State and counters that a row may have beside its weights, as bytes for each weight, and the text of a number.
_EXPLAINED = 26 * 4
_ELSEWHERE = (StalePlacement, WrongIncarnation)


@dataclass(frozen=True)
class RowsPart:
    """Some rows: keys: uint64[n] and their weights: float32[n, dim], state: float32[n, s], counters: uint32[n, c]."""

    keys: Keys
    weights: NDArray[np.float32]
    state: NDArray[np.float32]
    counters: NDArray[np.uint32]


class RowsClient:
    """Asks the shards of the job whose coordinator is at ``coordinator``; ``open`` first."""

    def __init__(
        self, transport: Transport, coordinator: str, *, rng: random.Random, retry: Retry = PATIENCE, job: bytes = b""
    ) -> None:
        """``job``: whose coordinator it has to be, if that is known."""
        self._transport = transport
        self._coordinator = coordinator
        self._rng = rng
        self._retry = retry
        self._job = job
        self.run = 0
        self.step = 0
        self.spec: JobSpec
        self.layout: Layout
        self.routes: Routes

    async def open(self) -> None:
        """Learn what the job is and where its blocks are; WrongJob if another job answers."""
        # No retry: who asks first wants to hear at once that nobody is there.
        reply: DescribeReply = await self._transport.call(
            self._coordinator, "Coordinator.Describe", DescribeRequest(), timeout_seconds=5.0
        )
        if self._job and reply.job != self._job:
            raise WrongJob(f"another job answers at {self._coordinator}")
        self._job, self.run, self.spec = reply.job, reply.run, JobSpec.from_json(reply.spec)
        self.layout = Layout(self.spec.tables, self.spec.dense)
        self._place(reply)

    async def _describe(self) -> DescribeReply:
        async def attempt(timeout: float) -> DescribeReply:
            reply: DescribeReply = await self._transport.call(
                self._coordinator, "Coordinator.Describe", DescribeRequest(), timeout_seconds=timeout
            )
            return reply

        return await self._retry.run(attempt, rng=self._rng)

    def _place(self, reply: DescribeReply) -> None:
        self.routes = unpack_placement(self.layout, reply.placement)
        self.step = reply.step

    async def _refresh(self) -> None:
        reply = await self._describe()
        if reply.job != self._job or reply.run != self.run:
            raise WrongRun("the job was restored from a checkpoint meanwhile: ask again", run=reply.run)
        self._place(reply)

    def table(self, name: str) -> TableSpec:
        """Return the spec of a table; UnknownTable lists those that there are."""
        return self.layout.tables[table_number(self.layout, name)]

    # What can be asked. keys: uint64[n], each once.

    async def get(self, name: str, keys: Keys) -> tuple[NDArray[np.bool_], NDArray[np.float32]]:
        """Return which of keys have rows: bool[n], and what they read as: float32[n, dim]."""
        dim = self.table(name).dim
        present, weights = np.zeros(len(keys), np.bool_), np.empty((len(keys), dim), np.float32)
        async for where, shard, reply in self._ask(name, keys, GET, row_bytes=16 + 4 * dim):
            found = unpack(reply.present, np.int32, "present")
            values = unpack(reply.weights, np.float32, "weights", dims=2, columns=dim)
            self._answered(shard, len(where), len(found), len(values))
            present[where], weights[where] = found != 0, values
        return present, weights

    async def explain(self, name: str, keys: Keys) -> list[dict[str, Any]]:
        """Return all that is known of each key, as its shard tells it, with the shard's address."""
        out: list[dict[str, Any]] = [{} for _ in keys]
        row_bytes = 4096 + _EXPLAINED * self.table(name).dim
        async for where, shard, reply in self._ask(name, keys, EXPLAIN, row_bytes=row_bytes, tick=self.step):
            self._answered(shard, len(where), len(reply.facts))
            for at, text in zip(where.tolist(), reply.facts, strict=True):
                out[at] = {**_facts(text), "address": shard.address}
        return out

    async def undo(self, name: str, keys: Keys, steps: int) -> NDArray[np.int32]:
        """Take back the last ``steps`` updates of each key; return int32[n], how many of them were still kept."""
        done = np.zeros(len(keys), np.int32)
        answered = 0
        try:
            async for where, shard, reply in self._ask(name, keys, UNDO, row_bytes=16, steps=steps):
                found = unpack(reply.undone, np.int32, "undone")
                self._answered(shard, len(where), len(found))
                done[where] = found
                answered += len(found)
        except PSError as error:
            if not answered:
                raise
            raise type(error)(f"{error}; {answered} of {len(keys)} keys were done before", **error.details) from error
        return done

    async def quarantine(self, name: str) -> tuple[int, Keys]:
        """Return how many gradients of a table were refused since its shards began, and a sample of their keys."""
        table = table_number(self.layout, name)
        refused, samples = 0, [np.empty(0, np.uint64)]
        for shard in self.routes.shards.values():
            request = RowsRequest(header=self._header(shard), verb=QUARANTINE, keys=TableKeys(table=table))
            reply = await self._call(shard, request)
            refused += reply.refused
            samples.append(unpack(reply.keys, np.uint64, "sample of keys"))
        return refused, np.unique(np.concatenate(samples))

    async def export(self, name: str, keys: Keys) -> AsyncIterator[RowsPart]:
        """Yield the rows of those of keys that have any."""
        row_bytes = 4096 + 4 * 4 * self.table(name).dim
        async for _, _, reply in self._ask(name, keys, EXPORT, row_bytes=row_bytes):
            yield self._part(name, reply)

    async def export_block(self, name: str, block: int) -> AsyncIterator[RowsPart]:
        """Yield all rows of a block in ascending order of keys, a page at a time; each page is of one instant."""
        table = table_number(self.layout, name)
        number = self.layout.table_base[table] + block
        least, more, end = 0, True, self._end()
        while more:
            shard = self._owner(number)
            request = RowsRequest(
                header=self._header(shard), verb=EXPORT, keys=TableKeys(table=table), block=block, least=least
            )
            try:
                reply = await self._call(shard, request)
            except _ELSEWHERE:
                await self._moved(end)
                continue
            if reply.more and reply.next <= least:
                raise Malformed(f"shard {shard.id} answered a page that ends before it begins", shard=shard.id)
            least, more, end = reply.next, reply.more, self._end()
            yield self._part(name, reply)

    # How it is asked.

    async def _ask(
        self, name: str, keys: Keys, verb: RowsVerb, *, row_bytes: int, **fields: int
    ) -> AsyncIterator[tuple[NDArray[np.int64], ShardAddress, RowsReply]]:
        """Yield (positions: int64[m] in keys, shard, reply) until all are answered for."""
        table = table_number(self.layout, name)
        blocks = np.empty(len(keys), np.int32)
        blocks_of(keys, table_salt(name), self.layout.tables[table].blocks.bit_length() - 1, blocks)
        numbers = self.layout.table_base[table] + blocks
        most = max(1, min(REQUEST_KEYS, MESSAGE_BYTES // row_bytes))
        left, end = np.arange(len(keys)), self._end()
        while len(left):
            left = left[np.lexsort((blocks[left], self.routes.owners[numbers[left]]))]
            shard = self._owner(int(numbers[left[0]]))
            chosen = left[:most][self.routes.owners[numbers[left[:most]]] == shard.id]
            found, counts = np.unique(blocks[chosen], return_counts=True)
            request = RowsRequest(
                header=self._header(shard),
                verb=verb,
                keys=TableKeys(
                    table=table, keys=pack(keys[chosen]), blocks=pack(found), counts=pack(counts.astype(np.int32))
                ),
                number=self._rng.getrandbits(63) + 1 if verb == UNDO else 0,
                **fields,
            )
            try:
                reply = await self._call(shard, request)
            except _ELSEWHERE:
                await self._moved(end)
                continue
            left, end = left[len(chosen) :], self._end()
            yield chosen, shard, reply

    async def _call(self, shard: ShardAddress, request: RowsRequest) -> RowsReply:
        """Return the shard's answer; whatever was lost on the way is sent again as it was."""

        async def attempt(timeout: float) -> RowsReply:
            reply: RowsReply = await self._transport.call(shard.address, "Shard.Rows", request, timeout_seconds=timeout)
            return reply

        return await self._retry.run(attempt, rng=self._rng, retryable=_lost)

    def _end(self) -> float:
        return asyncio.get_running_loop().time() + self._retry.deadline_seconds

    async def _moved(self, end: float) -> None:
        """Wait a little for a newer placement."""
        if asyncio.get_running_loop().time() >= end:
            raise Unavailable(f"the blocks kept moving (given up after {self._retry.deadline_seconds:g} s): ask again")
        await asyncio.sleep(self._retry.most_seconds * (0.5 + self._rng.random() / 2))
        await self._refresh()

    def _owner(self, number: int) -> ShardAddress:
        found = self.routes.shards.get(int(self.routes.owners[number]))
        if found is None:
            raise Unavailable(f"block {number} belongs to no shard yet: ask again", block=number)
        return found

    def _header(self, shard: ShardAddress) -> Header:
        return Header(
            protocol=PROTOCOL,
            job=self._job,
            run=self.run,
            target=shard.incarnation,
            generation=self.routes.generation,
        )

    @staticmethod
    def _answered(shard: ShardAddress, asked: int, *found: int) -> None:
        for n in found:
            if n != asked:
                raise Malformed(f"shard {shard.id} answered for {n} keys of {asked}", shard=shard.id)

    def _part(self, name: str, reply: RowsReply) -> RowsPart:
        keys = unpack(reply.keys, np.uint64, "keys")
        weights = unpack(reply.weights, np.float32, "weights", dims=2, columns=self.table(name).dim)
        state = unpack(reply.state, np.float32, "state", dims=2)
        counters = unpack(reply.counters, np.uint32, "counters", dims=2)
        if not len(keys) == len(weights) == len(state) == len(counters):
            raise Malformed(f"{len(keys)} keys came with {len(weights)}, {len(state)} and {len(counters)} of the rest")
        return RowsPart(keys, weights, state, counters)


def _lost(error: PSError) -> bool:
    return error.retryable and not isinstance(error, _ELSEWHERE)


def _facts(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Malformed(f"an explanation that is no JSON: {error}") from None
    if not isinstance(found, dict):
        raise Malformed("an explanation that is no JSON object")
    return found
