# SPDX-License-Identifier: Apache-2.0
"""The configurations of `oarlock.benchmarks.end_to_end`: a model at a batch, as a parameter server and in one process.

In parameter-server mode rows and dense parameters are on the shard, a process of its own, and all pulls and pushes travel; in
process the same classes share a process. Invariant: both train the same batches of the same data. One event loop.
"""

import asyncio
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from oarlock.benchmarks.end_to_end_job import DELAYED, IN_PROCESS, SHARD, WORKER, GatedJob
from oarlock.benchmarks.end_to_end_recipe import layers
from oarlock.benchmarks.end_to_end_sides import Command, CommandSide, JobSide, Trains

# Matrix products run on one thread in each worker: two of them have the two cores that the matrix products beside them have.
WORKERS = 2
NEAR, SHARD_NAME, SLOW = "inprocess", "shard", "delayed"
# Small enough for the workers to end a window together, large enough for leases not to count.
SAMPLES_PER_SPLIT, BATCHES_PER_SPLIT_NCF = 4096, 8
# How much of the fall of the loss in process the job of processes has to show over the same samples.
LEAST_FALL = 0.9


@dataclass
class Case:
    """One configuration: ``start`` its jobs, take its ``sides``, then ``figures``."""

    name: str
    model: str
    data: Path
    folder: Path
    dim: int = 16
    batch: int = 2048
    inprocess: bool = True
    delayed: bool = False
    ps: GatedJob = field(init=False)
    near: GatedJob | None = None

    def __post_init__(self) -> None:
        self.ps = GatedJob(f"{self.name}-ps", self.data, self.folder / f"{self.name}-ps", self._options())
        if self.inprocess:
            # Nothing is pulled ahead where there is no wire to wait for, as the product has it.
            folder = self.folder / f"{self.name}-inprocess"
            self.near = GatedJob(f"{self.name}-inprocess", self.data, folder, self._options(), prefetch=1)

    def _options(self) -> dict[str, object]:
        per_split = BATCHES_PER_SPLIT_NCF if self.model == "ncf" else max(1, SAMPLES_PER_SPLIT // self.batch)
        return {"model": self.model, "dim": self.dim, "batch_samples": self.batch, "batches_per_split": per_split}

    def jobs(self) -> list[GatedJob]:
        return [self.ps, self.near] if self.near else [self.ps]

    async def start(self) -> None:
        """Start all processes, create the rows, and wait until everybody could begin."""
        await self.ps.start()
        self.ps.add(SHARD_NAME, SHARD)
        if self.near:
            await self.near.start()
            self.near.add(NEAR, IN_PROCESS, "--workers", str(WORKERS), "--data", str(self.data))

        async def far() -> None:
            await self.ps.fill()
            names = [f"worker-{n}" for n in range(WORKERS)]
            for name in names:
                self.ps.add(name, WORKER, "--reader", "arrow")
            if self.delayed:
                self.ps.add(SLOW, DELAYED)
            await self.ps.ready(dict.fromkeys([*names, SLOW] if self.delayed else names, 1))

        async def near(job: GatedJob) -> None:
            await job.fill(NEAR)
            await job.ready({NEAR: WORKERS})

        async with asyncio.TaskGroup() as group:
            group.create_task(far())
            if self.near:
                group.create_task(near(self.near))

    async def close(self) -> None:
        for job in self.jobs():
            await job.close()

    def sides(self, gemm: Command) -> dict[str, Trains]:
        """Return the sides of this case by name."""
        found: dict[str, Trains] = {}
        if self.model != "ncf":
            # The layers of NeuMF are too small for their products to be what bounds it.
            shape = [list(s) for s in layers(self.model, self.dim)]
            found[f"{self.name}_gemm"] = CommandSide(gemm, {"layers": shape, "batch": self.batch})
        for count in range(1, WORKERS + 1):
            found[f"{self.name}_ps_{count}"] = JobSide(self.ps, {f"worker-{n}": 1 for n in range(count)})
        if self.near:
            found[f"{self.name}_inproc"] = JobSide(self.near, {NEAR: WORKERS})
        return found

    def ps_names(self) -> list[str]:
        return [f"{self.name}_ps_{count}" for count in range(1, WORKERS + 1)]

    def learning(self) -> dict[str, Any]:
        """Return losses of both jobs before and after the same number of samples, and whether speed came with learning."""
        curves = {"ps": self.ps.gate.losses}
        if self.near:
            curves["inprocess"] = self.near.gate.losses
        common = min(sum(n for n, _ in curve) for curve in curves.values())
        ends = {name: ends_of(curve, common) for name, curve in curves.items()}
        losses = {name: {"before": round(a, 4), "after": round(b, 4)} for name, (a, b) in ends.items()}
        return {"samples": common, "loss": losses, "learns": learns(ends["ps"], ends.get("inprocess"))}


def learns(ps: tuple[float, float], inprocess: tuple[float, float] | None) -> bool:
    """Tell whether a job's loss, (before, after), fell as it does in process over the same samples."""
    # From the same start: a first tenth that went well is no reason to ask less of the rest.
    start, end = inprocess or (ps[0], ps[0])
    return start - ps[1] > max(0.0, LEAST_FALL * (start - end))


def ends_of(curve: list[tuple[int, float]], samples: int) -> tuple[float, float]:
    """Return the mean loss of the first and of the last tenth of the first ``samples`` samples of a curve."""
    total, first, last = 0, [0.0, 0], [0.0, 0]
    for count, loss in curve:
        total += count
        if total > samples:
            break
        if total <= max(samples / 10, curve[0][0]):
            first = [first[0] + loss * count, first[1] + count]
        if total > samples * 0.9:
            last = [last[0] + loss * count, last[1] + count]
    return first[0] / max(1, first[1]), last[0] / max(1, last[1])
