# SPDX-License-Identifier: Apache-2.0
"""`python -m oarlock.benchmarks.scaling [--json] [--quick] [--seed N] [--replicas R]`: servers that come and go under load.

A job of real processes, two workers and at first two shards, trains Wide & Deep on clicks of Criteo's shape, with 10 M rows
(``--quick``: 1 M), and is scaled to four shards and back to two while it does. Then what a copy of each block costs in quiet
times: two jobs, with and without copies, in turns. The last line printed is the result.
"""

from oarlock.benchmarks.surroundings import settle, surroundings

if __name__ == "__main__":
    settle("oarlock.benchmarks.scaling")

import argparse
import asyncio
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from oarlock.benchmarks.checkpoint_gaps import longest_gap, median_gap, speed
from oarlock.benchmarks.checkpoint_recipe import TABLE, prolong
from oarlock.benchmarks.end_to_end_data import DataSize, generate_clicks
from oarlock.benchmarks.scaling_job import Scale, ScalingJob

DIM, BATCH, WORKERS = 16, 2048, 2
SPLIT_BATCHES = 8
FEW, MORE = 2, 4
INTERVAL_SECONDS = 0.5
Told = list[NDArray[np.float64]]


@dataclass(frozen=True)
class Size:
    """How much is measured. ``samples`` are drawn, and come again until an epoch has ``epoch`` of them: it shall not end.

    ``cap``: of a field's categories; ``blocks``: of the table, each at most 8 MiB; ``rounds``: from few servers to more and back;
    ``quiet_seconds``: between two changes, at least; ``turns`` of ``batches`` each for the cost of copies.
    """

    samples: int
    epoch: int
    cap: int
    blocks: int
    rounds: int
    quiet_seconds: float
    turns: int
    batches: int


FULL = Size(1 << 20, 1 << 24, 1_888_000, 256, rounds=3, quiet_seconds=8.0, turns=8, batches=64)
QUICK = Size(1 << 17, 1 << 22, 124_000, 32, rounds=1, quiet_seconds=2.0, turns=2, batches=24)
TINY = Size(1 << 15, 1 << 20, 2_000, 8, rounds=1, quiet_seconds=0.5, turns=1, batches=16)


def speeds(told: Told, begin: float, end: float) -> list[float]:
    """Return the samples per second of each interval of [begin, end]; of one shorter than an interval its own."""
    edges = np.linspace(begin, end, max(2, 1 + int((end - begin) / INTERVAL_SECONDS)))
    return [BATCH * speed(told, *span) for span in itertools.pairwise(edges)]


def pause_ms(told: Told, begin: float, end: float) -> float:
    """Return the longest gap between two acknowledged pushes of a worker in [begin, end], less that worker's median one."""
    return round(max(longest_gap(worker, begin, end) - median_gap(worker) for worker in told) * 1e3, 1)


def of_scale(told: Told, scale: Scale, around: list[tuple[float, float]]) -> dict[str, Any]:
    """Return what one change of servers cost; ``around``: the quiet times before and after it."""
    quiet = statistics.mean(statistics.median(speeds(told, *span)) for span in around)
    moving = speeds(told, scale.there, scale.done)
    return {
        "servers": f"{scale.before} to {scale.after}",
        "pause_ms": pause_ms(told, scale.asked, scale.done),
        "pause_of_moves_ms": pause_ms(told, scale.there, scale.done),
        "throughput": round(statistics.median(moving) / quiet, 3),
        "throughput_mean": round(BATCH * speed(told, scale.there, scale.done) / quiet, 3),
        "throughput_of_starts": round(BATCH * speed(told, scale.asked, scale.there) / quiet, 3)
        if scale.there > scale.asked
        else None,
        "seconds": round(scale.done - scale.asked, 2),
        "seconds_of_moves": round(scale.done - scale.there, 2),
        "copied_mb": round(scale.sent / 1e6, 1),
        "least_mb": round(scale.least / 1e6, 1),
        "bytes_over_least": round(scale.sent / scale.least, 3),
    }


async def change(
    size: Size, data: Path, folder: Path, rows: int, replicas: int, seed: int, say: Callable[[str], None]
) -> dict[str, Any]:
    """Scale a job that trains, and return all figures."""
    job = ScalingJob(
        "scaling",
        data,
        folder,
        options(size),
        WORKERS,
        servers=FEW,
        replicas=replicas,
        seed=seed,
        rebalance_seconds=0.0,
    )
    scales: list[Scale] = []
    quiet: list[tuple[float, float]] = []

    async def quiet_time() -> None:
        begun = time.monotonic()
        await job.pause(max([size.quiet_seconds, *(s.done - s.there for s in scales[-1:])]))
        quiet.append((begun, time.monotonic()))

    try:
        await job.begin()
        sizes = job.sizes({TABLE: rows})
        say(f"{rows} rows on {FEW} servers")
        await job.train()
        await job.pause(size.quiet_seconds / 2)
        await quiet_time()
        for servers in [MORE, FEW] * size.rounds:
            scales.append(await job.scale(servers, sizes))
            say(f"{servers} servers after {scales[-1].done - scales[-1].asked:.2f} s")
            await quiet_time()
        told = [each["told"] for each in job.notes()]
        await job.rest()
    finally:
        await job.close()
    found = [of_scale(told, each, quiet[at : at + 2]) for at, each in enumerate(scales)]
    return {
        "pause_ms": max(each["pause_ms"] for each in found),
        "pause_quiet_ms": max(pause_ms(told, *span) for span in quiet),
        "pauses_quiet_ms": [pause_ms(told, *span) for span in quiet],
        "throughput": min(each["throughput"] for each in found),
        "bytes_over_least": max(each["bytes_over_least"] for each in found),
        "scales": found,
        "step_ms": round(max(map(median_gap, told)) * 1e3, 1),
        "samples_per_s": [round(statistics.median(speeds(told, *span))) for span in quiet],
        "largest_block_mb": round(float(sizes.max()) / 1e6, 2),
        "rows": rows,
    }


async def copies_cost(size: Size, data: Path, folder: Path, seed: int) -> dict[str, Any]:
    """Return the speed of a job whose blocks have a copy each over that of one whose blocks have none, in turns."""
    jobs = [
        ScalingJob(
            f"replicas{r}", data, folder / str(r), options(size), WORKERS, servers=FEW, replicas=r, seed=seed,
            rebalance_seconds=0.0,
        )
        for r in (0, 1)
    ]  # fmt: skip
    begun: list[ScalingJob] = []
    found: list[list[float]] = [[], []]
    try:
        for job in jobs:
            begun.append(job)
            await job.begin()
            await job.window(dict.fromkeys(job.names, 1), size.batches)
        for turn in range(size.turns):
            for which in (0, 1) if turn % 2 else (1, 0):
                window = await jobs[which].window(dict.fromkeys(jobs[which].names, 1), size.batches)
                found[which].append(window.speed)
    finally:
        for job in begun:
            await job.close()
    ratios = [one / none for none, one in zip(*found, strict=True)]
    return {
        "replicas_1_over_0": round(statistics.median(ratios), 3),
        "replicas_1_over_0_range": [round(min(ratios), 3), round(max(ratios), 3)],
        "replicas_0_samples_per_s": round(statistics.median(found[0])),
    }


def options(size: Size) -> dict[str, object]:
    """Return the options of the recipe."""
    return {
        "model": "wdl",
        "dim": DIM,
        "batch_samples": BATCH,
        "batches_per_split": SPLIT_BATCHES,
        "blocks": size.blocks,
    }


async def measure(size: Size, folder: Path, replicas: int, seed: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Return all figures."""
    data = folder / "data"
    rows = await asyncio.to_thread(generate_clicks, data, DataSize(size.samples, size.cap, True), seed=seed)
    prolong(data, size.samples, size.epoch)
    found = await change(size, data, folder / "job", rows, replicas, seed, say)
    (folder / "jobs").mkdir()
    return {**found, **await copies_cost(size, data, folder / "jobs", seed)}


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m oarlock.benchmarks.scaling", description=__doc__.split("\n")[0])
    parser.add_argument("--json", action="store_true", help="print nothing but the result")
    parser.add_argument("--quick", action="store_true", help="1 M rows instead of 10 M, within a minute")
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help="of the data and the job")
    parser.add_argument("--replicas", type=int, default=0, choices=(0, 1), help="copies of each block beside its owner")
    given = parser.parse_args()
    before = surroundings(("numpy", "numba", "pyarrow", "grpcio"))
    begun = time.monotonic()

    def say(line: str) -> None:
        if not given.json:
            print(f"{time.monotonic() - begun:6.1f} s  {line}", file=sys.stderr)

    size = TINY if given.tiny else QUICK if given.quick else FULL
    with tempfile.TemporaryDirectory(prefix="oarlock-") as folder:
        found = asyncio.run(measure(size, Path(folder), given.replicas, given.seed, say))
    if not given.json:
        for name, value in found.items():
            print(f"{name:26} {value}", file=sys.stderr)
    taken = {
        "seconds": round(time.monotonic() - begun, 1),
        "load_average_after": [round(x, 2) for x in os.getloadavg()],
        "surroundings": before,
    }
    print(json.dumps({"benchmark": "scaling", "replicas": given.replicas, "seed": given.seed, **found, **taken}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
