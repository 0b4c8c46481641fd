# SPDX-License-Identifier: Apache-2.0
"""Pulls and pushes of a table and of its C twins, in turns: rates, ratios, and what a second thread brings.

Invariant: within a round every side gets the same requests on memory of its own, in an order of sides that changes from
round to round; a ratio is taken within a round, and the median over rounds is reported. Requests are many, so that rows come
from memory and not from a cache. Threads are ended when a function returns.
"""

import statistics
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from oarlock.benchmarks.table_keys import Request
from oarlock.benchmarks.table_twin import Twin
from oarlock.embedding.table import Table

OURS = "oarlock"
RATE = 0.01
# Answers one request, by its number.
Side = Callable[[int], None]


@dataclass
class Turns:
    """Million rows per second of each side, by round."""

    rates: dict[str, list[float]]

    def median(self, name: str) -> float:
        return statistics.median(self.rates[name])

    def ratio(self, name: str, other: str) -> float:
        """Return the median over rounds of how much faster ``name`` is than ``other``."""
        return statistics.median(a / b for a, b in zip(self.rates[name], self.rates[other], strict=True))

    def medians(self) -> dict[str, float]:
        return {name: round(self.median(name), 2) for name in self.rates}


def take_turns(
    sides: Mapping[str, Side], requests: int, rows: int, batch: int, seconds: float, least: int = 5
) -> Turns:
    """Run ``batch`` requests of ``rows`` keys by each side in turn until the time is up.

    The first ten requests of a turn are up to twice as slow as those behind them, on every side: the page tables of its
    memory have to come back into the caches. A server's requests come one after the other, so a batch is a few times ten.
    """
    names = list(sides)
    rates: dict[str, list[float]] = {name: [] for name in names}
    for name in names:
        sides[name](0)
    begun = time.monotonic()
    turn = 0
    while turn < least or time.monotonic() - begun < seconds:
        first = turn * batch
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            side = sides[name]
            # The middle one of a turn's requests, so that one during which others got the processor counts for nothing.
            spent = []
            for number in range(first, first + batch):
                start = time.perf_counter()
                side(number % requests)
                spent.append(time.perf_counter() - start)
            rates[name].append(rows / statistics.median(spent) / 1e6)
        turn += 1
    return Turns(rates)


def pulls(table: Table, twins: Sequence[Twin], requests: Sequence[Request], *, gather: bool) -> dict[str, Side]:
    """Return the sides of a pull; ``gather``: the first twin's rows by slot as well."""
    out = np.empty((max(r.keys.shape[0] for r in requests), table.spec.dim), np.float32)
    sides: dict[str, Side] = {OURS: partial(_pull, table, requests, out)}
    for twin in twins:
        sides[twin.name] = partial(_pull_twin, twin, requests, out)
    if gather and twins:
        # Half a cycle ahead of the twin whose rows they are, so that they are in no cache.
        half = len(requests) // 2
        slots = [twins[0].slots(request.keys) for request in [*requests[half:], *requests[:half]]]
        sides["gather"] = partial(_gather, twins[0], slots, out)
    return sides


def pushes(table: Table, twins: Sequence[Twin], requests: Sequence[Request]) -> dict[str, Side]:
    """Return the sides of a push of one and the same gradients."""
    shape = (max(r.keys.shape[0] for r in requests), table.spec.dim)
    gradients = np.random.default_rng(5).standard_normal(shape).astype(np.float32)
    sides: dict[str, Side] = {OURS: partial(_push, table, requests, gradients)}
    for twin in twins:
        sides[twin.name] = partial(_push_twin, twin, requests, gradients)
    return sides


def _pull(table: Table, requests: Sequence[Request], out: NDArray[np.float32], number: int) -> None:
    keys, blocks, counts = requests[number]
    table.pull(keys, blocks, counts, out[: keys.shape[0]])


def _push(table: Table, requests: Sequence[Request], gradients: NDArray[np.float32], number: int) -> None:
    keys, blocks, counts = requests[number]
    table.push(keys, blocks, counts, gradients[: keys.shape[0]], rate=RATE)


def _pull_twin(twin: Twin, requests: Sequence[Request], out: NDArray[np.float32], number: int) -> None:
    twin.pull(requests[number].keys, out)


def _push_twin(twin: Twin, requests: Sequence[Request], gradients: NDArray[np.float32], number: int) -> None:
    if twin.push(requests[number].keys, gradients, RATE) < 0:
        raise MemoryError("the twin has no room")


def _gather(twin: Twin, slots: Sequence[NDArray[np.uint32]], out: NDArray[np.float32], number: int) -> None:
    twin.gather(slots[number], out)


# Two threads


def scaling(
    sides: Mapping[str, tuple[Side, Side]], requests: int, batch: int, pairs: int, deadline: float
) -> dict[str, float]:
    """Return how much more two threads do than one: of each side the median over interleaved pairs of runs.

    A side is two functions, one for each thread, on blocks of their own.
    """
    found: dict[str, list[float]] = {name: [] for name in sides}
    for pair in range(pairs):
        for name, halves in sides.items():
            first = pair * batch
            one = _timed([halves[pair % 2]], first, batch, requests)
            two = _timed(list(halves), first + batch, batch, requests)
            found[name].append(2 * one / two)
        if pair >= 2 and time.monotonic() > deadline:
            break
    return {name: round(statistics.median(ratios), 3) for name, ratios in found.items()}


def _timed(sides: Sequence[Side], first: int, batch: int, requests: int) -> float:
    """Return the seconds from the first side's begin to the last side's end, each side in a thread of its own."""
    barrier = threading.Barrier(len(sides))
    times: list[tuple[float, float]] = []
    failed: list[BaseException] = []

    def run(side: Side) -> None:
        try:
            side(first % requests)
            barrier.wait()
            begun = time.perf_counter()
            for number in range(first, first + batch):
                side(number % requests)
            times.append((begun, time.perf_counter()))
        except BaseException as error:
            failed.append(error)
            barrier.abort()

    threads = [threading.Thread(target=run, args=(side,)) for side in sides]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]
    return max(end for _, end in times) - min(begin for begin, _ in times)
