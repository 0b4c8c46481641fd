# SPDX-License-Identifier: Apache-2.0
"""Nearest rows: an index beside exact search, one query at a time, one thread each, before and after a tenth of the rows changed.

The rows are a mixture of 1,000 Gaussians: centres of independent normal values, rows around them with half that deviation;
queries are other points of it, and the score is the inner product. Invariant: both answer the same queries in turns, and what is
counted as found is what exact search finds. It is a part of ``benchmarks/serving.py``, and runs alone.
"""

from oarlock.benchmarks.surroundings import settle, surroundings

if __name__ == "__main__":
    settle("oarlock.benchmarks.serving_recall")

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from oarlock.proto.errors import InvalidArgument
from oarlock.serving.nearest import NearestIndex, load_faiss

CENTRES, DIM, WANTED = 1000, 64, 100
SPREAD = 0.5
CHANGED = 0.1
# Rows of one update.
UPDATE_ROWS = 10_000


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    rows: int
    queries: int


SIZES = {"full": Size(1_000_000, 500), "quick": Size(100_000, 200), "tiny": Size(12_000, 20)}


def measure_recall(size: Size, say: Callable[[str], None], *, seed: int = 0, spread: float = SPREAD) -> dict[str, Any]:
    """Return the figures; all null, with the reason, where there is no index."""
    try:
        faiss = load_faiss()
    except InvalidArgument as error:
        return {"recall_at_100": None, "ann_speedup": None, "recall": {"why": str(error)}}
    rng = np.random.default_rng(seed)
    centres = rng.normal(0, 1, (CENTRES, DIM)).astype(np.float32)

    def draw(count: int) -> NDArray[np.float32]:
        noise = rng.standard_normal((count, DIM), np.float32)
        points: NDArray[np.float32] = centres[rng.integers(0, CENTRES, count)] + np.float32(spread) * noise
        return points

    keys = np.arange(size.rows, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    index = NearestIndex(DIM)
    index.build(keys, draw(size.rows))
    say(f"index of {size.rows:,} rows built in {index.build_seconds:.1f} s, {index.probes} lists a search")
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        before = _compare(index, draw(size.queries))
        changed = rng.permutation(keys)[: int(CHANGED * size.rows)]
        begun = time.perf_counter()
        for at in range(0, len(changed), UPDATE_ROWS):
            part = changed[at : at + UPDATE_ROWS]
            index.update(part, draw(len(part)))
        seconds = time.perf_counter() - begun
        after = _compare(index, draw(size.queries))
    finally:
        faiss.omp_set_num_threads(threads)
    found = {
        "rows": size.rows,
        "dim": DIM,
        "spread": spread,
        "build_seconds": round(index.build_seconds, 2),
        "bytes_per_row": round(index.nbytes / size.rows, 1),
        "lists_searched": index.probes,
        "updates_per_second": round(len(changed) / seconds),
        "before": before,
        "after_changes": after,
    }
    return {
        # The worse of before and after.
        "recall_at_100": min(before["recall"], after["recall"]),
        "ann_speedup": min(before["speedup"], after["speedup"]),
        "recall": found,
    }


def _compare(index: NearestIndex, queries: NDArray[np.float32]) -> dict[str, float]:
    times: dict[bool, list[float]] = {True: [], False: []}
    shares = []
    for query in queries:
        keys = {}
        for exact in (True, False):
            begun = time.perf_counter()
            found, _ = index.search(query[None], WANTED, exact=exact)
            times[exact].append(time.perf_counter() - begun)
            keys[exact] = found.keys[0]
        shares.append(len(np.intersect1d(keys[True], keys[False])) / WANTED)
    exact_seconds, seconds = (float(np.mean(times[exact])) for exact in (True, False))
    return {
        "recall": round(float(np.mean(shares)), 4),
        "exact_per_second": round(1 / exact_seconds, 1),
        "per_second": round(1 / seconds, 1),
        "speedup": round(exact_seconds / seconds, 1),
    }


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        prog="python -m oarlock.benchmarks.serving_recall", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--json", action="store_true", help="print nothing but the result")
    parser.add_argument("--quick", action="store_true", help="fewer rows")
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help="of rows and queries")
    parser.add_argument("--spread", type=float, default=SPREAD, help=f"of rows around their centre (default {SPREAD})")
    options = parser.parse_args()
    size = "tiny" if options.tiny else "quick" if options.quick else "full"

    def say(text: str) -> None:
        if not options.json:
            print(text, file=sys.stderr, flush=True)

    found = measure_recall(SIZES[size], say, seed=options.seed, spread=options.spread)
    print(json.dumps({"benchmark": "serving_recall", **found, "size": size, "surroundings": surroundings(("numpy",))}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
