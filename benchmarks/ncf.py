# SPDX-License-Identifier: Apache-2.0
"""`python -m oarlock.benchmarks.ncf [--json] [--quick]`: the speed of training NeuMF-8 on generated data of MovieLens-1M's shape.

The same model, batch and data by jobs of processes, by a job in one process, by one thread without a cluster, and by PyTorch;
all in one run, in turns, medians. Invariant: it writes to a temporary folder only, and the last line printed is the result.
"""

from oarlock.benchmarks.surroundings import settle, surroundings

if __name__ == "__main__":
    settle("oarlock.benchmarks.ncf")

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from oarlock.benchmarks.ncf_job import JobFigures, measure_in_process, measure_processes, plan
from oarlock.benchmarks.ncf_local import LocalNcf
from oarlock.benchmarks.ncf_torch import FORMS, TorchNcf, fastest, load_torch
from oarlock.data.interactions import list_train, load_positives
from oarlock.data.planted import generate_ncf
from oarlock.launch.job import make_spec

ML1M_SAMPLES = 4_970_845
STARTED = time.monotonic()
LEAST_SECONDS = 16.0
PACKAGES = ("numpy", "numba", "grpcio", "protobuf", "pyarrow", "petastorm", "torch")


@dataclass(frozen=True)
class Size:
    """How much is measured: data, epochs and seconds of each job, seconds of each turn of what is no job."""

    users: int
    items: int
    positives: int
    epochs: int
    rounds: int
    job_seconds: float
    turn_seconds: float
    # When the last job is to end, counted from the start; jobs are cut short for it.
    most_seconds: float


SIZES = {
    "full": Size(6040, 3706, 82, 3, 3, 60.0, 2.0, 1200.0),
    "quick": Size(6040, 3706, 12, 4, 1, 4.0, 0.4, 38.0),
    "tiny": Size(120, 220, 20, 2, 1, 1.0, 0.03, 30.0),
}


@dataclass
class Figures:
    """What was measured of one way of training: samples per second and processor seconds per million samples."""

    speeds: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)

    def turn(self, run: Callable[[int], int], seconds: float) -> None:
        """Measure ``run`` for a while, three times."""
        run(1)
        for _ in range(3):
            begun, worked = time.perf_counter(), time.process_time()
            samples = 0
            while not samples or time.perf_counter() - begun < seconds / 3:
                samples += run(2)
            self.speeds.append(samples / (time.perf_counter() - begun))
            self.processor.append((time.process_time() - worked) / samples * 1e6)

    def add(self, job: JobFigures) -> None:
        self.speeds += job.speeds
        self.processor += job.processor

    def speed(self) -> float | None:
        return statistics.median(self.speeds) if self.speeds else None


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m oarlock.benchmarks.ncf", description=__doc__.split("\n")[0])
    parser.add_argument("--json", action="store_true", help="print nothing but the result")
    parser.add_argument("--quick", action="store_true", help="less of everything: under a minute")
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()

    def say(text: str) -> None:
        if not options.json:
            print(text, file=sys.stderr, flush=True)

    size = SIZES["tiny" if options.tiny else "quick" if options.quick else "full"]
    with tempfile.TemporaryDirectory(prefix="oarlock-bench-") as folder, threadpool_limits(1, "blas"):
        result = measure(size, Path(folder), say)
    result["size"] = "tiny" if options.tiny else "quick" if options.quick else "full"
    print(json.dumps(result))
    return 0


def measure(size: Size, folder: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Return all figures."""
    begun = STARTED
    before = surroundings(PACKAGES)
    data = folder / "data"
    info = generate_ncf(data, users=size.users, items=size.items, positives_per_user=size.positives)
    say(f"{info.train_rows} pairs of {info.users} users and {info.items} items")
    spec = make_spec(plan(data, servers=1, workers=1, epochs=1), "local")
    local = LocalNcf(spec)
    local.start()
    local.run(8)
    local.forget_times()
    names = ("ps", "ps_1x1", "inprocess", "torch", "torch_given_batches", "local")
    figures = {name: Figures() for name in names}
    stages: dict[str, dict[str, float]] = {}
    short: list[str] = []
    torch, about_torch = _torch(data, (size.users, size.items), spec.batch_rows, size.turn_seconds / 3)

    def between() -> None:
        figures["local"].turn(local.run, size.turn_seconds)
        if torch is not None:
            figures["torch"].turn(torch.run, size.turn_seconds)
            figures["torch_given_batches"].turn(torch.run_given, size.turn_seconds)

    jobs: tuple[tuple[str, int, int, bool], ...] = (
        ("ps", 2, 2, True),
        ("inprocess", 2, 2, False),
        ("ps_1x1", 1, 1, True),
    )
    left = len(jobs) * size.rounds
    for turn in range(size.rounds):
        for name, servers, workers, processes in jobs:
            run = plan(data, servers=servers, workers=workers, epochs=size.epochs)
            # Of the time that is left each job gets an equal part.
            part = (begun + size.most_seconds - time.monotonic()) / left
            left -= 1
            if not figures["ps"].speeds:
                # What the benchmark is for gets its time on a busy machine as well.
                part = max(part, LEAST_SECONDS)
            elif part < LEAST_SECONDS / 4:
                short.append(name)
                continue
            found = (measure_processes if processes else measure_in_process)(
                run, folder / f"{name}-{turn}", min(size.job_seconds, part / 2), time.monotonic() + part
            )
            figures[name].add(found)
            stages[name] = found.stages
            if found.cut_short:
                short.append(name)
            say(f"{name}: {', '.join(f'{s:,.0f}' for s in found.speeds)} samples/s")
            between()
    speeds = {name: f.speed() for name, f in figures.items()}
    # A job's first epoch holds its warm-up: shown, but nothing is concluded from it.
    steady = {name: None if name in short else speed for name, speed in speeds.items()}
    return {
        "benchmark": "ncf",
        "model": "NeuMF: GMF 8 + MLP 64-32-16-8, rows of 40 values, Adam, 4 negatives per positive",
        "batch_samples": spec.batch_rows * 5,
        "users": info.users,
        "items": info.items,
        "samples_per_epoch": info.train_rows * 5,
        **{f"{name}_samples_per_s": speed and round(speed) for name, speed in speeds.items()},
        **about_torch,
        "ps_vs_torch": _ratio(steady["ps"], speeds["torch"]),
        "inprocess_vs_torch": _ratio(steady["inprocess"], speeds["torch"]),
        "ps_vs_local": _ratio(steady["ps"], speeds["local"]),
        "local_us": local.parts(),
        "epoch_seconds": {name: speed and round(ML1M_SAMPLES / speed, 2) for name, speed in speeds.items()},
        "cpu_seconds_per_million_samples": {
            name: round(statistics.median(f.processor), 2) if f.processor else None for name, f in figures.items()
        },
        "stages": stages,
        # Jobs that had no time for more than (a part of) their first epoch.
        "cut_short": short,
        "runs": {name: [round(s) for s in f.speeds] for name, f in figures.items()},
        "surroundings": {**before, "load_average_after": surroundings(())["load_average"]},
        "seconds": round(time.monotonic() - begun, 1),
    }


def _torch(
    data: Path, sizes: tuple[int, int], batch_rows: int, seconds: float
) -> tuple[TorchNcf | None, dict[str, Any]]:
    """Return the fastest form of the model in PyTorch, None if it cannot be had, and what to report about it."""
    # Where torch's compiler would keep what it never makes here; it creates the folder all the same.
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(data.parent / "torch")
    try:
        torch = load_torch()
    except ImportError as error:
        return None, {"why": f"torch cannot be imported ({error}): make setup-torch"}
    pairs = load_positives(list_train(data))
    users = np.repeat(pairs.users, np.diff(pairs.offsets)).astype(np.int64)
    order = np.random.default_rng(0).permutation(len(users))
    made = {
        form: TorchNcf(torch, users[order], pairs.items.astype(np.int64)[order], sizes, batch_rows, form)
        for form in FORMS
    }
    for each in made.values():
        each.start()
    form, threads, tried = fastest(torch, made, seconds)
    return made[form], {"why": None, "torch_form": form, "torch_threads": threads, "torch_tried_us": tried}


def _ratio(ours: float | None, theirs: float | None) -> float | None:
    return round(ours / theirs, 3) if ours and theirs else None


if __name__ == "__main__":
    sys.exit(main())
