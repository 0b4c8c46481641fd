# SPDX-License-Identifier: Apache-2.0
"""gRPC's server reflection, by which tools such as grpcurl learn a server's methods from itself.

Invariant: it is there if grpcio-reflection is installed (the extra ``reflection``), and nothing else is missing if it is not. It
tells schemas only, which are public. Called once, before the server starts.
"""

import importlib
import logging
from typing import Any

from oarlock.proto import serving_pb2

logger = logging.getLogger(__name__)

# Services that a proto file describes as such; the others are between processes of one release.
_DESCRIBED = {s.full_name for s in serving_pb2.DESCRIPTOR.services_by_name.values()}


def reflect(server: Any, service: str) -> bool:
    """Have ``server`` describe ``service``, if it can be; return whether it does."""
    if service not in _DESCRIBED:
        return False
    try:
        found = importlib.import_module("grpc_reflection.v1alpha.reflection")
    except ImportError:
        logger.info("event=no_reflection (install oarlock[reflection] to have it)")
        return False
    found.enable_server_reflection((service, found.SERVICE_NAME), server)
    return True
