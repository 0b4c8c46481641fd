# SPDX-License-Identifier: Apache-2.0
"""What the serving benchmark measures: rows per second of processor time, and latencies at fixed rates.

Invariant: both sides take short turns one after the other in one run, so what the machine does otherwise meets both; of the
turns' ratios the median counts. A rate is kept by a clock and not by answers (open loop): a latency counts from when the request
was due.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from oarlock.benchmarks.serving_sides import processor_seconds

Lookup = Callable[[NDArray[np.uint64]], NDArray[np.float32]]
# Requests that are drawn before anything is measured, and gone through in turn.
DRAWN = 64


@dataclass
class Turn:
    """One side's turn."""

    rows: int
    client_seconds: float
    server_seconds: float
    wall_seconds: float
    requests: int

    @property
    def rows_per_second(self) -> float:
        """Rows per second of processor time, of client and server together."""
        return self.rows / max(self.client_seconds + self.server_seconds, 1e-9)


def draw(keys: NDArray[np.uint64], size: int, rng: np.random.Generator) -> list[NDArray[np.uint64]]:
    """Return requests of ``size`` keys each, any row as likely as another."""
    return [keys[rng.integers(0, len(keys), size)] for _ in range(DRAWN)]


def take_turn(lookup: Lookup, pid: int, requests: Sequence[NDArray[np.uint64]], seconds: float) -> Turn:
    """Ask one request after the other for so long."""
    server, client, begun = processor_seconds(pid), time.process_time(), time.perf_counter()
    done = 0
    while time.perf_counter() - begun < seconds:
        for _ in range(4):
            lookup(requests[done % len(requests)])
            done += 1
    wall = time.perf_counter() - begun
    client, server = time.process_time() - client, processor_seconds(pid) - server
    return Turn(done * len(requests[0]), client, server, wall, done)


def compare(
    sides: dict[str, tuple[Lookup, int]], requests: Sequence[NDArray[np.uint64]], *, turns: int, seconds: float
) -> dict[str, Any]:
    """Return the medians of the sides' figures, and of the ratio of each side to the last one, turn by turn."""
    found: dict[str, list[Turn]] = {name: [] for name in sides}
    for lookup, pid in sides.values():
        take_turn(lookup, pid, requests, seconds / 4)
    for _ in range(turns):
        for name, (lookup, pid) in sides.items():
            found[name].append(take_turn(lookup, pid, requests, seconds))
    *others, last = sides
    return {
        "rows_per_cpu_second": {n: round(statistics.median(t.rows_per_second for t in ts)) for n, ts in found.items()},
        "client_us": {n: _microseconds([t.client_seconds / t.requests for t in ts]) for n, ts in found.items()},
        "server_us": {n: _microseconds([t.server_seconds / t.requests for t in ts]) for n, ts in found.items()},
        "requests_per_second": {
            n: round(statistics.median(t.requests / t.wall_seconds for t in ts), 1) for n, ts in found.items()
        },
        "ratio": {
            n: round(
                statistics.median(
                    a.rows_per_second / b.rows_per_second for a, b in zip(found[n], found[last], strict=True)
                ),
                2,
            )
            for n in others
        },
    }


def _microseconds(values: list[float]) -> float:
    return round(1e6 * statistics.median(values), 1)


def at_rate(lookup: Callable[[Any], Any], requests: Sequence[Any], rate: float, seconds: float) -> NDArray[np.float64]:
    """Ask at a fixed rate for so long; return the seconds that each answer came after its request was due."""
    count = max(10, int(rate * seconds))
    out = np.empty(count)
    begun = time.perf_counter() + 0.01
    for i in range(count):
        due = begun + i / rate
        while (left := due - time.perf_counter()) > 0:
            # To sleep to the end would come late by as much as the system's clock is coarse.
            if left > 0.0002:
                time.sleep(left - 0.0001)
        lookup(requests[i % len(requests)])
        out[i] = time.perf_counter() - due
    return out


def compare_latency(
    sides: dict[str, tuple[Lookup, int]],
    requests: Sequence[NDArray[np.uint64]],
    *,
    rate: float,
    turns: int,
    seconds: float,
) -> dict[str, Any]:
    """Return the sides' percentiles at one rate, and the median over turns of the ratio of the first one's p99 to the last's."""
    found: dict[str, list[NDArray[np.float64]]] = {name: [] for name in sides}
    for _ in range(turns):
        for name, (lookup, _) in sides.items():
            found[name].append(at_rate(lookup, requests, rate, seconds))
    names = list(sides)
    first, last = names[0], names[-1]
    ratios = [np.quantile(a, 0.99) / np.quantile(b, 0.99) for a, b in zip(found[first], found[last], strict=True)]
    return {
        "rate": round(rate, 1),
        "ms": {
            name: {
                f"p{100 * q:g}": round(1e3 * float(np.quantile(np.concatenate(turns_), q)), 3)
                for q in (0.5, 0.99, 0.999)
            }
            for name, turns_ in found.items()
        },
        "p99_ratio": round(statistics.median(map(float, ratios)), 3) if len(sides) > 1 else None,
    }
