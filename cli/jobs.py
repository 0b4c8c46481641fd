# SPDX-License-Identifier: Apache-2.0
"""`oarlock status` and `oarlock stop`: talking to a job by name, folder or address."""

import argparse
import asyncio
import json
from typing import Any

from rich.console import Console
from rich.table import Table

from oarlock.cli.show import epochs_table
from oarlock.launch.folder import locate, stored_status
from oarlock.proto.coordinator_pb2 import StatusReply, StatusRequest, StopRequest
from oarlock.proto.errors import PSError, Unavailable
from oarlock.proto.rpc import GrpcTransport


async def _ask(address: str, method: str, request: Any) -> Any:
    transport = GrpcTransport()
    try:
        return await transport.call(address, method, request, timeout_seconds=5.0)
    finally:
        await transport.close()


def status(options: argparse.Namespace) -> int:
    """Show a job: the live one if its coordinator answers, else what its folder says."""
    folder, address = locate(options.job)
    found: dict[str, Any] | None = None
    if address is not None:
        try:
            reply: StatusReply = asyncio.run(_ask(address, "Coordinator.Status", StatusRequest()))
            found = json.loads(reply.status)
        except PSError:
            if folder is None:
                raise
    if found is None:
        assert folder is not None
        found = stored_status(folder)
    if options.json:
        print(json.dumps(found))
        return 0
    console = Console()
    console.print(
        f"job {found['name']}: {found['phase']}{' (' + found['reason'] + ')' if found['reason'] else ''}, run {found['run']}, "
        f"epoch {min(found['epoch'] + 1, found['epochs'])} of {found['epochs']}",
        highlight=False,
        markup=False,
    )
    if found["members"]:
        console.print(_members(found))
    if found["history"]:
        console.print(epochs_table(found))
    return 0


def _members(found: dict[str, Any]) -> Table:
    table = Table(title="members", title_justify="left")
    for name in ("role", "id", "address", "pid", "blocks", "rows", "MB", "pushes", "samples", "open splits"):
        table.add_column(name, justify="right" if name not in ("role", "address") else "left")
    for m in sorted(found["members"], key=lambda m: (m["role"], m["id"])):
        s = m["stats"]
        table.add_row(
            m["role"],
            str(m["id"]),
            m["address"] or m["host"],
            str(m["pid"]),
            str(s.get("blocks", "")),
            str(s.get("rows", "")),
            f"{s['bytes'] / 1e6:.1f}" if "bytes" in s else "",
            str(s.get("pushes", "")),
            str(s.get("samples", "")),
            " ".join(map(str, s.get("open_splits", []))),
        )
    return table


def stop(options: argparse.Namespace) -> int:
    """Ask a running job to end."""
    _, address = locate(options.job)
    if address is None:
        raise Unavailable(f"job {options.job} is not running")
    request = StopRequest(checkpoint=not options.no_checkpoint, reason="oarlock stop")
    asyncio.run(_ask(address, "Coordinator.Stop", request))
    return 0
