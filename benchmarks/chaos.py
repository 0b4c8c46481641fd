# SPDX-License-Identifier: Apache-2.0
"""`python -m oarlock.benchmarks.chaos [--json] [--quick] [--seed N] [--only PART]`: jobs whose processes all die and stop.

A Wide & Deep job with a counting table beside it (`chaos_recipe`), two to four shards, two or three workers, one copy of each
block. Every few seconds a shard, a worker or the coordinator is killed, one stands still for longer than its lease, other
numbers are asked for, or a cut; `launch/chaos_events.py` draws what and when of the seed. Jobs are run until there were enough
events. `--only counted` or `--only sync` runs one of the two parts.

    events                       that were carried out, of all kinds
    lost_pushes, double_applied  occurrences and groups that the counting table has too few of, and too many, by the files alone
    auc_gap                      of the disturbed jobs' AUC, the largest distance to the mean of as many quiet jobs as there are
                                 `quiet_seeds`; `auc_range` is theirs
    recover_s_p50, _max          seconds from the SIGKILL of a shard to the first acknowledged push on every block that it owned
    paused_recover_s_max         the same from the SIGSTOP of a shard, so its lease is part of it
    worker_recover_s_max         from the SIGKILL of a worker until another one had a push of each of its splits acknowledged
    coordinator_recover_s_max    from the SIGKILL of the coordinator to its first answer, as the launcher sees it
    sync_identical               whether a sync job under the same has the digest of a quiet one, of one process

Blocks of a shard are those whose last acknowledged push before the signal it answered; times are read off the workers' notes
(`launch/chaos_times.py`). In the full size each of two shards owns 1 GiB of rows, which events wait for, and has a copy of the
other's; every group pushes to every one of these blocks. Quiet jobs have no ballast, and train beside the sync part, of which
nothing is timed. In the quick size each is one process, and the disturbed one's workers wait before each batch, so that the
job lasts.
Invariant: it writes to a temporary folder only, leaves no process, and the last line printed is the result.
"""

from oarlock.benchmarks.surroundings import settle, surroundings

if __name__ == "__main__":
    settle("oarlock.benchmarks.chaos")

import argparse
import json
import logging
import multiprocessing
import os
import secrets
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

from oarlock.benchmarks.chaos_recipe import RECIPE, write_clicks
from oarlock.benchmarks.counting import Count, check
from oarlock.benchmarks.kills import MARKER, processes_left
from oarlock.checkpoint.store import open_checkpoint
from oarlock.cli.digest import digest_of
from oarlock.client.job import DONE
from oarlock.data.planted import generate_ncf
from oarlock.launch.chaos import under_way
from oarlock.launch.chaos_events import USUAL, Plan
from oarlock.launch.chaos_ledger import Ledger, summary
from oarlock.launch.chaos_run import Ended, run_job
from oarlock.launch.config import RunConfig
from oarlock.launch.folder import create
from oarlock.launch.inprocess import run_in_process
from oarlock.launch.kernels import compile_or_load
from oarlock.proto.errors import Unavailable

# What no job needs: one that takes longer hangs.
MOST_SECONDS = 1200.0
# A larger gap than the quiet seeds' range may be of this much.
LEAST_RANGE = 0.001
CLICKS = "clicks"


@dataclass(frozen=True)
class Size:
    """How much is run. ``ballast``: blocks, rows and values of a row; events wait until the job has ``loaded`` bytes of rows."""

    rows: int
    test_rows: int
    batch: int
    epochs: int
    quiet_seeds: int
    # In one process, which is sooner at work; else as the disturbed one.
    quiet_in_process: bool
    # Seconds before each batch of the disturbed job.
    pace: float
    events: int
    gap_seconds: float
    lease_seconds: float
    ballast: tuple[int, int, int]
    loaded: int
    sync_users: int
    sync_epochs: int
    sync_events: int
    sync_gap_seconds: float
    sync_mix: Mapping[str, int]


STRIKES = {"kill shard": 2, "kill worker": 1, "kill coordinator": 1}
SIZES = {
    "full": Size(
        *(524_288, 65_536, 256, 5, 5, False, 0.0, 50, 4.0, 5.0, (256, 2048, 1024), 4 << 30),
        *(600, 60, 16, 3.0, {**STRIKES, "scale shard": 1, "cut": 1}),
    ),
    "quick": Size(49_152, 8192, 128, 2, 2, True, 0.05, 10, 0.9, 2.0, (0, 0, 1), 0, 200, 10, 3, 0.7, STRIKES),
}
# Beside the ones of `Size`: shards come and go between 2 and 4, workers between 2 and 3.
SHARDS, WORKERS = (2, 4), (2, 3)


def main() -> int:
    """Run and print."""
    parser = argparse.ArgumentParser(prog="python -m oarlock.benchmarks.chaos", description=__doc__.split("\n")[0])
    parser.add_argument("--json", action="store_true", help="print nothing but the result")
    parser.add_argument("--quick", action="store_true", help="less of everything: about ten events, under 50 s")
    parser.add_argument("--seed", type=int, default=0, help="of the data, the jobs, and what is done when (default 0)")
    parser.add_argument("--only", choices=("counted", "sync"), help="one of the two parts")
    options = parser.parse_args()

    def say(text: str) -> None:
        if not options.json:
            print(text, file=sys.stderr, flush=True)

    # What the launcher warns of is part of what happens here.
    logging.getLogger("oarlock").addHandler(logging.NullHandler())
    size = "quick" if options.quick else "full"
    with tempfile.TemporaryDirectory(prefix="oarlock-chaos-") as folder:
        result = measure(SIZES[size], Path(folder), options.seed, options.only, say)
    print(json.dumps({"benchmark": "chaos", "size": size, "seed": options.seed, **result}))
    return 0


def measure(size: Size, folder: Path, seed: int, only: str | None, say: Callable[[str], None]) -> dict[str, Any]:
    """Return all figures."""
    begun = time.monotonic()
    before = surroundings(("numpy", "numba", "grpcio", "pyarrow"))
    compile_or_load()
    # Python's own, which stays to the end: no process of a job.
    resource_tracker.ensure_running()
    marker = secrets.token_hex(16)
    os.environ[MARKER] = marker
    result: dict[str, Any] = {}
    try:
        # Quiet jobs train in a process of their own while this one watches the sync part.
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            counted = Counted(size, folder, seed, say)
            quiet = counted.disturb().train_quietly(pool) if only != "sync" else []
            if only != "counted":
                result |= sync(size, folder, seed, say)
            if only != "sync":
                result |= counted.result([each.result() for each in quiet])
    finally:
        del os.environ[MARKER]
    return {
        **result,
        "processes_left": processes_left(marker),
        "lease_seconds": size.lease_seconds,
        "surroundings": before,
        "seconds": round(time.monotonic() - begun, 1),
    }


class Counted:
    """The job that counts: under chaos until there were enough events, and in peace."""

    def __init__(self, size: Size, folder: Path, seed: int, say: Callable[[str], None]) -> None:
        self._size = size
        self._folder = folder
        self._seed = seed
        self._say = say
        self._disturbed: list[tuple[Ended, Count]] = []

    def disturb(self) -> "Counted":
        """Train until there were enough events."""
        size = self._size
        write_clicks(self._folder / CLICKS, rows=size.rows, test_rows=size.test_rows, seed=self._seed)
        left = size.events
        while left > 0:
            number = len(self._disturbed)
            plan = Plan(left, size.gap_seconds, self._seed + number, USUAL, SHARDS, WORKERS)
            ended, count = train(size, self._folder, f"disturbed-{number}", self._seed + number, plan)
            self._disturbed.append((ended, count))
            words = f"auc {_auc(ended):.5f} in {ended.seconds:.1f} s; {count}; {summary([ended.ledger])['kinds']}"
            self._say(f"disturbed-{number}: {words}")
            for entry in ended.ledger.entries:
                self._say(f"  {json.dumps(entry.to_json())}")
            done = len(ended.ledger.done)
            if not done:
                raise Unavailable("a job was over before anything was done to it: it is too small for this machine")
            left -= done
        return self

    def train_quietly(self, pool: Executor) -> list["Future[tuple[float, float]]"]:
        """Have the quiet jobs trained, one after the other; each gives its AUC and seconds."""
        size, seed = self._size, self._seed
        return [pool.submit(_quiet, size, self._folder, f"quiet-{n}", seed + n) for n in range(size.quiet_seeds)]

    def result(self, quiet: list[tuple[float, float]]) -> dict[str, Any]:
        """Return all figures."""
        peace = [auc for auc, _ in quiet]
        under = [_auc(ended) for ended, _ in self._disturbed]
        counts = [count for _, count in self._disturbed]
        ledgers = [ended.ledger for ended, _ in self._disturbed]
        gap = max(abs(auc - statistics.fmean(peace)) for auc in under)
        self._say(f"quiet: auc {', '.join(f'{auc:.5f}' for auc in peace)}")
        return {
            **summary(ledgers),
            "lost_pushes": sum(c.lost + c.groups_lost for c in counts),
            "double_applied": sum(c.doubled + c.groups_doubled for c in counts),
            "auc_gap": round(gap, 6),
            "auc_gap_allowed": round(max(max(peace) - min(peace), LEAST_RANGE), 6),
            "auc": [round(auc, 6) for auc in under],
            "auc_quiet": [round(auc, 6) for auc in peace],
            "quiet_seeds": len(peace),
            "auc_range": round(max(peace) - min(peace), 6),
            "samples_exact": all(c.samples_exact for c in counts),
            "jobs": len(counts),
            "occurrences": sum(2 * c.rows * c.epochs for c in counts),
            "disturbed_seconds": [round(ended.seconds, 1) for ended, _ in self._disturbed],
            "quiet_seconds": [round(seconds, 1) for _, seconds in quiet],
            "ledger": [e.to_json() for ledger in ledgers for e in ledger.entries],
        }


def _quiet(size: Size, folder: Path, name: str, seed: int) -> tuple[float, float]:
    """Train in peace, in a process of its own; return AUC and seconds."""
    logging.getLogger("oarlock").addHandler(logging.NullHandler())
    ended, _ = train(size, folder, name, seed, None)
    return _auc(ended), ended.seconds


def train(size: Size, where: Path, name: str, seed: int, plan: Plan | None) -> tuple[Ended, Count]:
    """Train one job that counts, on the clicks in ``where``, under a plan or in peace; what it wrote is gone after it."""
    folder, data = where / name, where / CLICKS
    blocks, rows, dim = size.ballast if plan is not None else (0, 0, 1)
    options: dict[str, Any] = {
        "batch_samples": size.batch,
        "ballast": blocks,
        "ballast_rows": rows,
        "ballast_dim": dim,
    }
    options["pace"] = size.pace if plan is not None else 0.0
    run = RunConfig(
        recipe=RECIPE,
        data=str(data),
        seed=seed,
        epochs=size.epochs,
        servers=SHARDS[0],
        workers=2,
        reader="arrow",
        replicas=1,
        lease_seconds=size.lease_seconds,
        heartbeat_seconds=size.lease_seconds / 10,
        checkpoint_epochs=1000,
        recipe_options=options,
    )
    spec = create(folder, name, run)

    def loaded(status: dict[str, Any]) -> bool:
        """Whether all shards together hold as many bytes of rows as the size asks for, copies included."""
        stats = [m["stats"] for m in status["members"] if m["role"] == "shard"]
        return under_way(status) and sum(s.get("bytes", 0) for s in stats) >= size.loaded

    if plan is None and size.quiet_in_process:
        begun = time.monotonic()
        status = run_in_process(spec, folder, watch=lambda status: True)
        ended = Ended(spec, folder, status, Ledger(), time.monotonic() - begun)
    else:
        ended = run_job(spec, folder, plan, ready=loaded, most_seconds=MOST_SECONDS)
    if ended.status["phase"] != DONE:
        raise Unavailable(f"job {name} ended as {ended.status['phase']}: {ended.status['reason']}")
    count = check(data, folder, spec, ended.status["history"])
    # Its checkpoints have all that it had in memory.
    shutil.rmtree(folder)
    return ended, count


def sync(size: Size, folder: Path, seed: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Train a sync job in peace, in one process, and under chaos; return whether both have the same digest."""
    data = folder / "sync-data"
    generate_ncf(data, users=size.sync_users, items=400, positives_per_user=40, seed=seed)
    run = RunConfig(
        data=str(data),
        mode="sync",
        ranks=4,
        epochs=size.sync_epochs,
        seed=seed,
        lease_seconds=2.0,
        heartbeat_seconds=0.2,
        recipe_options={"batch_samples": 1024},
    )
    quiet = folder / "sync-quiet"
    spec = create(quiet, "sync-quiet", replace(run, servers=1, workers=1))
    status = run_in_process(spec, quiet, watch=lambda status: True)
    if status["phase"] != DONE:
        raise Unavailable(f"the quiet sync job ended as {status['phase']}: {status['reason']}")
    target = folder / "sync-disturbed"
    disturbed = replace(run, servers=3, workers=2, replicas=1)
    plan = Plan(size.sync_events, size.sync_gap_seconds, seed, size.sync_mix, SHARDS, WORKERS)
    ended = run_job(create(target, "sync-disturbed", disturbed), target, plan, most_seconds=MOST_SECONDS)
    if ended.status["phase"] != DONE:
        raise Unavailable(f"the sync job ended as {ended.status['phase']}: {ended.status['reason']}")
    digests = [str(digest_of(*open_checkpoint(each / "checkpoints"))) for each in (quiet, target)]
    say(f"sync: {digests} in {ended.seconds:.1f} s; {summary([ended.ledger])['kinds']}")
    for entry in ended.ledger.entries:
        say(f"  {json.dumps(entry.to_json())}")
    return {
        "sync_identical": digests[0] == digests[1],
        "sync": {
            **summary([ended.ledger]),
            "seconds": round(ended.seconds, 1),
            "ledger": [e.to_json() for e in ended.ledger.entries],
        },
    }


def _auc(ended: Ended) -> float:
    return float(ended.status["history"][-1]["metrics"]["auc"])


if __name__ == "__main__":
    sys.exit(main())
