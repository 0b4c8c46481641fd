# SPDX-License-Identifier: Apache-2.0
"""`python -m oarlock.benchmarks.quality [--json] [--quick] [--data FOLDER] [--recipe NAME] [--seeds N] [--keep F] [--cases ...]`

What modes and compression do to a model: each case is trained from several seeds by real processes and compared with the
same recipe in one process, one worker, float32. Without --data on generated clicks, whose best AUC is known.
Invariant: all that it writes is in a temporary folder; every job is its own, none is cut short. Main thread.
"""

from oarlock.benchmarks.surroundings import settle, surroundings

if __name__ == "__main__":
    settle("oarlock.benchmarks.quality")

import argparse
import asyncio
import itertools
import json
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from oarlock.benchmarks.quality_cases import BASE, CASES, HOW, Case, Outcome, Trained, bytes_per_sample, read_case
from oarlock.benchmarks.quality_data import generate_clicks
from oarlock.benchmarks.quality_kept import Kept
from oarlock.client.job import DONE
from oarlock.launch.config import assign, run_config
from oarlock.launch.folder import create
from oarlock.launch.inprocess import run_in_process
from oarlock.launch.job import make_spec
from oarlock.launch.processes import LocalProcesses
from oarlock.proto.errors import InvalidArgument, PSError, Unavailable

WATCH_SECONDS = 0.1
# Rows of generated clicks, epochs and seeds: of --tiny, --quick, and without either.
LEAST_ROWS = 1000
SIZES = {"tiny": (2_000, 1, 1), "quick": (60_000, 2, 1), "full": (300_000, 3, 5)}
QUICK_CASES = ("async", "async/int8/int8", "async/int8+feedback/int8")


class Bench:
    """Trains the cases of one comparison; ``settings`` are fields of all their runs.

    ``in_process``: shards and workers of all jobs are threads of this process, which pull nothing ahead.
    """

    def __init__(
        self,
        settings: dict[str, Any],
        folder: Path,
        kept: Kept,
        say: Callable[[str], None],
        *,
        in_process: bool = False,
    ) -> None:
        self._settings = settings
        self._folder = folder
        self._kept = kept
        self._say = say
        self._in_process = in_process
        spec = make_spec(run_config(settings), "quality")
        self._tables = [table.name for table in spec.tables]
        self.metric = spec.metrics[0]

    def train(self, case: Case, seed: int) -> Trained:
        """Run one job to its end; return what came of it."""
        moved: list[float] = []

        def watch(status: dict[str, Any]) -> bool:
            if status and (found := bytes_per_sample(status)) is not None:
                moved.append(found)
            return True

        folder = self._folder / "job"
        spec = create(folder, "quality", run_config(case.settings(self._tables, {**self._settings, "seed": seed})))
        if case.in_process or self._in_process:
            status = run_in_process(spec, folder, watch=watch, watch_seconds=WATCH_SECONDS)
        else:
            status = asyncio.run(LocalProcesses(spec, folder).run(watch, WATCH_SECONDS))
        shutil.rmtree(folder)
        if status["phase"] != DONE:
            raise Unavailable(f"{case.text}, seed {seed}: the job ended as {status['phase']}: {status['reason']}")
        history = status["history"]
        found = Trained(
            history[-1]["metrics"][self.metric],
            statistics.median(r["samples"] / r["train_seconds"] for r in history),
            moved[-1] if moved and not case.in_process else None,
        )
        self._say(
            f"{case.text:<34} seed {seed}  {self.metric} {found.metric:.5f}  {found.samples_per_s:,.0f} samples/s"
        )
        return found

    def measure(self, cases: Sequence[Case], seeds: int, most: int | None) -> dict[str, Any]:
        """Return the figures of all cases; they take turns, so that a machine that gets slower is slower for all.

        Of jobs that are not kept yet at most ``most`` are run. ``left``: how many there are then.
        """
        if BASE not in [case.text for case in cases]:
            cases = [read_case(BASE), *cases]
        # What cannot be run is said before anything is.
        for case in cases:
            make_spec(run_config(case.settings(self._tables, self._settings)), "quality")
        outcomes = {case.text: Outcome() for case in cases}
        left = 0
        for seed, case in itertools.product(range(seeds), cases):
            found = self._kept.get(case.text, seed)
            if found is None and (most is None or most > 0):
                found = self.train(case, seed)
                self._kept.put(case.text, seed, found)
                most = None if most is None else most - 1
            if found is None:
                left += 1
            else:
                outcomes[case.text].jobs.append(found)
        told = {case: outcomes[case.text] for case in cases if outcomes[case.text].jobs}
        base = outcomes[BASE] if outcomes[BASE].jobs else None
        figures = {}
        for case, outcome in told.items():
            own = outcomes.get(case.own_base) if case.own_base not in (BASE, case.text) else None
            figures[case.text] = outcome.told(base if case.text != BASE else None, own if own and own.jobs else None)
        return {"metric": self.metric, "left": left, "cases": figures}


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
    parser.add_argument("--cases", nargs="+", metavar="CASE", help=HOW)
    parser.add_argument(
        "--in-process", action="store_true", help="no processes: soon done, and nothing is pulled ahead"
    )
    parser.add_argument("--rows", type=int, metavar="N", help="generated clicks, a tenth of them to test on")
    parser.add_argument(
        "--keep", type=Path, metavar="FOLDER", help="keep what jobs came to; go on with those that are missing"
    )
    parser.add_argument("--jobs", type=int, metavar="N", help="run at most N jobs of those that are missing")
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
        rows = options.rows or rows
        if rows < LEAST_ROWS:
            raise InvalidArgument(f"--rows {rows}: give an integer >= {LEAST_ROWS}")
        best = generate_clicks(data, rows)
    elif options.rows:
        raise InvalidArgument("--rows and --data contradict each other: only generated clicks are as many as one likes")
    for name, least in (("seeds", 1), ("jobs", 0)):
        if (value := getattr(options, name)) is not None and value < least:
            raise InvalidArgument(f"--{name} {value}: give an integer >= {least}")
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
    seeds = options.seeds or seeds
    cases = [read_case(text) for text in options.cases or (QUICK_CASES if size != "full" else CASES)]
    if size == "tiny":
        cases = cases[-1:]
    comparison = {**settings, "data": str(data.resolve()) if options.data else f"{rows} generated clicks"}
    kept = Kept(options.keep, {**comparison, "in_process": options.in_process})
    kept.open()
    bench = Bench(
        settings, folder, kept, lambda text: print(text, file=sys.stderr, flush=True), in_process=options.in_process
    )
    found = bench.measure(cases, seeds, options.jobs)
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
    print(f"{jobs}: {result['metric']}; best possible {result['best_possible']}; {result['left']} jobs left")
    for name, case in result["cases"].items():
        low, high = case["spread"]
        own = f"  ({case['gap_own']:+.5f} to its own base)" if "gap_own" in case else ""
        print(
            f"{name:<46} {case['mean']:.5f} ({low:.5f} to {high:.5f}, deviation {case['deviation'] or 0.0:.5f})  "
            f"gap {case.get('gap', 0.0):+.5f} +- {case.get('gap_error', 0.0):.5f}{own}  "
            f"{case.get('bytes_per_sample', 0.0):8.1f} bytes/sample  {case['samples_per_s']:10,.0f} samples/s"
        )
    print(json.dumps(result["surroundings"]), file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
