# SPDX-License-Identifier: Apache-2.0
"""Processor time of processes, from /proc. Pure reads; any thread."""

import os
from collections.abc import Iterable
from pathlib import Path

_TICKS = os.sysconf("SC_CLK_TCK")


def processor_seconds(pids: Iterable[int]) -> float:
    """Return the processor seconds (user and system, all threads) of those processes that are still there."""
    total = 0
    for pid in pids:
        try:
            stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
        except OSError:
            continue
        # The command's name stands in parentheses and may hold anything.
        fields = stat.rpartition(")")[2].split()
        total += int(fields[11]) + int(fields[12])
    return total / _TICKS


def busy_seconds() -> float:
    """Return the seconds that all processors of the machine together were busy, whoever kept them so."""
    fields = Path("/proc/stat").read_text(encoding="utf-8").split("\n", 1)[0].split()[1:]
    user, nice, system, interrupts, soft = (int(fields[i]) for i in (0, 1, 2, 5, 6))
    return (user + nice + system + interrupts + soft) / _TICKS
