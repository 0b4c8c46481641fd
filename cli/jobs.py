# SPDX-License-Identifier: Apache-2.0
"""`oarlock status` and `oarlock stop`: talking to a job by name, folder or address."""

import argparse
import asyncio
import json
import sys
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from oarlock.cli.autoscale_lines import autoscale_lines
from oarlock.cli.copy_lines import copy_lines
from oarlock.cli.cut_lines import cut_lines
from oarlock.cli.show import epochs_table, event_lines, result_console, wire_lines
from oarlock.client.job import OVER
from oarlock.client.security import security_of
from oarlock.launch.folder import is_running, locate, read_spec, stored_security, stored_status
from oarlock.proto.coordinator_pb2 import StatusReply, StatusRequest, StopRequest
from oarlock.proto.errors import PermissionDenied, PSError, Unauthenticated, Unavailable
from oarlock.proto.rpc import GrpcTransport
from oarlock.proto.security import Security


def ask(address: str, method: str, request: Any, security: Security) -> Any:
    """Return what a coordinator answers."""
    return asyncio.run(_ask(address, method, request, security))


async def _ask(address: str, method: str, request: Any, security: Security) -> Any:
    transport = GrpcTransport(security=security)
    try:
        return await transport.call(address, method, request, timeout_seconds=5.0)
    finally:
        await transport.close()


def asking(options: argparse.Namespace, folder: Path | None) -> Security:
    """Return the tokens and certificates with which a job is asked: those of the options, else those that its folder names."""
    return security_of(options, stored_security(folder))


def live(folder: Path | None, address: str | None, security: Security) -> dict[str, Any] | None:
    """Return what the coordinator at ``address`` says, if it answers and is the one of the folder's job."""
    if address is None:
        return None
    try:
        reply: StatusReply = ask(address, "Coordinator.Status", StatusRequest(), security)
    except (Unauthenticated, PermissionDenied):
        # Somebody answers.
        raise
    except PSError:
        if folder is None:
            raise
        return None
    found: dict[str, Any] = json.loads(reply.status)
    # The port of a coordinator that is gone may be another job's by now.
    return found if folder is None or found["job"] == read_spec(folder).job else None


def running(options: argparse.Namespace) -> tuple[Path | None, str, Security, dict[str, Any]]:
    """Return (folder, coordinator's address, how to ask it, status) of a job that runs; Unavailable if it does not, or has no
    address."""
    job = options.job
    folder, address = locate(job)
    security = asking(options, folder)
    found = live(folder, address, security)
    if found is None or address is None or found["phase"] in OVER:
        if folder is not None and is_running(folder):
            raise Unavailable(f"job {job} runs in one process: it has no address to be asked at")
        raise Unavailable(f"job {job} is not running")
    return folder, address, security, found


def status(options: argparse.Namespace) -> int:
    """Show a job: the live one if its coordinator answers, else what its folder says."""
    folder, address = locate(options.job)
    security = asking(options, folder)
    found = live(folder, address, security)
    if found is None:
        assert folder is not None
        found = stored_status(folder)
    if options.json:
        print(json.dumps(found))
        return 0
    console = result_console()
    console.print(
        f"job {found['name']}: {found['phase']}{' (' + found['reason'] + ')' if found['reason'] else ''}, run {found['run']}, "
        f"{len(found['history'])} of {found['epochs']} epochs done",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    if found.get("metrics"):
        scheme = "https" if security.serves_tls else "http"
        console.print(
            f"metrics at {scheme}://{found['metrics']}/metrics", highlight=False, markup=False, soft_wrap=True
        )
    if found.get("ranks"):
        # Each process tells which of them it hosts.
        told = [(m["id"], m["stats"]["ranks"]) for m in found["members"] if isinstance(m["stats"].get("ranks"), list)]
        hosts = "; ".join(f"worker {number}: {' '.join(map(str, ranks)) or 'none'}" for number, ranks in told)
        text = f"mode {found['mode']} of {found['ranks']} ranks{', hosted by ' + hosts if hosts else ''}"
        console.print(text, highlight=False, markup=False, soft_wrap=True)
    for line in [*copy_lines(found), *autoscale_lines(found), *wire_lines(found), *cut_lines(found)]:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    for line in event_lines(found):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    for warning in found.get("warnings", []):
        console.print(f"warning: {warning}", highlight=False, markup=False, soft_wrap=True)
    if found["members"]:
        console.print(_members(found))
    if found["history"]:
        console.print(epochs_table(found))
    return 0


def _members(found: dict[str, Any]) -> Table:
    table = Table(title="members", title_justify="left")
    observed = any("metrics" in m["stats"] for m in found["members"])
    names = ("role", "id", "address", "pid", "blocks", "rows", "MB", "pushes", "samples", "open splits")
    for name in (*names, "metrics") if observed else names:
        table.add_column(name, justify="right" if name not in ("role", "address", "metrics") else "left")
    for m in sorted(found["members"], key=lambda m: (m["role"], m["id"])):
        s = m["stats"]
        cells = (
            m["role"],
            str(m["id"]),
            m["address"] or m["host"],
            str(m["pid"]),
            str(s.get("blocks", "")),
            str(s.get("rows", "")),
            f"{s['bytes'] / 1e6:.1f}" if isinstance(s.get("bytes"), int) else "",
            str(s.get("pushes", "")),
            str(s.get("samples", "")),
            " ".join(map(str, s["open_splits"])) if isinstance(s.get("open_splits"), list) else "",
            *([str(s.get("metrics", ""))] if observed else []),
        )
        # Members say what they like; brackets are no style of ours.
        table.add_row(*map(escape, cells))
    return table


def stop(options: argparse.Namespace) -> int:
    """Ask a running job to end."""
    folder, address = locate(options.job)
    security = asking(options, folder)
    found = live(folder, address, security)
    if found is None or found["phase"] in OVER:
        if folder is not None and is_running(folder):
            raise Unavailable(f"job {options.job} runs in one process: press Ctrl-C there")
        raise Unavailable(f"job {options.job} is not running")
    assert address is not None
    request = StopRequest(checkpoint=not options.no_checkpoint, reason="oarlock stop")
    ask(address, "Coordinator.Stop", request, security)
    print(f"job {found['name']} was asked to stop", file=sys.stderr)
    return 0
