# SPDX-License-Identifier: Apache-2.0
"""gRPC's server reflection, by which tools such as grpcurl learn a server's methods from itself.

Invariant: it is there if grpcio-reflection is installed (the extra ``reflection``), and nothing else is missing if it is not. It
tells schemas only, which are public, and still to those alone whom the guard lets in. Its streams hold ``MAX_STREAMS`` threads at
most; who has one for long gives it to a newcomer. Made before the server starts; its calls are threads of the server.
"""

import importlib
import logging
from collections.abc import Iterator
from typing import Any

import grpc

from oarlock.proto import serving_pb2
from oarlock.proto.rpc.places import STALL_SECONDS, Places

logger = logging.getLogger(__name__)

MAX_STREAMS = 4
# Services that a proto file describes as such; the others are between processes of one release.
_DESCRIBED = {s.full_name for s in serving_pb2.DESCRIPTOR.services_by_name.values()}


class Reflection(grpc.GenericRpcHandler):  # type: ignore[misc]
    """Describes ``service``, if it can be."""

    def __init__(self, service: str, *, stall_seconds: float = STALL_SECONDS) -> None:
        self._places = Places(MAX_STREAMS, stall_seconds=stall_seconds)
        self._found = _Found()
        if service not in _DESCRIBED:
            return
        try:
            module = importlib.import_module("grpc_reflection.v1alpha.reflection")
        except ImportError:
            logger.info("event=no_reflection (install oarlock[reflection] to have it)")
            return
        module.enable_server_reflection((service, module.SERVICE_NAME), self._found)

    def service(self, call: Any) -> Any:
        """Return what works on a call of reflection, None if it is none."""
        found = next((h for each in self._found.handlers if (h := each.service(call)) is not None), None)
        return None if found is None else found._replace(stream_stream=self._bounded(found.stream_stream))

    def _bounded(self, behaviour: Any) -> Any:
        def answer(requests: Iterator[Any], context: Any) -> Iterator[Any]:
            place = self._places.enter(context.cancel, patient=False)
            if place is None:
                words = f"{MAX_STREAMS} others ask for schemas at this moment: ask again"
                context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, words)
                return
            try:
                yield from behaviour(requests, context)
            finally:
                self._places.leave(place)

        return answer


class _Found:
    """Stands for a server that a service is added to: a server itself would ask nobody before such a service is called."""

    def __init__(self) -> None:
        self.handlers: list[grpc.GenericRpcHandler] = []

    def add_generic_rpc_handlers(self, handlers: tuple[grpc.GenericRpcHandler, ...]) -> None:
        self.handlers.extend(handlers)

    def add_registered_method_handlers(self, service: str, handlers: dict[str, Any]) -> None:
        """Leave out what goes round every generic handler, the guard too; the same are among those."""
