# SPDX-License-Identifier: Apache-2.0
"""A worker that is asked to leave: it ends what it began, gives back the rest, and nobody waits for its lease."""

import asyncio
import functools
from collections.abc import Callable
from typing import Any

import pytest

from oarlock.client.job import DONE
from oarlock.proto.errors import Unavailable
from oarlock.worker.process import JOIN_SECONDS, LEAVE_SECONDS

Make = Callable[..., Any]
# Far longer than any of these jobs takes: whoever waits for a lease to end shows.
LEASE = 5000.0


@pytest.fixture
def start_leaver(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], tuple[asyncio.Task[Any], asyncio.Event]]:
    """Start a worker of a job that leaves once the event is set."""

    def start(job: Any) -> tuple[asyncio.Task[Any], asyncio.Event]:
        leaving = asyncio.Event()
        names = type(job).start_worker.__globals__
        with monkeypatch.context() as patched:
            patched.setitem(names, "run_worker", functools.partial(names["run_worker"], leaving=leaving))
            return job.start_worker(), leaving

    return start


def seconds() -> float:
    return asyncio.get_running_loop().time()


@pytest.mark.parametrize("pushes", [0, 1, 20, 55, 90])
def test_what_is_unfinished_goes_to_others_at_once(make_job: Make, start_leaver: Any, pushes: int) -> None:
    job = make_job(epochs=2, rows=300, lease_seconds=LEASE)
    job.wire.doubled = 0.1

    async def scene(job: Any) -> None:
        job.start_shards()
        worker, leaving = start_leaver(job)
        await job.until(lambda: job.coordinator.members.alive("worker"))
        (mine,) = job.coordinator.members.alive("worker")
        other = job.start_worker()
        await job.until(lambda: len(job.wire.calls("Shard.Push")) >= pushes)
        leaving.set()
        asked = seconds()
        await worker
        assert seconds() - asked < 3
        assert mine.state == "left"
        assert not job.coordinator.work.leased_to(mine.incarnation)
        await other
        await asyncio.gather(*job.background)

    assert job.run(scene) < LEASE / 10
    assert job.coordinator.phase == DONE
    assert (job.workers[0].result() is not None) == (pushes > 0)
    job.check_counted_once()


def test_it_asks_for_no_more_and_gives_back_what_is_open(make_job: Make, start_leaver: Any, counting: Any) -> None:
    job = make_job(epochs=1, rows=300, group_rows=100, rows_per_split=100, lease_seconds=LEASE)

    async def scene(job: Any) -> None:
        job.start_shards()
        worker, leaving = start_leaver(job)
        await job.until(lambda: len(job.wire.calls("Shard.Push")) >= 5)
        leaving.set()
        questions = len(job.wire.calls("Coordinator.Lease"))
        await worker
        assert len(job.wire.calls("Coordinator.Lease")) == questions
        (given_back,) = job.wire.calls("Coordinator.Release")
        assert list(given_back.splits) == [0, 1]
        # What was encoded was pushed, and every push was heard.
        pushed = {(r.split, r.group) for r in job.wire.calls("Shard.Push")}
        assert pushed == {(split, batch) for _, split, batch in counting.seen}
        assert len(job.wire.calls("Shard.Push")) == len(job.wire.calls("Shard.Push", "answered"))
        assert not job.coordinator.work.leases
        await job.start_worker()
        await asyncio.gather(*job.background)

    assert job.run(scene) < LEASE / 10
    job.check_counted_once()


def test_it_leaves_in_the_middle_of_an_evaluation(make_job: Make, start_leaver: Any) -> None:
    job = make_job(epochs=1, open_splits=4, lease_seconds=LEASE)
    asked: list[asyncio.Event] = []

    async def ask(method: str, request: Any) -> None:
        if method == "Coordinator.CloseSplit" and request.sums and asked:
            asked.pop().set()

    job.wire.bend = ask

    async def scene(job: Any) -> None:
        job.start_shards()
        worker, leaving = start_leaver(job)
        asked.append(leaving)
        await worker
        assert not asked
        assert 0 < len(job.coordinator.work.results) < 4
        await job.start_worker()
        await asyncio.gather(*job.background)

    assert job.run(scene) < LEASE / 10
    job.check_counted_once()


def test_it_leaves_although_no_coordinator_was_ever_there(make_job: Make, start_leaver: Any) -> None:
    job = make_job(epochs=1)

    async def silence(method: str, request: Any) -> None:
        raise Unavailable("nobody is there")

    job.wire.bend = silence

    async def scene(job: Any) -> None:
        worker, leaving = start_leaver(job)
        await asyncio.sleep(7)
        leaving.set()
        assert await worker is None

    assert job.run(scene) < 7 + JOIN_SECONDS + 1


@pytest.mark.parametrize("silent", ["Coordinator.", "Shard.Push"])
def test_it_does_not_wait_for_ever_for_those_that_are_silent(make_job: Make, start_leaver: Any, silent: str) -> None:
    job = make_job(epochs=1, lease_seconds=60.0)
    quiet: list[bool] = []

    async def silence(method: str, request: Any) -> None:
        if quiet and method.startswith(silent):
            await asyncio.sleep(1)
            raise Unavailable("nobody answers")

    job.wire.bend = silence

    async def scene(job: Any) -> None:
        job.start_shards()
        worker, leaving = start_leaver(job)
        await job.until(lambda: len(job.wire.calls("Shard.Push")) >= 5)
        quiet.append(True)
        leaving.set()
        asked = seconds()
        await worker
        assert LEAVE_SECONDS <= seconds() - asked < LEAVE_SECONDS + 5
        quiet.clear()
        await job.start_worker()
        await asyncio.gather(*job.background)

    job.run(scene)
    job.check_counted_once()
