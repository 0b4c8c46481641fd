# SPDX-License-Identifier: Apache-2.0
"""Sweeps: slices in the order of blocks, paced by steps, under the push lock, and the same whoever calls how often."""

import asyncio
import os
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import rig
from hypothesis import given
from hypothesis import strategies as st

from oarlock.client.push import PushIdentity, RowGradients, cut_push
from oarlock.embedding.evict import Swept
from oarlock.embedding.spec import Admission, Eviction, Part, TableSpec
from oarlock.proto.errors import OutOfMemory
from oarlock.ps import process, sweep
from oarlock.ps.identity import Identity
from oarlock.ps.service import ShardService
from oarlock.ps.sweep import Sweeper, round_steps

OLD = Eviction(age=40)
NOTHING = Swept(0, True, np.empty(0, np.uint64), np.empty(0, np.uint64))


def job_of(*tables, shards=1, **changes):
    """A job whose epoch has 100 groups."""
    values = {"splits": 10, "rows_per_split": 100, "batch_rows": 10, **changes}
    return rig.Job(rig.spec_of(tables=tables, dense=(), **values), shards=shards).place()


def table(name="user", eviction=OLD, **changes):
    return TableSpec(name, 2, rig.SGD, rig.ZEROS, **{"blocks": 8, "eviction": eviction, **changes})


def push(job, group, raw, *, step, name="user"):
    keyset = rig.group_keys(job.layout, job.routes(), name, raw)
    part = RowGradients(keyset, np.ones((len(keyset.keys), 2), np.float32), 1.0)
    for made in cut_push(job.layout, job.routes(), PushIdentity(3, group, step), {name: part}, None, 1.0):
        made.request.header.CopyFrom(job.header(made.shard.id))
        job.services[made.shard.id].push(made.bulk)


def sweep_all(shard):
    """Sweep what is due; return how many slices that was."""
    count = 0
    while shard.sweep_some():
        count += 1
        assert count < 10_000
    return count


@pytest.mark.parametrize(
    ("rules", "steps"),
    [
        (Eviction(age=40), 10),
        (Eviction(age=1), 1),
        (Eviction(age=4000), 100),
        (Eviction(age=40, norm=0.1), 10),
        (Eviction(norm=0.1), 100),
        (Eviction(age=40, score=0.1), 100),
        (Eviction(age=40, occurrences=2), 100),
    ],
)
def test_a_round_takes_an_epoch_or_a_quarter_of_an_age(rules, steps):
    assert round_steps(table(eviction=rules), 100) == steps


def test_a_push_that_comes_late_with_an_old_step_makes_no_row_older():
    job = job_of(table())
    shard = job.shards[0]
    push(job, 0, range(100), step=100)
    # Of a worker that was held up: it has trained them now, whatever it knew of the others then.
    push(job, 1, range(50, 150), step=3)
    sweep_all(shard)
    push(job, 2, [0], step=130)
    sweep_all(shard)
    assert shard.stats()["rows"] == 150


def test_rows_leave_once_they_are_old_and_no_sooner():
    job = job_of(table())
    shard = job.shards[0]
    push(job, 0, range(100), step=0)
    push(job, 1, range(50), step=30)
    assert (sweep_all(shard), shard.stats()["rows"]) == (8, 100)  # from step 1 to 31 is more than a round of 10 steps
    push(job, 2, [0], step=40)  # the tick is 41: those of tick 1 are 40 old
    sweep_all(shard)
    assert shard.stats()["rows"] == 100
    push(job, 3, [0], step=51)
    sweep_all(shard)
    assert shard.stats()["rows"] == 50
    assert shard.stats()["evicted"] == {"user": 50}
    assert shard.stats()["sweeps"] > 20
    versions = [shard.tables[0].version(b) for b in range(8)]
    assert shard.sequence.tolist() == versions
    # An evicted row is as one that never was.
    push(job, 4, range(100), step=52)
    assert np.all(job.rows("user", range(51, 100)) == -1)
    assert np.all(job.rows("user", range(1, 50)) == -3)


def test_blocks_come_in_their_order_each_at_its_part_of_the_round():
    job = job_of(table(eviction=Eviction(norm=1e-9)))  # rows of zeros would go; a round is 100 steps
    shard = job.shards[0]
    swept = []
    shard.tables[0].sweep = lambda block, **named: (swept.append((block, named["tick"])), NOTHING)[1]
    push(job, 0, [1], step=0)
    for step in range(1, 230):
        push(job, step, [1], step=step)
        sweep_all(shard)
    # Block b of 8 is due once (b + 1) / 8 of a round is over; the first one began at tick 1.
    due = [1 + 100 * turn + -(-100 * (block + 1) // 8) for turn in range(2) for block in range(8)]
    assert swept[:16] == [(n % 8, due[n]) for n in range(16)]
    assert [block for block, _ in swept[16:]] == [0, 1]


@given(st.lists(st.integers(1, 400), min_size=1, max_size=40), st.lists(st.integers(0, 3), max_size=40))
def test_every_block_is_swept_once_a_round_at_most_however_steps_jump(steps, patience):
    """Whoever is called too rarely leaves rounds out, and never sweeps a block twice for one."""
    found = []

    class Fake:
        spec = table(eviction=Eviction(norm=1.0))

        def sweep(self, block, *, tick, buckets):
            found.append((block, tick))
            return NOTHING

    owned = np.isin(np.arange(8), [0, 1, 5, 6])
    shard = SimpleNamespace(tables=[Fake()], layout=SimpleNamespace(table_base=[0]), owned=owned, told=None)
    sweeper = Sweeper(shard, epoch_steps=50)
    sweeper.begin(min(steps))
    for n, step in enumerate(sorted(steps)):
        for _ in range(patience[n] if n < len(patience) else 20):
            sweeper.sweep_some(step)
    begun = min(steps)
    for block in (0, 1, 5, 6):
        ticks = [tick for b, tick in found if b == block]
        assert len(ticks) <= (max(steps) - begun) // 50 + 1
    assert sweeper.slices == len(found)


def test_what_is_left_out_of_one_slice_comes_with_the_next(monkeypatch):
    monkeypatch.setattr(sweep, "SLICE_BUCKETS", 4)
    job = job_of(table(blocks=1))
    shard = job.shards[0]
    push(job, 0, range(1000), step=0)
    push(job, 1, [0], step=60)
    assert shard.sweep_some()
    first = shard.stats()["rows"]
    assert 1000 - 4 * 5 <= first < 1000
    # Between two slices the table is open to all.
    push(job, 2, [5000], step=60)
    sweep_all(shard)
    assert shard.stats()["rows"] == 2
    assert shard.sweeper.slices >= 1000 // 20


def test_tables_take_turns():
    job = job_of(table("user"), table("item", eviction=Eviction(age=40)), table("other", eviction=Eviction()))
    shard = job.shards[0]
    order = []
    for each in shard.tables:
        each.sweep = lambda block, name=each.spec.name, **_: (order.append((name, block)), NOTHING)[1]
    push(job, 0, [1], step=0)
    shard.sweep_some()
    push(job, 1, [1], step=60)
    sweep_all(shard)
    assert order == [(name, block) for block in range(8) for name in ("user", "item")]


def test_a_table_without_rules_is_never_swept():
    job = job_of(table(eviction=Eviction(max_bytes=1 << 20)))
    shard = job.shards[0]
    shard.tables[0].sweep = lambda *_, **__: pytest.fail("swept")
    for step in (0, 500, 1000):
        push(job, step, [1], step=step)
        assert not shard.sweep_some()
    assert shard.sweeper.idle


def test_a_job_that_was_restored_begins_its_rounds_where_it_is():
    """Its first step is high: that is no reason to sweep everything at once."""
    job = job_of(table(eviction=Eviction(score=0.5)))
    shard = job.shards[0]
    assert not shard.sweep_some()
    push(job, 0, range(50), step=70_000)
    assert not shard.sweep_some()
    assert shard.sweeper.slices == 0


def test_how_often_it_is_called_does_not_matter_to_the_rows():
    eager, lazy = (job_of(table(eviction=Eviction(age=60, score=0.2, decay=0.9))) for _ in range(2))
    rng = np.random.default_rng(0)
    for group in range(150):
        raw = rng.integers(0, 400, 30)
        for job in (eager, lazy):
            push(job, group, np.unique(raw), step=2 * group)
            for _ in range(3 if job is eager else 1):
                sweep_all(job.shards[0])
    assert eager.shards[0].stats()["evicted"]["user"] > 100
    assert rig.state(eager) == rig.state(lazy)


def test_a_sweep_that_fails_stops_neither_training_nor_the_other_blocks(monkeypatch):
    said = []
    monkeypatch.setattr(sweep.logger, "warning", lambda text, *values: said.append(text % values))
    job = job_of(table())
    shard = job.shards[0]
    real = shard.tables[0].sweep

    def failing(block, **named):
        if block == 2:
            raise OutOfMemory("the disk is full")
        return real(block, **named)

    shard.tables[0].sweep = failing
    push(job, 0, range(200), step=0)
    push(job, 1, [0], step=60)
    assert sweep_all(shard) == 8
    left = [int(shard.tables[0].export_block(b).keys.size) for b in range(8)]
    assert left[2] > 10
    assert sum(left) - left[2] <= 1
    assert said == ["event=sweep_failed table=user block=2 error=the disk is full"]


def test_a_long_order_is_not_waited_for():
    job = job_of(table())
    shard = job.shards[0]
    push(job, 0, range(9), step=0)
    push(job, 1, [0], step=60)
    shard.push_lock.acquire()
    assert shard.sweep_some(), "come again"
    assert shard.sweeper.slices == 0
    shard.push_lock.release()
    assert shard.sweep_some()
    assert shard.sweeper.slices == 1


def test_pushes_pulls_and_sweeps_side_by_side_lose_nothing():
    """Rows that are pushed again and again never grow old, whatever is swept around them."""
    job = job_of(table(eviction=Eviction(age=20), blocks=2))
    shard = job.shards[0]
    over = threading.Event()
    errors = []

    def sweeping():
        try:
            while not over.is_set():
                shard.sweep_some()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=sweeping)
    thread.start()
    try:
        for group in range(300):
            fresh = range(1000 + 50 * group, 1050 + 50 * group)
            push(job, group, [*range(100), *fresh], step=group)
            assert np.all(job.rows("user", range(100)) == -1 - group)
    finally:
        over.set()
        thread.join()
    assert not errors
    assert np.all(job.rows("user", range(100)) == -300)


def test_the_sweeping_of_a_shard_ends_when_it_is_cancelled():
    job = job_of(table())
    shard = job.shards[0]
    push(job, 0, range(100), step=0)
    shard.sweep_some()
    push(job, 1, [0], step=60)

    async def body():
        task = asyncio.ensure_future(process._sweep(shard))
        await asyncio.sleep(1)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        return task.cancelled()

    cancelled, _ = rig.run(body())
    assert cancelled
    assert shard.stats()["rows"] == 1
    # Without rules there is nothing to wait for.
    quiet = job_of(table(eviction=Eviction()))
    assert rig.run(process._sweep(quiet.shards[0]))[0] is None


def test_other_kinds_of_tables_are_swept_too():
    parts = (Part(1, rig.SGD, rig.ZEROS), Part(1, rig.SGD, rig.ZEROS))
    rules = {"eviction": Eviction(age=40), "initializer": rig.ZEROS}
    tables = (
        TableSpec("user", 2, rig.SGD, blocks=4, memory_bytes=1, usage=True, **rules),
        TableSpec("item", 2, blocks=4, parts=parts, expand_score=0.5, eviction=Eviction(age=40)),
        TableSpec("seen", 2, rig.SGD, blocks=4, admission=Admission("count"), **rules),
    )
    job = job_of(*tables)
    shard = job.shards[0]
    for name in ("user", "item", "seen"):
        for group in range(2):
            push(job, group, range(1000 * group, 1000 * group + 1000), step=0, name=name)
    assert shard.stats()["spilled"]["user"] > 0
    shard.sweep_some()
    push(job, 2, [0], step=60)
    sweep_all(shard)
    assert shard.stats()["tables"] == {"user": 1, "item": 0, "seen": 0}
    assert shard.stats()["evicted"] == {"user": 1999, "item": 2000, "seen": 2000}
    job.services[0].end()


def open_files():
    return len(os.listdir("/proc/self/fd"))


def test_a_shard_gives_its_spill_files_back(tmp_path):
    """In the folder that it was given, without a name, and gone when the shard ends."""
    spec = rig.spec_of(tables=(TableSpec("user", 8, rig.SGD, rig.ZEROS, 2, memory_bytes=1),), dense=())
    before = open_files()
    service = ShardService(spill_folder=tmp_path)
    service.end()  # before it joined there is nothing
    job = rig.Job(spec, shards=1)
    job.services[0] = service
    job.shards[0] = service.configure(spec, Identity(spec.job_bytes, 1, 0, 100))
    job.place()
    for group in range(3):
        keyset = rig.group_keys(job.layout, job.routes(), "user", range(1000 * group, 1000 * group + 1000))
        part = RowGradients(keyset, np.ones((1000, 8), np.float32), 1.0)
        (made,) = cut_push(job.layout, job.routes(), PushIdentity(0, group), {"user": part}, None, 1.0)
        made.request.header.CopyFrom(job.header(0))
        service.push(made.bulk)
    assert job.shards[0].stats()["spilled"]["user"] > 1000
    links = [os.path.realpath(f"/proc/self/fd/{n}") for n in os.listdir("/proc/self/fd")]
    assert any(Path(link).parent == tmp_path for link in links)
    assert list(tmp_path.iterdir()) == []
    assert np.all(job.rows("user", range(3000)) == -1)
    service.end()
    service.end()
    assert open_files() == before
