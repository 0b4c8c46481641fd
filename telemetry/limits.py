# SPDX-License-Identifier: Apache-2.0
"""What the operating system lets this process have: memory, by the machine, its control groups (versions 1 and 2) and its own
limit, and processors.

Invariant: the narrowest limit counts, and what a system does not tell limits nothing. Any thread; files are read anew each time.
"""

import contextlib
import math
import os
import resource
from collections.abc import Iterator
from pathlib import Path

from oarlock.telemetry.system import memory

PROC, GROUPS = Path("/proc"), Path("/sys/fs/cgroup")


def memory_limit() -> int:
    """Return the bytes of RAM that this process may have in all, with what others leave of limits that they share; 0: not known.

    That is what it has and what is free: who shares a machine or a group with others may have less when these take more.
    """
    try:
        virtual, resident = memory()
    except OSError:
        return 0
    rooms = [*_machine(), *_groups()]
    addresses = resource.getrlimit(resource.RLIMIT_AS)[0]
    if addresses != resource.RLIM_INFINITY:
        rooms.append(addresses - virtual)
    return resident + max(min(rooms), 0) if rooms else 0


def processors() -> float:
    """Return how many processors this process may use, a part of one included."""
    found = float(len(os.sched_getaffinity(0)))
    for folder in _folders("cpu"):
        with contextlib.suppress(OSError, ValueError):
            if (folder / "cpu.max").exists():
                quota, period = (folder / "cpu.max").read_text(encoding="ascii").split()
            else:
                quota, period = (
                    (folder / f"cpu.cfs_{what}_us").read_text(encoding="ascii") for what in ("quota", "period")
                )
            share = float(quota) / float(period) if quota != "max" else math.inf
            if share > 0:
                found = min(found, share)
    return found


def _machine() -> Iterator[int]:
    with contextlib.suppress(OSError, ValueError):
        for line in (PROC / "meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                yield int(line.split()[1]) * 1024


def _groups() -> Iterator[int]:
    """Yield the room in each group that this process is in, up to the outermost."""
    for folder in _folders("memory"):
        with contextlib.suppress(OSError, ValueError):
            first = (folder / "memory.max").exists()
            limit, used, cached = (
                ("memory.max", "memory.current", "inactive_file")
                if first
                else ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            )
            most = (folder / limit).read_text(encoding="ascii").strip()
            if most != "max":
                # What is only a file's pages gives way.
                gives = _field(folder / "memory.stat", cached)
                yield int(most) - int((folder / used).read_text(encoding="ascii")) + gives


def _field(path: Path, name: str) -> int:
    lines = path.read_text(encoding="ascii").splitlines()
    return next((int(line.split()[1]) for line in lines if line.startswith(f"{name} ")), 0)


def _folders(controller: str) -> list[Path]:
    """Return the folders of this process's groups of a controller, of either version, the innermost first."""
    try:
        lines = (PROC / "self" / "cgroup").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number != "0" and controller not in controllers.split(","):
            continue
        root = GROUPS if number == "0" else GROUPS / controllers
        inside = Path(path.lstrip("/"))
        # In a container the path is often that of outside, and what is mounted is the container's own.
        found += [root / each for each in (inside, *inside.parents)]
    return [folder for folder in found if folder.is_dir()]
