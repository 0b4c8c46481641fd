# SPDX-License-Identifier: Apache-2.0
"""A table of four times its memory budget, the rest of it in a file, beside the same table without a budget.

Invariant: both get the same requests by Zipf's law, a pull and then a push of the same keys, in turns; the file lies in the
given folder and is gone when ``measure_spill`` returns. Hot rows have come to memory before anything is timed.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from oarlock.benchmarks import table_speed as speed
from oarlock.benchmarks.table_keys import LAWS, Request
from oarlock.benchmarks.table_store import fill, payload
from oarlock.embedding.descriptor import SPILLED_ROWS
from oarlock.embedding.table import Table
from oarlock.proto.errors import PSError

OVER_BUDGET = 4


def measure_spill(folder: Path, rows: int, optimizer: str, keys: int, requests: int, seconds: float) -> dict[str, Any]:
    """Return the rate of pull and push through the file over the rate in memory, or null and why."""
    inside = fill("inside", rows, 16, optimizer)
    each = payload(16, optimizer, "float32", inside.table)
    if each is None:
        return {"spill_vs_memory": None, "spill": {"why": "the table does not tell the width of its state"}}
    budget = rows * each // OVER_BUDGET
    folder = folder / "spill"
    folder.mkdir()
    try:
        spilled = fill("spilled", rows, 16, optimizer, memory_bytes=budget, folder=folder)
    except PSError as error:
        return {"spill_vs_memory": None, "spill": {"why": str(error)}}
    try:
        drawn = [inside.universe.draw(LAWS[1], size=keys) for _ in range(requests)]
        # The tables' names differ, and with them the blocks of the keys.
        again = [spilled.universe.group(request.keys) for request in drawn]
        sides = {"memory": _steps(inside.table, drawn), "spill": _steps(spilled.table, again)}
        for number in range(requests):
            sides["spill"](number)
        turns = speed.take_turns(sides, requests, drawn[0].keys.shape[0], 4, seconds)
        in_file = int(spilled.table.descriptors[:, SPILLED_ROWS].sum())
        about: dict[str, Any] = {
            "rows": rows,
            "rows_in_file": in_file,
            "budget_bytes": budget,
            "table_bytes": spilled.table.nbytes,
        }
        about["why"] = None if in_file else "no row was spilled"
        return {
            "spill_vs_memory": round(turns.ratio("spill", "memory"), 3) if in_file else None,
            "spill": {**about, "step_mrows_per_s": turns.medians()},
        }
    finally:
        spilled.table.close()


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
