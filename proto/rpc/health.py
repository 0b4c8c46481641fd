# SPDX-License-Identifier: Apache-2.0
"""gRPC's standard health service, grpc.health.v1: orchestrators and load balancers ask it whether to send requests here.

Invariant: it says what ``serving`` says at that moment, about this process as a whole (the empty name) and each of its services;
another name is NOT_FOUND. A Watch holds a thread while it is open, so there are at most ``MAX_WATCHES``. Threads of the server.
"""

import time
from collections.abc import Callable, Iterator
from threading import Semaphore
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from oarlock.proto.health_pb2 import HealthCheckRequest, HealthCheckResponse

SERVICE = "grpc.health.v1.Health"
MAX_WATCHES = 8
# How soon who watches hears of a change.
LOOK_SECONDS = 0.2


class Health:
    """Answers for ``services``; ``serving`` tells whether they are served."""

    def __init__(self, services: tuple[str, ...], serving: Callable[[], bool]) -> None:
        self._services = ("", *services)
        self._serving = serving
        self._watches = Semaphore(MAX_WATCHES)
        self._over = False

    def handler(self) -> grpc.GenericRpcHandler:
        """Return what a server of gRPC is to be given."""
        return grpc.method_handlers_generic_handler(
            SERVICE,
            {
                "Check": grpc.unary_unary_rpc_method_handler(self._check),
                "Watch": grpc.unary_stream_rpc_method_handler(self._watch),
            },
        )

    def stop(self) -> None:
        """End all watches soon."""
        self._over = True

    def _status(self, service: str) -> Any:
        if service not in self._services:
            return HealthCheckResponse.SERVICE_UNKNOWN
        return HealthCheckResponse.SERVING if self._serving() else HealthCheckResponse.NOT_SERVING

    def _check(self, data: bytes, context: Any) -> bytes:
        service = _asked(data, context)
        status = self._status(service)
        if status == HealthCheckResponse.SERVICE_UNKNOWN:
            context.abort(grpc.StatusCode.NOT_FOUND, f"there is no service {service[:200]!r} here")
        return bytes(HealthCheckResponse(status=status).SerializeToString())

    def _watch(self, data: bytes, context: Any) -> Iterator[bytes]:
        service = _asked(data, context)
        if not self._watches.acquire(blocking=False):
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, f"{MAX_WATCHES} others watch already; ask by Check")
        try:
            told = -1
            while context.is_active() and not self._over:
                status = self._status(service)
                if status != told:
                    told = status
                    yield HealthCheckResponse(status=status).SerializeToString()
                time.sleep(LOOK_SECONDS)
        finally:
            self._watches.release()


def _asked(data: bytes, context: Any) -> str:
    try:
        return str(HealthCheckRequest.FromString(data).service)
    except DecodeError:
        context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"{len(data)} bytes that are no HealthCheckRequest")
        raise
