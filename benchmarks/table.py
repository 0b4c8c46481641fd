# SPDX-License-Identifier: Apache-2.0
"""`python -m oarlock.benchmarks.table [--json] [--quick]`: the memory engine beside a C program of the same work.

Pulls and pushes of 15,000 distinct keys, 10 M rows of dim 16, row-wise adagrad, in turns with a C hash table that is compiled
at run time, and with its bare gather; the worse of uniform and Zipf keys. Invariant: it writes to a temporary folder only, and
the last line printed is the result. What cannot be had is null, and ``why`` says the reason.
"""

from oarlock.benchmarks.surroundings import settle, surroundings

if __name__ == "__main__":
    settle("oarlock.benchmarks.table")

import argparse
import importlib
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from oarlock.benchmarks import table_speed as speed
from oarlock.benchmarks.table_cases import measure_cases, measure_large, measure_usage
from oarlock.benchmarks.table_growth import measure_growth
from oarlock.benchmarks.table_keys import LAWS, REQUEST_KEYS, Request
from oarlock.benchmarks.table_spill import measure_spill
from oarlock.benchmarks.table_store import HEADLINE, Filled, fill, huge_share, payload, warm_up
from oarlock.benchmarks.table_twin import FORMS, ROOMY, Twin, TwinCompiler, columns_of

STARTED = time.monotonic()
DIM = 16
THREAD_REQUESTS = 40
# What two threads have to reach over one, or which share of what the twin reaches: which case is the worst.
LEAST_SCALING, SHARE_OF_TWIN = 1.8, 0.95


@dataclass(frozen=True)
class Size:
    """How much is measured; seconds are of each part, ``most_seconds`` is when new cases stop being begun."""

    rows: int
    fill_seconds: float
    keys: int
    requests: int
    batch: int
    turn_seconds: float
    thread_batch: int
    pairs: int
    scaling_seconds: float
    growth_seconds: float
    roomy_before_seconds: float
    case_bytes: int
    case_seconds: float
    most_seconds: float
    large_rows: int
    spill_rows: int


FULL = Size(
    rows=10_000_000,
    fill_seconds=120.0,
    keys=REQUEST_KEYS,
    requests=240,
    batch=40,
    turn_seconds=12.0,
    thread_batch=240,
    pairs=9,
    scaling_seconds=60.0,
    growth_seconds=12.0,
    roomy_before_seconds=1e9,
    case_bytes=256 << 20,
    case_seconds=1.0,
    most_seconds=600.0,
    large_rows=100_000_000,
    spill_rows=4_000_000,
)
QUICK = replace(
    FULL,
    fill_seconds=8.0,
    requests=120,
    batch=24,
    turn_seconds=0.8,
    thread_batch=60,
    scaling_seconds=4.0,
    growth_seconds=2.4,
    roomy_before_seconds=9.0,
    case_bytes=32 << 20,
    case_seconds=0.05,
    most_seconds=41.0,
    large_rows=0,
    spill_rows=1_500_000,
)
TINY = replace(
    QUICK,
    rows=20_000,
    keys=500,
    requests=6,
    batch=2,
    turn_seconds=0.01,
    thread_batch=2,
    pairs=1,
    growth_seconds=0.05,
    roomy_before_seconds=1e9,
    case_bytes=1 << 17,
    case_seconds=0.01,
    most_seconds=1e9,
    large_rows=1000,
    spill_rows=40_000,
)
SIZES = {"full": FULL, "quick": QUICK, "tiny": TINY}


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m oarlock.benchmarks.table", description=__doc__.split("\n")[0])
    parser.add_argument("--json", action="store_true", help="print nothing but the result")
    parser.add_argument("--quick", action="store_true", help="less of everything: under a minute")
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()

    def say(text: str) -> None:
        if not options.json:
            print(f"{time.monotonic() - STARTED:6.1f} s  {text}", file=sys.stderr, flush=True)

    size = "tiny" if options.tiny else "quick" if options.quick else "full"
    before = surroundings(("numpy", "numba", "llvmlite"))
    with tempfile.TemporaryDirectory(prefix="oarlock-bench-") as folder:
        result = measure(SIZES[size], Path(folder), say)
    dedup = _dedup(options.quick or options.tiny)
    after = {"load_average_after": surroundings(())["load_average"]}
    ending = {"size": size, "surroundings": {**before, **after}, "seconds": round(time.monotonic() - STARTED, 1)}
    print(json.dumps({"benchmark": "table", **result, **dedup, **ending}))
    return 0


def measure(size: Size, folder: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Return all figures but those of the dedup kernels."""
    optimizer = HEADLINE
    compiler = TwinCompiler(folder)
    library = compiler.library(DIM, columns_of(optimizer, DIM))
    warm_up(DIM, optimizer)
    filled = fill("benchmark", size.rows, DIM, optimizer, deadline=time.monotonic() + size.fill_seconds)
    rows = filled.universe.rows
    huge = {"table": huge_share()}
    build = round(rows / filled.seconds / 1e6, 2)
    say(f"{rows} rows created, {build} M/s")
    each = payload(DIM, optimizer, "float32", filled.table)
    over = each and round(filled.nbytes / rows / each, 3)
    requests = {law: [filled.universe.draw(law, size=size.keys) for _ in range(size.requests)] for law in LAWS}
    twins = _twins(library, filled, size)
    huge["with_twins"] = huge_share()
    say(f"requests drawn, {len(twins)} twins built; huge pages {huge}")
    try:
        speeds, small = _speeds(filled, twins, requests, size)
        say(f"pull {speeds['pull_mrows_per_s']}, push {speeds['push_mrows_per_s']}")
        threads = _threads(filled, twins, size)
        say(f"two threads: {threads['scaling']}")
    finally:
        for twin in twins:
            twin.close()
    growth = measure_growth(filled.table, filled.universe, requests[LAWS[0]], size.growth_seconds, size.keys)
    say(f"pull during growth: {growth['growth']}")
    del filled
    spill = measure_spill(folder, size.spill_rows, optimizer, size.keys, size.requests // 4, size.turn_seconds)
    say(f"spill: {spill}")
    deadline = STARTED + size.most_seconds
    cases, left_out = measure_cases(
        compiler, optimizer, size.case_bytes, size.case_seconds, deadline, others=size.rows > 1 << 20
    )
    small["build"] = build
    usage = measure_usage(size.rows * 2 // 5, optimizer)
    large = [
        measure_large(compiler, count, optimizer, dtype, small, size.turn_seconds)
        for count, dtype in ((size.large_rows, "float32"), (2 * size.large_rows, "int8"))
        if count
    ]
    return {
        **speeds,
        **threads,
        "bytes_over_payload": over,
        "bytes_over_payload_usage": usage,
        "bytes_over_payload_by_dim": {str(c["dim"]): c["bytes_over_payload"] for c in cases if _is_plain(c, optimizer)},
        **growth,
        "huge_page_share": huge,
        "rows": rows,
        "dim": DIM,
        "optimizer": optimizer,
        "build_mrows_per_s": build,
        **spill,
        "why": {"twin": compiler.why, "spill_vs_memory": spill["spill"]["why"]},
        "cases": cases,
        "cases_left_out": left_out,
        "large": large,
    }


def _is_plain(case: dict[str, Any], optimizer: str) -> bool:
    return bool(case["optimizer"] == optimizer and case["dtype"] == "float32")


def _twins(library: Any, filled: Filled, size: Size) -> list[Twin]:
    """Return the twins of the two designs, and of the first once more with an emptier index if there is time."""
    if library is None:
        return []
    rows = filled.universe.rows
    keys = filled.universe.span(0, rows).keys
    made: list[Twin] = []
    for form in (*FORMS, ROOMY):
        if form is ROOMY and time.monotonic() - STARTED > size.roomy_before_seconds:
            break
        twin = Twin(library, form, salt=filled.table.salt, rows=rows)
        made.append(twin)
        if twin.build(keys) != rows:
            raise MemoryError(f"twin {form.name} does not hold {rows} rows")
    return made


def _speeds(
    filled: Filled, twins: list[Twin], requests: dict[str, list[Request]], size: Size
) -> tuple[dict[str, Any], dict[str, float]]:
    """Return the headline ratios, each of the law in which it is the lesser, and the pull rate by law."""
    found: dict[str, Any] = {"pull_mrows_per_s": {}, "push_mrows_per_s": {}}
    ratios: dict[str, list[float]] = {}
    small: dict[str, float] = {}
    for law, drawn in requests.items():
        for verb in ("pull", "push"):
            make: Callable[..., dict[str, speed.Side]] = speed.pulls if verb == "pull" else speed.pushes
            more = {"gather": True} if verb == "pull" else {}
            sides = make(filled.table, twins, drawn, **more)
            turns = speed.take_turns(sides, len(drawn), size.keys, size.batch, size.turn_seconds)
            found[f"{verb}_mrows_per_s"][law] = turns.medians()
            if verb == "pull":
                small[law] = turns.median(speed.OURS)
                if law == LAWS[0] and "gather" in sides:
                    small["gather"] = turns.median("gather")
            if not twins:
                continue
            fastest = max((form.name for form in FORMS), key=turns.median)
            for key, other in (("c", fastest), ("c_roomy", ROOMY.name), ("gather", "gather")):
                if other in sides:
                    ratios.setdefault(f"{verb}_vs_{key}", []).append(turns.ratio(speed.OURS, other))
    names = ("pull_vs_c", "pull_vs_gather", "push_vs_c", "pull_vs_c_roomy", "push_vs_c_roomy")
    return {**{name: round(min(ratios[name]), 3) if name in ratios else None for name in names}, **found}, small


def _threads(filled: Filled, twins: Sequence[Twin], size: Size) -> dict[str, Any]:
    """Return how two threads on different blocks stand to one: all cases, and the one that is the worst."""
    deadline = time.monotonic() + size.scaling_seconds
    cases: list[dict[str, Any]] = []
    for number, law in enumerate(LAWS):
        halves = [
            [filled.universe.draw(law, half, size.keys) for _ in range(min(size.requests, THREAD_REQUESTS))]
            for half in (0, 1)
        ]
        for verb in ("pull", "push"):
            each = [
                speed.pulls(filled.table, twins[:1], drawn, gather=False)
                if verb == "pull"
                else speed.pushes(filled.table, twins[:1], drawn)
                for drawn in halves
            ]
            sides = {name: (each[0][name], each[1][name]) for name in each[0]}
            until = deadline - size.scaling_seconds * (1 - number) / 2
            ratios = speed.scaling(sides, len(halves[0]), size.thread_batch, size.pairs, until)
            twin = next((ratio for name, ratio in ratios.items() if name != speed.OURS), None)
            cases.append({"law": law, "verb": verb, "thread_scaling": ratios[speed.OURS], "thread_scaling_c": twin})
    worst = min(cases, key=lambda case: standing(case["thread_scaling"], case["thread_scaling_c"]))
    return {
        "thread_scaling": worst["thread_scaling"],
        "thread_scaling_c": worst["thread_scaling_c"],
        "thread_scaling_case": f"{worst['verb']}, {worst['law']}",
        "scaling": cases,
    }


def standing(ours: float, twin: float | None) -> float:
    return max(ours / LEAST_SCALING, ours / (SHARE_OF_TWIN * twin) if twin else 0.0)


def _dedup(quick: bool) -> dict[str, Any]:
    """Return the figures of unique, inverse and grouping by block, which a module of their own measures."""
    try:
        module = importlib.import_module("oarlock.benchmarks.table_dedup")
    except ModuleNotFoundError:
        return {"dedup_vs_numpy": None, "dedup_vs_torch": None, "dedup": None}
    found: dict[str, Any] = module.measure(quick)
    ratios = {name: found.pop(name, None) for name in ("dedup_vs_numpy", "dedup_vs_torch")}
    return {**ratios, "dedup": found}


if __name__ == "__main__":
    sys.exit(main())
