# SPDX-License-Identifier: Apache-2.0
"""Mode sync: what a step does, against plain numpy; and one digest for any shards, processes, kills and faults on the wire."""

import asyncio
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from oarlock.checkpoint.store import LocalStore
from oarlock.data.files import files_from_json
from oarlock.data.ranks import RankPlan
from oarlock.data.splits import plan_splits
from oarlock.embedding.digest import Digest

Make = Callable[..., Any]


@pytest.fixture
def recipe(counting: Any) -> Iterator[Any]:
    import rank_recipe

    yield rank_recipe
    del sys.modules["rank_recipe"]


@pytest.fixture
def make(make_job: Make, recipe: Any, seed: int) -> Make:
    """Make jobs over the same files, whatever else differs."""

    def made(**changes: Any) -> Any:
        values = {
            "recipe": "rank_recipe:recipe",
            "tables": recipe.TABLES,
            "dense": recipe.DENSE,
            "metrics": (recipe.METRIC,),
            "mode": "sync",
            "ranks": 3,
            "workers": 2,
            "rows": 200,
            **changes,
        }
        return make_job(rng=np.random.default_rng(seed), **values)

    return made


def digest(job: Any) -> str:
    """Return the digest of what the shards hold; every block is on one of them, and at the same step."""
    found, blocks, steps = Digest(), 0, set()
    for service in job.services:
        shard = service._joined[1]
        for table in shard.tables:
            for block in table.owned.tolist():
                found.add_rows(table.spec.name, block, *table.export_block(block))
        for place, known in enumerate(shard.layout.dense_blocks):
            if shard.owned[shard.layout.dense_base + place]:
                content = shard.dense[known.parameter].export_block(known.block)
                found.add_dense(shard.dense[known.parameter].spec.name, known.block, content.weights, content.state)
        blocks += int(shard.owned.sum())
        steps |= set(shard.marks.steps[shard.owned].tolist())
    assert blocks == shard.layout.blocks
    assert len(steps) == 1
    return str(found)


def plan_of(job: Any) -> RankPlan:
    spec = job.spec
    rows = [s.rows for s in plan_splits(files_from_json(list(spec.files)), spec.rows_per_split)]
    return RankPlan(
        rows,
        seed=spec.seed,
        ranks=spec.ranks,
        epochs=spec.epochs,
        batch_rows=spec.batch_rows,
        accumulate=spec.accumulate,
    )


def ended_well(job: Any) -> str:
    """Check what every job of this kind comes to; return its digest."""
    assert job.coordinator.phase == "done", job.coordinator.reason
    assert [r.samples for r in job.coordinator.work.history] == [len(job.data["train"])] * job.spec.epochs
    assert job.coordinator.work.steps == job.groups_per_epoch() * job.spec.epochs
    for service in job.services:
        shard = service._joined[1]
        assert shard.counters["pushes"] == plan_of(job).total
        assert shard.staged.nbytes == 0
    return digest(job)


def run(job: Any) -> str:
    job.run(lambda job: job.to_the_end())
    return ended_well(job)


@pytest.fixture
def small(counting: Any) -> Iterator[Any]:
    import small_recipe

    yield small_recipe
    small_recipe.batches.clear()
    del sys.modules["small_recipe"]


@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_step_does_what_numpy_says(make: Make, small: Any, accumulate: int) -> None:
    """The mean of all ranks' samples is one step of sgd; batches are of 5 and 6 samples, and 11 splits leave ranks idle."""
    job = make(
        recipe="small_recipe:recipe",
        tables=small.TABLES,
        dense=small.DENSE,
        metrics=("count",),
        epochs=1,
        rows=220,
        group_rows=21,
        accumulate=accumulate,
    )
    first: dict[str, Any] = {}

    async def note(method: str, request: Any) -> None:
        if method == "Shard.Push" and not first:
            first["rows"] = job.rows().astype(np.float64)
            first["weights"] = weights(job).astype(np.float64)

    job.wire.bend = note
    job.run(lambda job: job.to_the_end())
    plan, spec = plan_of(job), job.spec
    of_ranks = [plan.units(rank, 0) for rank in range(3)]
    assert any(None in units for units in of_ranks)
    rows, weight, bias = first["rows"], first["weights"], 0.0
    batches = {split: 1 + max(b for s, b in small.batches if s == split) for split, _ in small.batches}
    for units in zip(*of_ranks, strict=True):
        step = [
            small.batches[unit.split, number]
            for unit in units
            if unit is not None
            for number in range(unit.group * accumulate, min((unit.group + 1) * accumulate, batches[unit.split]))
        ]
        one, other, label = (np.concatenate(column) for column in zip(*step, strict=True))
        keys = np.concatenate([one[:, None], other], axis=1)
        inputs = rows[keys].reshape(len(label), -1)
        error = (1 / (1 + np.exp(-(inputs @ weight + bias))) - label) / len(label)
        of_rows = np.zeros_like(rows)
        np.add.at(of_rows, keys.ravel(), np.outer(error, weight).reshape(-1, rows.shape[1]))
        rows = rows - small.RATES.rows * of_rows
        weight, bias = weight - small.RATES.dense * inputs.T @ error, bias - small.RATES.dense * error.sum()
    assert np.abs(rows - first["rows"]).max() > 0.02
    np.testing.assert_allclose(job.rows(), rows, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(weights(job), weight, rtol=1e-4, atol=1e-6)
    assert spec.ranks == 3


def weights(job: Any) -> Any:
    """Return the weights of the score, from whichever shard has them."""
    place = [spec.name for spec in job.spec.dense].index("score.weight")
    out = np.empty(job.spec.dense[place].size, np.float32)
    for service in job.services:
        shard = service._joined[1]
        if shard.owned[shard.layout.dense_base + place]:
            shard.dense[place].pull_block(0, out)
    return out


def test_shards_processes_and_threads_make_no_difference(make: Make) -> None:
    quiet = make(workers=1, servers=1)
    known = run(quiet)
    losses = [(r.metrics["logloss"], r.evaluated) for r in quiet.coordinator.work.history]
    assert losses[1][0] < losses[0][0] < 0.8
    assert any(service._joined[1].tables[1].evicted for service in quiet.services)
    for servers, workers in ((2, 2), (4, 3)):
        job = make(servers=servers, workers=workers)
        assert run(job) == known
        # Evaluation reads the same rows, and merges in the same order.
        assert [(r.metrics["logloss"], r.evaluated) for r in job.coordinator.work.history] == losses


@pytest.mark.slow
def test_what_a_result_depends_on_changes_the_digest(make: Make) -> None:
    known = {run(make(ranks=ranks, epochs=1)) for ranks in (1, 2, 3)}
    known.add(run(make(ranks=3, epochs=1, accumulate=2)))
    other = make(ranks=3, epochs=1)
    object.__setattr__(other.spec, "seed", 6)
    known.add(run(other))
    assert len(known) == 5


# Faults


FIRST = [0, *(pytest.param(number, marks=pytest.mark.slow) for number in (1, 2, 3))]


@pytest.mark.parametrize("number", FIRST)
def test_faults_on_the_wire_make_no_difference(make: Make, number: int) -> None:
    known = run(make(workers=1, servers=1, epochs=1))
    job = make(workers=2, servers=2, epochs=1)
    job.wire.rng.seed(number)
    job.wire.faults = dict.fromkeys(("drop", "duplicate", "delay", "reorder"), 0.02)
    assert run(job) == known
    assert job.wire.struck["drop"] + job.wire.struck["duplicate"] > 3


@pytest.mark.parametrize("number", FIRST)
def test_workers_that_are_killed_make_no_difference(make: Make, number: int) -> None:
    """A worker ends between two messages, wherever that is; its ranks go to others, which go on to the bit."""
    known = run(make(workers=1, servers=1, epochs=1, ranks=4))
    job = make(workers=2, servers=2, epochs=1, ranks=4)
    rng, kills = random.Random(number), 0

    async def scene(job: Any) -> None:
        nonlocal kills
        job.start()
        while job.coordinator.phase != "done":
            for _ in range(rng.randrange(1, 40)):
                await asyncio.sleep(0.02)
            living = [worker for worker in job.workers if not worker.done()]
            if kills < 6 and living and job.coordinator.phase == "training":
                living[rng.randrange(len(living))].cancel()
                kills += 1
                job.start_worker()
        await asyncio.gather(*job.workers, return_exceptions=True)
        await asyncio.gather(*job.background)

    job.run(scene)
    assert kills == 6
    assert ended_well(job) == known


def test_ranks_are_shared_out_and_move_to_who_comes(make: Make) -> None:
    known = run(make(workers=1, servers=1, ranks=4))
    job = make(workers=1, servers=2, ranks=4)
    seen: list[list[int]] = []

    def hosts() -> list[int]:
        leases = job.coordinator.work.leases
        return sorted(Counter(w for (kind, _), w in leases.items() if kind == "rank").values())

    async def scene(job: Any) -> None:
        job.start()
        await job.until(lambda: hosts() == [4])
        leaving = asyncio.Event()
        await job.until(lambda: job.wire.calls("Shard.Push"))
        job.start_worker()
        await job.until(lambda: hosts() == [2, 2])
        seen.append(hosts())
        leaving.set()
        job.workers[0].cancel()
        await job.until(lambda: hosts() == [4])
        await asyncio.gather(*job.workers, return_exceptions=True)
        await asyncio.gather(*job.background)

    job.run(scene)
    assert ended_well(job) == known


@pytest.mark.parametrize("pushes", [pytest.param(0, marks=pytest.mark.slow), 7])
def test_a_restore_at_an_epochs_end_and_in_its_middle_makes_no_difference(make: Make, pushes: int) -> None:
    known = run(make(epochs=3, servers=1, workers=1))
    job = make(epochs=3, servers=2, checkpoint_epochs=1, checkpoints_kept=9)

    async def scene(job: Any) -> None:
        job.start()
        await job.until(lambda: len(job.coordinator.work.history) == 1)
        begun = len(job.wire.calls("Shard.Push"))
        await job.until(lambda: len(job.wire.calls("Shard.Push")) >= begun + pushes)
        job.coordinator.stop(True, "enough")
        await asyncio.gather(*job.workers, *job.background)

    job.run(scene)
    assert job.coordinator.phase == "stopped"
    store = LocalStore(job.folder / "checkpoints")
    found = store.latest()
    assert found is not None
    steps = {step_of(store, found, entry) for entry in found.blocks}
    assert len(steps) == 1
    assert (steps == {plan_of(job).before(1)}) == (pushes == 0)
    again = make(epochs=3, servers=3, workers=3)

    async def go_on(again: Any) -> None:
        again.coordinator.begin_run(found, str(job.folder / "checkpoints"))
        await again.to_the_end()

    again.run(go_on)
    assert again.coordinator.phase == "done"
    assert digest(again) == known
    assert [r.samples for r in again.coordinator.work.history] == [len(again.data["train"])] * 3


def step_of(store: LocalStore, manifest: Any, entry: Any) -> int:
    (step,) = store.load_block(manifest, entry).marks.values()
    return int(step)


@pytest.mark.slow
def test_a_cut_in_the_middle_of_training_is_of_one_step_and_the_job_goes_on_from_it(make: Make) -> None:
    """Cuts on demand while every rank trains, on a wire that delays and repeats; each of them is where a run may begin."""
    known = run(make(epochs=2, servers=1, workers=1))
    job = make(epochs=2, servers=3, checkpoint_epochs=0, checkpoints_kept=99, heartbeat_seconds=0.1)
    job.wire.faults = dict.fromkeys(("duplicate", "delay"), 0.05)

    async def scene(job: Any) -> None:
        job.start()
        for _ in range(4):
            begun = len(job.wire.calls("Shard.Push"))
            await job.until(lambda begun=begun: len(job.wire.calls("Shard.Push")) > begun + 8)
            if job.coordinator.phase == "training":
                job.coordinator.cuts.wanted = True
            await job.until(lambda: not job.coordinator.cuts.wanted and not job.coordinator.cuts.begun)
        await asyncio.gather(*job.workers)
        await asyncio.gather(*job.background)

    job.run(scene)
    assert ended_well(job) == known
    assert job.coordinator.warnings == []
    store, steps = LocalStore(job.folder / "checkpoints"), set()
    for cut in store.cuts():
        found = store.load_manifest(cut)
        of_blocks = {step_of(store, found, entry) for entry in found.blocks}
        assert len(of_blocks) == 1
        steps |= of_blocks
        if max(of_blocks) == plan_of(job).total:
            continue
        again = make(epochs=2, servers=2, workers=2)

        async def go_on(again: Any, found: Any = found) -> None:
            again.coordinator.begin_run(found, str(job.folder / "checkpoints" / f"cut-{found.cut:06d}"))
            await again.to_the_end()

        again.run(go_on)
        assert digest(again) == known
        assert [r.samples for r in again.coordinator.work.history] == [len(again.data["train"])] * 2
    assert len(steps) >= 4
