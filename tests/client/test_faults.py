# SPDX-License-Identifier: Apache-2.0
"""Clients and shards over a wire with faults, in virtual time: every group is applied exactly once to every block."""

import asyncio
import random

import numpy as np
import pytest
import rig

from oarlock.client.client import Client
from oarlock.client.push import RowGradients
from oarlock.client.retry import Retry
from oarlock.proto.errors import PSError

KEYS = np.array([*range(40), (1 << 64) - 1, 1 << 40], np.uint64)
PATIENT = Retry(deadline_seconds=10000.0)


def amount(split, group, key):
    """A small integer that float32 adds exactly, different for every (split, group, key)."""
    return float((split * 31 + group * 7 + int(key) % 13) % 5 - 2)


async def train(job, client, split, groups, *, begin=0, check=None):
    """Push the groups of a split as a worker does: one after another, each acknowledged before the next."""
    for group in range(begin, groups):
        gradients = {}
        for table in job.layout.tables:
            raw = np.array([k for k in KEYS if (int(k) * 7 + split + group) % 3], np.uint64)
            keyset = rig.group_keys(job.layout, client.routes, table.name, raw)
            values = np.array([[amount(split, group, k)] * table.dim for k in keyset.keys], np.float32)
            gradients[table.name] = RowGradients(keyset, values, 1.0)
        dense = np.full(job.layout.dense_size, amount(split, group, 3), np.float32)
        waiting = client.push(split, group, gradients, dense=dense, dense_rate=1.0)
        for part in gradients.values():
            part.gradients[:] = np.nan
        dense[:] = np.nan
        counts = await waiting
        assert counts.refused == 0
        if check:
            await check(client, gradients)


def expected(job, ended):
    """Return (rows by table, dense) after the groups below ended[split] of each split."""
    rows = {}
    for table in job.layout.tables:
        total = np.zeros(len(KEYS))
        for split, groups in ended.items():
            for group in range(groups):
                touched = [(int(k) * 7 + split + group) % 3 != 0 for k in KEYS]
                total -= [amount(split, group, k) if t else 0.0 for k, t in zip(KEYS, touched, strict=True)]
        rows[table.name] = np.repeat(total[:, None], table.dim, axis=1)
    dense = -sum(amount(s, g, 3) for s, groups in ended.items() for g in range(groups))
    return rows, dense


def assert_exact(job, ended):
    rows, dense = expected(job, ended)
    for table, values in rows.items():
        assert np.array_equal(job.rows(table, KEYS), values)
    assert np.array_equal(job.dense(), np.full(job.layout.dense_size, dense))


@pytest.mark.parametrize(
    "faults",
    [
        {"lose": 0.2},
        {"deaf": 0.2},
        {"late": 0.3},
        {"slow": 0.3},
        {"lose": 0.1, "deaf": 0.1, "late": 0.2, "slow": 0.1},
    ],
    ids=lambda faults: "+".join(faults),
)
def test_two_hundred_pushes_are_counted_exactly(faults, seed):
    job = rig.Job(rig.spec_of()).place()
    wire = rig.FaultyWire(job.transport, random.Random(seed), **faults)

    async def body():
        client = Client(job.member(wire, retry=PATIENT, seed=seed))
        await asyncio.gather(*(train(job, client, split, 50) for split in range(4)))
        assert [await client.next_group(split) for split in range(4)] == [49] * 4
        await wire.drain()

    rig.run(body())
    assert all(wire.happened[kind] > 10 for kind in faults)
    assert_exact(job, dict.fromkeys(range(4), 50))


def test_blocks_that_move_take_their_marks_along(seed):
    """Blocks move while pushes are lost, late and repeated: no group is lost or applied twice on the way."""
    job = rig.Job(rig.spec_of()).place()
    rng = random.Random(seed)
    wire = rig.FaultyWire(job.transport, rng, lose=0.1, deaf=0.1, late=0.2, slow=0.2)

    async def body():
        client = Client(job.member(wire, retry=PATIENT, seed=seed))
        training = [asyncio.ensure_future(train(job, client, split, 30)) for split in range(4)]
        while not all(t.done() for t in training):
            job.move(rng.randrange(job.layout.blocks), rng.randrange(3))
            await asyncio.sleep(rng.random() * 5)
        await asyncio.gather(*training)
        await wire.drain()

    rig.run(body())
    assert job.generation > 30
    assert_exact(job, dict.fromkeys(range(4), 30))


def test_a_successor_repeats_what_the_dead_worker_left_half_done(seed):
    job = rig.Job(rig.spec_of()).place()
    rng = random.Random(seed)
    wire = rig.FaultyWire(job.transport, rng, lose=0.3, deaf=0.2, late=0.3)

    async def body():
        first = Client(job.member(wire, retry=Retry(deadline_seconds=30), seed=1))
        died = []
        for split in range(4):
            worker = asyncio.ensure_future(train(job, first, split, 30))
            await asyncio.sleep(rng.random() * 100)
            worker.cancel()
            (result,) = await asyncio.gather(worker, return_exceptions=True)
            assert isinstance(result, PSError | asyncio.CancelledError) or result is None
        second = Client(job.member(wire, retry=PATIENT, seed=2))
        for split in range(4):
            begin = await second.next_group(split)
            died.append(begin)
            await train(job, second, split, 30, begin=begin)
        await wire.drain()
        return died

    died, _ = rig.run(body())
    assert any(0 < begin < 29 for begin in died)
    assert_exact(job, dict.fromkeys(range(4), 30))


def test_two_workers_on_one_split_do_no_harm(seed):
    job = rig.Job(rig.spec_of()).place()
    rng = random.Random(seed)
    wire = rig.FaultyWire(job.transport, rng, lose=0.1, deaf=0.1, late=0.2, slow=0.3)

    async def body():
        clients = [Client(job.member(wire, retry=PATIENT, seed=n)) for n in range(2)]
        await asyncio.gather(*(train(job, client, 3, 40) for client in clients))
        await wire.drain()

    rig.run(body())
    assert_exact(job, {3: 40})


def test_a_pull_sees_every_group_that_was_acknowledged(seed):
    job = rig.Job(rig.spec_of()).place()
    rng = random.Random(seed)
    wire = rig.FaultyWire(job.transport, rng, lose=0.1, deaf=0.1, late=0.1, slow=0.2)
    pulled = []

    async def check(client, gradients):
        keys = {name: part.keys for name, part in gradients.items()}
        rows = {t.name: np.full((len(keys[t.name].keys), t.dim), np.nan, np.float32) for t in job.layout.tables}
        dense = np.full(job.layout.dense_size, np.nan, np.float32)
        await client.pull(keys, rows, dense=dense)
        want, want_dense = expected(job, {0: len(pulled) + 1})
        at = {int(k): i for i, k in enumerate(KEYS)}
        for table, values in rows.items():
            assert np.array_equal(values, want[table][[at[int(k)] for k in keys[table].keys]])
        assert np.array_equal(dense, np.full(len(dense), want_dense))
        pulled.append(1)
        if len(pulled) % 5 == 0:
            job.move(rng.randrange(job.layout.blocks), rng.randrange(3))

    async def body():
        client = Client(job.member(wire, retry=PATIENT, seed=seed))
        await train(job, client, 0, 40, check=check)
        await wire.drain()

    rig.run(body())
    assert len(pulled) == 40
