# SPDX-License-Identifier: Apache-2.0
"""A table of four times its memory budget, the rest of it in a file, beside the same table without a budget.

Twice: with few requests that come again and again, so that the rows they name have come to memory before anything is timed;
and with so many that a fifth of each request's rows lies in the file, as in one pass over data of such keys.
Invariant: both get the same requests by Zipf's law, a pull and then a push of the same keys, in turns; the file lies in the
given folder and is gone when ``measure_spill`` returns.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from oarlock.benchmarks import table_speed as speed
from oarlock.benchmarks.table_keys import LAWS, Request
from oarlock.benchmarks.table_store import Filled, fill, payload
from oarlock.embedding.descriptor import SPILLED_ROWS
from oarlock.embedding.table import Table
from oarlock.proto.errors import PSError

OVER_BUDGET = 4
FRESH = 10  # times as many requests are drawn for the second figure


def measure_spill(folder: Path, rows: int, optimizer: str, keys: int, requests: int, seconds: float) -> dict[str, Any]:
    """Return the rate of pull and push through the file over the rate in memory, or null and why."""
    inside = fill("inside", rows, 16, optimizer)
    each = payload(16, optimizer, "float32", inside.table)
    if each is None:
        return _nothing("the table does not tell the width of its state")
    budget = rows * each // OVER_BUDGET
    folder = folder / "spill"
    folder.mkdir()
    try:
        spilled = fill("spilled", rows, 16, optimizer, memory_bytes=budget, folder=folder)
    except PSError as error:
        return _nothing(str(error))
    try:
        few, step = _ratio(inside, spilled, keys, requests, seconds)
        many, fresh = _ratio(inside, spilled, keys, FRESH * requests, seconds)
        in_file = int(spilled.table.descriptors[:, SPILLED_ROWS].sum())
        return {
            "spill_vs_memory": few if in_file else None,
            "spill_fresh_vs_memory": many if in_file else None,
            "spill": {
                "rows": rows,
                "rows_in_file": in_file,
                "budget_bytes": budget,
                "table_bytes": spilled.table.nbytes,
                "why": None if in_file else "no row was spilled",
                "requests": {"again": requests, "fresh": FRESH * requests},
                "step_mrows_per_s": step,
                "fresh_step_mrows_per_s": fresh,
            },
        }
    finally:
        spilled.table.close()


def _nothing(why: str) -> dict[str, Any]:
    return {"spill_vs_memory": None, "spill_fresh_vs_memory": None, "spill": {"why": why}}


def _ratio(inside: Filled, spilled: Filled, keys: int, requests: int, seconds: float) -> tuple[float, dict[str, float]]:
    """Return the rate through the file over that in memory, and both, for ``requests`` different requests in a circle."""
    drawn = [inside.universe.draw(LAWS[1], size=keys) for _ in range(requests)]
    # The tables' names differ, and with them the blocks of the keys.
    again = [spilled.universe.group(request.keys) for request in drawn]
    sides = {"memory": _steps(inside.table, drawn), "spill": _steps(spilled.table, again)}
    for number in range(requests):
        sides["spill"](number)
    turns = speed.take_turns(sides, requests, drawn[0].keys.shape[0], 4, seconds)
    return round(turns.ratio("spill", "memory"), 3), turns.medians()


def _steps(table: Table, requests: Sequence[Request]) -> speed.Side:
    """Return what pulls a request's rows and pushes their gradients, as a worker does in a step."""
    most = max(request.keys.shape[0] for request in requests)
    out = np.empty((most, table.spec.dim), np.float32)
    gradients = np.random.default_rng(3).standard_normal(out.shape).astype(np.float32)
    return partial(_step, table, requests, out, gradients)


def _step(table: Table, requests: Sequence[Request], out: Any, gradients: Any, number: int) -> None:
    keys, blocks, counts = requests[number]
    table.pull(keys, blocks, counts, out[: keys.shape[0]])
    table.push(keys, blocks, counts, gradients[: keys.shape[0]], rate=speed.RATE)
