# SPDX-License-Identifier: Apache-2.0
"""A split is charged with what was met with it, and with nothing else."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from oarlock.client.job import DONE
from oarlock.proto.coordinator_pb2 import EVALUATE, TRAIN
from oarlock.proto.errors import DeadlineExceeded, InvalidArgument, LeaseLost, OutOfMemory, PSError, WrongRun
from oarlock.worker.blame import Blame


async def _fail(error: BaseException) -> None:
    raise error


@pytest.mark.parametrize("error", [InvalidArgument("bad row"), OutOfMemory("full"), ValueError("bad row")])
def test_an_error_of_the_work_is_charged(error: Exception) -> None:
    blame = Blame()
    with pytest.raises(type(error)):
        asyncio.run(blame.of(TRAIN, 7, _fail(error)))
    blame.note(EVALUATE, 8, ValueError("a second one"))
    assert blame.release is not None
    assert list(blame.release.splits) == [7]
    assert str(error) in blame.release.reason


@pytest.mark.parametrize(
    "error", [LeaseLost("late"), WrongRun("old"), DeadlineExceeded("slow"), asyncio.CancelledError()]
)
def test_an_error_of_time_or_place_is_not(error: BaseException) -> None:
    blame = Blame()
    blame.note(TRAIN, 7, error)
    assert blame.release is None


def test_only_the_split_at_fault_is_charged(make_job: Callable[..., Any], counting: Any) -> None:
    """Two workers meet an error with one split each time; the splits that they had beside it are not charged."""
    job = make_job(workers=1, epochs=1, open_splits=3)
    bad: set[int] = set()

    async def refuse(method: str, request: Any) -> None:
        if method == "Shard.Push" and len(bad) < 2 and request.header.sender not in bad:
            bad.add(request.header.sender)
            raise InvalidArgument("not this one")

    job.wire.bend = refuse

    async def scene(job: Any) -> None:
        job.start()
        for _ in range(2):
            with pytest.raises(PSError, match="not this one"):
                await job.workers[-1]
            job.start_worker()
        failures = job.coordinator.work.failures
        assert sum(map(len, failures.values())) == 2
        await job.workers[-1]
        await asyncio.gather(*job.background)

    job.run(scene)
    assert job.coordinator.phase == DONE
    job.check_counted_once()
