# SPDX-License-Identifier: Apache-2.0
"""Tables for the benchmark: made, filled by pushes, and weighed.

Invariant: a table that ``fill`` returns has stored all blocks and holds exactly the rows of its universe; what it weighs is
the larger of what it says and of what the process has grown by. Main thread.
"""

import ctypes
import gc
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

from oarlock.benchmarks.table_keys import REQUEST_KEYS, Universe
from oarlock.embedding.spec import Initializer, OptimizerSpec, TableSpec
from oarlock.embedding.table import Table

BLOCKS = 64
CHUNK_ROWS = 1 << 20
HEADLINE = "rowwise_adagrad"
_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}
DTYPES = tuple(_BYTES)


class Filled(NamedTuple):
    """A table with its universe, the seconds that its rows took to create, and the bytes that they take."""

    table: Table
    universe: Universe
    seconds: float
    nbytes: int


def make(
    name: str,
    dim: int,
    optimizer: str,
    dtype: str = "float32",
    *,
    memory_bytes: int = 0,
    folder: Path | None = None,
    usage: bool = False,
) -> Table:
    """Return an empty table with all its blocks; beyond ``memory_bytes`` of rows, if not 0, it spills into ``folder``.

    ``usage``: its rows keep their occurrences and the tick of their last update.
    """
    # The twin's accumulators begin at zero, and so do these.
    rule = OptimizerSpec(optimizer, initial=0.0) if optimizer in ("adagrad", HEADLINE) else OptimizerSpec(optimizer)
    spec = TableSpec(name, dim, rule, Initializer("zeros"), BLOCKS, dtype, usage=usage, memory_bytes=memory_bytes)
    table = Table(spec, seed=1, spill_folder=folder)
    for block in range(BLOCKS):
        table.adopt(block)
    return table


def universe_of(table: Table, rows: int) -> Universe:
    return Universe(table.salt, table.spec.blocks.bit_length() - 1, rows)


def fill(
    name: str,
    rows: int,
    dim: int,
    optimizer: str,
    dtype: str = "float32",
    *,
    deadline: float = 1e18,
    memory_bytes: int = 0,
    folder: Path | None = None,
    usage: bool = False,
) -> Filled:
    """Create rows by pushes of gradient zero until all exist, or until ``deadline`` (time.monotonic()) has passed."""
    gc.collect()
    before = resident()
    table = make(name, dim, optimizer, dtype, memory_bytes=memory_bytes, folder=folder, usage=usage)
    universe = universe_of(table, rows)
    # Rows are spilled as others come after them, so those of a table with a budget come in ordinary requests.
    chunk = max(1, min(REQUEST_KEYS if memory_bytes else CHUNK_ROWS, rows, (64 << 20) // dim))
    gradients = np.zeros((chunk, dim), np.float32)
    seconds = 0.0
    done = 0
    while done < rows and (not done or time.monotonic() < deadline):
        end = min(done + chunk, rows)
        request = universe.span(done, end)
        begun = time.perf_counter()
        table.push(*request, gradients[: end - done], rate=0.01)
        seconds += time.perf_counter() - begun
        done = end
    universe.rows = done
    del gradients, request
    return Filled(table, universe, seconds, max(resident() - before, table.nbytes))


def warm_up(dim: int, optimizer: str) -> None:
    """Have the kernels that a table needs compiled or loaded, so that neither counts as time or memory of a table."""
    table, universe, _, _ = fill("warm", 4096, dim, optimizer)
    keys, blocks, counts = universe.span(0, 2048)
    table.pull(keys, blocks, counts, np.empty((keys.shape[0], dim), np.float32))


def payload(dim: int, optimizer: str, dtype: str, table: Table) -> int | None:
    """Return the bytes of a row's weights and state, None if the table does not tell its state's width."""
    columns = getattr(table, "state_columns", None)
    if columns is None:
        columns = {HEADLINE: 1, "adagrad": dim, "sgd": 0}.get(optimizer)
    return None if columns is None else dim * _BYTES[dtype] + 4 * int(columns)


def resident() -> int:
    """Return the resident bytes of this process, after what is free was given back."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    return _field("/proc/self/smaps_rollup", "Rss:") or _field("/proc/self/status", "VmRSS:")


def huge_share() -> float | None:
    """Return how much of this process's own memory lies in huge pages: without them every row costs a page walk."""
    own = _field("/proc/self/smaps_rollup", "Anonymous:")
    return round(_field("/proc/self/smaps_rollup", "AnonHugePages:") / own, 3) if own else None


def available() -> int:
    """Return the bytes of memory that can be had without swapping."""
    return _field("/proc/meminfo", "MemAvailable:")


def _field(path: str, name: str) -> int:
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(name)), 0)
