# SPDX-License-Identifier: Apache-2.0
"""What the entry points of all processes share: options, logging, the end of a parent, and how an error ends a process.

Invariant: a process ends with 0, or with 1 after one line `error: ...` on standard error, or 2 for wrong usage. 75 instead of 1
says that nothing is wrong with it but that it was away for too long: one that is started in its place joins anew.
"""

import argparse
import asyncio
import gc
import json
import os
import sys
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from oarlock.client.processors import allowed_cores, pin, usable_cores
from oarlock.client.security import add_security
from oarlock.proto.errors import InvalidArgument, LeaseLost, NotFound, PSError, WrongRun
from oarlock.telemetry.log import to_stream
from oarlock.telemetry.prometheus import LOOPBACK, read_port

# Where a job's folder keeps the address of its coordinator.
ADDRESS_FILE = "coordinator.json"
# The exit code of a process whose lease, or whose run, ended without it (EX_TEMPFAIL of sysexits.h).
START_AGAIN = 75


def parser(program: str, description: str) -> argparse.ArgumentParser:
    """Return a parser with the options that every process has."""
    made = argparse.ArgumentParser(prog=f"python -m {program}", description=description)
    made.add_argument("--log-level", default="info", choices=("debug", "info", "warning", "error"))
    made.add_argument(
        "--metrics-port",
        type=read_port,
        metavar="N",
        help="serve metrics for Prometheus at this port (0: any free one)",
    )
    made.add_argument(
        "--metrics-host", default=LOOPBACK, metavar="HOST", help="where to serve them (default: this host alone)"
    )
    made.add_argument(
        "--metrics-if-free",
        action="store_true",
        help="go on without them if the port is taken (set by a parent that starts a process again)",
    )
    made.add_argument(
        "--trace", metavar="FILE", help="record what this process does when, as a timeline in Chrome's trace format"
    )
    made.add_argument(
        "--until-stdin-closes", action="store_true", help="end when standard input does (set by a parent)"
    )
    made.add_argument("--pin-cores", default="", metavar="LIST", help="run on these cores alone, like 0-3,8")
    add_security(made)
    return made


def run(main: Callable[[], Awaitable[Any]], options: argparse.Namespace) -> int:
    """Run a process's main coroutine; return its exit code."""
    to_stream(options.log_level)
    if options.until_stdin_closes:
        threading.Thread(target=_end_with_parent, name="oarlock-parent", daemon=True).start()
    try:
        if options.pin_cores:
            pin(usable_cores(options.pin_cores, "--pin-cores", allowed_cores()))
        asyncio.run(_body(main))
    except PSError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return START_AGAIN if isinstance(error, LeaseLost | WrongRun) else 1
    except KeyboardInterrupt:
        return 130
    return 0


async def _body(main: Callable[[], Awaitable[Any]]) -> None:
    await main()


def _end_with_parent() -> None:
    try:
        # Not sys.stdin: a thread inside its lock when the interpreter ends aborts the process.
        while os.read(0, 4096):
            pass
    except OSError:
        pass
    # Nothing to save here: what must survive is on disk before it is told. Threads of gRPC would delay a softer exit.
    print("error: the parent process is gone", file=sys.stderr, flush=True)
    os._exit(1)


def keep_what_is_loaded() -> None:
    """Spare what is in memory by now, modules above all, from every later search for garbage.

    A whole search takes a tenth of a second, in which a process answers nobody. Call once, when all is loaded.
    """
    gc.collect()
    gc.freeze()


def write_address(folder: Path, address: str) -> None:
    """Publish the coordinator's address in the job's folder, whole or not at all."""
    partial = folder / f".{ADDRESS_FILE}.{os.getpid()}"
    partial.write_text(json.dumps({"address": address, "pid": os.getpid()}), encoding="utf-8")
    os.replace(partial, folder / ADDRESS_FILE)


def read_address(folder: Path) -> str:
    """Return the address in a job's folder; NotFound if no coordinator has published one."""
    try:
        return str(json.loads((folder / ADDRESS_FILE).read_text(encoding="utf-8"))["address"])
    except FileNotFoundError:
        raise NotFound(f"{folder} has no {ADDRESS_FILE}: no coordinator runs there") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InvalidArgument(f"{folder / ADDRESS_FILE} cannot be read: {error}") from None
