# SPDX-License-Identifier: Apache-2.0
"""Pulls of a worker that keeps rows: what it computes on lacks ``bound`` updates at most, whatever the wire and placements do.

Every push adds 1 to each of its rows, so a row tells how many updates it has.
"""

import asyncio
import random
from dataclasses import replace

import numpy as np
import pytest
import rig
from cache_rig import DIM, Worker, counted, job_of, move, owner_of

from oarlock.client.pull import cut_pull
from oarlock.embedding.spec import CacheSpec, Eviction, TableSpec
from oarlock.proto.common_pb2 import Header
from oarlock.proto.errors import DeadlineExceeded
from oarlock.proto.shard_pb2 import PullRequest

NO_DENSE = np.empty(0, np.int32)
FAULTS = {"lose": 0.1, "deaf": 0.1, "late": 0.2, "slow": 0.1}


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
    assert {(t.table, t.HasField("versions"), t.bound) for r in requests for t in r.tables} == {
        (0, True, 1),
        (1, False, 0),
    }


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
def test_a_row_that_was_evicted_before_its_block_moved_is_not_taken_for_the_new_one(way):
    """A block takes along that rows were evicted: the version of a new one is above that of the one that is kept."""
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
        (message,) = cut_pull(
            job.layout, replace(worker.client.routes, owners=job.owners * 0), {"user": keys}, NO_DENSE
        )
        under_way.take("user", message.pieces[0][1], np.arange(8, dtype=np.int32), np.full(8, 9, np.uint32), rows)
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


@pytest.mark.parametrize("dim", [1, 2, 16])
def test_questions_and_answers_of_kept_rows_fit_a_message(dim):
    table = TableSpec("user", dim, rig.SGD, rig.ZEROS, 8, cache=CacheSpec(100))
    job = rig.Job(rig.spec_of(tables=(table,))).place()
    worker = Worker(job)
    keys = {"user": rig.group_keys(job.layout, job.routes(), "user", range(4000))}
    rows = {"user": np.zeros((4000, dim), np.float32)}
    asked = worker.caches.ask(job.run, job.generation, keys, rows)
    limit = 700 * (4 * dim + 8)
    messages = cut_pull(job.layout, job.routes(), keys, NO_DENSE, limit=limit)
    assert len(messages) > 6
    for message in messages:
        request = PullRequest(header=Header(run=job.run, generation=job.generation))
        for name, piece in message.pieces:
            made = request.tables.add()
            made.CopyFrom(piece.keys(keys[name].keys))
            asked.request(request.header, name, piece, made, None)
        n = sum(piece.size for _, piece in message.pieces)
        # The envelope has room of its own: MAX_MESSAGE_BYTES - MESSAGE_BYTES.
        assert request.ByteSize() <= limit + 200
        assert (4 * dim + 8) * n <= limit
    assert sum(piece.size for m in messages for _, piece in m.pieces) == 4000


def test_of_a_piece_that_was_answered_twice_the_last_answer_counts():
    job = job_of(bound=5, shards=1)
    worker = Worker(job)
    keys = {"user": rig.group_keys(job.layout, job.routes(), "user", [1])}
    rows = {"user": np.zeros((1, DIM), np.float32)}
    (message,) = cut_pull(job.layout, job.routes(), keys, NO_DENSE)
    (name, piece), place = message.pieces[0], (job.run, job.generation)

    def came(version):
        return np.zeros(1, np.int32), np.full(1, version, np.uint32), np.full((1, DIM), version, np.float32)

    first = worker.caches.ask(*place, keys, rows)
    first.take(name, piece, *came(1))
    first.keep()
    second = worker.caches.ask(*place, keys, rows)
    second.take(name, piece, *came(9))
    second.take(name, piece, *(array[:0] for array in came(9)))
    second.keep()
    assert (worker.cache.hits, worker.cache.misses) == (1, 1)
    assert worker.cache.versions_of(keys["user"].keys, rows["user"]).tolist() == [1]
