# SPDX-License-Identifier: Apache-2.0
"""A job whose shard dies with the only copy of its blocks: it goes back by itself, and comes to what it would have come to."""

import asyncio
import gc
import sys
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from oarlock.checkpoint.store import open_checkpoint
from oarlock.cli.digest import digest_of
from oarlock.client.job import FAILED
from oarlock.cluster.beginning import next_run
from oarlock.embedding.spec import TableSpec

Make = Callable[..., Any]

MODES: dict[str, dict[str, Any]] = {
    "async": {},
    "ssp": {"mode": "ssp", "staleness": 2},
    "geo": {"mode": "geo"},
}


async def lose(job: Any, number: int) -> None:
    """Kill a shard as a signal does, have another one in its place, and wait until the next run trains."""
    run = job.coordinator.run
    await kill(job, number)
    job.services[number].end()
    job.services[number] = type(job.services[number])()
    job.start_shard(number)
    await job.until(lambda: job.coordinator.run > run and job.coordinator.phase == "training")


async def kill(job: Any, number: int) -> None:
    task = job.background[1 + number]
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    c = job.coordinator
    dead = next(m for m in c.members.alive("shard") if m.address.endswith(f"-{number}"))
    c.member_gone(dead, "dead", "killed")


async def to_the_end(job: Any) -> None:
    await asyncio.gather(*job.workers)
    await job.until(lambda: job.background[0].done())


@pytest.mark.parametrize("mode", MODES)
def test_the_count_is_exact(make_job: Make, mode: str) -> None:
    job = make_job(epochs=4, workers=2, checkpoint_epochs=1, rows=400, **MODES[mode])
    left: list[Any] = []

    async def scene(job: Any) -> None:
        job.start()
        await job.until(lambda: job.coordinator.work.epoch >= 1 and job.coordinator.cuts.committed)
        await job.until(lambda: job.coordinator.phase == "training" and job.coordinator.work.closed.above)
        members = {m.incarnation for m in job.coordinator.members.alive("worker")}
        survivor = weakref.ref(job.services[0]._joined[1])
        left.append((survivor, weakref.ref(survivor().tables[0])))
        workers = list(job.workers)
        await lose(job, 1)
        assert not any(worker.done() for worker in workers), "they stay"
        assert not members & {m.incarnation for m in job.coordinator.members.alive("worker")}
        await to_the_end(job)

    job.run(scene)
    job.check_counted_once()
    c = job.coordinator
    assert (c.run, [r.epoch for r in c.work.history]) == (2, [0, 1, 2, 3])
    (found,) = c.recoveries.all
    assert (found["kind"], found["shard"], found["run"], found["cut"]) == ("rollback", 1, 2, c.events.all[0]["cut"])
    assert found["cut"] > 0
    # First the shard, then its tables, which are kept until they are closed.
    for _ in range(2):
        gc.collect()
    assert [each() for each in left[0]] == [None, None], "the memory of the run before"


def test_without_a_cut_it_begins_again(make_job: Make) -> None:
    job = make_job(epochs=2, workers=2, rows=400)

    async def scene(job: Any) -> None:
        job.start()
        await job.until(lambda: job.coordinator.work.epoch == 1)
        await lose(job, 0)
        assert (job.coordinator.work.epoch, job.coordinator.work.history) == (0, [])
        # And once more.
        await job.until(lambda: job.coordinator.work.closed.floor)
        await lose(job, 1)
        await to_the_end(job)

    job.run(scene)
    job.check_counted_once()
    c = job.coordinator
    assert (c.run, [r["cut"] for r in c.recoveries.all]) == (3, [0, 0])
    assert [(e["event"], e["cut"], e["path"]) for e in c.events.all] == [("restore", 0, "")] * 2


def test_rows_on_disk_go_with_the_run(make_job: Make, counting: Any) -> None:
    """A shard that stays gives its spill file back, and goes on with another one."""
    spec = counting.TABLES[0]
    spilling = TableSpec(**{**vars(spec), "memory_bytes": 1 << 16})
    job = make_job(epochs=3, tables=(spilling,), checkpoint_epochs=1, rows=400)

    async def scene(job: Any) -> None:
        job.start()
        await job.until(lambda: job.coordinator.work.epoch >= 1 and job.coordinator.phase == "training")
        file = job.services[0]._joined[1].tables[0]._cold.file
        await lose(job, 1)
        gc.collect()
        assert file._state in ("closed", "not open yet")
        await to_the_end(job)

    job.run(scene)
    job.check_counted_once()


def test_a_worker_that_is_told_by_a_shard_asks_the_coordinator(make_job: Make) -> None:
    """Whoever hears first, from whomever, that its run is over."""
    job = make_job(epochs=3, workers=3, checkpoint_epochs=1, rows=400, heartbeat_seconds=2.0, lease_seconds=60.0)

    async def scene(job: Any) -> None:
        job.start()
        await job.until(lambda: job.coordinator.work.epoch >= 1 and job.coordinator.phase == "training")
        await lose(job, 1)
        await to_the_end(job)

    job.run(scene)
    job.check_counted_once()


def test_whoever_stops_it_just_before_the_next_run_begins_is_heard(
    make_job: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job(epochs=1000, workers=2, rows=400)

    def stopped(c: Any, checkpoints: Any) -> Any:
        after = next_run(c, checkpoints)
        c.stop(True, "late")
        return after

    monkeypatch.setattr("oarlock.cluster.process.next_run", stopped)

    async def scene(job: Any) -> None:
        job.start()
        await job.until(lambda: job.coordinator.work.epoch == 1)
        await kill(job, 0)
        await job.until(lambda: job.background[0].done())

    job.run(scene)
    assert (job.coordinator.run, job.coordinator.phase, job.coordinator.reason) == (2, "stopped", "late")


def test_a_job_that_stops_does_not_go_back(make_job: Make) -> None:
    job = make_job(epochs=3, checkpoint_epochs=1)

    async def scene(job: Any) -> None:
        job.start()
        await job.until(lambda: job.coordinator.work.epoch >= 1 and job.coordinator.phase == "training")
        job.coordinator.stop(True, "enough")
        await kill(job, 1)
        assert job.coordinator.phase == FAILED
        assert job.coordinator.reason.endswith("go on from the last checkpoint with --resume")
        await to_the_end(job)

    job.run(scene)


@pytest.mark.parametrize("mode", ["sync", "hybrid"])
def test_ranks_go_on_from_the_step_of_the_cut(make_job: Make, counting: Any, seed: int, mode: str) -> None:
    """Under sync the digest is that of a job that nobody touched."""
    import rank_recipe as recipe

    def make(**changes: Any) -> Any:
        values = {
            "recipe": "rank_recipe:recipe",
            "tables": recipe.TABLES,
            "dense": recipe.DENSE,
            "metrics": (recipe.METRIC,),
            "mode": mode,
            "ranks": 3,
            "rows": 200,
            "epochs": 3,
            "checkpoint_epochs": 1,
        }
        return make_job(rng=np.random.default_rng(seed), **{**values, **changes})

    async def scene(job: Any) -> None:
        job.start()
        await job.until(lambda: job.coordinator.work.epoch >= 1 and job.coordinator.phase == "training")
        await job.until(lambda: job.coordinator.work.closed.above)
        await lose(job, 1)
        await to_the_end(job)

    job, quiet = make(workers=2), make(workers=1)
    job.run(scene)
    assert (job.coordinator.run, job.coordinator.phase) == (2, "done")
    assert [r.samples for r in job.coordinator.work.history] == [200] * 3
    if mode == "sync":
        quiet.run(lambda each: each.to_the_end())
        found = [digest_of(*open_checkpoint(each.folder / "checkpoints")) for each in (job, quiet)]
        assert str(found[0]) == str(found[1])
        losses = [[r.loss for r in each.coordinator.work.history] for each in (job, quiet)]
        # What workers report is summed up as it comes.
        assert losses[0] == pytest.approx(losses[1], rel=1e-12)
    del sys.modules["rank_recipe"]
