# SPDX-License-Identifier: Apache-2.0
"""A job from its begin to its end, under chaos or in peace, as `oarlock chaos` and the benchmarks run it.

Invariant: no process outlives it, nor the folder of its workers' notes; a job that does not end in time is an error.
"""

import asyncio
import contextlib
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from oarlock.client.job import OVER, JobSpec
from oarlock.client.layout import Layout
from oarlock.launch.chaos import WATCH_SECONDS, Chaos
from oarlock.launch.chaos_events import Event, Plan
from oarlock.launch.chaos_ledger import Ledger, explain
from oarlock.launch.processes import LocalProcesses
from oarlock.proto.errors import DeadlineExceeded

Status = dict[str, Any]


@dataclass
class Ended:
    """A job that came to its end: the last status, what was done to it, and how long it took."""

    spec: JobSpec
    folder: Path
    status: Status
    ledger: Ledger
    seconds: float


def run_job(
    spec: JobSpec,
    folder: Path,
    plan: Plan | None,
    *,
    events: Iterable[Event] | None = None,
    ready: Callable[[Status], bool] | None = None,
    watch: Callable[[Status], bool] = lambda status: True,
    most_seconds: float | None = None,
    **launching: Any,
) -> Ended:
    """Run a job that was planned into ``folder``; ``plan``: what is done to it (None: nothing).

    ``events``, ``ready``: see Chaos. ``launching``: further arguments of the launcher.
    """
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="oarlock-notes-") as notes:
        if plan is not None:
            launching["push_notes"] = Path(notes)
        launched = LocalProcesses(spec, folder, **launching)
        chaos = Chaos(launched, spec, plan, events=events, ready=ready) if plan is not None else None
        status = asyncio.run(_run(launched, chaos, watch, most_seconds, spec.name))
        ledger = chaos.ledger if chaos is not None else Ledger()
        if chaos is not None:
            explain(ledger, spec, Layout(spec.tables, spec.dense).blocks, Path(notes), status)
    return Ended(spec, folder, status, ledger, time.monotonic() - begun)


async def _run(
    launched: LocalProcesses,
    chaos: Chaos | None,
    watch: Callable[[Status], bool],
    most_seconds: float | None,
    name: str,
) -> Status:
    striking = asyncio.ensure_future(chaos.run()) if chaos is not None else None

    def hear(status: Status) -> bool:
        if chaos is not None and striking is not None:
            chaos.watch(status)
            if striking.done():
                # What went wrong there is not to be missed.
                striking.result()
            elif status.get("phase") in OVER:
                striking.cancel()
        return watch(status)

    try:
        async with asyncio.timeout(most_seconds):
            return await launched.run(hear, WATCH_SECONDS)
    except TimeoutError:
        raise DeadlineExceeded(f"job {name} did not end within {most_seconds:g} s") from None
    finally:
        if striking is not None:
            striking.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await striking
