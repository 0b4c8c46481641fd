# SPDX-License-Identifier: Apache-2.0
"""`oarlock checkpoint JOB`: a running job makes a cut now; the command ends once it is committed, or came to nothing."""

import argparse
import json
import sys
import time
from typing import Any

from oarlock.cli.jobs import ask, live
from oarlock.client.job import OVER
from oarlock.launch.folder import is_running, locate
from oarlock.proto.coordinator_pb2 import CheckpointReply, CheckpointRequest
from oarlock.proto.errors import Unavailable

LOOK_SECONDS = 0.1


def checkpoint_now(options: argparse.Namespace) -> int:
    """Ask a running job for a checkpoint and wait for it."""
    folder, address = locate(options.job)
    found = live(folder, address)
    if found is None or found["phase"] in OVER or address is None:
        if folder is not None and is_running(folder):
            raise Unavailable(f"job {options.job} runs in one process: it has no address to be asked at")
        raise Unavailable(f"job {options.job} is not running")
    reply: CheckpointReply = ask(address, "Coordinator.Checkpoint", CheckpointRequest())
    print(f"job {found['name']} was asked for a checkpoint", file=sys.stderr, flush=True)
    made = _wait(options.job, reply.last, folder, address)
    print(json.dumps(made) if options.json else f"cut {made['cut']} is committed: {made['path']}")
    return 0


def _wait(job: str, last: int, folder: Any, address: str) -> dict[str, Any]:
    """Return the checkpoint of the first cut after ``last``; Unavailable if it came to nothing."""
    while True:
        found = live(folder, address)
        if found is None:
            raise Unavailable(f"job {job} does not answer any more")
        made = next((c for c in found["checkpoints"] if c["cut"] > last), None)
        if made is not None:
            return dict(made)
        failed = found["cut"].get("failed", {"cut": 0})
        if failed["cut"] > last:
            raise Unavailable(f"cut {failed['cut']} came to nothing, training goes on: {failed['error']}")
        if found["phase"] in OVER:
            raise Unavailable(f"job {job} is {found['phase']}, without another checkpoint")
        time.sleep(LOOK_SECONDS)
