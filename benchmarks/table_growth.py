# SPDX-License-Identifier: Apache-2.0
"""How long a pull takes while the table grows under it.

Invariant: the pulls are of the same requests in three conditions: alone, beside pushes of rows that exist, and beside pushes of
new rows; nothing but the pushes of another thread differs. That thread is ended when ``measure_growth`` returns. Threads hand
on the interpreter as soon as a shard's do.
"""

import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from oarlock.benchmarks.table_keys import REQUEST_KEYS, Request, Universe
from oarlock.embedding.table import Table
from oarlock.ps.process import SWITCH_SECONDS


class Pusher:
    """A thread that pushes gradients of zero, one request after the other: once each, or round and round."""

    def __init__(self, table: Table, requests: Sequence[Request], *, again: bool) -> None:
        self._table = table
        self._requests = requests
        self._again = again
        self._zeros = np.zeros((max(r.keys.shape[0] for r in requests), table.spec.dim), np.float32)
        self._thread = threading.Thread(target=self._run)
        self.stopped = threading.Event()
        self.pushed = 0
        self.failed: BaseException | None = None

    def start(self) -> None:
        self._thread.start()

    def _run(self) -> None:
        try:
            while not self.stopped.is_set():
                for keys, blocks, counts in self._requests:
                    self._table.push(keys, blocks, counts, self._zeros[: keys.shape[0]], rate=0.01)
                    self.pushed += 1
                    if self.stopped.is_set():
                        return
                if not self._again:
                    return
        except BaseException as error:
            self.failed = error
        finally:
            self.stopped.set()

    def close(self) -> None:
        self.stopped.set()
        self._thread.join()
        if self.failed is not None:
            raise self.failed


def measure_growth(
    table: Table, universe: Universe, requests: Sequence[Request], seconds: float, size: int = REQUEST_KEYS
) -> dict[str, Any]:
    """Return p99.9 of a pull in each condition over the median of a pull alone; the table ends with more rows."""
    part = seconds / 3
    rows = table.rows
    # As many again as there are, so that every block outgrows its index, if the time suffices.
    new = [universe.span(at, at + size) for at in range(universe.rows, universe.rows + rows, size)]
    out = np.empty((max(r.keys.shape[0] for r in requests), table.spec.dim), np.float32)
    before = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_SECONDS)
    try:
        still = _pull_times(table, requests, out, part, None)
        pushed = _pull_times(table, requests, out, part, Pusher(table, requests, again=True))
        growing = _pull_times(table, requests, out, 2 * seconds, Pusher(table, new, again=False))
    finally:
        sys.setswitchinterval(before)
    median = float(np.median(still))
    return {
        "growth_p999_over_p50": round(float(np.quantile(growing, 0.999)) / median, 2),
        "still_p999_over_p50": round(float(np.quantile(still, 0.999)) / median, 2),
        "pushed_p999_over_p50": round(float(np.quantile(pushed, 0.999)) / median, 2),
        "growth": {
            "p50_us": {n: _us(t, 0.5) for n, t in (("still", still), ("pushed", pushed), ("growing", growing))},
            "p999_us": {n: _us(t, 0.999) for n, t in (("still", still), ("pushed", pushed), ("growing", growing))},
            "longest_us": _us(growing, 1.0),
            "pulls": len(growing),
            "rows_before": rows,
            "rows_after": table.rows,
        },
    }


def _us(times: NDArray[np.float64], q: float) -> float:
    return round(float(np.quantile(times, q)) * 1e6, 1)


def _pull_times(
    table: Table, requests: Sequence[Request], out: NDArray[np.float32], seconds: float, pusher: Pusher | None
) -> NDArray[np.float64]:
    """Return the seconds of each pull, until the time is up or the pusher has nothing left."""
    times: list[float] = []
    if pusher is not None:
        pusher.start()
    try:
        begun = time.perf_counter()
        while not times or (time.perf_counter() - begun < seconds and not (pusher and pusher.stopped.is_set())):
            keys, blocks, counts = requests[len(times) % len(requests)]
            start = time.perf_counter()
            table.pull(keys, blocks, counts, out[: keys.shape[0]])
            times.append(time.perf_counter() - start)
    finally:
        if pusher is not None:
            pusher.close()
    return np.array(times)
