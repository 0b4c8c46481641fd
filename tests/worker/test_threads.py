# SPDX-License-Identifier: Apache-2.0
"""Groups that are computed in real threads, several at once: what is pushed, in which order, and what goes wrong.

Time is the machine's here; where one thread must wait for another it waits for what that one does, never for a while.
"""

import asyncio
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from oarlock.client.job import FAILED
from oarlock.proto.methods import METHODS
from oarlock.worker import session
from oarlock.worker.session import Session

Make = Callable[..., Any]
PATIENCE = 30.0


@pytest.fixture
def make_threaded(make_job: Make, monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    # However little there is to compute here, a thread does it.
    monkeypatch.setattr(session, "COMPUTE_HERE_SECONDS", 0.0)
    with ThreadPoolExecutor(1) as executor:

        def make(**changes: Any) -> Any:
            job = make_job(**{"heartbeat_seconds": 0.05, "lease_seconds": 60.0, **changes})
            job.threads, job.wire.seconds = executor, 0.0
            return job

        yield make


def watch(monkeypatch: pytest.MonkeyPatch, counting: Any, meet: Callable[[tuple[int, int]], None]) -> None:
    """Have ``meet((split, batch))`` called in the thread that computes a batch, before it does."""
    original = counting.CountingProgram.train

    def train(self: Any, feeds: Any, samples: int, *, seed: int, step: int) -> float:
        meet((step >> 32, step & 0xFFFFFFFF))
        return float(original(self, feeds, samples, seed=seed, step=step))

    monkeypatch.setattr(counting.CountingProgram, "train", train)


@pytest.mark.parametrize("mode", ["async", "ssp", "geo"])
@pytest.mark.parametrize("threads", [2, 4])
def test_threads_count_every_sample_once(make_threaded: Make, counting: Any, threads: int, mode: str) -> None:
    job = make_threaded(compute_threads=threads, mode=mode, accumulate=2, workers=2, open_splits=3, staleness=0)
    job.wire.doubled = 0.1
    job.wire._again = _soon.__get__(job.wire)
    job.run(lambda job: job.to_the_end())
    job.check_counted_once()
    assert len(set(counting.draws)) == len(counting.draws) == job.batches()


async def _soon(self: Any, address: str, method: str, data: bytes) -> None:
    """Repeat a message at once: the pauses between repetitions of the virtual wire would be real ones here."""
    await self.inner.call(address, method, METHODS[method].request.FromString(data), timeout_seconds=1)


@pytest.mark.parametrize("threads", [2, 4])
def test_as_many_groups_as_threads_compute_at_once(
    make_threaded: Make, counting: Any, monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    """The first of them end only when all have begun."""
    job = make_threaded(compute_threads=threads, prefetch=1, open_splits=2, epochs=1)
    together = threading.Barrier(threads)
    met: list[int] = []

    def meet(batch: tuple[int, int]) -> None:
        if len(met) < threads:
            met.append(together.wait(PATIENCE))

    watch(monkeypatch, counting, meet)
    job.run(lambda job: job.to_the_end())
    assert sorted(met[:threads]) == list(range(threads))
    job.check_counted_once()


def test_groups_of_a_split_are_pushed_in_order_whoever_computes_first(
    make_threaded: Make, counting: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even groups wait until the odd one after them has computed."""
    job = make_threaded(compute_threads=2, prefetch=2, open_splits=1, epochs=1, servers=2)
    done: dict[tuple[int, int], threading.Event] = defaultdict(threading.Event)
    order: list[tuple[int, int]] = []
    lock = threading.Lock()

    def meet(batch: tuple[int, int]) -> None:
        with lock:
            mine, after = done[batch], done[batch[0], batch[1] + 1]
        if batch[1] % 2 == 0 and batch[1] + 1 < 4:
            assert after.wait(PATIENCE)
        order.append(batch)
        mine.set()

    watch(monkeypatch, counting, meet)
    job.run(lambda job: job.to_the_end())
    assert order[:2] == [(order[0][0], 1), (order[0][0], 0)]
    waiting: dict[int, set[int]] = defaultdict(set)
    last: dict[int, int] = {}
    for event, method, request in job.wire.log:
        if method == "Shard.Push" and event == "sent":
            assert waiting[request.split] <= {request.group}, "an earlier group is still on its way"
            assert request.group - last.get(request.split, -1) in (0, 1)
            last[request.split] = request.group
            waiting[request.split].add(request.group)
        elif method == "Shard.Push":
            waiting[request.split].discard(request.group)
    job.check_counted_once()


@pytest.mark.parametrize("threads", [2, 4])
def test_no_two_groups_have_one_step(make_threaded: Make, threads: int) -> None:
    """Groups that compute at once are told apart, and a worker that is alone counts them all."""
    job = make_threaded(compute_threads=threads, open_splits=3, epochs=1, servers=1)
    job.run(lambda job: job.to_the_end())
    steps = sorted(push.step for push in job.wire.calls("Shard.Push"))
    assert steps == list(range(job.batches_per_epoch()))


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_a_failing_compute_is_charged_to_its_split(
    make_job: Make, make_threaded: Make, counting: Any, monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    """Three workers fail where one batch is computed; nobody else's split is charged, and the job says why it stops."""
    changes = {"workers": 4, "epochs": 1, "accumulate": 2, "compute_threads": max(1, threads)}
    job = make_threaded(**changes) if threads else make_job(**changes)

    def meet(batch: tuple[int, int]) -> None:
        if batch == (3, 2):
            raise ValueError("this batch cannot be computed")

    watch(monkeypatch, counting, meet)
    ends: list[Any] = []

    async def scene(job: Any) -> None:
        job.start()
        ends.extend(await asyncio.gather(*job.workers, return_exceptions=True))
        assert job.coordinator.phase == FAILED
        await asyncio.gather(*job.background)

    job.run(scene)
    assert "split 3 met an error on 3 workers" in job.coordinator.reason
    assert "this batch cannot be computed" in job.coordinator.reason
    assert sum(isinstance(end, ValueError) for end in ends) == 3


def test_a_job_that_ends_while_threads_compute_leaves_nothing(
    make_threaded: Make, counting: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The threads end what they began, which nobody waits for any more; nothing of it is pushed."""
    job = make_threaded(compute_threads=2, prefetch=2, open_splits=2, epochs=1)
    begun, given_up = threading.Event(), threading.Event()

    def meet(batch: tuple[int, int]) -> None:
        begun.set()
        assert given_up.wait(PATIENCE)

    watch(monkeypatch, counting, meet)
    original = Session.give_back

    def give_back(self: Session, program: Any) -> None:
        original(self, program)
        given_up.set()

    monkeypatch.setattr(Session, "give_back", give_back)

    async def scene(job: Any) -> None:
        job.start()
        await job.until(begun.is_set)
        job.coordinator.fail("a shard is gone")
        await job.workers[0]

    job.run(scene)
    assert counting.draws
    assert not job.wire.calls("Shard.Push")
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("oarlock-compute")]
