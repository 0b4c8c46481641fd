# SPDX-License-Identifier: Apache-2.0
"""`python -m oarlock.benchmarks.cache_job [--json] [--quick]`: what row caches do to whole jobs, of real processes.

DLRM on planted clicks, two shards and two workers, once without caches and once for each bound: bytes of pulls for each sample,
AUC, and what came of the pulls; all seeds of all cases are told, for two workers train a little differently every time. Then
jobs whose batches are single samples, a tenth of which has the same value in the first field: how many rows the busiest shard
sends, and for how long it works on pulls (by the clock, so that little is to be made of it on a busy machine). Fields follow
Zipf's law, P(rank r) ~ r^-1.05; labels come of a logistic model of the values. Invariant: it writes to a temporary folder alone,
and no process outlives it. Main thread.
"""

from oarlock.benchmarks.surroundings import settle, surroundings

if __name__ == "__main__":
    settle("oarlock.benchmarks.cache_job")

import argparse
import asyncio
import json
import re
import sys
import tempfile
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from oarlock.client.job import DONE
from oarlock.launch.config import RunConfig
from oarlock.launch.folder import create
from oarlock.launch.processes import LocalProcesses
from oarlock.proto.errors import Unavailable

ALPHA = 1.05
SIZES = (50_000, 20_000, 10_000, 5_000, 2_000, 500, 100, 20)
DIM = 16
SERVERS = WORKERS = 2
BOUNDS = (0, 3, 10, 100)
HOT_BOUNDS = (10, 100)
ROW_GROUP = 512
HOT = 0.1  # of all samples have the hot value in the first field
CACHED = 10_000  # rows that a worker keeps
WATCH_SECONDS = 0.1
NAMES = [f"f{number}" for number in range(len(SIZES))]
SCHEMA = 'format = "parquet"\n\n[label]\ncolumn = "label"\n' + "".join(f'\n[[fields]]\ncolumn = "{n}"\n' for n in NAMES)
_SAMPLE = re.compile(r"^(oarlock_\w+?)(?:\{([^}]*)\})? ([-+0-9.eE]+)$", re.MULTILINE)


@dataclass(frozen=True)
class Scale:
    """How much is trained: samples and seeds of the jobs with AUC, their batches, and samples of the jobs with a hot key."""

    samples: int
    seeds: int
    batch: int
    singles: int


SCALES = {
    "tiny": Scale(4_096, 1, 512, 1_024),
    "quick": Scale(65_536, 1, 1024, 2_048),
    "full": Scale(131_072, 3, 1024, 6_144),
}


def generate(folder: Path, samples: int, *, hot: float = 0.0, test: int = 0) -> None:
    """Write planted clicks with a schema; ``hot``: share of the samples whose first field has one value."""
    rng = np.random.default_rng(7)
    folder.mkdir(parents=True)
    (folder / "schema.toml").write_text(SCHEMA, encoding="utf-8")
    laws = [np.cumsum(np.arange(1, size + 1, dtype=np.float64) ** -ALPHA) for size in SIZES]
    effects = [rng.normal(0, 0.6, size) for size in SIZES]
    for name, n in (("train", samples), ("test", test)):
        if not n:
            continue
        columns: dict[str, Any] = {}
        logit = np.full(n, -0.5)
        for field, law, effect in zip(NAMES, laws, effects, strict=True):
            found = np.searchsorted(law, rng.random(n) * law[-1]).clip(0, len(law) - 1)
            if hot and field == NAMES[0]:
                # No frequent value otherwise: what is seen of the hot one is its own.
                found = np.where(rng.random(n) < hot, len(law) - 1, found)
            columns[field] = found
            logit += effect[found]
        columns["label"] = (rng.random(n) < 1 / (1 + np.exp(-logit))).astype(np.int64)
        pq.write_table(pa.table(columns), folder / f"{name}.parquet", row_group_size=ROW_GROUP)


def scraped(address: str) -> dict[str, float]:
    """Return the samples of a metrics page, those of one name and method added up."""
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=10.0) as page:
        text = page.read().decode()
    out: dict[str, float] = {}
    for name, labels, value in _SAMPLE.findall(text):
        method = re.search(r'method="([^"]*)"', labels)
        key = f"{name}:{method[1]}" if method else name
        out[key] = out.get(key, 0.0) + float(value)
    return out


class _Watch:
    """Reads the pages of all members as long as nothing was evaluated: evaluation pulls all rows.

    ``bounds``: of each worker's cache the batches that it had trained when its bound was seen to change, and to which.
    """

    def __init__(self) -> None:
        self.pages: dict[tuple[str, int], dict[str, float]] = {}
        self.bounds: dict[int, list[tuple[int, int]]] = {}

    def __call__(self, status: dict[str, Any]) -> bool:
        if status and not status["evaluated"]:
            for member in status["members"]:
                stats = member["stats"] or {}
                if cache := stats.get("caches", {}).get("fields"):
                    known = self.bounds.setdefault(member["id"], [])
                    if not known or known[-1][1] != cache["bound"]:
                        known.append((stats["batches"], cache["bound"]))
                if address := (member["stats"] or {}).get("metrics"):
                    try:
                        self.pages[member["role"], member["id"]] = scraped(address)
                    except OSError:
                        continue
        return True

    def of(self, role: str, name: str) -> list[float]:
        return [page.get(name, 0.0) for (r, _), page in self.pages.items() if r == role]


def run_job(folder: Path, data: Path, *, bound: int | str | None, seed: int, batch: int) -> dict[str, Any]:
    """Train one epoch; ``bound`` None: without caches. Return what was seen until the evaluation began, and the AUC."""
    run = RunConfig(
        recipe="dlrm",
        data=str(data),
        epochs=1,
        seed=seed,
        servers=SERVERS,
        workers=WORKERS,
        reader="arrow",
        checkpoint_epochs=0,
        cache={} if bound is None else {"fields": {"rows": CACHED, "bound": bound, "policy": "lfu"}},
        recipe_options={"dim": DIM, "batch_samples": batch, "top": [32 if batch > 1 else 4], "row_rate": 0.01},
    )
    spec, watch = create(folder, "cache", run), _Watch()
    processes = LocalProcesses(spec, folder, log_level="warning", metrics_port=0)
    status = asyncio.run(processes.run(watch, WATCH_SECONDS))
    if status["phase"] != DONE:
        raise Unavailable(f"the job came to its end as {status['phase']}: {status['reason']}")
    pulled = [
        sum(watch.of("worker", f"oarlock_rpc_client_{way}_bytes_total:Shard.Pull")) for way in ("sent", "received")
    ]
    samples = sum(watch.of("worker", "oarlock_worker_samples_total"))
    hits, misses = (sum(watch.of("worker", f"oarlock_cache_{what}_total")) for what in ("hits", "misses"))
    loads = [
        {
            "asked": page["oarlock_table_asked_rows_total"],
            "sent": page["oarlock_table_pulled_rows_total"],
            "pull_seconds": page["oarlock_shard_pull_seconds_sum"],
        }
        for (role, _), page in watch.pages.items()
        if role == "shard"
    ]
    return {
        "bound": bound,
        "seed": seed,
        "auc": status["history"][-1]["metrics"].get("auc"),
        "train_seconds": status["history"][-1]["train_seconds"],
        "bounds": list(watch.bounds.values()),
        "loss": round(status["history"][-1]["loss"], 5),
        "pull_bytes_per_sample": round(sum(pulled) / samples, 1),
        "hit_rate": round(hits / (hits + misses), 4) if hits + misses else 0.0,
        "shards": loads,
    }


def busiest(job: dict[str, Any]) -> tuple[float, float]:
    """Return how many rows the shard sends that sends most, and how long the one takes for pulls that takes longest.

    Both for each row that anyone was asked for, the latter in microseconds.
    """
    asked = sum(shard["asked"] for shard in job["shards"])
    return max(s["sent"] for s in job["shards"]) / asked, 1e6 * max(s["pull_seconds"] for s in job["shards"]) / asked


def measure(scale: Scale, folder: Path) -> dict[str, Any]:
    """Return the figures of every case."""
    generate(folder / "clicks", scale.samples, test=max(2048, scale.samples // 8))
    generate(folder / "hot", scale.singles, hot=HOT)
    number = iter(range(1000))

    def job(data: str, bound: int | None, seed: int, batch: int) -> dict[str, Any]:
        return run_job(folder / f"job-{next(number)}", folder / data, bound=bound, seed=seed, batch=batch)

    cases = (None, *BOUNDS)
    jobs = [job("clicks", bound, seed, scale.batch) for seed in range(scale.seeds) for bound in cases]
    hot = [job("hot", bound, 0, 1) for bound in (None, *HOT_BOUNDS)]
    rows, seconds = busiest(hot[0])
    return {
        "jobs": jobs,
        "auc": {str(b): [j["auc"] for j in jobs if j["bound"] == b] for b in cases},
        "pull_bytes_saved": {
            str(b): round(1 - _mean(jobs, b, "pull_bytes_per_sample") / _mean(jobs, None, "pull_bytes_per_sample"), 4)
            for b in BOUNDS
        },
        "hot_jobs": hot,
        # How many times fewer rows the busiest shard sends, and less time it works on pulls.
        "hot_key_cut": {str(j["bound"]): round(rows / max(busiest(j)[0], 1e-9), 2) for j in hot[1:]},
        "hot_key_seconds_cut": {str(j["bound"]): round(seconds / max(busiest(j)[1], 1e-9), 2) for j in hot[1:]},
        "surroundings": surroundings(("numpy", "numba")),
    }


def _mean(jobs: list[dict[str, Any]], bound: int | None, what: str) -> float:
    return float(np.mean([job[what] for job in jobs if job["bound"] == bound]))


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--quick", action="store_true", help="fewer samples, one seed")
    parser.add_argument("--tiny", action="store_true", help="hardly any work, for tests")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="oarlock-cache-") as folder:
        result = measure(SCALES["tiny" if chosen.tiny else "quick" if chosen.quick else "full"], Path(folder))
    if chosen.json:
        print(json.dumps(result))
        return 0
    print("bound  seed  auc      bytes per sample  hits")
    for job in result["jobs"]:
        row = f"{job['auc']:.5f}  {job['pull_bytes_per_sample']:>16}  {job['hit_rate']:.3f}"
        print(f"{job['bound']!s:>5}  {job['seed']:>4}  {row}")
    print(json.dumps({name: result[name] for name in ("pull_bytes_saved", "hot_key_cut", "hot_key_seconds_cut")}))
    print(json.dumps(result["surroundings"]), file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
