# SPDX-License-Identifier: Apache-2.0
"""The loop of `oarlock.benchmarks.exactly_once`: pull, train and push over gRPC, in turns on shards with marks and without.

Invariant: both sides train the same batches in the same order, and a split's next group waits for the last one's answers on
both. One event loop.
"""

import asyncio
import random
import statistics
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from oarlock.benchmarks.exactly_once_handler import GROUPS_PER_SPLIT, Pairs, header_for, spread
from oarlock.benchmarks.exactly_once_shard import RUN, ShardProcess
from oarlock.client.client import Client
from oarlock.client.closed import ClosedSet
from oarlock.client.job import JobSpec
from oarlock.client.layout import Layout
from oarlock.client.membership import Membership
from oarlock.client.push import PushIdentity, RowGradients, cut_push
from oarlock.client.router import Routes, make_routes, pack_placement
from oarlock.cluster.placement import balanced
from oarlock.data.files import files_from_json
from oarlock.data.interactions import load_positives
from oarlock.nn import Program
from oarlock.proto.bulk import inlined
from oarlock.proto.common_pb2 import Header
from oarlock.proto.coordinator_pb2 import WORKER
from oarlock.proto.rpc import GrpcTransport
from oarlock.proto.shard_pb2 import AdoptRequest, CloseRequest
from oarlock.worker.prepare import Prepared, Preparer
from oarlock.worker.recipe import Rates, Workload

SHARDS = 2
# Open splits of a worker, as a job has them.
TRACKS = 2


class Nameless(Membership):
    """A member whose messages say nothing of who sends them, nor whom they are for."""

    def header(self, target: int = 0) -> Header:
        return Header()


@dataclass
class Track:
    """One open split of a side: its number, how far it came, and the batches that it goes round."""

    batches: list[Prepared]
    split: int
    group: int = 0
    turn: int = 0


@dataclass
class Work:
    """What both sides train: one program, one recipe."""

    workload: Workload
    program: Program
    rates: Rates
    compute_seconds: list[float] = field(default_factory=list)


class Side:
    """Shards with or without marks, and a client of theirs."""

    def __init__(self, spec: JobSpec, transport: GrpcTransport, work: Work, *, marks: bool) -> None:
        self.marks = marks
        self._spec = spec
        self._transport = transport
        self._work = work
        self._processes = [ShardProcess(spec, n, marks=marks) for n in range(SHARDS)]
        self._tracks: list[Track] = []
        self._closed = ClosedSet()
        self._told = ClosedSet()
        self._tell_at = 0.0
        self._trained_seconds = 0.0
        self.groups = 0
        self.orders = 0

    def start(self) -> None:
        for process in self._processes:
            process.start()

    async def join(self) -> None:
        """Give the shards their blocks, as a coordinator does."""
        spec = self._spec
        shards = {a.id: a for a in (process.address() for process in self._processes)}
        member = (Membership if self.marks else Nameless)(self._transport, "", WORKER, rng=random.Random(0))
        member.take_up(spec)
        member.id, member.incarnation, member.run = 0, 9, RUN
        member.routes = make_routes(member.layout, 1, balanced(member.layout, list(shards)), shards)
        placement = pack_placement(1, member.routes.owners, shards)
        for shard in shards.values():
            adoption = AdoptRequest(header=header_for(spec, shard.id), placement=placement)
            await self._transport.call(shard.address, "Shard.Adopt", adoption, timeout_seconds=20.0)
        self._client = Client(member)

    def take(self, batches: list[Prepared]) -> None:
        """Share the batches out: two tracks never hold the same one, for its buffers are written to."""
        self._tracks = [Track(batches[n::TRACKS], n) for n in range(TRACKS)]

    @property
    def routes(self) -> Routes:
        return self._client.routes

    def shard_seconds(self) -> float:
        return sum(process.processor_seconds() for process in self._processes)

    async def run(self, groups: int) -> int:
        """Train ``groups`` batches of each track; return their samples."""
        begun = time.perf_counter()
        # A coordinator tells of closed splits once a heartbeat, beside the training.
        tell = self.marks and self._trained_seconds >= self._tell_at and self._closed != self._told
        telling = [self._tell_closed()] if tell else []
        samples = await asyncio.gather(*(self._train(track, groups) for track in self._tracks), *telling)
        self._trained_seconds += time.perf_counter() - begun
        return sum(s or 0 for s in samples)

    async def _train(self, track: Track, groups: int) -> int:
        work, client = self._work, self._client
        program = work.program
        samples = 0
        for _ in range(groups):
            batch = track.batches[track.turn % len(track.batches)]
            track.turn += 1
            await client.pull(batch.keys, batch.rows, dense=batch.dense)
            begun = time.perf_counter()
            program.flat_parameters[:] = batch.dense
            feeds: dict[str, Any] = dict(batch.feeds)
            for lookup in work.workload.model.lookups:
                feeds[lookup.name] = (batch.rows[lookup.table], batch.inverse[lookup.name])
            program.train(feeds, batch.samples)
            work.compute_seconds.append(time.perf_counter() - begun)
            gradients = {
                lookup.table: RowGradients(
                    batch.keys[lookup.table], program.row_gradients[lookup.name], work.rates.rows
                )
                for lookup in work.workload.model.lookups
            }
            counts = await client.push(
                track.split if self.marks else 0,
                track.group if self.marks else 0,
                gradients,
                dense=program.flat_gradients,
                dense_rate=work.rates.dense,
            )
            # A push that was skipped would be cheap.
            assert not counts.skipped, "every group comes once"
            samples += batch.samples
            self.groups += 1
            track.group += 1
            if track.group == GROUPS_PER_SPLIT:
                self._closed.add(track.split)
                track.split, track.group = track.split + TRACKS, 0
        return samples

    async def _tell_closed(self) -> None:
        self.orders += 1
        self._tell_at = self._trained_seconds + self._spec.heartbeat_seconds
        self._told = ClosedSet(self._closed.floor, self._closed.above)
        message = self._told.pack()

        async def tell(number: int, address: str) -> None:
            request = CloseRequest(header=header_for(self._spec, number), closed=message)
            await self._transport.call(address, "Shard.Close", request, timeout_seconds=20.0)

        await asyncio.gather(*(tell(s.id, s.address) for s in self.routes.shards.values()))

    async def order_seconds(self, times: int) -> float:
        """Return the processor seconds, on both ends, of telling all shards what is closed."""
        shards, client = self.shard_seconds(), time.process_time()
        for _ in range(times):
            await self._tell_closed()
        return (time.process_time() - client + self.shard_seconds() - shards) / times

    def close(self) -> None:
        for process in self._processes:
            process.close()


def prepare(workload: Workload, spec: JobSpec, routes: Routes, count: int) -> list[Prepared]:
    """Return batches as the recipe encodes them, their keys made distinct."""
    pairs = load_positives(files_from_json(list(spec.files)))
    users = np.repeat(pairs.users, np.diff(pairs.offsets))
    order = np.random.default_rng(0).permutation(len(users))
    users, items = users[order].astype(np.uint64), pairs.items[order].astype(np.uint64)
    preparer = Preparer(workload.model, Layout(spec.tables, spec.dense))
    found = []
    for number in range(count):
        first = number * spec.batch_rows % max(1, len(users) - spec.batch_rows)
        rows = slice(first, first + spec.batch_rows)
        example = workload.encode({"user": users[rows], "item": items[rows]}, epoch=0, split=number, batch=0)
        # The recipe's labels are one array that every batch fills anew.
        example.feeds.update({name: values.copy() for name, values in example.feeds.items()})
        found.append(preparer.prepare([example], routes))
    return found


def requests_for_shard(spec: JobSpec, routes: Routes, batches: list[Prepared], rates: Rates) -> list[Any]:
    """Return the pushes of the batches to shard 0, with gradients drawn at random."""
    rng = np.random.default_rng(1)
    layout = Layout(spec.tables, spec.dense)
    found = []
    for batch in batches:
        gradients = {
            name: RowGradients(keys, rng.normal(0, 0.01, batch.rows[name].shape).astype(np.float32), rates.rows)
            for name, keys in batch.keys.items()
        }
        dense = rng.normal(0, 0.01, layout.dense_size).astype(np.float32)
        messages = cut_push(layout, routes, PushIdentity(0, 0), gradients, dense, rates.dense)
        found += [inlined(m.bulk) for m in messages if m.shard.id == 0]
    return found


class Turns:
    """What was measured of both sides, over all sets of processes; index 0 is with marks."""

    def __init__(self) -> None:
        self._wall: list[Pairs] = []
        self._processor: list[Pairs] = []
        self._speeds: tuple[list[float], list[float]] = ([], [])
        self._worked: tuple[list[float], list[float]] = ([], [])
        self._orders: list[float] = []
        self._orders_per_group: list[float] = []

    async def measure(
        self, sides: tuple[Side, Side], *, groups: int, warm_up: int, seconds: float, least_rounds: int
    ) -> None:
        """Train on both sides in turns, ``groups`` of each track in a round, for a while and ``least_rounds`` at least."""
        wall, processor = Pairs(), Pairs()
        for side in sides:
            # Rows are created, kernels and buffers are warm.
            await side.run(warm_up)
        rounds, begun = 0, time.monotonic()
        while rounds < least_rounds or time.monotonic() < begun + seconds:
            rounds += 1
            for which in (0, 1, 1, 0):
                side = sides[which]
                # The other side's shards had the processor's caches: one group is not counted.
                await side.run(1)
                shards, client, start = side.shard_seconds(), time.process_time(), time.perf_counter()
                samples = await side.run(groups)
                spent = time.perf_counter() - start
                used = time.process_time() - client
                used += side.shard_seconds() - shards
                wall.add(which, spent)
                processor.add(which, used)
                self._speeds[which].append(samples / spent)
                self._worked[which].append(used / (groups * TRACKS))
        self._wall.append(wall)
        self._processor.append(processor)
        self._orders_per_group.append(sides[0].orders / sides[0].groups)
        self._orders.append(await sides[0].order_seconds(2 * least_rounds))

    def report(self) -> dict[str, Any]:
        """Return medians over everything, and the ratios of each set: processes differ though they run the same code."""

        def ratios(kind: list[Pairs]) -> dict[str, Any]:
            found = spread([r for pairs in kind for r in pairs.ratios()])
            return {**found, "ratio_of_sets": [spread(pairs.ratios())["ratio"] for pairs in kind]}

        return {
            "samples_per_second_with": round(statistics.median(self._speeds[0])),
            "samples_per_second_without": round(statistics.median(self._speeds[1])),
            **ratios(self._wall),
            "processor_us_with": round(statistics.median(self._worked[0]) * 1e6, 1),
            "processor_us_without": round(statistics.median(self._worked[1]) * 1e6, 1),
            **{f"processor_{name}": value for name, value in ratios(self._processor).items() if name != "pairs"},
            "close_order_processor_us": round(statistics.median(self._orders) * 1e6, 1),
            "close_orders_per_group": round(statistics.median(self._orders_per_group), 4),
        }
