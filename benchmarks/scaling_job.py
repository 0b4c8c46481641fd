# SPDX-License-Identifier: Apache-2.0
"""The job of `oarlock.benchmarks.scaling`: servers come and go while it trains, as the coordinator is asked over the wire.

What moves, when, and how is the coordinator's and the shards' own; this starts the processes that are wanted, as the launcher
does, and watches. Invariant: a shard that is started later is the product's own process, and empty. One event loop.
"""

import asyncio
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from oarlock.benchmarks.end_to_end_job import SHARD
from oarlock.benchmarks.noted_job import HEARTBEAT_SECONDS, NotedJob
from oarlock.client.layout import Layout
from oarlock.embedding.make import make_table
from oarlock.launch.wanted import settled
from oarlock.proto.coordinator_pb2 import ScaleRequest
from oarlock.proto.errors import Unavailable

LOOK_SECONDS = 0.02
SCALE_SECONDS = 300.0
# After which all counters of what was done have been told.
TOLD_SECONDS = 2.5 * HEARTBEAT_SECONDS


@dataclass(frozen=True)
class Scale:
    """One change of servers by ``time.monotonic``: asked for; all members there; nothing moves any more, and who leaves has left.

    ``sent``: bytes of all full copies, ``least``: of those that the change cannot do without.
    """

    before: int
    after: int
    asked: float
    there: float
    done: float
    sent: int
    least: float


def block_bytes(layout: Layout, rows: dict[str, int], seed: int) -> NDArray[np.float64]:
    """Return float64[blocks]: the bytes of each one's full copy, where keys are hashed evenly and all ``rows`` exist."""
    sizes = np.zeros(layout.blocks)
    for base, spec in zip(layout.table_base, layout.tables, strict=True):
        table = make_table(spec, seed=seed)
        try:
            sizes[base : base + spec.blocks] = rows[spec.name] / spec.blocks * table.live_bytes[0]
        finally:
            table.close()
    numbers = np.arange(layout.dense_base, layout.blocks, dtype=np.int32)
    # Adam keeps two values beside each.
    sizes[layout.dense_base :] = 12.0 * layout.lengths_of(numbers)
    return sizes


def least_bytes(sizes: NDArray[np.float64], members: NDArray[np.int32], before: int, after: int) -> float:
    """Return how many bytes a change of servers cannot do without.

    More of them: what newcomers are to have, their share of all copies. Fewer: what those have that leave, who are the last ones.
    """
    kept = (members >= 0).sum(axis=1)
    if after > before:
        return float((sizes * kept).sum()) * (after - before) / after
    return float((sizes * (members >= after).sum(axis=1)).sum())


class ScalingJob(NotedJob):
    """``begin()``, ``train()``, ``scale``, ``rest()``, ``close()``."""

    def __init__(
        self, name: str, data: Path, folder: Path, options: dict[str, object], workers: int, **fields: Any
    ) -> None:
        super().__init__(name, data, folder, options, workers, **fields)
        self._leaving: set[str] = set()
        # By incarnation, as it last told.
        self._sent: dict[int, int] = {}

    def _check(self) -> None:
        for name in list(self._children):
            # Who left in good order is nobody's business any more.
            if name in self._leaving and self._children[name].process.poll() == 0:
                del self._children[name]
                self._leaving.discard(name)
        super()._check()

    def _copied(self) -> int:
        """Return the bytes of full copies that all shards have sent so far, also those that have left."""
        for member in self._coordinator.members.alive("shard"):
            self._sent[member.incarnation] = int(member.stats.get("copied_bytes", 0))
        return sum(self._sent.values())

    async def scale(self, servers: int, sizes: NDArray[np.float64]) -> Scale:
        """Ask for another number of servers, and return once there are so many and nothing moves; ``sizes``: of all blocks."""
        coordinator = self._coordinator
        with coordinator.lock:
            before = len(coordinator.members.alive("shard"))
            members = coordinator.records.members.copy()
            copied = self._copied()
        asked = time.monotonic()
        request = ScaleRequest(servers=servers)
        await self._transport.call(self.address, "Coordinator.Scale", request, timeout_seconds=20.0)
        for number in range(before, servers):
            self.add(f"shard{number}", SHARD)
        self._leaving |= {f"shard{number}" for number in range(servers, before)}
        there = 0.0 if servers > before else asked
        while not self._settled():
            self._check()
            with coordinator.lock:
                self._copied()
            if not there and len(coordinator.members.alive("shard")) == servers:
                there = time.monotonic()
            if time.monotonic() > asked + SCALE_SECONDS:
                raise Unavailable(f"there were not {servers} servers within {SCALE_SECONDS:g} s")
            await asyncio.sleep(LOOK_SECONDS)
        done = time.monotonic()
        await self.pause(TOLD_SECONDS)
        with coordinator.lock:
            sent = self._copied() - copied
        least = least_bytes(sizes, members, before, servers)
        return Scale(before, servers, asked, there or done, done, sent, least)

    def _settled(self) -> bool:
        with self._coordinator.lock:
            return self._coordinator.copies.at_rest and settled(self._coordinator.status())

    def sizes(self, rows: dict[str, int]) -> NDArray[np.float64]:
        return block_bytes(self._coordinator.layout, rows, self.spec.seed)
