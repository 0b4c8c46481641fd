# SPDX-License-Identifier: Apache-2.0
"""A campaign: many schedules, by several processes, one after the other in each.

Invariant: what a seed gives depends on the seed alone, so it does not matter which process runs it, or what it ran before.
"""

import logging
import multiprocessing
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures import wait as wait_for
from dataclasses import dataclass, field
from pathlib import Path

from oarlock.simulation.data import Data
from oarlock.simulation.elastic import ELASTIC, draw_elastic
from oarlock.simulation.faults import LEAST_EVENTS, MODES, Schedule, draw
from oarlock.simulation.restored import run
from oarlock.simulation.shrink import shrink

CHUNK = 20
_data: Data | None = None
_folder: "tempfile.TemporaryDirectory[str] | None" = None


@dataclass
class Tally:
    """What some schedules came to."""

    schedules: int = 0
    # Those that ended before they had LEAST_EVENTS events, because their faults added up to the loss of a shard, count apart.
    short: int = 0
    events: int = 0
    least_events: int = 1 << 60
    virtual_seconds: float = 0.0
    counts: Counter[str] = field(default_factory=Counter)
    # Seed and the invariant that broke.
    violations: list[tuple[int, str]] = field(default_factory=list)

    def add(self, other: "Tally") -> None:
        self.schedules += other.schedules
        self.short += other.short
        self.events += other.events
        self.least_events = min(self.least_events, other.least_events)
        self.virtual_seconds += other.virtual_seconds
        self.counts.update(other.counts)
        self.violations.extend(other.violations)


def files() -> Data:
    """Return the files of all simulated jobs of this process, made when they are first wanted."""
    global _data, _folder
    if _data is None:
        # What a job says of its troubles is wanted once one is looked at, not ten thousand times.
        logging.getLogger("oarlock").setLevel(logging.CRITICAL)
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)
        _folder = tempfile.TemporaryDirectory()
        _data = Data(Path(_folder.name) / "data")
    return _data


def drawn(seed: int, modes: tuple[str, ...]) -> Schedule:
    """Return the schedule of a seed."""
    return draw_elastic(seed) if modes == (ELASTIC,) else draw(seed, modes)


def run_seeds(seeds: range, modes: tuple[str, ...] = MODES) -> Tally:
    """Run the schedules of some seeds."""
    tally = Tally()
    for seed in seeds:
        outcome = run(drawn(seed, modes), files())
        tally.counts.update(outcome.counts)
        if outcome.violation:
            tally.violations.append((seed, outcome.violation))
        elif outcome.events < LEAST_EVENTS:
            tally.short += 1
            continue
        else:
            tally.least_events = min(tally.least_events, outcome.events)
        tally.schedules += 1
        tally.events += outcome.events
        tally.virtual_seconds += outcome.seconds
    return tally


def campaign(
    first: int, count: int, processes: int, *, seconds: float, modes: tuple[str, ...] = MODES
) -> Iterator[Tally]:
    """Yield the tally of all schedules so far, again and again; none is begun after ``seconds``."""
    end = time.monotonic() + seconds
    left = [range(s, min(s + CHUNK, first + count)) for s in range(first, first + count, CHUNK)]
    left.reverse()
    total = Tally()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        running: set[Future[Tally]] = set()
        while running or (left and time.monotonic() < end):
            while left and len(running) <= processes and time.monotonic() < end:
                running.add(pool.submit(run_seeds, left.pop(), modes))
            done, running = wait_for(running, return_when="FIRST_COMPLETED")
            for future in done:
                total.add(future.result())
            yield total


def smallest(schedule: Schedule, violation: str) -> Schedule:
    """Shrink a schedule that broke an invariant to a small one that breaks the same."""
    kind = violation.split(":", 1)[0]
    return shrink(schedule, lambda s: run(s, files()).violation.startswith(f"{kind}:"))
