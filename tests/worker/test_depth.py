# SPDX-License-Identifier: Apache-2.0
"""How old rows can be by the worker's own doing: the formula of docs/consistency.md for async, reached and never passed."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest


@pytest.mark.parametrize("mode", ["async", "geo"])
@pytest.mark.parametrize(
    ("prefetch", "threads", "open_splits"), [(1, 1, 1), (2, 1, 1), (2, 1, 2), (1, 3, 2), (4, 2, 1)]
)
def test_rows_lack_as_many_own_groups_as_the_formula_says(
    make_job: Callable[..., Any], prefetch: int, threads: int, open_splits: int, mode: str
) -> None:
    job = make_job(
        rows=100,
        # Splits of one group: nothing but the bound on pushes in flight holds them back.
        group_rows=5,
        rows_per_split=5,
        batch_rows=2,
        accumulate=3,
        epochs=1,
        mode=mode,
        servers=1,
        prefetch=prefetch,
        compute_threads=threads,
        open_splits=open_splits,
    )
    groups, pulls, lacking = job.groups_per_epoch(), 0, []

    async def note(method: str, request: Any) -> None:
        nonlocal pulls
        if method == "Shard.Pull" and pulls < groups:
            # All groups before it were pulled; what was acknowledged of them is there for sure.
            lacking.append(pulls - len(job.wire.calls("Shard.Push", "answered")))
            pulls += 1
        elif method == "Shard.Push":
            # Long enough for all to happen that can happen before it is there.
            await asyncio.sleep(3)

    job.wire.bend = note
    job.run(lambda job: job.to_the_end())
    assert len(lacking) == groups
    assert max(lacking) == (0 if mode == "geo" else prefetch + threads - 2 + 2 * open_splits)
