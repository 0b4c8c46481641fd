# SPDX-License-Identifier: Apache-2.0
"""What the workers' own counters say of windows: where a batch's time went, what was hidden, what travelled. Pure."""

import re
from collections.abc import Sequence

from oarlock.benchmarks.end_to_end_job import Window

_STAGE = re.compile(r'oarlock_worker_stage_seconds_total\{stage="(\w+)"\}')
_WAITING = 'oarlock_worker_stage_seconds_total{stage="wait_for_pull"}'
_PULLS, _PUSHES = "oarlock_worker_pull_seconds_sum", "oarlock_worker_push_seconds_sum"
_BATCHES = "oarlock_worker_batches_total"
_BYTES = re.compile(r'oarlock_rpc_client_(sent|received)_bytes_total\{method="Shard\.\w+"\}')


def total(windows: Sequence[Window]) -> dict[str, float]:
    """Return the sums of the windows' counters."""
    found: dict[str, float] = {}
    for window in windows:
        for name, value in window.counters.items():
            found[name] = found.get(name, 0.0) + value
    return found


def stages_of(windows: Sequence[Window]) -> dict[str, float]:
    """Return the milliseconds of a batch by stage of its worker, and those of its pull and push; empty: no worker told."""
    counters = total(windows)
    batches = counters.get(_BATCHES, 0.0)
    if not batches:
        return {}
    found = {m[1]: seconds for name, seconds in counters.items() if (m := _STAGE.fullmatch(name))}
    found |= {"pull": counters.get(_PULLS, 0.0), "push": counters.get(_PUSHES, 0.0)}
    return {name: round(seconds / batches * 1e3, 3) for name, seconds in found.items()}


def hidden_share(windows: Sequence[Window]) -> float | None:
    """Return the share of the pulls' time that no compute thread waited for."""
    counters = total(windows)
    pulls = counters.get(_PULLS, 0.0)
    return round(1.0 - counters.get(_WAITING, 0.0) / pulls, 3) if pulls else None


def wire_bytes(windows: Sequence[Window]) -> float | None:
    """Return the bytes of pulls and pushes, both ways and without the frames around them, per sample."""
    moved = sum(value for name, value in total(windows).items() if _BYTES.fullmatch(name))
    return round(moved / sum(w.samples for w in windows), 1) if moved else None
