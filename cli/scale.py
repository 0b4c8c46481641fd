# SPDX-License-Identifier: Apache-2.0
"""`oarlock scale JOB`: a running job is to have another number of shards or workers; the command ends once it is told, or, if
asked to wait, once it is so. With ``--dry-run`` nothing is asked for: what the job's own scaler would do now is printed.
"""

import argparse
import json
import sys
import time
from typing import Any

from rich.console import Console

from oarlock.cli.autoscale_lines import dry_run_lines
from oarlock.cli.copy_lines import moves_line, numbers_line
from oarlock.cli.jobs import ask, live, running
from oarlock.client.job import OVER
from oarlock.launch.wanted import settled
from oarlock.proto.coordinator_pb2 import ScaleReply, ScaleRequest
from oarlock.proto.errors import InvalidArgument, Unavailable

LOOK_SECONDS = 0.2
# Where there is no terminal, how far it is is told in lines, so often.
SAY_SECONDS = 2.0


def scale(options: argparse.Namespace) -> int:
    """Ask a running job for other numbers."""
    folder, address, security, found = running(options)
    if "scale" not in found:
        raise Unavailable(
            f"job {found['name']} is run by Oarlock {found.get('version', 'of an older version')}, which cannot scale it: "
            "stop it, and resume it with other numbers"
        )
    if options.dry_run:
        return _dry_run(found, options.json)
    begun = time.monotonic()
    request = ScaleRequest(servers=options.servers or 0, workers=options.workers or 0)
    reply: ScaleReply = ask(address, "Coordinator.Scale", request, security)
    result = {"servers": reply.servers, "workers": reply.workers, "said": reply.said}
    text = f"job {found['name']}: {reply.servers} servers, {reply.workers} workers: {reply.said}"
    if options.wait:
        print(text, file=sys.stderr, flush=True)
        _wait(options.job, lambda: live(folder, address, security), (reply.servers, reply.workers))
        result["seconds"] = round(time.monotonic() - begun, 3)
        text = f"job {found['name']} has {reply.servers} servers and {reply.workers} workers after {result['seconds']:.1f} s"
    print(json.dumps(result) if options.json else text)
    return 0


def _dry_run(status: dict[str, Any], as_json: bool) -> int:
    found = status.get("autoscale")
    if not found:
        raise InvalidArgument(
            f"job {status['name']} has no scaler: give its job file a table [autoscale], with dry_run = true if it is to tell, "
            "and not to do"
        )
    print(json.dumps(found) if as_json else "\n".join(dry_run_lines(found)))
    return 0


def _wait(job: str, look: Any, wanted: tuple[int, int]) -> None:
    """Return once a job has the numbers that are wanted, and nothing moves; Unavailable if it will not."""
    console = Console(stderr=True)
    told, told_at = "", 0.0
    with console.status("") as spinner:
        while True:
            found = look()
            if found is None:
                raise Unavailable(f"job {job} does not answer any more; `oarlock status` tells what it has")
            if found["phase"] in OVER:
                raise Unavailable(f"job {job} is {found['phase']}, before it had what was asked for")
            if (found["scale"]["servers"], found["scale"]["workers"]) != wanted:
                raise Unavailable(f"job {job} was asked for other numbers meanwhile: {numbers_line(found)}")
            if settled(found):
                return
            text = "; ".join(part for part in (numbers_line(found), moves_line(found)) if part)
            if console.is_terminal:
                spinner.update(text)
            elif text != told and time.monotonic() - told_at >= SAY_SECONDS:
                told, told_at = text, time.monotonic()
                console.print(text, highlight=False, markup=False, soft_wrap=True)
            time.sleep(LOOK_SECONDS)
