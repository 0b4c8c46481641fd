# SPDX-License-Identifier: Apache-2.0
"""Pulls of a worker that keeps rows: what it computes on lacks ``bound`` updates at most, whatever the wire, placements and shards do.

Every push adds 1 to each of its rows, so a row tells how many updates it has. The last tests put wrong answers in.
"""

import asyncio
import random
from dataclasses import replace

import numpy as np
import pytest
import rig

from oarlock.client.caches import Caches
from oarlock.client.client import Client
from oarlock.client.pull import cut_pull
from oarlock.client.push import RowGradients
from oarlock.client.retry import Retry
from oarlock.embedding.spec import CacheSpec, Eviction, TableSpec
from oarlock.proto.arrays import pack
from oarlock.proto.errors import DeadlineExceeded, Malformed
from oarlock.proto.shard_pb2 import PullReply, PullRequest

PATIENT = Retry(deadline_seconds=10000.0)
DIM = 2
FAULTS = {"lose": 0.1, "deaf": 0.1, "late": 0.2, "slow": 0.1}


def job_of(bound=0, rows=100, policy="lru", shards=3, **changes):
    """A job with a table ``user`` that workers keep rows of, and ``item`` that they do not."""
    user = TableSpec("user", DIM, rig.SGD, rig.ZEROS, 8, cache=CacheSpec(rows, bound, policy), **changes)
    return rig.Job(rig.spec_of(tables=(user, TableSpec("item", 3, rig.SGD, rig.ZEROS, 4))), shards).place()


class Worker:
    """A client with caches, whose groups count up."""

    def __init__(self, job, split=0, transport=None, seed=0):
        self.job, self.split, self.group = job, split, 0
        self.member = job.member(transport, retry=PATIENT, seed=seed)
        self.client, self.caches = Client(self.member), Caches(job.spec.tables)
        self.cache = self.caches.of["user"]

    async def pull(self, raw, *, tables=("user",), caches=True):
        """Return {key: first value of its row}."""
        keys = {name: rig.group_keys(self.job.layout, self.client.routes, name, raw) for name in tables}
        dims = {t.name: t.dim for t in self.job.layout.tables}
        rows = {name: np.full((len(found.keys), dims[name]), np.nan, np.float32) for name, found in keys.items()}
        await self.client.pull(keys, rows, caches=self.caches if caches else None)
        for found in rows.values():
            assert (found == found[:, :1]).all()
        return dict(zip(keys["user"].keys.tolist(), rows["user"][:, 0].tolist(), strict=True))

    async def push(self, raw, value=-1.0, step=0):
        keys = rig.group_keys(self.job.layout, self.client.routes, "user", raw)
        gradients = np.full((len(keys.keys), DIM), value, np.float32)
        await self.client.push(self.split, self.group, {"user": RowGradients(keys, gradients, 1.0)}, step=step)
        self.group += 1


def move(job, number, to):
    """Move a block, and have all shards go by the new placement."""
    job.move(number, to)
    for shard in job.shards.values():
        shard.generation = job.generation


def owner_of(job, key):
    """Return (number of the key's block, its owner)."""
    block = int(rig.group_keys(job.layout, job.routes(), "user", [key]).blocks[0])
    return block, int(job.owners[block])


def counted(job, what):
    return sum(getattr(shard, what)[0] for shard in job.shards.values())


def test_only_rows_that_are_too_old_come(spy):
    job = job_of(bound=1)
    spy.inner = job.transport

    async def body():
        worker, raw = Worker(job, transport=spy), range(1, 21)
        found = [await worker.pull(raw, tables=("user", "item"))]
        for _ in range(4):
            await worker.push(raw)
            found.append(await worker.pull(raw, tables=("user", "item")))
        return worker, found

    (worker, found), _ = rig.run(body())
    # Rows that are absent are not kept. Then one of two updates is let pass.
    assert [set(rows.values()) for rows in found] == [{0}, {1}, {1}, {3}, {3}]
    assert (worker.cache.hits, worker.cache.misses, worker.cache.outdated) == (40, 60, 20)
    assert worker.cache.saved_bytes == 40 * 4 * DIM
    assert (counted(job, "rows_asked"), counted(job, "rows_pulled")) == (100, 60)
    requests = [PullRequest.FromString(data) for _, _, data, _ in spy.sent("Shard.Pull")]
    assert {(t.table, t.HasField("versions"), t.bound) for r in requests for t in r.tables} == {(0, True, 1), (1, False, 0)}


def test_without_caches_a_pull_is_as_ever_and_leaves_them_alone():
    job = job_of(bound=5)

    async def body():
        worker = Worker(job)
        await worker.push([1, 2])
        await worker.pull([1, 2])
        await worker.push([1, 2])
        assert await worker.pull([1, 2]) == {1: 1, 2: 1}
        assert await worker.pull([1, 2], caches=False) == {1: 2, 2: 2}
        assert (worker.cache.hits, worker.cache.misses) == (2, 2)

    rig.run(body())


@pytest.mark.parametrize("policy", ["lru", "lfu"])
@pytest.mark.parametrize("rows", [7, 100])
def test_with_bound_0_every_row_is_what_it_is_without_a_cache(seed, rows, policy):
    job, rng = job_of(rows=rows, policy=policy), random.Random(seed)

    async def body():
        worker, other = Worker(job), Worker(job, split=1)
        for _ in range(60):
            raw = rng.sample(range(30), rng.randrange(1, 15))
            assert await worker.pull(raw, tables=("user", "item")) == await worker.pull(raw, caches=False)
            await rng.choice([worker, other]).push(rng.sample(range(30), 4))
        return worker

    worker, _ = rig.run(body())
    assert worker.cache.hits > 50
    assert rows == 100 or worker.cache.evictions > 50


@pytest.mark.parametrize("moves", [False, True], ids=["still", "moving"])
def test_no_row_lacks_more_than_the_bound(seed, moves):
    """Two workers, each with two pulls under way, beside pushes, over a wire with faults; then the same beside moves."""
    bound = 2
    job, rng = job_of(bound=bound, rows=15), random.Random(seed)
    wire = rig.FaultyWire(job.transport, rng, **FAULTS)
    workers = [Worker(job, split, wire, seed=split) for split in range(2)]

    async def checked(worker, raw):
        before = dict(zip(raw, job.rows("user", raw)[:, 0].tolist(), strict=True))
        found = await worker.pull(raw, tables=("user", "item"))
        after = dict(zip(raw, job.rows("user", raw)[:, 0].tolist(), strict=True))
        for key, value in found.items():
            assert before[key] - bound <= value <= after[key], (key, before[key], value, after[key])

    async def train(worker):
        for _ in range(20):
            await worker.member.refresh()
            batches = [sorted({int(rng.random() ** 2 * 40) for _ in range(12)}) for _ in range(2)]
            await asyncio.gather(*(checked(worker, raw) for raw in batches), worker.push(batches[0]))

    async def body():
        training = [asyncio.ensure_future(train(worker)) for worker in workers]
        while moves and not all(t.done() for t in training):
            move(job, rng.randrange(8), rng.randrange(3))
            await asyncio.sleep(rng.random() * 200)
        await asyncio.gather(*training)
        await wire.drain()

    rig.run(body())
    hits = sum(worker.cache.hits for worker in workers)
    assert hits > (20 if moves else 150)
    assert job.generation > 5 if moves else sum(worker.cache.evictions for worker in workers) > 30
    assert all(wire.happened[kind] > 5 for kind in FAULTS)


def test_a_row_that_was_evicted_and_created_again_comes():
    job = job_of(bound=3, eviction=Eviction(age=5), shards=1)

    async def body():
        worker, table = Worker(job), job.shards[0].tables[0]
        for step in range(4):
            await worker.push([1], step=step)
        assert await worker.pull([1]) == {1: 4}
        block, _ = owner_of(job, 1)
        while not table.sweep(block, tick=100)[1]:
            pass
        assert table.rows == 0
        for _ in range(4):
            await worker.push([1], value=10.0, step=100)
        assert await worker.pull([1]) == {1: -40}

    rig.run(body())


@pytest.mark.parametrize("way", ["in a pull", "known", "and back"])
def test_a_row_of_a_block_that_was_elsewhere_comes_whatever_its_version_says(way):
    """A block forgets with its move what was evicted: the new row has the version of the one that is kept, of an earlier life."""
    job = job_of(bound=3, eviction=Eviction(age=5))

    async def body():
        worker, other = Worker(job), Worker(job, split=1)
        for step in range(4):
            await worker.push([1, 2], step=step)
        assert await worker.pull([1, 2]) == {1: 4, 2: 4}
        block, owner = owner_of(job, 1)
        while not job.shards[owner].tables[0].sweep(block, tick=100)[1]:
            pass
        move(job, block, (owner + 1) % 3)
        if way == "and back":
            move(job, block, owner)
        await other.member.refresh()
        for _ in range(4):
            await other.push([1], value=10.0, step=100)
        _, now = owner_of(job, 1)
        found = rig.group_keys(job.layout, job.routes(), "user", [1])
        newer = job.shards[now].tables[0].pull_newer(
            found.keys, found.blocks, found.counts, np.array([4], np.uint32), bound=3
        )
        assert len(newer.rows) == 0, "its version says that nothing has to come"
        if way == "known":
            await worker.member.refresh()
        assert (await worker.pull([1]))[1] == -40
        await worker.member.refresh()
        assert (await worker.pull([1]))[1] == -40

    rig.run(body())


@pytest.mark.parametrize("what", ["run", "generation"])
def test_a_new_run_and_a_new_placement_empty_the_caches_also_for_a_pull_under_way(what, spy):
    job = job_of(bound=5)
    spy.inner = job.transport
    raw = range(1, 9)

    async def body():
        worker = Worker(job, transport=spy)
        await worker.push(raw)
        await worker.pull(raw)
        assert len(worker.cache) == 8
        keys = rig.group_keys(job.layout, worker.client.routes, "user", raw)
        rows = np.zeros((8, DIM), np.float32)
        under_way = worker.caches.ask(job.run, worker.member.routes.generation, {"user": keys}, {"user": rows})
        if what == "generation":
            move(job, 0, 2)
            await worker.member.refresh()
        else:
            worker.member.run = 2
            for s, service in job.services.items():
                service._joined = (replace(service._joined[0], run=2), job.shards[s])
        await worker.push(raw)
        await worker.pull([1])
        assert len(worker.cache) == 1
        under_way.keep()
        assert len(worker.cache) == 1
        assert await worker.pull(raw) == dict.fromkeys(raw, 2)

    rig.run(body())


def test_a_part_that_is_asked_for_again_counts_once():
    """The answer of one shard is lost after the other's came; its rows change meanwhile."""
    job = job_of(bound=0)
    lost = []

    class Deaf(rig.Spy):
        async def call(self, address, method, request, *, timeout_seconds):
            reply = await super().call(address, method, request, timeout_seconds=timeout_seconds)
            if method == "Shard.Pull" and address == "shard-1" and not lost:
                lost.append(reply)
                await Worker(job, split=3).push(range(1, 30))
                raise DeadlineExceeded("no answer in time")
            return reply

    async def body():
        worker = Worker(job, transport=Deaf(job.transport))
        await worker.push(range(1, 30))
        found = await worker.pull(range(1, 30))
        there = {key for key in found if owner_of(job, key)[1] == 1}
        assert there
        assert found == {key: 2 if key in there else 1 for key in range(1, 30)}
        assert (worker.cache.hits, worker.cache.misses) == (0, 29)
        assert await worker.pull(range(1, 30)) == dict.fromkeys(range(1, 30), 2)
        assert worker.cache.hits == len(there)

    rig.run(body())


def test_a_shard_that_knows_no_versions_is_understood():
    job = job_of(bound=9)

    class Plain(rig.Spy):
        async def call(self, address, method, request, *, timeout_seconds):
            if method == "Shard.Pull":
                request = PullRequest.FromString(request.SerializeToString())
                for table in request.tables:
                    table.ClearField("versions")
                    table.ClearField("bound")
            return await super().call(address, method, request, timeout_seconds=timeout_seconds)

    async def body():
        worker, plain = Worker(job), Worker(job, transport=Plain(job.transport))
        for turn in range(1, 4):
            await worker.push([1, 2])
            assert await plain.pull([1, 2]) == {1: turn, 2: turn}
        assert len(plain.cache) == 0

    rig.run(body())


def test_an_answer_of_kept_rows_fits_a_message():
    job = job_of()
    keys = {"user": rig.group_keys(job.layout, job.routes(), "user", range(500))}
    limit = 4000
    messages = cut_pull(job.layout, job.routes(), keys, np.empty(0, np.int32), limit=limit)
    for message in messages:
        n = sum(piece.size for _, piece in message.pieces)
        blocks = sum(len(piece.blocks) for _, piece in message.pieces)
        assert max(12 * n + 8 * blocks, (4 * DIM + 8) * n) <= limit
    assert sum(piece.size for m in messages for _, piece in m.pieces) == 500


def int32(*values):
    return pack(np.array(values, np.int32))


def uint32(*values):
    return pack(np.array(values, np.uint32))


def rows_of(n):
    return pack(np.full((n, DIM), 7, np.float32))


# What a shard answers to a pull of four keys, of which the last is not kept, and what is wrong with that.
ANSWERS = {
    "a row that is not kept is missing": (rows_of(1), int32(0), uint32(5), "did not come, and no row of it is kept"),
    "nothing came": (rows_of(0), int32(), uint32(), "did not come, and no row of it is kept"),
    "beyond the end": (rows_of(2), int32(3, 4), uint32(5, 5), "not ascending within 0 to 3"),
    "below 0": (rows_of(2), int32(-1, 3), uint32(5, 5), "not ascending within 0 to 3"),
    "twice": (rows_of(2), int32(3, 3), uint32(5, 5), "not ascending within 0 to 3"),
    "not in order": (rows_of(4), int32(0, 2, 1, 3), uint32(5, 5, 5, 5), "not ascending within 0 to 3"),
    "more rows": (rows_of(3), int32(0, 3), uint32(5, 5), "3 rows and 2 versions of user for 2 positions"),
    "fewer rows": (rows_of(1), int32(0, 3), uint32(5, 5), "1 rows and 2 versions of user for 2 positions"),
    "fewer versions": (rows_of(2), int32(0, 3), uint32(5), "2 rows and 1 versions of user for 2 positions"),
    "no positions": (rows_of(4), None, uint32(5, 5, 5, 5), "positions and versions of 0 and 1 tables for 1"),
    "no versions": (rows_of(4), int32(0, 1, 2, 3), None, "positions and versions of 1 and 0 tables for 1"),
    "neither, and rows are missing": (rows_of(2), None, None, "2 rows and 4 versions of user for 4 positions"),
    "positions of another type": (rows_of(2), uint32(0, 3), uint32(5, 5), "positions of user: dtype uint32, wanted int32"),
    "versions of another type": (rows_of(2), int32(0, 3), int32(5, 5), "versions of user: dtype int32, wanted uint32"),
    "rows of another width": (
        pack(np.zeros((2, 3), np.float32)),
        int32(0, 3),
        uint32(5, 5),
        "rows of user: 3 columns, wanted 2",
    ),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_an_answer_that_cannot_be_changes_nothing(name, spy):
    rows, positions, versions, problem = ANSWERS[name]
    job = job_of(bound=1, shards=1)
    spy.inner = job.transport
    answer = PullReply(
        rows=[rows],
        positions=[] if positions is None else [positions],
        versions=[] if versions is None else [versions],
    )

    async def body():
        worker = Worker(job, transport=spy)
        *there, absent = rig.group_keys(job.layout, worker.client.routes, "user", [1, 2, 3, 4]).keys.tolist()
        await worker.push(there)
        await worker.pull(there)
        told, state = worker.caches.told(), rig.state(job)
        spy.answers.append(lambda a, m, r: answer if m == "Shard.Pull" else None)
        with pytest.raises(Malformed, match=problem):
            await worker.pull([1, 2, 3, 4])
        assert worker.caches.told() == told
        assert rig.state(job) == state
        spy.answers.clear()
        assert await worker.pull([1, 2, 3, 4]) == {**dict.fromkeys(there, 1), absent: 0}

    rig.run(body())
