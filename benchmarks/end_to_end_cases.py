# SPDX-License-Identifier: Apache-2.0
"""The configurations of `oarlock.benchmarks.end_to_end`: a model at a batch, as a parameter server and in one process.

In parameter-server mode rows and dense parameters are on the shard, a process of its own, and all pulls and pushes travel; in
process the same classes share a process. Invariant: both train the same batches of the same data. One event loop.
"""

import asyncio
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from oarlock.benchmarks.end_to_end_job import DELAYED, IN_PROCESS, SHARD, WORKER, GatedJob
from oarlock.benchmarks.end_to_end_recipe import layers
from oarlock.benchmarks.end_to_end_sides import Command, CommandSide, JobSide, Trains, Turns

NEAR, SHARD_NAME, SLOW = "inprocess", "shard", "delayed"
# Small enough for two workers to end a window together, large enough for leases not to count.
SAMPLES_PER_SPLIT, BATCHES_PER_SPLIT_NCF = 8192, 8
# Where they are not the recipe's: at its own W&D learns less, in one process, too, and both overshoot at first beside a shard.
RATES = {"wdl": {"dense_rate": 0.0005}, "dlrm": {"dense_rate": 0.0005, "row_rate": 0.01}}
# How much of the fall of the loss in process a job of processes has to show over the same samples.
LEAST_FALL = 0.9
# How many batches it may be behind: what is pulled ahead is computed on parameters of some batches ago, worst at the beginning.
MOST_BEHIND = 16


@dataclass(frozen=True)
class Form:
    """How a job is spread: matrix products run on one thread each, ``compute_threads`` of them at once in each worker."""

    workers: int
    compute_threads: int
    prefetch: int
    dense_dtype: str = "float32"


# Two compute threads in all, as many as the products beside them have. While one waits for its pull the other computes and the
# shard works: nothing has to be pulled ahead, and all is computed on newer parameters.
PS_FORMS = {"ps_1": Form(1, 2, 1), "ps_2": Form(2, 1, 1)}
# Its speed is compared with nothing in float32, so it is not among those of which the fastest counts; how it learns is, with
# its twin. Two compute threads overshoot at the beginning, each time in another way, and one does not: that is no rounding.
BF16, BF16_TWIN = "ps_bf16", "ps_1"
BF16_FORM = replace(PS_FORMS[BF16_TWIN], dense_dtype="bfloat16")
NEAR_FORM = Form(1, 2, 1)
# One compute thread, for the questions of what a wire costs and how much of a pull is hidden.
ONE, NEAR_ONE = "ps_one", "inproc_one"
ONE_FORMS = {ONE: Form(1, 1, 2), NEAR_ONE: Form(1, 1, 1)}


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
    # With jobs of one compute thread beside them.
    ones: bool = False
    bf16: bool = False
    forms: tuple[str, ...] = tuple(PS_FORMS)
    # By form: each learns by itself, so that the speed of one is not held against the learning of another.
    ps: dict[str, GatedJob] = field(init=False)
    near: GatedJob | None = None
    one: dict[str, GatedJob] = field(default_factory=dict)
    half: GatedJob | None = None

    def __post_init__(self) -> None:
        self.ps = {kind: self._job(kind, PS_FORMS[kind]) for kind in self.forms}
        if self.inprocess:
            self.near = self._job("inproc", NEAR_FORM)
        if self.ones:
            self.one = {kind: self._job(kind, form) for kind, form in ONE_FORMS.items()}
        if self.bf16:
            self.half = self._job(BF16, BF16_FORM)

    def _job(self, kind: str, form: Form) -> GatedJob:
        per_split = BATCHES_PER_SPLIT_NCF if self.model == "ncf" else max(1, SAMPLES_PER_SPLIT // self.batch)
        options: dict[str, object] = {"model": self.model, "dim": self.dim, "batch_samples": self.batch}
        options |= {"batches_per_split": per_split, "dense_dtype": form.dense_dtype}
        options |= RATES.get(self.model, {})
        name = f"{self.name}_{kind}"
        threads = form.compute_threads
        return GatedJob(name, self.data, self.folder / name, options, prefetch=form.prefetch, compute_threads=threads)

    def jobs(self) -> list[GatedJob]:
        return [*self.ps.values(), *(job for job in (self.near, self.half) if job), *self.one.values()]

    async def start(self) -> None:
        """Start all processes, create the rows, and wait until everybody could begin."""
        for job in self.jobs():
            await job.start()
        async with asyncio.TaskGroup() as group:
            for kind, job in self.ps.items():
                group.create_task(self._start_far(job, PS_FORMS[kind].workers))
            if self.near:
                group.create_task(self._start_near(self.near))
            if self.half:
                group.create_task(self._start_far(self.half, BF16_FORM.workers))
            if self.one:
                group.create_task(self._start_far(self.one[ONE], 1, slow=True))
                group.create_task(self._start_near(self.one[NEAR_ONE]))

    async def _start_far(self, job: GatedJob, workers: int, *, slow: bool = False) -> None:
        job.add(SHARD_NAME, SHARD)
        await job.fill()
        names = job.workers = worker_names(workers)
        for name in names:
            job.add(name, WORKER, "--reader", "arrow")
        if slow:
            job.add(SLOW, DELAYED)
            names = [*names, SLOW]
        await job.ready(dict.fromkeys(names, 1))

    async def _start_near(self, job: GatedJob) -> None:
        job.add(NEAR, IN_PROCESS, "--data", str(self.data))
        job.workers = [NEAR]
        await job.fill(NEAR)
        await job.ready({NEAR: 1})

    async def close(self) -> None:
        for job in self.jobs():
            await job.close()

    def sides(self, gemm: Command, one_thread: Command | None) -> dict[str, Trains]:
        """Return the sides of this case by name; the products of a step also on one thread, for what they cost a processor.

        Two threads that wait for each other while others have the processors cost more than they compute.
        """
        found: dict[str, Trains] = {}
        if self.model != "ncf":
            # The layers of NeuMF are too small for their products to be what bounds it.
            shape = [list(s) for s in layers(self.model, self.dim)]
            asked = {"layers": shape, "batch": self.batch}
            found[f"{self.name}_gemm"] = CommandSide(gemm, asked)
            if one_thread is not None:
                found[f"{self.name}_gemm_1"] = CommandSide(one_thread, asked)
        for job in self._judged():
            found[job.name] = JobSide(job, dict.fromkeys(job.workers, 1))
        return found

    def _judged(self) -> list[GatedJob]:
        return [job for job in self.jobs() if job not in self.one.values()]

    async def learn(self, samples: int) -> None:
        """Train every job on, until it has seen so many samples: after fewer nothing can be said of its loss."""
        for job in self._judged():
            missing = samples - samples_of(job.gate.losses)
            if missing > 0:
                await job.window(dict.fromkeys(job.workers, 1), -(-missing // self.batch))

    def best(self, turns: Turns) -> str | None:
        """Return the fastest of the sides with a shard of their own; one that does not learn does not count."""
        learning = self.learning()
        learned = [job.name for job in self.ps.values() if learning[job.name]["learns"]]
        return turns.fastest(learned) if learned else None

    def learning(self) -> dict[str, dict[str, Any]]:
        """Return, by side, the loss before and after, beside that of the same samples in process, and whether it fell alike.

        In bfloat16 it has to fall as in float32 with the same form, which itself has to fall as in process.
        """
        found: dict[str, dict[str, Any]] = {}
        for job in self._judged():
            curve = job.gate.losses
            twin = self.ps.get(BF16_TWIN) if job is self.half else None
            beside = None if job is self.near else twin or self.near
            near = beside.gate.losses if beside else None
            common = min(samples_of(curve), samples_of(near) if near else samples_of(curve))
            behind = max(common // 2, common - MOST_BEHIND * self.batch)
            mine, other = ends_of(curve, common), ends_of(near, behind) if near else None
            learned = learns(mine, other) and (twin is None or found[twin.name]["learns"])
            found[job.name] = {"samples": common, "loss": _rounded(mine), "learns": learned}
            if job is not self.near:
                found[job.name]["float32" if twin else "inproc"] = _rounded(other)
        return found


def worker_names(count: int) -> list[str]:
    return [f"worker-{n}" for n in range(count)]


def _rounded(ends: tuple[float, float] | None) -> list[float] | None:
    return ends and [round(x, 4) for x in ends]


def samples_of(curve: list[tuple[int, float]]) -> int:
    return sum(count for count, _ in curve)


def learns(ps: tuple[float, float], inprocess: tuple[float, float] | None) -> bool:
    """Tell whether a job's loss, (before, after), fell as it does in process over the same samples."""
    # Both began with the same parameters: the higher first loss is the one that was trained on less while it was taken.
    start = max(ps[0], inprocess[0]) if inprocess else ps[0]
    end = inprocess[1] if inprocess else start
    return start - ps[1] > max(0.0, LEAST_FALL * (start - end))


def ends_of(curve: list[tuple[int, float]], samples: int) -> tuple[float, float]:
    """Return the loss of a curve's first split, and the mean loss of the last quarter of its first ``samples`` samples."""
    total = counted = 0
    lost = 0.0
    for count, loss in curve:
        total += count
        if total > samples and counted:
            break
        if total > samples * 0.75:
            counted += count
            lost += loss * count
    return curve[0][1], lost / max(1, counted)
