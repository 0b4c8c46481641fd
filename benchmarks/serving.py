# SPDX-License-Identifier: Apache-2.0
"""`python -m oarlock.benchmarks.serving [--json] [--quick] [--seed N]`: rows of a checkpoint by key, beside Redis; predictions.

`oarlock serve` and its client against redis-server with MGET of the same keys by redis-py and hiredis, in turns: rows per second
of processor time of client and server together, latencies at a fixed rate, memory per row. Predictions: serving_predict.py. And
`oarlock serve --follow` beside a shard under a load of pushes: the time until a push is served. Invariant: it writes to a
temporary folder only, and the last line printed is the result. What cannot be had is null, and ``why`` says the reason.
"""

from oarlock.benchmarks.surroundings import settle, surroundings

if __name__ == "__main__":
    settle("oarlock.benchmarks.serving")

import argparse
import contextlib
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from oarlock.benchmarks.serving_freshness import measure_freshness
from oarlock.benchmarks.serving_measures import Lookup, compare, compare_latency, draw
from oarlock.benchmarks.serving_model import row_values, write_model
from oarlock.benchmarks.serving_predict import measure_predictions
from oarlock.benchmarks.serving_recall import SIZES as RECALL_SIZES
from oarlock.benchmarks.serving_recall import measure_recall
from oarlock.benchmarks.serving_sides import Oarlock, Redis, missing_of_redis, resident_bytes

STARTED = time.monotonic()
SIZES_OF_REQUESTS = (100, 1000, 10_000)
DIMS = (16, 64)
HEADLINE = 16


@dataclass(frozen=True)
class Size:
    """How much is measured; seconds are of each turn."""

    rows: int
    turns: int
    turn_seconds: float
    rate_turns: int
    rate_seconds: float
    followed_rows: int
    followed_seconds: float
    dims: tuple[int, ...] = DIMS
    more_turns: int = 0
    rate_dims: tuple[int, ...] = DIMS
    rate_keys: tuple[int, ...] = SIZES_OF_REQUESTS
    predict_rows: int = 1_000_000
    predict_turns: int = 5
    predict_seconds: float = 2.0


SIZES = {
    "full": Size(
        10_000_000,
        turns=11,
        turn_seconds=1.0,
        rate_turns=7,
        rate_seconds=5.0,
        followed_rows=4_000_000,
        followed_seconds=30,
    ),
    "quick": Size(
        1_000_000,
        turns=5,
        turn_seconds=0.1,
        more_turns=4,
        # A moment in which the machine does something else is in one turn of seven, and so not in their median.
        rate_turns=7,
        rate_seconds=0.4,
        followed_rows=200_000,
        followed_seconds=3.5,
        rate_dims=(HEADLINE,),
        rate_keys=(1000,),
        predict_rows=50_000,
        predict_turns=2,
        predict_seconds=0.05,
    ),
    "tiny": Size(
        5_000,
        turns=1,
        turn_seconds=0.02,
        rate_turns=1,
        rate_seconds=0.05,
        followed_rows=10_000,
        followed_seconds=2.5,
        dims=(HEADLINE,),
        predict_rows=2_000,
        predict_turns=1,
        predict_seconds=0.02,
    ),
}


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m oarlock.benchmarks.serving", description=__doc__.split("\n")[0])
    parser.add_argument("--json", action="store_true", help="print nothing but the result")
    parser.add_argument("--quick", action="store_true", help="less of everything: under a minute")
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help="of keys and requests")
    options = parser.parse_args()

    def say(text: str) -> None:
        if not options.json:
            print(f"{time.monotonic() - STARTED:6.1f} s  {text}", file=sys.stderr, flush=True)

    size = "tiny" if options.tiny else "quick" if options.quick else "full"
    before = surroundings(("numpy", "numba", "grpcio", "redis", "hiredis"))
    why = missing_of_redis()
    if why:
        print(f"NO COMPARISON WITH REDIS: {why}", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(prefix="oarlock-bench-") as folder:
        result = measure(SIZES[size], Path(folder), say, seed=options.seed, why=why)
        result |= measure_recall(RECALL_SIZES[size], say, seed=options.seed)
    after = {"load_average_after": surroundings(())["load_average"]}
    ending = {"size": size, "surroundings": {**before, **after}, "seconds": round(time.monotonic() - STARTED, 1)}
    print(json.dumps({"benchmark": "serving", **result, **ending}))
    return 0


def measure(size: Size, folder: Path, say: Callable[[str], None], *, seed: int, why: str) -> dict[str, Any]:
    """Return all figures; ``why`` there is no Redis, empty if there is."""
    # What a serving process has without rows is the interpreter and its libraries.
    write_model(folder / "empty", 16, HEADLINE)
    # The first process may have to compile kernels, and keeps the compiler's memory: it counts for nobody.
    Oarlock(folder / "empty").close()
    empty = Oarlock(folder / "empty")
    base = resident_bytes(empty.pid)
    empty.close()
    by_dim = {}
    for dim in size.dims:
        by_dim[dim] = _measure_dim(size, folder / str(dim), dim, base, say, seed, why)
        say(f"dim {dim}: {by_dim[dim]}")
    predictions = measure_predictions(
        folder / "predict", size.predict_rows, seconds=size.predict_seconds, turns=size.predict_turns, seed=seed
    )
    say(f"predictions: {predictions}")
    fresh = measure_freshness(folder / "job", rows=size.followed_rows, seconds=size.followed_seconds, seed=seed)
    say(f"followed: {fresh}")
    headline = by_dim[HEADLINE]
    found: dict[str, Any] = {
        "lookup_vs_redis": _ratio(headline, 10_000),
        "lookup_1000_vs_redis": _ratio(headline, 1000),
        "lookup_100_vs_redis": _ratio(headline, 100),
    }
    for dim in size.dims[1:]:
        found |= {f"lookup_{n}_dim{dim}_vs_redis": _ratio(by_dim[dim], n) for n in SIZES_OF_REQUESTS}
    return {
        **found,
        "p99_vs_redis": None if why else headline["latency"]["1000"]["p99_ratio"],
        "bytes_vs_redis": headline["bytes_vs_redis"],
        **predictions,
        # What was never seen has no time, and neither has the whole.
        "freshness_p99_s": None if fresh["unseen"] else fresh["freshness_s"]["p99"],
        "tombstone_p99_s": None if fresh["unseen"] else fresh["tombstone_s"]["p99"],
        "failed": sum(each["failed"] for each in by_dim.values()) + fresh["failed"] + predictions["predict"]["failed"],
        "followed": fresh,
        "rows": size.rows,
        "by_dim": {str(dim): each for dim, each in by_dim.items()},
        "why": {"redis": why or None},
    }


def _ratio(found: dict[str, Any], keys: int) -> float | None:
    ratio: float | None = (
        found["lookup"][str(keys)]["ratio"].get("oarlock") if "redis" in found["bytes_per_row"] else None
    )
    return ratio


def _measure_dim(
    size: Size, folder: Path, dim: int, base: int, say: Callable[[str], None], seed: int, why: str
) -> dict[str, Any]:
    keys = write_model(folder / "model", size.rows, dim, seed=seed)
    say(f"dim {dim}: {size.rows:,} rows written")
    with contextlib.ExitStack() as stack:
        oarlock = Oarlock(folder / "model")
        stack.callback(oarlock.close)
        say(f"served after {oarlock.ready['seconds']} s")
        per_row = {"oarlock": (resident_bytes(oarlock.pid) - base) / size.rows}
        sides: dict[str, tuple[Lookup, int]] = {
            "oarlock": (oarlock.lookup, oarlock.pid),
            "oarlock_grpc": (oarlock.lookup_by_grpc, oarlock.pid),
        }
        redis = None
        if not why:
            redis = Redis(folder / "redis", dim)
            stack.callback(redis.close)
            redis.fill(keys)
            per_row["redis"] = (resident_bytes(redis.pid) - redis.empty_bytes) / size.rows
            sides["redis"] = (redis.lookup, redis.pid)
            say(f"Redis {redis.version} filled")
        rng = np.random.default_rng(seed)
        requests = {n: draw(keys, n, rng) for n in SIZES_OF_REQUESTS}
        failed = sum(_wrong(lookup(r[0]), r[0], dim) for lookup, _ in sides.values() for r in requests.values())
        lookup = {
            # Small ones are a matter of microseconds of processor time, which the machine changes most.
            str(n): compare(
                sides, r, turns=size.turns + (size.more_turns if n == 100 else 0), seconds=size.turn_seconds
            )
            for n, r in requests.items()
        }
        # By one caller: redis-py is slower than its server, so that is the most that a process can ask of it.
        last = "redis" if redis else "oarlock"
        two: dict[str, tuple[Lookup, int]] = {name: sides[name] for name in ("oarlock", "redis") if name in sides}
        latency = {
            str(n): compare_latency(
                two,
                r,
                rate=lookup[str(n)]["requests_per_second"][last] / 2,
                turns=size.rate_turns,
                seconds=size.rate_seconds,
            )
            for n, r in requests.items()
            if dim in size.rate_dims and n in size.rate_keys
        }
        per_row = {name: round(value, 1) for name, value in per_row.items()}
        return {
            "lookup": lookup,
            "latency": latency,
            "bytes_per_row": per_row,
            "bytes_vs_redis": round(per_row["oarlock"] / per_row["redis"], 3) if redis else None,
            "resident_bytes": {"oarlock": resident_bytes(oarlock.pid), "of_it_without_rows": base}
            | ({"redis": resident_bytes(redis.pid)} if redis else {}),
            "open_seconds": oarlock.ready["seconds"],
            "failed": failed,
        }


def _wrong(found: NDArray[np.float32], keys: NDArray[np.uint64], dim: int) -> int:
    """Return how many rows of an answer are not those of the model."""
    return int((found != row_values(keys, dim)).any(axis=1).sum())


if __name__ == "__main__":
    sys.exit(main())
