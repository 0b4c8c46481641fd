# SPDX-License-Identifier: Apache-2.0
"""Other tables than the headline's: widths, optimizers, number formats; and tables that fill the machine's memory.

Invariant: a case that was left out is named with the reason, never silently missing. Each table is gone before the next.
"""

import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from oarlock.benchmarks import table_speed as speed
from oarlock.benchmarks.table_keys import LAWS, REQUEST_KEYS
from oarlock.benchmarks.table_store import DTYPES, available, fill, make, payload
from oarlock.benchmarks.table_twin import FORMS, OPTIMIZERS, Twin, TwinCompiler, columns_of
from oarlock.embedding.optimizers import OPTIMIZERS as EVERY
from oarlock.proto.errors import PSError

DIMS = (8, 16, 32, 64, 128, 256)
_SPARE = 2 << 30


def list_cases(optimizer: str, others: bool) -> Iterator[tuple[int, str, str]]:
    """Yield (dim, optimizer, dtype): every width, then every number format, then every other optimizer if wanted."""
    for dim in DIMS:
        yield dim, optimizer, "float32"
    for dtype in DTYPES[1:]:
        yield 16, optimizer, dtype
    for name in EVERY:
        if others and name != optimizer:
            yield 16, name, "float32"


def measure_cases(
    compiler: TwinCompiler, optimizer: str, nbytes: int, seconds: float, deadline: float, *, others: bool
) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the figures of each case with about ``nbytes`` of weights, and the names of those there was no time for."""
    found: list[dict[str, Any]] = []
    left_out: list[str] = []
    for dim, name, dtype in list_cases(optimizer, others):
        if time.monotonic() > deadline:
            left_out.append(f"{name} of dim {dim} as {dtype}")
        else:
            found.append(_case(compiler, nbytes // (4 * dim), dim, name, dtype, seconds))
    return found, left_out


def _case(compiler: TwinCompiler, rows: int, dim: int, optimizer: str, dtype: str, seconds: float) -> dict[str, Any]:
    filled = fill("case", rows, dim, optimizer, dtype)
    table, universe = filled.table, filled.universe
    requests = [universe.draw(LAWS[0]) for _ in range(24)]
    size = requests[0].keys.shape[0]
    twins: list[Twin] = []
    # Weights are pulled alike whatever moved them; a push is the twin's work for the optimizers that it knows.
    library = compiler.library(dim, columns_of(optimizer, dim)) if dtype == "float32" else None
    if library is not None:
        twins = [Twin(library, FORMS[0], salt=table.salt, rows=rows)]
    try:
        for twin in twins:
            twin.build(universe.span(0, rows).keys)
        pulled = speed.take_turns(speed.pulls(table, twins, requests, gather=True), len(requests), size, 4, seconds)
        known = twins if optimizer in OPTIMIZERS else []
        pushed = speed.take_turns(speed.pushes(table, known, requests), len(requests), size, 4, seconds)
    finally:
        for twin in twins:
            twin.close()
    each = payload(dim, optimizer, dtype, table)
    case: dict[str, Any] = {"dim": dim, "optimizer": optimizer, "dtype": dtype, "rows": rows}
    case |= {"pull_mrows_per_s": pulled.medians(), "push_mrows_per_s": pushed.medians()}
    case["build_mrows_per_s"] = round(rows / filled.seconds / 1e6, 2)
    case["bytes_over_payload"] = each and round(filled.nbytes / rows / each, 3)
    return case


def measure_usage(rows: int, optimizer: str) -> float | None:
    """Return the bytes over the payload of rows of dim 16 that keep their occurrences and their last update."""
    filled = fill("usage", rows, 16, optimizer, usage=True)
    each = payload(16, optimizer, "float32", filled.table)
    return each and round(filled.nbytes / rows / each, 3)


def measure_gather(compiler: TwinCompiler, optimizer: str, rows: int, seconds: float) -> float | None:
    """Return the raw gather's rate over ``rows`` rows of dim 16, without keys or an index: what the memory gives."""
    library = compiler.library(16, columns_of(optimizer, 16))
    if library is None:
        return None
    twin = Twin(library, FORMS[0], salt=np.uint64(0), rows=rows)
    try:
        twin.touch()
        random = np.random.default_rng(7)
        slots = [random.integers(0, rows, REQUEST_KEYS, np.uint32) for _ in range(100)]
        out = np.empty((REQUEST_KEYS, 16), np.float32)
        sides: dict[str, speed.Side] = {"gather": lambda number: twin.gather(slots[number], out)}
        return speed.take_turns(sides, len(slots), REQUEST_KEYS, 40, seconds).median("gather")
    finally:
        twin.close()


def measure_large(
    compiler: TwinCompiler, rows: int, optimizer: str, dtype: str, small: dict[str, float], seconds: float
) -> dict[str, Any]:
    """Return how fast a table of ``rows`` rows of dim 16 is made and pulled, beside the headline table's figures.

    Of float32 rows also how the raw gather does at that size.
    """
    result: dict[str, Any] = {"rows": rows, "dim": 16, "optimizer": optimizer, "dtype": dtype, "why": None}
    try:
        each = payload(16, optimizer, dtype, make("trial", 16, optimizer, dtype)) or 16 * 4 * 2
        needed = int(rows * each * 1.6) + _SPARE
        if available() < needed:
            return {**result, "why": f"needs {needed >> 20} MiB of memory, {available() >> 20} can be had"}
        filled = fill("large", rows, 16, optimizer, dtype)
    except PSError as error:
        return {**result, "why": str(error)}
    result["bytes_over_payload"] = round(filled.nbytes / rows / each, 3)
    result["build_mrows_per_s"] = round(rows / filled.seconds / 1e6, 2)
    for law in LAWS:
        requests = [filled.universe.draw(law) for _ in range(100)]
        size = requests[0].keys.shape[0]
        turns = speed.take_turns(speed.pulls(filled.table, [], requests, gather=False), 100, size, 40, seconds)
        rate = turns.median(speed.OURS)
        result[f"pull_mrows_per_s_{law}"] = round(rate, 2)
        if law in small:
            result[f"pull_time_over_small_{law}"] = round(small[law] / rate, 3)
    if "build" in small:
        result["build_time_over_small"] = round(small["build"] / result["build_mrows_per_s"], 3)
    del filled, turns
    gather = measure_gather(compiler, optimizer, rows, seconds) if dtype == "float32" else None
    if gather is not None:
        result["gather_mrows_per_s"] = round(gather, 2)
        result["gather_time_over_small"] = round(small["gather"] / gather, 3) if "gather" in small else None
    return result
