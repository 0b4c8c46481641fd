# SPDX-License-Identifier: Apache-2.0
"""One way to run a body against a handler over each transport: TCP and a unix socket, each with frames or by gRPC alone, and none
at all."""

import asyncio
import sys
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from oarlock.proto.rpc import GrpcServer, GrpcTransport
from oarlock.proto.transport import InProcess
from tests.conftest import load_shared

for _name in ("client_rig", "frame_rig", "golden_rig", "golden_serving", "scripted_rig", "security_rig"):
    load_shared(f"proto/{_name}.py")

Body = Callable[[Any, str], Awaitable[Any]]
Runner = Callable[..., Any]


def over_grpc(
    handler: object, body: Body, *, listen: str = "127.0.0.1:0", service: str = "Shard", frames: bool = True
) -> Any:
    """Return what ``body(transport, address)`` returns while ``handler`` is served at ``listen``."""
    server = GrpcServer(handler, service, listen=listen)

    async def run() -> Any:
        transport = GrpcTransport(frames=frames)
        try:
            return await body(transport, server.address)
        finally:
            await transport.close()

    try:
        server.start()
        return asyncio.run(run())
    finally:
        server.stop(0)


@pytest.fixture
def handler(request: pytest.FixtureRequest) -> Iterator[Any]:
    """frame_rig's Handler, or the module's own; nothing waits for it at the end."""
    made = getattr(request.module, "Handler", sys.modules["frame_rig"].Handler)()
    yield made
    made.gate.set()


@pytest.fixture
def server(handler: Any) -> Iterator[GrpcServer]:
    """``handler``, served at a port."""
    made = GrpcServer(handler, "Shard", listen="127.0.0.1:0")
    made.start()
    yield made
    handler.gate.set()
    made.stop(0)


@pytest.fixture
def tcp() -> Runner:
    return over_grpc


@pytest.fixture(params=["tcp", "unix", "gRPC over tcp", "gRPC over unix", "in-process"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Runner:
    """The contract's runner: ``run(handler, body)``."""
    if request.param != "in-process":
        listen = f"unix:{tmp_path}/s" if "unix" in request.param else "127.0.0.1:0"
        return lambda handler, body: over_grpc(handler, body, listen=listen, frames="gRPC" not in request.param)

    def in_process(handler: object, body: Body) -> Any:
        async def inside() -> Any:
            transport = InProcess()
            try:
                return await body(transport, transport.serve(handler, "here"))
            finally:
                await transport.close()

        return asyncio.run(inside())

    return in_process
