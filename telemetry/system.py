# SPDX-License-Identifier: Apache-2.0
"""What the operating system says of this process, under the names that Prometheus's own clients use.

Invariant: what a system does not tell (no /proc) is left out, never made up. Any thread.
"""

import contextlib
import os
import resource
from collections.abc import Callable
from pathlib import Path

_STAT = Path("/proc/self/stat")
_FDS = Path("/proc/self/fd")
_BOOT = Path("/proc/stat")
# Fields of /proc/self/stat (proc(5), from 1 on), counted from the one after the name, which may hold anything.
_THREADS, _BEGUN, _VIRTUAL, _RESIDENT = (field - 3 for field in (20, 22, 23, 24))


def system_source() -> Callable[[], dict[str, float]]:
    """Return the source of the `process_...` metrics."""
    begun = _begun()

    def source() -> dict[str, float]:
        times = os.times()
        found: dict[str, float] = {
            "process_cpu_seconds_total": times.user + times.system,
            "process_max_fds": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
            **begun,
        }
        with contextlib.suppress(OSError):
            stat = _stat()
            found["process_threads"] = stat[_THREADS]
            found["process_virtual_memory_bytes"], found["process_resident_memory_bytes"] = memory()
            # The listing's own descriptor is one of them.
            found["process_open_fds"] = len(os.listdir(_FDS)) - 1
        return found

    return source


def memory() -> tuple[int, int]:
    """Return the bytes of this process's addresses, and those that it has in RAM; OSError where there is no /proc."""
    stat = _stat()
    return stat[_VIRTUAL], stat[_RESIDENT] * os.sysconf("SC_PAGE_SIZE")


def _stat() -> list[int]:
    fields = _STAT.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    return [0, *map(int, fields[1:])]


def _begun() -> dict[str, float]:
    """Return when the process began: the machine's start and the ticks since then."""
    with contextlib.suppress(OSError, StopIteration):
        lines = _BOOT.read_text(encoding="ascii").splitlines()
        boot = int(next(line for line in lines if line.startswith("btime ")).split()[1])
        return {"process_start_time_seconds": boot + _stat()[_BEGUN] / os.sysconf("SC_CLK_TCK")}
    return {}
