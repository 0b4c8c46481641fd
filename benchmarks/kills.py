# SPDX-License-Identifier: Apache-2.0
"""`python -m oarlock.benchmarks.kills [--json] [--quick] [--seed N] [--data DIR]`: jobs whose processes are killed and stopped.

A counting job shows that nothing is lost and nothing is done twice; an NCF job that it learns what it learns in peace. Two
shards, three workers, real processes. Shards are not killed: a job goes back to its last cut when one of them dies. Invariant:
it writes to a temporary folder only, leaves no process, and the last line printed is the result.
"""

from oarlock.benchmarks.surroundings import settle, surroundings

if __name__ == "__main__":
    settle("oarlock.benchmarks.kills")

import argparse
import asyncio
import contextlib
import json
import logging
import os
import secrets
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from oarlock.benchmarks.counting import Count, check, write_data
from oarlock.benchmarks.killer import Harm, Killer, Rhythm
from oarlock.client.job import DONE, OVER, JobSpec
from oarlock.data.interactions import read_info
from oarlock.data.planted import generate_ncf
from oarlock.launch.config import RunConfig
from oarlock.launch.folder import create
from oarlock.launch.kernels import compile_or_load
from oarlock.launch.processes import LocalProcesses
from oarlock.proto.errors import DeadlineExceeded, Unavailable

# In the environment of every process that this program starts, and of those that they start.
MARKER = "OARLOCK_KILLS"
RECIPE = "oarlock.simulation.counting:recipe"
QUIET_RUNS = 3
WATCH_SECONDS = 0.1
# What no job needs: one that takes longer hangs.
MOST_SECONDS = 600.0


@dataclass(frozen=True)
class Size:
    """How much is run: rows and epochs of a counting job, of which there are as many as ``kills`` take; epochs of NCF."""

    rows: int
    keys: int
    epochs: int
    kills: int
    users: int
    items: int
    positives: int
    ncf_epochs: int
    rhythm: Rhythm
    # A job that lasts longer than this ends in peace.
    harm_seconds: float


SIZES = {
    "full": Size(100_000, 20_000, 20, 30, 1500, 800, 30, 20, Rhythm(), MOST_SECONDS),
    "quick": Size(60_000, 20_000, 4, 4, 200, 220, 20, 4, Rhythm(worker=1.5, coordinator=3.0, stop=3.0), 7.0),
}
LEASE_SECONDS = 2.0


@dataclass
class Ended:
    """A job that ended: its spec and folder, the last status, what was done to it, and how long it took."""

    spec: JobSpec
    folder: Path
    status: dict[str, Any]
    harm: Harm
    seconds: float


def main() -> int:
    """Run and print."""
    parser = argparse.ArgumentParser(prog="python -m oarlock.benchmarks.kills", description=__doc__.split("\n")[0])
    parser.add_argument("--json", action="store_true", help="print nothing but the result")
    parser.add_argument("--quick", action="store_true", help="less of everything: under a minute")
    parser.add_argument("--seed", type=int, default=0, help="of the data, the jobs, and who is killed when (default 0)")
    parser.add_argument("--data", default="", metavar="DIR", help="NCF's data, from `oarlock data import ncf`")
    parser.add_argument("--only", choices=("counting", "ncf"), help="one of the two jobs")
    options = parser.parse_args()

    def say(text: str) -> None:
        if not options.json:
            print(text, file=sys.stderr, flush=True)

    # What the launcher warns of is part of what happens here.
    logging.getLogger("oarlock").addHandler(logging.NullHandler())
    size = "quick" if options.quick else "full"
    with tempfile.TemporaryDirectory(prefix="oarlock-kills-") as folder:
        result = measure(SIZES[size], Path(folder), options.seed, options.data, options.only, say)
    print(json.dumps({"benchmark": "kills", "size": size, "seed": options.seed, **result}))
    return 0


def measure(
    size: Size, folder: Path, seed: int, ncf_data: str, only: str | None, say: Callable[[str], None]
) -> dict[str, Any]:
    """Return all figures."""
    begun = time.monotonic()
    before = surroundings(("numpy", "numba", "grpcio", "pyarrow"))
    compile_or_load()
    marker = secrets.token_hex(16)
    os.environ[MARKER] = marker
    result: dict[str, Any] = {}
    harm = Harm()
    try:
        if only != "ncf":
            result, harm = count(size, folder, seed, say)
        if only != "counting":
            about_ncf, ncf_harm = learn(size, folder, seed, ncf_data, say)
            result, harm = {**result, **about_ncf}, harm + ncf_harm
    finally:
        del os.environ[MARKER]
    return {
        "kills": harm.kills,
        "stops": harm.stops,
        **asdict(harm),
        **result,
        "shards_killed": "none: a job goes back to its last cut when one dies",
        "processes_left": processes_left(marker),
        "lease_seconds": LEASE_SECONDS,
        "rhythm": asdict(size.rhythm),
        "surroundings": before,
        "seconds": round(time.monotonic() - begun, 1),
    }


def run_job(
    folder: Path, run: RunConfig, rhythm: Rhythm | None, seed: int, harm_seconds: float = MOST_SECONDS
) -> Ended:
    """Run one job to its end, doing harm to it in ``rhythm`` (None: in peace); raise if it does not come to that."""
    spec = create(folder, folder.name, run)
    launched = LocalProcesses(spec, folder, restarts=run.restarts)
    killer = Killer(launched, rhythm or Rhythm(), seed)

    async def kill() -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(killer.run(), harm_seconds)

    async def body() -> dict[str, Any]:
        killing = asyncio.ensure_future(kill()) if rhythm is not None else None

        def watch(status: dict[str, Any]) -> bool:
            if killing is not None and status.get("phase") in OVER:
                killing.cancel()
            return True

        try:
            async with asyncio.timeout(MOST_SECONDS):
                return await launched.run(watch, WATCH_SECONDS)
        except TimeoutError:
            raise DeadlineExceeded(f"job {folder.name} did not end within {MOST_SECONDS:g} s") from None
        finally:
            if killing is not None:
                killing.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await killing

    begun = time.monotonic()
    status = asyncio.run(body())
    if status["phase"] != DONE:
        raise Unavailable(f"job {folder.name} ended as {status['phase']}: {status['reason']}")
    return Ended(spec, folder, status, killer.harm, time.monotonic() - begun)


def plan(data: Path, **fields: Any) -> RunConfig:
    """Return a run over two shards and three workers whose lease is short enough to be outlasted now and then."""
    return RunConfig(
        data=str(data),
        servers=2,
        workers=3,
        reader="arrow",
        lease_seconds=LEASE_SECONDS,
        heartbeat_seconds=LEASE_SECONDS / 10,
        **fields,
    )


def count(size: Size, folder: Path, seed: int, say: Callable[[str], None]) -> tuple[dict[str, Any], Harm]:
    """Run counting jobs until enough was killed; return what they came to, summed up, and the harm done."""
    counts: list[Count] = []
    harm, seconds = Harm(), 0.0
    while harm.kills < size.kills:
        number = len(counts)
        data = folder / f"data-{number}"
        write_data(data, rows=size.rows, keys=size.keys, seed=seed + number)
        run = plan(data, recipe=RECIPE, epochs=size.epochs, seed=seed + number)
        ended = run_job(folder / f"counting-{number}", run, size.rhythm, seed + number, size.harm_seconds)
        counts.append(check(data, ended.folder, ended.spec, ended.status["history"]))
        harm, seconds = harm + ended.harm, seconds + ended.seconds
        say(f"counting: {counts[-1]} {ended.harm} in {ended.seconds:.1f} s")
    return {
        "counting_exact": all(c.exact for c in counts),
        **{
            name: sum(getattr(c, name) for c in counts) for name in ("lost", "doubled", "groups_lost", "groups_doubled")
        },
        "samples_exact": all(c.samples_exact for c in counts),
        "evaluation_exact": all(c.evaluation_exact for c in counts),
        "counting": {
            "jobs": len(counts),
            "rows": size.rows,
            "epochs": size.epochs,
            "occurrences": sum(2 * c.rows * c.epochs for c in counts),
            "seconds": round(seconds, 1),
            "kills": harm.kills,
            **asdict(harm),
        },
    }, harm


def learn(size: Size, folder: Path, seed: int, given: str, say: Callable[[str], None]) -> tuple[dict[str, Any], Harm]:
    """Train NCF under kills, and in peace with that seed and two more; return HR@10 of all, and the harm done.

    Seeds differ by more than kills do, so the disturbed run's own is among the quiet ones. Even so a run that is like them lies
    outside of the range of three in up to half of all cases.
    """
    data = Path(given).absolute() if given else folder / "ncf-data"
    if not given:
        generate_ncf(data, users=size.users, items=size.items, positives_per_user=size.positives, seed=seed)
    rows = read_info(data).train_rows

    def train(name: str, number: int, rhythm: Rhythm | None) -> Ended:
        ended = run_job(folder / name, plan(data, epochs=size.ncf_epochs, seed=number), rhythm, seed, size.harm_seconds)
        say(f"{name}: hr@10 {_best(ended):.4f} in {ended.seconds:.1f} s {ended.harm if rhythm else ''}")
        return ended

    disturbed = train("ncf-disturbed", seed, size.rhythm)
    quiet = [train(f"ncf-quiet-{n}", seed + n, None) for n in range(QUIET_RUNS)]
    peace = [_best(q) for q in quiet]
    per_epoch = rows * (1 + disturbed.spec.config["negatives"])
    return {
        "hr_at_10": _best(disturbed),
        "hr_at_10_quiet": peace,
        "within_spread": min(peace) <= _best(disturbed) <= max(peace),
        "ncf": {
            "data": data.name if given else "generated",
            "rows": rows,
            "epochs": size.ncf_epochs,
            "samples_exact": all(
                [r["samples"] for r in job.status["history"]] == [per_epoch] * size.ncf_epochs
                for job in (disturbed, *quiet)
            ),
            "seed": seed,
            "seeds_quiet": [seed + n for n in range(QUIET_RUNS)],
            "last_hr_at_10": _last(disturbed),
            "last_hr_at_10_quiet": [_last(q) for q in quiet],
            "seconds": round(disturbed.seconds, 1),
            "seconds_quiet": [round(q.seconds, 1) for q in quiet],
            "kills": disturbed.harm.kills,
            **asdict(disturbed.harm),
        },
    }, disturbed.harm


def _best(ended: Ended) -> float:
    return float(ended.status["best"]["metrics"]["hr@10"])


def _last(ended: Ended) -> float:
    return float(ended.status["history"][-1]["metrics"]["hr@10"])


def processes_left(marker: str) -> int:
    """Return how many processes have ``marker`` in their environment: nobody can leave this family."""
    wanted = f"{MARKER}={marker}".encode()
    found = 0
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            with contextlib.suppress(OSError):
                found += wanted in (folder / "environ").read_bytes().split(b"\0")
    return found


if __name__ == "__main__":
    sys.exit(main())
