# SPDX-License-Identifier: Apache-2.0
"""Small models, cut by cut, and servers of them."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from oarlock.proto.rpc import GrpcServer
from oarlock.proto.security import Security
from oarlock.serving.service import ServingService
from oarlock.serving.swap import Serving
from tests.conftest import load_shared

load_shared("proto/security_rig.py")
load_shared("serving/serving_rig.py")
for _name in ("rig", "rows_rig"):
    load_shared(f"client/{_name}.py")
load_shared("serving/follow_rig.py")
load_shared("serving/fleet_rig.py")
load_shared("serving/predict_rig.py")
load_shared("serving/http_rig.py")
load_shared("serving/process_rig.py")

import fleet_rig  # noqa: E402
import serving_rig  # noqa: E402


@pytest.fixture
def model(tmp_path: Path) -> Any:
    """A folder with cut 1 of a job with two tables."""
    made = serving_rig.Model(tmp_path / "checkpoints")
    made.cut(1)
    return made


@pytest.fixture
def serve() -> Iterator[Callable[..., tuple[ServingService, str]]]:
    """Serve what a Serving has, by gRPC and frames; returns the service and its address."""
    servers: list[GrpcServer] = []

    def start(serving: Serving, security: Security | None = None, **options: Any) -> tuple[ServingService, str]:
        service = ServingService(serving, **options)
        server = GrpcServer(service, "Serving", listen="127.0.0.1:0", security=security, serving=lambda: serving.ready)
        servers.append(server)
        return service, server.start()

    yield start
    for server in servers:
        server.stop()


@pytest.fixture
def servers() -> Iterator[Any]:
    """Servers of parts, which are stopped at the end."""
    made = fleet_rig.Servers()
    yield made
    made.stop()
