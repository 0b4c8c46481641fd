# SPDX-License-Identifier: Apache-2.0
"""Mode hybrid: rows are counted once, as under async, and dense values make the steps of all ranks, as under sync."""

import asyncio
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from oarlock.checkpoint.store import LocalStore
from oarlock.client.compression import WireSpec
from oarlock.data.files import files_from_json
from oarlock.data.ranks import RankPlan
from oarlock.data.splits import plan_splits
from oarlock.embedding.spec import CacheSpec, TableSpec
from oarlock.ps.rank_marks import STEP_MARK

Make = Callable[..., Any]


@pytest.fixture
def make(make_job: Make, seed: int) -> Make:
    """Make jobs over the same files, whatever else differs."""

    def made(**changes: Any) -> Any:
        values = {"mode": "hybrid", "ranks": 3, "workers": 2, "rows": 220, "group_rows": 21, **changes}
        return make_job(rng=np.random.default_rng(seed), **values)

    return made


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


def check_exact(job: Any) -> None:
    """Each occurrence counts once in the rows, each step once in the dense value."""
    assert job.coordinator.phase == "done", job.coordinator.reason
    np.testing.assert_array_equal(job.counts(), job.occurrences() * job.spec.epochs)
    # Each batch gives -1 by its share of the step's samples.
    assert job.batches() == plan_of(job).total
    assert job.coordinator.work.steps == job.groups_per_epoch() * job.spec.epochs
    assert [r.samples for r in job.coordinator.work.history] == [len(job.data["train"])] * job.spec.epochs
    for service in job.services:
        shard = service._joined[1]
        assert shard.staged.nbytes == 0
        assert shard.marks.splits == 0


def run(job: Any) -> None:
    job.run(lambda job: job.to_the_end())
    check_exact(job)


@pytest.mark.parametrize(
    "changes",
    [
        {"servers": 1, "workers": 1, "ranks": 1, "rows": 60},
        pytest.param({"servers": 2, "workers": 2}, marks=pytest.mark.slow),
        {"servers": 3, "workers": 3, "ranks": 7, "accumulate": 2, "prefetch": 3},
    ],
)
def test_rows_count_once_and_dense_values_by_steps(make: Make, changes: dict[str, Any]) -> None:
    run(make(**changes))


@pytest.mark.parametrize("prefetch", [1, 3])
def test_rows_are_pulled_ahead_and_dense_values_for_their_step_alone(make: Make, prefetch: int) -> None:
    job = make(servers=1, ranks=1, workers=1, prefetch=prefetch, epochs=1, rows=60)
    run(job)
    rows, dense, pushed, ahead = 0, 0, 0, set()
    for event, method, request in job.wire.log:
        if event == "sent" and method == "Shard.Pull" and request.rank:
            assert not request.tables
            # The commit of a step says which one.
            assert request.state == pushed
            dense += 1
        elif event == "sent" and method == "Shard.Pull" and not request.dense.data:
            rows += 1
            ahead.add(rows - pushed)
        elif event == "answered" and method == "Shard.Push":
            pushed += 1
    assert pushed == plan_of(job).total
    # The last one commits the last step.
    assert dense == pushed + 1
    assert max(ahead) == prefetch


def dense_bits(job: Any) -> list[bytes]:
    """Return all dense blocks, weights and states, in the job's order."""
    out: dict[int, bytes] = {}
    for service in job.services:
        shard = service._joined[1]
        for place, block in enumerate(shard.layout.dense_blocks):
            if shard.owned[shard.layout.dense_base + place]:
                content = shard.dense[block.parameter].export_block(block.block)
                out[place] = content.weights.tobytes() + content.state.tobytes()
    return [out[place] for place in sorted(out)]


@pytest.fixture
def still(counting: Any) -> Iterator[Any]:
    """A net with hidden layers, dropout and adam whose rows do not move: only dense values, and their order, matter."""
    import rank_recipe

    rates = rank_recipe.RankWorkload.rates
    rank_recipe.RankWorkload.rates = lambda self, done: replace_rows(rates(self, done))
    yield rank_recipe
    del sys.modules["rank_recipe"]


def replace_rows(rates: Any) -> Any:
    return type(rates)(0.0, rates.dense)


def test_dense_values_are_those_of_sync_to_the_bit_where_rows_stand_still(make: Make, still: Any) -> None:
    values = {
        "recipe": "rank_recipe:recipe",
        # Without a policy that takes rows away or lets them in by how often they came.
        "tables": tuple(TableSpec(t.name, t.dim, t.optimizer, t.initializer, t.blocks) for t in still.TABLES),
        "dense": still.DENSE,
        "metrics": (still.METRIC,),
        "rows": 100,
        "epochs": 1,
    }
    known = make(mode="sync", workers=1, servers=1, **values)
    known.run(lambda job: job.to_the_end())
    assert any(np.frombuffer(bits, np.float32).any() for bits in dense_bits(known))
    job = make(**values, workers=3, servers=3, prefetch=2)
    job.wire.faults = dict.fromkeys(("drop", "duplicate", "delay", "reorder"), 0.02)
    job.run(lambda job: job.to_the_end())
    assert job.coordinator.phase == "done"
    assert dense_bits(job) == dense_bits(known)


# Faults

FIRST = [0, *(pytest.param(number, marks=pytest.mark.slow) for number in (1, 2, 3))]


@pytest.mark.parametrize("number", FIRST)
def test_faults_on_the_wire_lose_and_double_nothing(make: Make, number: int) -> None:
    job = make(workers=2, servers=2, prefetch=2, accumulate=2, epochs=1)
    job.wire.rng.seed(number)
    job.wire.faults = dict.fromkeys(("drop", "duplicate", "delay", "reorder"), 0.02)
    run(job)
    assert job.wire.struck["drop"] + job.wire.struck["duplicate"] > 3


def kill_in_mid_step(job: Any, number: int, kills: list[int], most: int = 6) -> Any:
    """Return a scene in which workers end between two messages, and others come."""
    rng = random.Random(number)

    async def scene(job: Any) -> None:
        job.start()
        while job.coordinator.phase != "done":
            for _ in range(rng.randrange(1, 40)):
                await asyncio.sleep(0.02)
            living = [worker for worker in job.workers if not worker.done()]
            if len(kills) < most and living and job.coordinator.phase == "training":
                living[rng.randrange(len(living))].cancel()
                kills.append(len(job.workers))
                job.start_worker()
        await asyncio.gather(*job.workers, return_exceptions=True)
        await asyncio.gather(*job.background)

    return scene


@pytest.mark.parametrize("number", FIRST)
def test_workers_that_are_killed_lose_and_double_nothing(make: Make, number: int) -> None:
    job, kills = make(ranks=4, rows=120), list[int]()
    job.wire.doubled = 0.1
    job.run(kill_in_mid_step(job, number, kills, most=4))
    assert len(kills) == 4
    check_exact(job)


def test_a_worker_that_ends_between_its_rows_on_two_shards_is_completed(make: Make) -> None:
    """The rows of a group are on one shard and not on the other when its worker ends: its successor fills the gap alone."""
    job = make(servers=2, ranks=2, workers=2, epochs=1)
    caught: dict[str, Any] = {}

    async def bend(method: str, request: Any) -> None:
        if method == "Shard.Push" and request.rank == 2 and request.step == 3:
            caught.setdefault("targets", set()).add(request.header.target)
            if "sender" not in caught:
                caught["sender"] = request.header.sender
            elif request.header.sender == caught["sender"] and len(caught["targets"]) > 1:
                await asyncio.sleep(1e4)

    async def scene(job: Any) -> None:
        job.start()
        await job.until(lambda: len(caught.get("targets", ())) > 1)
        for _ in range(20):
            await asyncio.sleep(0.02)
        marks = [service._joined[1].marks for service in job.services]
        unit = plan_of(job).units(1, 0)[3]
        assert unit is not None
        caught["marks"] = sorted(of.highest(unit.split) for of in marks)
        caught["group"] = unit.group
        hosts = {w: r for (kind, r), w in job.coordinator.work.leases.items() if kind == "rank"}
        for worker in job.workers:
            worker.cancel()
        assert caught["sender"] in hosts
        job.start_worker()
        await asyncio.gather(*job.workers, return_exceptions=True)
        await asyncio.gather(*job.background)

    job.wire.bend = bend
    job.run(scene)
    assert caught["marks"] == [caught["group"] - 1, caught["group"]]
    check_exact(job)


# Cuts and restores


def images_of(store: LocalStore, manifest: Any) -> dict[tuple[str, str, int], Any]:
    return {(e.kind, e.name, e.block): store.load_block(manifest, e) for e in manifest.blocks}


def check_cut(job: Any, manifest: Any) -> int:
    """Check that a cut is of one step: rows hold every group up to it and none after it; return the step."""
    images = images_of(LocalStore(job.folder / "checkpoints"), manifest)
    (step,) = {image.marks[STEP_MARK] for (kind, _, _), image in images.items() if kind == "dense"}
    plan, spec = plan_of(job), job.spec
    counted = sum(image.weights[:, 0].sum() for (kind, _, _), image in images.items() if kind == "rows")
    sizes = [s.rows for s in plan_splits(files_from_json(list(spec.files)), spec.rows_per_split)]
    wanted, at = 0, 0
    for epoch in range(spec.epochs):
        order = job_order(spec, epoch)
        of_ranks = [plan.units(rank, epoch) for rank in range(spec.ranks)]
        for units in zip(*of_ranks, strict=True):
            at += 1
            for unit in units if at <= step else ():
                if unit is not None:
                    wanted += 2 * rows_of_group(spec, sizes[order[unit.split % spec.splits]], unit.group)
    assert counted == wanted
    (dense,) = (image.weights[0, 0] for (kind, _, _), image in images.items() if kind == "dense")
    assert dense == step
    return int(step)


def job_order(spec: Any, epoch: int) -> list[int]:
    from oarlock.data.order import split_order

    found: list[int] = split_order(spec.seed, epoch, spec.splits).tolist()
    return found


def rows_of_group(spec: Any, size: int, group: int) -> int:
    batches = -(-size // spec.batch_rows)
    first, last = group * spec.accumulate, min((group + 1) * spec.accumulate, batches)
    return int(last * size // batches - first * size // batches)


def go_on(make: Make, job: Any, manifest: Any, **changes: Any) -> None:
    again = make(epochs=job.spec.epochs, **changes)

    async def scene(again: Any) -> None:
        path = str(job.folder / "checkpoints" / f"cut-{manifest.cut:06d}")
        again.coordinator.begin_run(manifest, path)
        await again.to_the_end()

    again.run(scene)
    check_exact(again)


def test_a_job_that_is_stopped_ends_after_one_step_of_all_ranks_and_goes_on_from_it(make: Make) -> None:
    job = make(epochs=2, servers=2, ranks=4, prefetch=2, rows=120)

    async def scene(job: Any) -> None:
        job.start()
        await job.until(lambda: len(job.wire.calls("Shard.Push")) >= 30)
        job.coordinator.stop(True, "enough")
        await asyncio.gather(*job.workers, *job.background)

    job.run(scene)
    assert (job.coordinator.phase, job.coordinator.reason) == ("stopped", "enough")
    assert not job.coordinator.cuts.deserted
    found = LocalStore(job.folder / "checkpoints").latest()
    assert found is not None
    assert 0 < check_cut(job, found) < plan_of(job).total
    go_on(make, job, found, servers=3, workers=3, ranks=4, rows=120)


@pytest.mark.slow
def test_cuts_while_all_train_are_of_one_step_each(make: Make) -> None:
    job = make(servers=3, ranks=4, heartbeat_seconds=0.1, checkpoints_kept=99)
    job.wire.faults = dict.fromkeys(("duplicate", "delay"), 0.05)
    kills: list[int] = []

    async def scene(job: Any) -> None:
        job.start()
        for number in range(4):
            begun = len(job.wire.calls("Shard.Push"))
            await job.until(lambda begun=begun: len(job.wire.calls("Shard.Push")) > begun + 8)
            if job.coordinator.phase == "training":
                job.coordinator.cuts.wanted = True
            if number == 1:
                job.workers[0].cancel()
                kills.append(job.start_worker() is not None)
            await job.until(lambda: not job.coordinator.cuts.wanted and not job.coordinator.cuts.begun)
        await asyncio.gather(*job.workers, return_exceptions=True)
        await asyncio.gather(*job.background)

    job.run(scene)
    check_exact(job)
    store = LocalStore(job.folder / "checkpoints")
    steps = [check_cut(job, store.load_manifest(cut)) for cut in store.cuts()]
    assert len(set(steps)) >= 3
    cut = next(c for c, step in zip(store.cuts(), steps, strict=True) if 0 < step < plan_of(job).total)
    go_on(make, job, store.load_manifest(cut), servers=1, workers=2, ranks=4)


# What goes with rows


@pytest.mark.slow
def test_rows_may_be_kept_and_packed_and_what_a_dead_worker_kept_is_counted(make: Make, counting: Any) -> None:
    (table,) = counting.TABLES
    exact = {"key": WireSpec(push="topk:1"), "dense": WireSpec("bfloat16", "bfloat16")}
    job, kills = make(ranks=4, tables=(replace(table, cache=CacheSpec(40, 2)),), compression=exact), list[int]()
    job.run(kill_in_mid_step(job, 1, kills, most=3))
    check_exact(job)
    assert 1 <= job.coordinator.status()["residual_splits_lost"] <= 4 * (len(kills) + 3)
    packed = [part.HasField("packed") for request in job.wire.calls("Shard.Push") for part in request.tables]
    assert any(packed)
    assert not all(packed)
    asked = [keys.HasField("versions") for request in job.wire.calls("Shard.Pull") for keys in request.tables]
    assert any(asked)
