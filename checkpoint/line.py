# SPDX-License-Identifier: Apache-2.0
"""Line: which cuts of a folder the job as it is now has behind it, and which are of runs that it went back from.

    cuts 9 10 11 12, back to 10, then 13      the line is 9 10 13; 11 and 12 are abandoned
    back to 12, then 14                       the line is 9 10 11 12 14; 13 is abandoned

Invariant: a pure function of the numbers of cuts and of the restores in the order in which they were made. A number is never
used twice, so a cut above ``last`` of a restore is of its run or of a later one.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

# What an event of a job's history is called that is a restore.
RESTORE = "restore"
# Under which name a manifest's metrics have a job's history, and what decides how its training goes on.
EVENTS, PLAN = "events", "plan"


class Restore(NamedTuple):
    """A run that began from cut ``cut`` when ``last`` was the highest number of a cut."""

    cut: int
    last: int


def line_of(cuts: Iterable[int], restores: Sequence[Restore]) -> list[int]:
    """Return those of ``cuts`` that are on the line which the last of ``restores`` began, ascending."""
    numbers, line = sorted(cuts), []
    highest = numbers[-1] if numbers else 0
    restored = False
    for restore in reversed(restores):
        # What was restored once the cut existed that the line comes from is not in its past.
        if restored and restore.last >= highest:
            continue
        line += [cut for cut in numbers if restore.last < cut <= highest]
        highest, restored = restore.cut, True
    return sorted([*line, *(cut for cut in numbers if cut <= highest)])


def restores_in(events: object) -> list[Restore]:
    """Return the restores of a job's history; what is none, or is malformed, is left out."""
    if not isinstance(events, list | tuple):
        return []
    found = []
    for event in events:
        if isinstance(event, Mapping) and event.get("event") == RESTORE:
            cut, last = event.get("cut"), event.get("last")
            if _is_count(cut) and _is_count(last):
                found.append(Restore(int(str(cut)), int(str(last))))
    return found


def events_of(metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the history that a manifest's metrics have, without what is no event."""
    found = metrics.get(EVENTS, [])
    return [dict(event) for event in found if isinstance(event, dict)] if isinstance(found, list) else []


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 62
