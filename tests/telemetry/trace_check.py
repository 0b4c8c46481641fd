# SPDX-License-Identifier: Apache-2.0
"""A reader of traces that is the tests' own: it takes a file apart by what the format says, and refuses what is not allowed."""

import itertools
import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Slice:
    """A complete event, its times in microseconds."""

    name: str
    begin: float
    end: float
    args: dict[str, Any]


@dataclass
class Timeline:
    """Slices by process and row; a row's lanes (``pull 1``, ``pull 2``) are one row here. ``lanes``: how many it has."""

    processes: dict[str, dict[str, list[Slice]]] = field(default_factory=dict)
    lanes: dict[tuple[str, str], int] = field(default_factory=dict)
    dropped: int = 0
    told_dropped: int = 0


def refuse(constant: str) -> Any:
    raise AssertionError(f"{constant} is no JSON")


def is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def labelled(names: dict[int, str], rows: dict[tuple[int, int], list[dict[str, Any]]]) -> dict[int, str]:
    """Return names by process; of those that are started again under the same name the later ones are ``NAME, then``."""
    begun = {pid: min(e["ts"] for (of, _), events in rows.items() if of == pid for e in events) for pid, _ in rows}
    out: dict[int, str] = {}
    for pid in sorted(begun, key=begun.__getitem__):
        label = names[pid]
        while label in out.values():
            label += ", then"
        out[pid] = label
    return out


def timeline(path: Path) -> Timeline:
    """Return what a trace shows."""
    found = json.loads(path.read_bytes(), parse_constant=refuse)
    out = Timeline(told_dropped=found["otherData"]["dropped"])
    names: dict[tuple[str, int, int], str] = {}
    rows: dict[tuple[int, int], list[dict[str, Any]]] = {}
    for event in found["traceEvents"]:
        assert event["ph"] in ("X", "M", "i"), event
        assert all(type(event[n]) is int and 0 <= event[n] < 1 << 32 for n in ("pid", "tid")), event
        assert is_number(event["ts"]), event
        assert event["ts"] >= 0, event
        assert isinstance(event["name"], str), event
        if event["ph"] == "M" and event["name"] in ("process_name", "thread_name"):
            # Of several the last one holds.
            names[event["name"], event["pid"], event["tid"]] = event["args"]["name"]
        elif event["ph"] == "i":
            out.dropped += event["args"]["count"]
        elif event["ph"] == "X":
            assert is_number(event["dur"]), event
            assert event["dur"] >= 0, event
            rows.setdefault((event["pid"], event["tid"]), []).append(event)
    labels = labelled({pid: name for (kind, pid, _), name in names.items() if kind == "process_name"}, rows)
    for (pid, tid), events in rows.items():
        process, row = labels[pid], names["thread_name", pid, tid]
        slices = sorted(
            (Slice(e["name"], e["ts"], e["ts"] + e["dur"], e.get("args", {})) for e in events),
            key=lambda s: (s.begin, s.end),
        )
        for before, after in itertools.pairwise(slices):
            # A nanosecond may be lost when two times are added.
            assert before.end <= after.begin + 0.002, f"{process}, {row}: {before} and {after} overlap"
        about = re.sub(r" \d+$", "", row)
        out.processes.setdefault(process, {}).setdefault(about, []).extend(slices)
        out.lanes[process, about] = out.lanes.get((process, about), 0) + 1
    return out
