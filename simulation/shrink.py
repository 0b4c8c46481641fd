# SPDX-License-Identifier: Apache-2.0
"""Shrinking: from a schedule that breaks an invariant to a small one that breaks it, too.

Invariant: what is returned was run and failed with the same invariant. Delta debugging over the list of faults (Zeller and
Hildebrandt, IEEE TSE 2002), then over the job's size.
"""

from collections.abc import Callable
from dataclasses import replace

from oarlock.simulation.faults import Schedule


def shrink(schedule: Schedule, fails: Callable[[Schedule], bool], *, most_runs: int = 200) -> Schedule:
    """Return a schedule with as few faults as could be found in ``most_runs`` runs. ``schedule`` itself fails."""
    runs = 0

    def tried(candidate: Schedule) -> bool:
        nonlocal runs
        runs += 1
        return runs <= most_runs and fails(candidate)

    parts = 2
    while schedule.faults and runs < most_runs:
        count = len(schedule.faults)
        size = -(-count // min(parts, count))
        chunks = [set(range(first, min(first + size, count))) for first in range(0, count, size)]
        smaller = next((c for chunk in chunks if tried(c := schedule.without(chunk))), None)
        if smaller is not None:
            schedule, parts = smaller, max(2, parts - 1)
        elif size == 1:
            break
        else:
            parts = min(count, parts * 2)
    for name, least in (
        ("workers", 1),
        ("shards", 1),
        ("open_splits", 1),
        ("prefetch", 1),
        ("epochs", 1),
        ("accumulate", 1),
    ):
        while getattr(schedule, name) > least:
            candidate = replace(schedule, **{name: getattr(schedule, name) - 1})
            if not tried(candidate):
                break
            schedule = candidate
    return schedule
