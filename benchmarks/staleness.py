# SPDX-License-Identifier: Apache-2.0
"""`python -m oarlock.benchmarks.staleness [--json] [--quick] [--seeds N]`: fixed bounds of a row cache beside the adaptive one.

The job of ``cache_job`` (DLRM on planted clicks, two shards and two workers, real processes) in smaller batches,
once for each bound and each seed; the cases of a seed take turns. The best fixed bound is the one whose mean AUC is highest, and
the adaptive one is compared with that: AUC, seconds of the epoch, bytes of pulls. What differs from seed to seed is told, too,
since two workers train a little differently every time. Invariant: it writes to a temporary folder alone, and no process outlives
it. Main thread.
"""

from oarlock.benchmarks.surroundings import settle, surroundings

if __name__ == "__main__":
    settle("oarlock.benchmarks.staleness")

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from oarlock.benchmarks.cache_job import generate, run_job
from oarlock.launch.cache import AUTO

WITHIN = 0.0005  # of the best AUC: as good


@dataclass(frozen=True)
class Scale:
    """How much is trained: samples, seeds, batches of so many, for which bounds."""

    samples: int
    seeds: int
    batch: int
    bounds: tuple[int, ...]


SCALES = {
    "tiny": Scale(4_096, 1, 128, (1,)),
    "quick": Scale(32_768, 1, 256, (1, 10)),
    "full": Scale(131_072, 5, 256, (0, 1, 3, 10, 30)),
}


def told(jobs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return what the jobs of one case came to; ``auc_error``: the standard error of their mean AUC, if there are several."""
    aucs = [job["auc"] for job in jobs]
    return {
        "auc": round(fmean(aucs), 5),
        "aucs": [round(auc, 5) for auc in aucs],
        "auc_error": round(stdev(aucs) / len(aucs) ** 0.5, 5) if len(aucs) > 1 else None,
        "seconds": round(fmean(job["train_seconds"] for job in jobs), 2),
        "bytes": round(fmean(job["pull_bytes_per_sample"] for job in jobs), 1),
        "hits": round(fmean(job["hit_rate"] for job in jobs), 4),
    }


def compare(fixed: dict[int, dict[str, Any]], auto: dict[str, Any]) -> dict[str, Any]:
    """Compare the adaptive bound with the fixed one of the best AUC, and with the one of least bytes that is as good."""
    best = max(fixed, key=lambda bound: fixed[bound]["auc"])
    good = [bound for bound in fixed if fixed[bound]["auc"] >= fixed[best]["auc"] - WITHIN]
    leanest = min(good, key=lambda bound: fixed[bound]["bytes"])
    # Seeds make the same data's AUC differ: those of one seed are compared with each other.
    apart = [a - b for a, b in zip(auto["aucs"], fixed[best]["aucs"], strict=True)]
    return {
        "best": best,
        "auto_auc_minus_best": round(auto["auc"] - fixed[best]["auc"], 5),
        "auto_auc_minus_best_error": round(stdev(apart) / len(apart) ** 0.5, 5) if len(apart) > 1 else None,
        "auto_time_over_best": round(auto["seconds"] / fixed[best]["seconds"], 3),
        "auto_bytes_over_best": round(auto["bytes"] / fixed[best]["bytes"], 3),
        "leanest_as_good": leanest,
        "auto_bytes_over_leanest": round(auto["bytes"] / fixed[leanest]["bytes"], 3),
    }


def measure(scale: Scale, folder: Path) -> dict[str, Any]:
    """Return the figures of every case."""
    generate(folder / "clicks", scale.samples, test=max(2048, scale.samples // 8))
    cases: tuple[int | str, ...] = (*scale.bounds, AUTO)
    jobs: dict[int | str, list[dict[str, Any]]] = {case: [] for case in cases}
    for seed in range(scale.seeds):
        # Another one begins each time: what the machine does meanwhile shall not always strike the same.
        for case in (*cases[seed % len(cases) :], *cases[: seed % len(cases)]):
            job = run_job(folder / f"job-{seed}-{case}", folder / "clicks", bound=case, seed=seed, batch=scale.batch)
            jobs[case].append(job)
            text = (
                f"bound {case!s:>4}  seed {seed}  AUC {job['auc']:.5f}  {job['pull_bytes_per_sample']:.1f} bytes/sample"
            )
            print(text, file=sys.stderr, flush=True)
    fixed, auto = {bound: told(jobs[bound]) for bound in scale.bounds}, told(jobs[AUTO])
    return {
        "samples": scale.samples,
        "batch": scale.batch,
        "seeds": scale.seeds,
        **compare(fixed, auto),
        "fixed": {str(bound): found for bound, found in fixed.items()},
        "auto": auto,
        # [batches that a worker had trained, bound from then on], by seed and worker.
        "auto_bounds": [job["bounds"] for job in jobs[AUTO]],
        "surroundings": surroundings(("numpy", "numba")),
    }


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--quick", action="store_true", help="fewer samples and bounds, one seed")
    parser.add_argument("--tiny", action="store_true", help="hardly any work, for tests")
    parser.add_argument("--seeds", type=int, metavar="N", help="jobs of each case, from seeds 0 to N - 1")
    chosen = parser.parse_args()
    scale = SCALES["tiny" if chosen.tiny else "quick" if chosen.quick else "full"]
    if chosen.seeds is not None:
        if chosen.seeds < 1:
            parser.error(f"--seeds {chosen.seeds}: give an integer >= 1")
        scale = replace(scale, seeds=chosen.seeds)
    with tempfile.TemporaryDirectory(prefix="oarlock-staleness-") as folder:
        result = measure(scale, Path(folder))
    if chosen.json:
        print(json.dumps(result))
        return 0
    print("bound  AUC      error    seconds  bytes/sample  hits")
    for case, found in {**result["fixed"], AUTO: result["auto"]}.items():
        figures = f"{found['auc_error'] or 0:.5f}  {found['seconds']:>7}  {found['bytes']:>12}  {found['hits']:.3f}"
        print(f"{case:>5}  {found['auc']:.5f}  {figures}")
    print(json.dumps({name: value for name, value in result.items() if name.startswith(("auto_", "best", "leanest"))}))
    print(json.dumps(result["surroundings"]), file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
