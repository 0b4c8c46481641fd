# SPDX-License-Identifier: Apache-2.0
"""NCF by jobs: as processes over gRPC, and in one process; speed by the coordinator's clock, processor time of all processes.

Invariant: an epoch counts from its first batch to its last; evaluation, starting and stopping are left out. Main thread.
"""

import asyncio
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from oarlock.benchmarks.processor import processor_seconds
from oarlock.client.entry import ADDRESS_FILE
from oarlock.client.job import FAILED
from oarlock.launch.config import RunConfig
from oarlock.launch.folder import create
from oarlock.launch.inprocess import run_in_process
from oarlock.launch.processes import LocalProcesses
from oarlock.proto.errors import Unavailable

WATCH_SECONDS = 0.1
BATCH_SAMPLES = 2048


@dataclass
class JobFigures:
    """Of each epoch but the first: samples per second, and processor seconds per million samples."""

    speeds: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)
    stages: dict[str, float] = field(default_factory=dict)
    # There was no time for a second epoch: the speed is that of the first, as far as it came.
    cut_short: bool = False


def plan(data: Path, *, servers: int, workers: int, epochs: int) -> RunConfig:
    """Return the run that is measured: NeuMF-8 at 2048 samples a batch, no checkpoint before the end."""
    return RunConfig(
        recipe="ncf",
        data=str(data),
        epochs=epochs,
        servers=servers,
        workers=workers,
        checkpoint_epochs=0,
        recipe_options={"batch_samples": BATCH_SAMPLES, "row_rate": 0.003, "dense_rate": 0.001},
    )


class _Watch:
    """Reads off processor time at both ends of each epoch's training; ends the job when its time is up."""

    def __init__(self, pids: Callable[[dict[str, Any]], list[int]], seconds: float, end: float) -> None:
        self._pids = pids
        self._seconds = seconds
        self._end = end
        self._begun = 0.0
        self._latest: tuple[float, int] = (0.0, 0)
        self._history: list[dict[str, Any]] = []
        self._stopped = False
        self._at: dict[int, list[float]] = {}
        self.figures = JobFigures()

    def __call__(self, status: dict[str, Any]) -> bool:
        if not status:
            return time.monotonic() < self._end
        if status["phase"] == "training":
            if status["epoch"] == 0 and status["splits_closed"]:
                self._latest = (time.monotonic(), status["samples"])
            self._begun = self._begun or time.monotonic()
            ends = self._at.setdefault(status["epoch"], [])
            if len(ends) == 0 or (len(ends) == 1 and status["splits_closed"] == status["splits"]):
                ends.append(processor_seconds(self._pids(status)))
        self._history = status["history"]
        stages: dict[str, float] = {}
        for member in status["members"]:
            for name, seconds in (member["stats"] or {}).get("stages", {}).items():
                stages[name] = round(stages.get(name, 0.0) + seconds, 3)
        self.figures.stages = stages or self.figures.stages
        now = time.monotonic()
        # Two epochs if there is time: the first one is the warm-up.
        on = now < self._end and (len(status["history"]) < 2 or now - self._begun < self._seconds)
        self._stopped = self._stopped or not on
        return on

    def closed(self, status: dict[str, Any]) -> JobFigures:
        """Return the figures of a job that has ended."""
        # How a job ended that was cut short says nothing about its speed.
        if status["phase"] == FAILED and not self._stopped:
            raise Unavailable(f"the job that was measured failed: {status['reason']}")
        for result in (status["history"] or self._history)[1:]:
            self.figures.speeds.append(result["samples"] / result["train_seconds"])
            ends = self._at.get(result["epoch"], [])
            if len(ends) == 2:
                self.figures.processor.append((ends[1] - ends[0]) / result["samples"] * 1e6)
        if not self.figures.speeds:
            self.figures.cut_short = True
            now, samples = self._latest
            if samples:
                self.figures.speeds.append(samples / (now - self._begun))
        return self.figures


def measure_processes(run: RunConfig, folder: Path, seconds: float, end: float) -> JobFigures:
    """Run the job as processes for ``seconds`` of training, or two epochs if that is longer, yet not past ``end``."""
    spec = create(folder, folder.name, run)

    def pids(status: dict[str, Any]) -> list[int]:
        coordinator = json.loads((folder / ADDRESS_FILE).read_text(encoding="utf-8"))["pid"]
        return [coordinator, *(m["pid"] for m in status["members"])]

    watch = _Watch(pids, seconds, end)
    return watch.closed(asyncio.run(LocalProcesses(spec, folder).run(watch, WATCH_SECONDS)))


def measure_in_process(run: RunConfig, folder: Path, seconds: float, end: float) -> JobFigures:
    """Run the job in this process for ``seconds`` of training, or two epochs if that is longer, yet not past ``end``."""
    spec = create(folder, folder.name, run)
    watch = _Watch(lambda status: [os.getpid()], seconds, end)
    return watch.closed(run_in_process(spec, folder, watch=watch, watch_seconds=WATCH_SECONDS))
