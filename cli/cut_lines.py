# SPDX-License-Identifier: Apache-2.0
"""What is said of a job's cuts, from its status: how far the one is that is being written, which one failed, which is best.

Invariant: pure. Members may tell anything, so whatever is no number of theirs counts for nothing.
"""

from typing import Any


def progress_line(status: dict[str, Any]) -> str:
    """Return how far the cut is that is being made, empty if none is."""
    cut = status.get("cut", {})
    if not cut.get("begun"):
        return ""
    done, total = cut.get("written_bytes", 0), cut.get("bytes", 0)
    if not total:
        return f"cut {cut['begun']}: workers come to the gate"
    return f"cut {cut['begun']}: {done / 1e6:,.0f} of {total / 1e6:,.0f} MB written ({min(1.0, done / total):.0%})"


def cut_lines(status: dict[str, Any]) -> list[str]:
    """Return the lines on a job's cuts that ``oarlock status`` has."""
    cut, paths = status.get("cut", {}), {c["cut"]: c for c in status.get("checkpoints", [])}
    lines = [line] if (line := progress_line(status)) else []
    newest = status["checkpoints"][-1] if status.get("checkpoints") else None
    if newest is not None:
        lines.append(f"newest checkpoint: cut {newest['cut']}, {newest['path']}")
    if (best := cut.get("best")) in paths:
        lines.append(f"best checkpoint: cut {best}, after epoch {paths[best]['epoch']}, {paths[best]['path']}")
    if (failed := cut.get("failed")) and (newest is None or failed["cut"] > newest["cut"]):
        lines.append(f"cut {failed['cut']} came to nothing: {failed['error']}")
    return lines
