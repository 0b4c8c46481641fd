# SPDX-License-Identifier: Apache-2.0
"""`oarlock rollback JOB`: one table of a running job goes back to a checkpoint; the command ends once it has, or will not."""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from oarlock.checkpoint.cuts import split_cut
from oarlock.checkpoint.place import place_of
from oarlock.cli.jobs import ask, asking, live
from oarlock.client.job import OVER
from oarlock.launch.folder import is_running, locate, read_spec
from oarlock.launch.origin import find_origin
from oarlock.proto.coordinator_pb2 import RollbackReply, RollbackRequest
from oarlock.proto.errors import NotFound, Unavailable

LOOK_SECONDS = 0.1


def rollback(options: argparse.Namespace) -> int:
    """Ask a running job to let a table go back, and wait for it."""
    folder, address = locate(options.job)
    security = asking(options, folder)
    found = live(folder, address, security)
    if found is None or found["phase"] in OVER or address is None:
        if folder is not None and is_running(folder):
            raise Unavailable(f"job {options.job} runs in one process: it has no address to be asked at")
        raise Unavailable(f"job {options.job} is not running: go back with the whole job, --resume --restore @CUT")
    place = place_of(read_spec(folder)) if folder is not None else None
    path = find_origin(options.restore, place).path if options.restore else _own(options.cut, folder, found)
    reply: RollbackReply = ask(
        address, "Coordinator.Rollback", RollbackRequest(table=options.table, path=path), security
    )
    print(f"job {found['name']} was asked to let {options.table} go back to {path}", file=sys.stderr, flush=True)
    event = _wait(options.job, reply.number, lambda: live(folder, address, security))
    print(
        json.dumps(event)
        if options.json
        else f"table {event['table']} went back to cut {event['cut']} at step {event['step']}: {event['rows']:,} rows"
    )
    return 0


def _own(cut: int, folder: Path | None, status: dict[str, Any]) -> str:
    """Return the path of a job's own cut, as its coordinator knows it."""
    if folder is not None:
        return find_origin(f"{folder}@{cut}").path
    paths = {split_cut(str(known["path"]))[1]: str(known["path"]) for known in status["checkpoints"]}
    if cut not in paths:
        raise NotFound(f"job {status['name']} knows of no cut {cut}; there is: {', '.join(map(str, paths)) or 'none'}")
    return paths[cut]


def _wait(job: str, number: int, look: Callable[[], dict[str, Any] | None]) -> dict[str, Any]:
    """Return the event of roll back ``number``; Unavailable if it came to nothing."""
    while True:
        found = look()
        if found is None:
            raise Unavailable(f"job {job} does not answer any more; `oarlock status` tells whether the table went back")
        done = [e for e in found["events"] if e.get("event") == "rollback" and e.get("number") == number]
        if done:
            return dict(done[-1])
        failed = found["rollback"].get("failed", {})
        if failed.get("number", 0) >= number:
            raise Unavailable(f"the table did not go back, training goes on: {failed['error']}")
        if found["phase"] in OVER:
            raise Unavailable(f"job {job} is {found['phase']}, and the table did not go back")
        time.sleep(LOOK_SECONDS)
