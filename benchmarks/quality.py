# SPDX-License-Identifier: Apache-2.0
"""`python -m oarlock.benchmarks.quality [--json] [--quick] [--data FOLDER] [--recipe NAME] [--seeds N] [--cases ...]`

What modes and compression do to a model: each case is trained from several seeds by real processes and compared with the
same recipe in one process, one worker, float32. Without --data on generated clicks, whose best AUC is known.
Invariant: all that it writes is in a temporary folder; every job is its own, none is cut short. Main thread.
"""

from oarlock.benchmarks.surroundings import settle, surroundings

if __name__ == "__main__":
    settle("oarlock.benchmarks.quality")

import argparse
import asyncio
import json
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from oarlock.benchmarks.quality_cases import BASE, CASES, Case, Outcome, bytes_per_sample, read_case
from oarlock.benchmarks.quality_data import generate_clicks
from oarlock.client.job import DONE
from oarlock.launch.config import assign, run_config
from oarlock.launch.folder import create
from oarlock.launch.inprocess import run_in_process
from oarlock.launch.job import make_spec
from oarlock.launch.processes import LocalProcesses
from oarlock.proto.errors import InvalidArgument, PSError, Unavailable

WATCH_SECONDS = 0.1
# Rows of generated clicks, epochs and seeds: of --tiny, --quick, and without either.
SIZES = {"tiny": (2_000, 1, 1), "quick": (60_000, 2, 1), "full": (300_000, 4, 5)}
QUICK_CASES = (CASES[0], CASES[3], CASES[4])


class Bench:
    """Trains the cases of one comparison; ``settings`` are fields of all their runs."""

    def __init__(self, settings: dict[str, Any], folder: Path, say: Callable[[str], None]) -> None:
        self._settings = settings
        self._folder = folder
        self._say = say
        spec = make_spec(run_config(settings), "quality")
        self._tables = [table.name for table in spec.tables]
        self.metric = spec.metrics[0]

    def train(self, case: Case | None, seed: int, outcome: Outcome) -> None:
        """Run one job to its end and add what came of it; ``case`` None: the base."""
        moved: list[float] = []

        def watch(status: dict[str, Any]) -> bool:
            if status and (found := bytes_per_sample(status)) is not None:
                moved.append(found)
            return True

        folder = self._folder / "job"
        if case is None:
            spec = create(folder, "quality", run_config({**self._settings, "seed": seed, "servers": 1, "workers": 1}))
            status = run_in_process(spec, folder, watch=watch, watch_seconds=WATCH_SECONDS)
        else:
            settings = {**self._settings, **case.settings(self._tables), "seed": seed}
            spec = create(folder, "quality", run_config(settings))
            status = asyncio.run(LocalProcesses(spec, folder).run(watch, WATCH_SECONDS))
        shutil.rmtree(folder)
        name = case.text if case else BASE
        if status["phase"] != DONE:
            raise Unavailable(f"{name}, seed {seed}: the job ended as {status['phase']}: {status['reason']}")
        history = status["history"]
        outcome.metrics.append(history[-1]["metrics"][self.metric])
        outcome.samples_per_s.append(statistics.median(r["samples"] / r["train_seconds"] for r in history))
        if moved and case is not None:
            outcome.bytes_per_sample.append(moved[-1])
        self._say(
            f"{name:<34} seed {seed}  {self.metric} {outcome.metrics[-1]:.5f}  {outcome.samples_per_s[-1]:,.0f} samples/s"
        )

    def measure(self, cases: Sequence[Case], seeds: int) -> dict[str, Any]:
        """Return the figures of all cases; they take turns, so that a machine that gets slower is slower for all."""
        outcomes = {BASE: Outcome(), **{case.text: Outcome() for case in cases}}
        for seed in range(seeds):
            self.train(None, seed, outcomes[BASE])
            for case in cases:
                self.train(case, seed, outcomes[case.text])
        base = outcomes[BASE]
        return {
            "metric": self.metric,
            BASE: base.told(None),
            "cases": {case.text: outcomes[case.text].told(base) for case in cases},
        }


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m oarlock.benchmarks.quality", description=__doc__.split("\n")[2])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--quick", action="store_true", help="fewer cases, rows, epochs and seeds")
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="data of the recipe (default: generated clicks)")
    parser.add_argument("--recipe", default="dlrm", help="default dlrm")
    parser.add_argument("--epochs", type=int, metavar="N", help="passes over the data")
    parser.add_argument("--seeds", type=int, metavar="N", help="jobs of each case, from seeds 0 to N - 1")
    parser.add_argument("--servers", type=int, default=2, metavar="N")
    parser.add_argument("--workers", type=int, default=2, metavar="N")
    parser.add_argument("--cases", nargs="+", metavar="CASE", help="MODE[:N][/PUSH[/PULL[/zstd]]]")
    parser.add_argument(
        "--set", action="append", default=[], metavar="A.B=C", help="a field of every job, as of `oarlock train`"
    )
    return parser.parse_args()


def run(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Return the result of a comparison."""
    size = "tiny" if options.tiny else "quick" if options.quick else "full"
    rows, epochs, seeds = SIZES[size]
    best = None
    data = options.data
    if data is None:
        data = folder / "clicks"
        best = generate_clicks(data, rows)
    settings: dict[str, Any] = {
        "recipe": options.recipe,
        "data": str(data),
        "epochs": options.epochs or epochs,
        "servers": options.servers,
        "workers": options.workers,
        "checkpoint_epochs": 0,
        # What members count is told with heartbeats.
        "heartbeat_seconds": WATCH_SECONDS,
    }
    for setting in options.set:
        assign(settings, setting)
    if (seeds := options.seeds or seeds) < 1:
        raise InvalidArgument(f"--seeds {seeds}: give an integer >= 1")
    cases = [read_case(text) for text in options.cases or (QUICK_CASES if size != "full" else CASES)]
    if size == "tiny":
        cases = cases[-1:]
    bench = Bench(settings, folder, lambda text: print(text, file=sys.stderr, flush=True))
    found = bench.measure(cases, seeds)
    head = {"recipe": options.recipe, "data": options.data and options.data.name, "size": size, "best_possible": best}
    packages = ("numpy", "numba", "pyarrow", "grpcio")
    return {**head, "epochs": settings["epochs"], "seeds": seeds, **found, "surroundings": surroundings(packages)}


def main() -> int:
    """Measure and print."""
    options = _options()
    try:
        with tempfile.TemporaryDirectory(prefix="oarlock-quality-") as folder:
            result = run(options, Path(folder))
    except PSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if options.json:
        print(json.dumps(result))
        return 0
    jobs = f"{result['recipe']}, {result['epochs']} epochs, {result['seeds']} seeds"
    print(f"{jobs}: {result['metric']}; best possible {result['best_possible']}")
    for name, case in {BASE: result[BASE], **result["cases"]}.items():
        low, high = case["spread"]
        print(
            f"{name:<34} {case['mean']:.5f} ({low:.5f} to {high:.5f})  gap {case.get('gap', 0.0):+.5f}  "
            f"{case.get('bytes_per_sample', 0.0):8.1f} bytes/sample  {case['samples_per_s']:10,.0f} samples/s"
        )
    print(json.dumps(result["surroundings"]), file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
