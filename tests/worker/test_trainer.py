# SPDX-License-Identifier: Apache-2.0
"""Every sample of every epoch is trained exactly once, whatever workers come and go; and what the pipeline may not do."""

import asyncio
import dataclasses
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from oarlock.client.job import DONE, FAILED, STOPPED
from oarlock.proto.arrays import unpack
from oarlock.proto.errors import InvalidArgument

COORDINATOR = "in-process:coordinator"

Make = Callable[..., Any]


@pytest.mark.parametrize(("workers", "open_splits", "prefetch"), [(1, 1, 1), (1, 2, 2), (3, 2, 3)])
def test_every_sample_is_trained_once(make_job: Make, workers: int, open_splits: int, prefetch: int) -> None:
    job = make_job(workers=workers, open_splits=open_splits, prefetch=prefetch)
    job.wire.doubled = 0.1
    job.run(lambda job: job.to_the_end())
    assert job.coordinator.phase == DONE
    assert len(job.wire.later) > 5
    job.check_counted_once()
    trainers = [worker.result() for worker in job.workers]
    assert sum(t.progress.samples for t in trainers) == len(job.data["train"]) * job.spec.epochs
    assert sum(t.progress.batches for t in trainers) == job.batches()
    assert all(t.progress.batches > 0 and not t.stats()["open_splits"] for t in trainers)
    assert [r.loss for r in job.coordinator.work.history] == [0.25] * job.spec.epochs


def test_every_batch_has_a_draw_of_its_own(make_job: Make, counting: Any) -> None:
    job = make_job(workers=2, open_splits=2)
    job.run(lambda job: job.to_the_end())
    encoded = {(split, batch) for what, split, batch in counting.seen if what == "encode"}
    assert len(counting.draws) == len(encoded) == job.batches()
    assert {seed for seed, _ in counting.draws} == {job.spec.seed}
    assert {(step >> 32, step & 0xFFFFFFFF) for _, step in counting.draws} == encoded


def test_a_dead_workers_splits_are_finished_by_others(make_job: Make) -> None:
    job = make_job(workers=2, epochs=2, rows=300)
    job.wire.doubled = 0.2

    async def scene(job: Any) -> None:
        job.start()
        for dead, pushes in ((0, 15), (1, 60), (2, 110)):
            await job.until(lambda pushes=pushes: len(job.wire.calls("Shard.Push")) >= pushes)
            victim = job.workers[dead]
            victim.cancel()
            await asyncio.gather(victim, return_exceptions=True)
            assert victim.cancelled()
            job.start_worker()
        await asyncio.gather(*job.workers[3:], return_exceptions=True)
        await asyncio.gather(*job.background)

    job.run(scene)
    assert job.coordinator.phase == DONE
    assert [m.state for m in job.coordinator.members.all.values() if m.role == "worker"].count("dead") == 3
    # It was in the middle of something: its successor asked how far it came.
    assert len(job.wire.calls("Shard.Marks")) > 0
    job.check_counted_once()


def test_a_worker_that_ends_in_silence_loses_what_it_leased(make_job: Make) -> None:
    """The same with a push that arrives long after its sender died, and after its successor went on."""
    job = make_job(workers=1, epochs=1, rows=60)
    job.wire.doubled = 1.0

    async def scene(job: Any) -> None:
        job.start()
        await job.until(lambda: len(job.wire.calls("Shard.Push", "answered")) >= 2)
        job.workers[0].cancel()
        await job.start_worker()

    job.run(scene)
    job.check_counted_once()


def test_evaluation_does_not_depend_on_the_number_of_workers(make_job: Make) -> None:
    histories = []
    for workers in (1, 3):
        job = make_job(workers=workers)
        job.run(lambda job: job.to_the_end())
        histories.append([r.metrics["count"] for r in job.coordinator.work.history])
        of_key = job.occurrences()[job.data["test"][:, 0]].astype(np.float64)
        assert histories[-1] == [of_key.mean(), 2 * of_key.mean()]
    assert len(histories[0]) == 2


@pytest.mark.parametrize("prefetch", [1, 2, 4])
def test_the_pipeline_is_as_deep_as_prefetch(make_job: Make, counting: Any, prefetch: int) -> None:
    job = make_job(prefetch=prefetch, epochs=1, servers=1)
    encoded: list[int] = []
    pulled: list[int] = []
    pulls = 0

    async def note(method: str, request: Any) -> None:
        nonlocal pulls
        if method == "Shard.Push":
            pushed.add((request.split, request.group))
        # Once every encoded batch was pulled, further pulls are the evaluation's.
        pulls += method == "Shard.Pull" and pulls < len(counting.seen)
        encoded.append(len(counting.seen) - len(pushed))
        pulled.append(pulls - len(pushed))

    pushed: set[tuple[int, int]] = set()
    job.wire.bend = note
    job.run(lambda job: job.to_the_end())
    assert (max(pulled), max(encoded)) == (prefetch, prefetch + 1)


def test_groups_wait_for_each_other_and_a_split_for_all(make_job: Make) -> None:
    job = make_job(workers=2, open_splits=2)
    job.run(lambda job: job.to_the_end())
    unanswered: dict[int, set[int]] = defaultdict(set)
    open_messages: dict[tuple[int, int], int] = defaultdict(int)
    answered: dict[int, set[int]] = defaultdict(set)
    closed = 0
    for event, method, request in job.wire.log:
        if method == "Shard.Push":
            key = (request.split, request.group)
            open_messages[key] += 1 if event == "sent" else -1
            if event == "sent":
                unanswered[request.split].add(request.group)
                assert unanswered[request.split] == {request.group}, "an earlier group is still on its way"
                assert answered[request.split] <= set(range(request.group + 1))
            elif not open_messages[key]:
                unanswered[request.split].discard(request.group)
                answered[request.split].add(request.group)
        elif method == "Coordinator.CloseSplit" and event == "sent" and request.samples:
            closed += 1
            assert not unanswered[request.split]
            assert answered[request.split] == set(range(-(-request.samples // job.spec.batch_rows)))
    assert closed == job.spec.splits * job.spec.epochs


def test_pushes_in_flight_are_bounded_for_splits_of_one_batch(make_job: Make) -> None:
    job = make_job(group_rows=5, rows_per_split=5, batch_rows=8, epochs=1, servers=1, open_splits=2, prefetch=2)
    flying: set[int] = set()
    most = 0

    async def slow(method: str, request: Any) -> None:
        nonlocal most
        if method == "Shard.Push":
            flying.add(request.split)
            most = max(most, len(flying))
            await asyncio.sleep(3)
            flying.discard(request.split)

    job.wire.bend = slow
    job.run(lambda job: job.to_the_end())
    assert job.spec.splits == 48
    assert most == 2 * job.spec.open_splits
    job.check_counted_once()


def test_a_coordinator_without_more_work_is_not_asked_before_every_batch(make_job: Make) -> None:
    job = make_job(rows=300, group_rows=150, rows_per_split=150, batch_rows=3, epochs=1, open_splits=3)
    job.wire.seconds = 0.0
    job.run(lambda job: job.to_the_end())
    assert job.batches() == 100
    assert len(job.wire.calls("Coordinator.Lease")) < 20


def test_a_push_that_fails_for_good_ends_the_worker(make_job: Make) -> None:
    job = make_job(epochs=1)

    async def refuse(method: str, request: Any) -> None:
        if method == "Shard.Push" and request.group == 2:
            raise InvalidArgument("this push is not to our taste")

    job.wire.bend = refuse

    async def scene(job: Any) -> None:
        job.start()
        with pytest.raises(InvalidArgument, match="not to our taste"):
            await job.workers[0]
        assert not [c for c in job.wire.calls("Coordinator.CloseSplit") if c.samples]
        (member,) = (m for m in job.coordinator.members.all.values() if m.role == "worker")
        assert (member.state, member.error) == ("dead", "this push is not to our taste")
        assert not job.coordinator.work.leases

    assert job.run(scene) < 5


def test_refused_gradients_are_counted(make_job: Make, counting: Any) -> None:
    job = make_job(epochs=1, open_splits=3, servers=2)
    counting.poison.update((3, 7, 40))
    job.run(lambda job: job.to_the_end())
    clean = np.setdiff1d(np.arange(90), [3, 7, 40])
    np.testing.assert_array_equal(job.counts()[clean], job.occurrences()[clean])
    assert not job.counts()[[3, 7, 40]].any()
    # A key is refused once per group that has it.
    refused = 0
    for request in job.wire.calls("Shard.Push"):
        for table in request.tables:
            refused += int(np.isin(unpack(table.keys.keys, np.uint64, "keys"), [3, 7, 40]).sum())
    assert refused > 10
    assert job.workers[0].result().progress.refused == refused


def test_a_bad_file_fails_the_job_after_three_workers(make_job: Make) -> None:
    job = make_job(workers=4, epochs=1)
    reader = job.reader

    class Broken:
        name = "arrow"

        def read(self, plan: Any, columns: Any) -> Any:
            if plan.index == 3:
                raise InvalidArgument(f"{plan}: the file may be damaged")
            return reader.read(plan, columns)

    job.reader = Broken()

    async def scene(job: Any) -> None:
        job.start()
        ends = await asyncio.gather(*job.workers, return_exceptions=True)
        assert sum(isinstance(e, InvalidArgument) for e in ends) == 3
        await asyncio.gather(*job.background)

    job.run(scene)
    assert job.coordinator.phase == FAILED
    assert "met an error on 3 workers" in job.coordinator.reason
    assert "the file may be damaged" in job.coordinator.reason


def test_a_recipes_own_error_is_raised_and_told(make_job: Make, counting: Any) -> None:
    job = make_job(epochs=1)
    counting.bomb.add(int(job.data["train"][100, 0]))

    async def scene(job: Any) -> None:
        job.start()
        with pytest.raises(ValueError, match="cannot be encoded"):
            await job.workers[0]
        (member,) = (m for m in job.coordinator.members.all.values() if m.role == "worker")
        assert (member.state, member.error) == ("dead", "ValueError: this key cannot be encoded")

    job.run(scene)


@pytest.mark.parametrize("pushes", [1, 30, 77])
def test_a_stop_in_the_middle_leaves_whole_groups_and_gives_back_the_rest(
    make_job: Make, counting: Any, pushes: int
) -> None:
    job = make_job(workers=2, epochs=3)

    async def scene(job: Any) -> None:
        job.start()
        await job.until(lambda: len(job.wire.calls("Shard.Push")) >= pushes)
        job.coordinator.stop(True, "enough")
        asked = asyncio.get_running_loop().time()
        await asyncio.gather(*job.workers)
        assert asyncio.get_running_loop().time() - asked < 3
        assert not job.coordinator.work.leases
        assert [m.state for m in job.coordinator.members.all.values() if m.role == "worker"] == ["left", "left"]
        await asyncio.gather(*job.background)

    job.run(scene)
    assert job.coordinator.phase == STOPPED
    # What was encoded was pushed, whole: nothing is half done.
    sent = {(r.split, r.group) for r in job.wire.calls("Shard.Push", "answered")}
    assert sent == {(split, batch) for _, split, batch in counting.seen}
    assert job.batches() == len(sent)
    assert job.counts().sum() == 2 * sum(w.result().progress.samples for w in job.workers)


def test_a_stop_during_evaluation_gives_back_what_was_not_scored(make_job: Make) -> None:
    job = make_job(epochs=1, open_splits=4)

    async def stop(method: str, request: Any) -> None:
        if method == "Coordinator.CloseSplit" and request.sums and job.coordinator.stop_wanted is None:
            job.coordinator.stop(True, "enough")
            await asyncio.sleep(2)

    job.wire.bend = stop
    job.run(lambda job: job.to_the_end())
    assert job.coordinator.phase == STOPPED
    assert len(job.coordinator.work.results) == 1
    (released,) = job.wire.calls("Coordinator.Release")
    assert len(released.evaluations) == 3


def test_a_worker_ends_soon_when_the_job_failed_though_a_shard_is_silent(make_job: Make) -> None:
    job = make_job(epochs=1)

    async def silence(method: str, request: Any) -> None:
        if method == "Shard.Push" and request.group == 1:
            await asyncio.sleep(300)

    job.wire.bend = silence

    async def scene(job: Any) -> None:
        job.start()
        await job.until(lambda: any(r.group == 1 for r in job.wire.calls("Shard.Push")))
        job.coordinator.fail("a shard is gone")
        await job.workers[0]

    assert job.run(scene) < 3


def test_a_worker_waits_for_shards_for_as_long_as_it_takes(make_job: Make) -> None:
    job = make_job(epochs=1)

    async def scene(job: Any) -> None:
        worker = job.start_worker()
        await asyncio.sleep(130)
        assert not worker.done()
        job.start_shards()
        await worker

    assert 130 < job.run(scene) < 160
    job.check_counted_once()


@pytest.mark.parametrize("after", [0.0, 0.3, 1.7])
def test_a_job_stopped_before_it_began_ends_its_workers_in_peace(make_job: Make, after: float) -> None:
    job = make_job(epochs=1)

    async def scene(job: Any) -> None:
        worker = job.start_worker()
        await job.until(lambda: job.coordinator.members.alive("worker"))
        await asyncio.sleep(after)
        job.coordinator.stop(True, "not today")
        assert await worker is None

    assert job.run(scene) < 5
    assert job.coordinator.phase == STOPPED


def follows_what_was_trained(job: Any, counting: Any) -> None:
    """With one worker, the step of a push is how many batches it had trained before, to the last one."""
    order = {(draw >> 32, draw & 0xFFFFFFFF): number for number, (_, draw) in enumerate(counting.draws)}
    pushes = job.wire.calls("Shard.Push")
    assert len(pushes) == job.batches()
    assert [r.step for r in pushes] == [order[r.split, r.group] for r in pushes]


def test_every_push_says_how_many_groups_were_trained_before(make_job: Make, counting: Any) -> None:
    job = make_job(workers=1, epochs=2, open_splits=1, servers=1)
    job.run(lambda job: job.to_the_end())
    follows_what_was_trained(job, counting)


def test_no_group_counts_twice_while_its_split_is_being_closed(make_job: Make, counting: Any) -> None:
    """The coordinator counts a split's groups when it hears of the close, and tells so before the close is answered."""
    job = make_job(workers=1, epochs=2, open_splits=2, servers=1)

    async def close_late(method: str, request: Any) -> None:
        if method == "Coordinator.CloseSplit":
            await job.wire.inner.call(COORDINATOR, method, request, timeout_seconds=1)
            await asyncio.sleep(3 * job.spec.heartbeat_seconds)

    job.wire.bend = close_late
    job.run(lambda job: job.to_the_end())
    follows_what_was_trained(job, counting)


@pytest.mark.parametrize("usage", [True, False])
def test_occurrences_are_told_where_a_policy_reads_them(
    make_job: Make, monkeypatch: pytest.MonkeyPatch, usage: bool
) -> None:
    """Each occurrence adds one to its row, so the rows say what their counters must be."""
    import counting_recipe

    table = dataclasses.replace(counting_recipe.TABLES[0], usage=usage)
    monkeypatch.setattr(counting_recipe, "TABLES", (table,))
    job = make_job(workers=2)
    job.wire.doubled = 0.1
    job.run(lambda job: job.to_the_end())
    job.check_counted_once()
    parts = [part for push in job.wire.calls("Shard.Push") for part in push.tables]
    assert {part.HasField("occurrences") for part in parts} == {usage}
    counted = 0
    for service in job.services:
        found = service._joined[1].tables[0]
        for block in found.owned.tolist() if usage else ():
            rows = found.export_block(block)
            assert np.array_equal(rows.counters[:, 0], rows.weights[:, 0])
            counted += int(rows.counters[:, 0].sum())
    assert counted == usage * job.data["train"].size * job.spec.epochs
