# SPDX-License-Identifier: Apache-2.0
"""`oarlock checkpoint JOB`: a running job makes a cut now; the command ends once it is committed, or came to nothing."""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console

from oarlock.cli.cut_lines import progress_line
from oarlock.cli.jobs import ask, asking, live
from oarlock.cli.show import CUT_SECONDS
from oarlock.client.job import OVER
from oarlock.launch.folder import is_running, locate
from oarlock.proto.coordinator_pb2 import CheckpointReply, CheckpointRequest
from oarlock.proto.errors import Unavailable

LOOK_SECONDS = 0.1


def checkpoint_now(options: argparse.Namespace) -> int:
    """Ask a running job for a checkpoint and wait for it."""
    folder, address = locate(options.job)
    security = asking(options, folder)
    found = live(folder, address, security)
    if found is None or found["phase"] in OVER or address is None:
        if folder is not None and is_running(folder):
            raise Unavailable(f"job {options.job} runs in one process: it has no address to be asked at")
        raise Unavailable(f"job {options.job} is not running")
    reply: CheckpointReply = ask(address, "Coordinator.Checkpoint", CheckpointRequest(), security)
    print(f"job {found['name']} was asked for a checkpoint", file=sys.stderr, flush=True)
    with _waiting() as told:
        made = _wait(options.job, reply.last, lambda: live(folder, address, security), told)
    print(json.dumps(made) if options.json else f"cut {made['cut']} is committed: {made['path']}")
    return 0


@contextmanager
def _waiting() -> Iterator[Callable[[str], None]]:
    """Show how far the cut is: in one line on a terminal, in lines every now and then elsewhere."""
    console, since = Console(stderr=True), time.monotonic()
    if console.is_terminal:
        with console.status("waiting") as shown:
            yield lambda line: shown.update(line or "waiting")
        return

    def tell(line: str) -> None:
        nonlocal since
        if line and time.monotonic() - since >= CUT_SECONDS:
            since = time.monotonic()
            print(line, file=sys.stderr, flush=True)

    yield tell


def _wait(
    job: str, last: int, look: Callable[[], dict[str, Any] | None], told: Callable[[str], None]
) -> dict[str, Any]:
    """Return the checkpoint of the first cut after ``last``; Unavailable if it came to nothing."""
    while True:
        found = look()
        if found is None:
            raise Unavailable(f"job {job} does not answer any more")
        made = next((c for c in found["checkpoints"] if c["cut"] > last), None)
        if made is not None:
            return dict(made)
        failed = found["cut"].get("failed", {"cut": 0})
        if failed["cut"] > last:
            raise Unavailable(f"cut {failed['cut']} came to nothing, training goes on: {failed['error']}")
        told(progress_line(found))
        if found["phase"] in OVER:
            raise Unavailable(f"job {job} is {found['phase']}, without another checkpoint")
        time.sleep(LOOK_SECONDS)
