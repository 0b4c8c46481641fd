# SPDX-License-Identifier: Apache-2.0
"""Splits are opened before their turn."""

import asyncio
from collections.abc import Callable
from typing import Any

import numpy as np

Make = Callable[..., Any]


def test_nobody_waits_for_the_next_split_at_the_end_of_one(make_job: Make) -> None:
    job = make_job(workers=1, epochs=1, open_splits=1, prefetch=1, rows=600, rows_per_split=200, group_rows=200)
    pushes: list[tuple[float, int]] = []

    async def slow(method: str, request: Any) -> None:
        if method == "Coordinator.Lease" and request.held:
            # Longer than one group takes, and shorter than those take that are left when it is asked.
            await asyncio.sleep(1.5)
        if method == "Shard.Push":
            pushes.append((asyncio.get_running_loop().time(), request.split))
            await asyncio.sleep(0.4)

    job.wire.bend = slow
    job.run(lambda job: job.to_the_end())
    job.check_counted_once()
    assert np.diff([time for time, _ in pushes]).max() < 0.5, "the next split's first push follows as any other does"
    splits = [split for _, split in pushes]
    assert splits == sorted(splits), "what is opened ahead waits for its turn"
