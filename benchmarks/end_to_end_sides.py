# SPDX-License-Identifier: Apache-2.0
"""The sides of `oarlock.benchmarks.end_to_end`, each of which trains a window when told to, and the turns that they take.

Invariant: one side works at a time, all others wait without using a processor; each is warm before its first window that counts.
One event loop.
"""

import asyncio
import dataclasses
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from oarlock.benchmarks.end_to_end_job import GatedJob, Window, pin
from oarlock.benchmarks.processor import busy_seconds
from oarlock.proto.errors import Unavailable

WARM_BATCHES = 6
# Windows of which that many batches are no measure.
LONG_SECONDS = 1.0
# How long a side works before its window, which is not timed.
LEAD_SECONDS = 0.3
END_SECONDS = 5.0


class Command:
    """A process that answers questions on its standard input: GEMM, or PyTorch."""

    def __init__(self, arguments: Sequence[str], log: Path, *, python: str = sys.executable, threads: int = 2) -> None:
        environment = {
            **os.environ,
            "OPENBLAS_NUM_THREADS": str(threads),
            "OMP_NUM_THREADS": str(threads),
            "TORCHINDUCTOR_CACHE_DIR": str(log.parent / "torch"),
        }
        self._log = log
        with log.open("wb") as out:
            self._process = subprocess.Popen(
                [python, "-P", *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=out,
                env=environment,
                start_new_session=True,
                text=True,
            )

    async def ask(self, question: dict[str, Any]) -> dict[str, Any]:
        return await asyncio.to_thread(self._ask, json.dumps(question))

    def _ask(self, question: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(question + "\n")
            self._process.stdin.flush()
            answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        except (OSError, ValueError):
            ended = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            raise Unavailable(f"a process beside ours ended: {ended[-1] if ended else 'it said nothing'}") from None
        return answer

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()


def torch_python() -> str | None:
    """Return an interpreter that has PyTorch: this one, or that of `make setup-torch` beside it; None: there is none."""
    if importlib.util.find_spec("torch") is not None:
        return sys.executable
    beside = Path(sys.prefix).parent / ".venv-torch" / "bin" / "python"
    return str(beside) if beside.exists() else None


class Trains(Protocol):
    """What a side does: train about so many batches."""

    batch: int

    async def run(self, batches: int) -> Window: ...


@dataclass
class CommandSide:
    """A process that is asked."""

    command: Command
    question: dict[str, Any]

    def __post_init__(self) -> None:
        self.batch: int = self.question["batch"]
        self.answer: dict[str, Any] = {}

    async def run(self, batches: int) -> Window:
        self.answer = await self.command.ask({**self.question, "steps": batches})
        return Window(self.answer["seconds"], batches * self.batch, self.answer["processor"])


@dataclass
class JobSide:
    """Some of a job's workers; ``pins``: the processor that a process has to itself while this side works."""

    job: GatedJob
    workers: dict[str, int]
    pins: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.batch = self.job.spec.batch_rows

    async def run(self, batches: int) -> Window:
        everywhere = os.sched_getaffinity(0)
        for name, processor in self.pins.items():
            pin(self.job.pids([name]), {processor})
        try:
            return await self.job.window(self.workers, batches)
        finally:
            pin(self.job.pids(list(self.pins)), everywhere)


@dataclass
class Turns:
    """Windows by side, in rounds."""

    seconds: float
    sides: dict[str, Trains]
    windows: dict[str, list[Window]] = field(default_factory=dict)
    _batches: dict[str, int] = field(default_factory=dict)

    async def warm(self, say: Callable[[str], None]) -> None:
        """Run every side until it is warm, and find out how many batches make a window."""
        for name, side in self.sides.items():
            await side.run(WARM_BATCHES)
            found = await side.run(WARM_BATCHES)
            if self.seconds >= LONG_SECONDS:
                # So few batches are begun and ended more than they are trained: the guess is made of more.
                found = await side.run(max(WARM_BATCHES, round(found.speed / side.batch * self.seconds / 2)))
            self._batches[name] = max(WARM_BATCHES, round(found.speed / side.batch * self.seconds))
            say(f"{name}: {found.speed:,.0f} samples/s while it gets warm")

    async def take(self, rounds: int, deadline: float) -> int:
        """Take turns, each round in another order; return how many rounds there was time for (at least one)."""
        names = list(self.sides)
        for number in range(rounds):
            if number and time.monotonic() > deadline:
                return number
            for name in names[number % len(names) :] + names[: number % len(names)]:
                self.windows.setdefault(name, []).append(await self._window(name))
        return rounds

    async def _window(self, name: str) -> Window:
        # Threads that wake up may lie on one core until the system's scheduler sees it, and halve the speed for that long.
        await self.sides[name].run(max(1, round(self._batches[name] * LEAD_SECONDS / self.seconds)))
        begun, busy = time.perf_counter(), busy_seconds()
        window = await self.sides[name].run(self._batches[name])
        others = (busy_seconds() - busy - window.processor) / (time.perf_counter() - begun)
        return dataclasses.replace(window, others=max(0.0, others))

    def speed(self, name: str) -> float:
        return statistics.median(w.speed for w in self.windows[name])

    def fastest(self, names: Sequence[str]) -> str:
        return max(names, key=self.speed)

    def ratio(self, one: str, other: str) -> dict[str, float]:
        """Return one side's speed over another's: the median over rounds, with the least and the most, and that of
        samples per processor second, which other work on the machine hardly touches."""
        # Of products the one on a single thread tells what they cost.
        alone = f"{other}_1" if f"{other}_1" in self.windows else other
        each = [a.speed / b.speed for a, b in zip(self.windows[one], self.windows[other], strict=True)]
        return {
            "median": round(statistics.median(each), 3),
            "least": round(min(each), 3),
            "most": round(max(each), 3),
            "per_cpu_s": round(self.per_cpu_s(one) / self.per_cpu_s(alone), 3),
        }

    def per_cpu_s(self, name: str) -> float:
        """Return a side's samples per processor second of all its processes, over all windows."""
        windows = self.windows[name]
        return sum(w.samples for w in windows) / max(1e-9, sum(w.processor for w in windows))

    def others(self) -> float:
        """Return the median over all windows of how many processors others kept busy."""
        return round(statistics.median(w.others for windows in self.windows.values() for w in windows), 2)

    def figures(self, name: str) -> dict[str, Any]:
        """Return a side's samples per second, per processor second, how its windows spread, and cores that others took."""
        windows = self.windows[name]
        speeds = [w.speed for w in windows]
        return {
            "samples_per_s": round(self.speed(name)),
            "least": round(min(speeds)),
            "most": round(max(speeds)),
            "samples_per_cpu_s": round(self.per_cpu_s(name)),
            "others": round(statistics.median(w.others for w in windows), 2),
            "windows": len(windows),
        }
