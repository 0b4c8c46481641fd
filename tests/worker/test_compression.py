# SPDX-License-Identifier: Apache-2.0
"""A worker whose pushes are packed: every sample counts once, error feedback goes by split and in order, losses are told."""

import asyncio
import threading
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from oarlock.client.compression import WireSpec
from oarlock.client.job import DONE
from oarlock.launch.inprocess import run_in_process
from oarlock.worker import session

Make = Callable[..., Any]
# Of rows of one column the largest is all there is: what is counted stays exact, and nothing is kept.
EXACT = {"key": WireSpec(push="topk:1"), "dense": WireSpec(push="topk:1")}


@pytest.mark.parametrize("workers", [1, 3])
def test_every_sample_is_trained_once(make_job: Make, workers: int) -> None:
    kept = WireSpec("int8", "int8+feedback")
    job = make_job(workers=workers, compression={"key": kept, "dense": kept})
    job.wire.doubled = 0.2
    job.run(lambda job: job.to_the_end())
    assert job.coordinator.phase == DONE
    # A count of n travels as 127 * (n / 127), which is not n in float32; the last group of each split makes up for it.
    np.testing.assert_allclose(job.counts(), job.occurrences() * job.spec.epochs, rtol=1e-5)
    assert abs(job.batches() - job.batches_per_epoch() * job.spec.epochs) < 1e-3
    assert job.coordinator.status()["residual_splits_lost"] == 0
    packed = defaultdict(set)
    for request in job.wire.calls("Shard.Push"):
        packed[request.split].update((request.group, part.HasField("packed")) for part in request.tables)
    for found in packed.values():
        last = max(group for group, _ in found)
        assert found == {(group, group < last) for group in range(last + 1)}
    # Training asks for packed rows, evaluation for whole ones.
    assert {len(request.codecs) for request in job.wire.calls("Shard.Pull")} == {0, 1}


def test_a_dead_workers_splits_are_counted_as_having_lost_what_it_kept(make_job: Make) -> None:
    job = make_job(workers=2, epochs=2, rows=300, compression=EXACT)
    job.wire.doubled = 0.2

    async def scene(job: Any) -> None:
        job.start()
        await job.until(lambda: len(job.wire.calls("Shard.Push")) >= 15)
        victim = job.workers[0]
        victim.cancel()
        await asyncio.gather(victim, return_exceptions=True)
        job.start_worker()
        await asyncio.gather(*job.workers[1:], return_exceptions=True)
        await asyncio.gather(*job.background)

    job.run(scene)
    assert job.coordinator.phase == DONE
    job.check_counted_once()
    assert 1 <= job.coordinator.status()["residual_splits_lost"] <= job.spec.open_splits
    assert job.coordinator.counted()["given_back"] == job.coordinator.status()["residual_splits_lost"]


def test_of_a_job_that_keeps_nothing_nothing_is_told(make_job: Make) -> None:
    job = make_job(epochs=1, compression={"key": WireSpec("float16", "float16", zstd=True)})
    job.run(lambda job: job.to_the_end())
    assert "residual_splits_lost" not in job.coordinator.status()
    job.check_counted_once()


def test_groups_that_are_computed_at_once_are_encoded_in_their_order(
    make_job: Make, counting: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every other group of a split is computed only after the one behind it: that one waits for it with what is encoded."""
    job = make_job(rows=120, epochs=1, open_splits=1, compute_threads=2, compression=EXACT)
    done: dict[int, threading.Event] = {}
    overtaken = []
    train = counting.CountingProgram.train

    def late(self: Any, feeds: Any, samples: int, *, seed: int, step: int) -> float:
        if not step & 1:
            assert done.setdefault(step + 1, threading.Event()).wait(20)
            overtaken.append(step)
        result: float = train(self, feeds, samples, seed=seed, step=step)
        done.setdefault(step, threading.Event()).set()
        return result

    monkeypatch.setattr(counting.CountingProgram, "train", late)
    # Always in a thread, however short it is: on the event loop nobody would be waited for.
    monkeypatch.setattr(session, "COMPUTE_HERE_SECONDS", 0.0)
    status = run_in_process(job.spec, job.folder, watch=lambda status: True, watch_seconds=0.01)
    assert (status["phase"], status["reason"]) == (DONE, "")
    assert len(overtaken) == 2 * job.spec.splits
    assert status["residual_splits_lost"] == 0
