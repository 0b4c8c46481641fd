# SPDX-License-Identifier: Apache-2.0
"""A serving process's HTTP side in this process, and requests made by hand. Loaded as ``http_rig``."""

import contextlib
import http.client
import json
import socket
from typing import Any

import numpy as np

from oarlock.proto.security import Security
from oarlock.proto.work import Memory
from oarlock.serving.http_server import HttpServer
from oarlock.serving.models import Models
from oarlock.serving.openapi import description
from oarlock.serving.rest import Rest
from oarlock.serving.service import ServingService
from oarlock.serving.swap import Serving

SECONDS = 20.0


class Http:
    """Serves what ``serving`` serves over HTTP."""

    def __init__(
        self,
        serving: Serving,
        predictor: Any = None,
        security: Security | None = None,
        begun: bool = True,
        **options: Any,
    ) -> None:
        security = security or Security()
        self.serving = serving
        self.models = Models(ServingService(serving))
        if begun:
            self.models.begin(predictor)
        self.rest = Rest(self.models, security, Memory(), description=description())
        self.server = HttpServer(
            self.rest.answer, listen="127.0.0.1:0", admit=self.rest.admit, context=security.http_context, **options
        )
        self.address = self.server.start()
        host, _, port = self.address.rpartition(":")
        self.place = (host, int(port))

    def ask(self, method: str, path: str, body: Any = None, headers: Any = (), context: Any = None) -> Any:
        """Return (status, headers, body) of one request."""
        kind = http.client.HTTPConnection if context is None else http.client.HTTPSConnection
        more = {} if context is None else {"context": context}
        connection = kind(*self.place, timeout=SECONDS, **more)
        data = json.dumps(body) if isinstance(body, dict | list) else body
        try:
            connection.request(method, path, data, dict(headers))
            response = connection.getresponse()
            return response.status, dict(response.getheaders()), response.read()
        finally:
            connection.close()

    def json(self, method: str, path: str, body: Any = None, headers: Any = ()) -> Any:
        """Return (status, the JSON of the body)."""
        status, _, data = self.ask(method, path, body, headers)
        return status, json.loads(data)

    def raw(self, data: bytes, shut: bool = True) -> bytes:
        """Send bytes; return all that comes back until the connection ends."""
        with socket.create_connection(self.place, timeout=SECONDS) as peer:
            # Who is refused early may find the connection gone.
            with contextlib.suppress(OSError):
                peer.sendall(data)
                if shut:
                    peer.shutdown(socket.SHUT_WR)
            found = bytearray()
            while True:
                try:
                    more = peer.recv(65536)
                except ConnectionError:
                    break
                if not more:
                    break
                found += more
            return bytes(found)

    def close(self) -> None:
        self.server.stop(5.0)


def keys_body(keys: Any, **more: Any) -> dict[str, Any]:
    values = [int(key) for key in keys]
    return {"inputs": [{"name": "keys", "datatype": "UINT64", "shape": [len(values)], "data": values}], **more}


def binary_body(tensors: Any, **more: Any) -> tuple[bytes, dict[str, str]]:
    """Return a body with binary tensor data and its header; tensors: (name, datatype, shape, bytes)."""
    inputs = [
        {"name": n, "datatype": t, "shape": list(s), "parameters": {"binary_data_size": len(d)}}
        for n, t, s, d in tensors
    ]
    head = json.dumps({"inputs": inputs, **more}).encode()
    return head + b"".join(d for *_, d in tensors), {"Inference-Header-Content-Length": str(len(head))}


def values_of(answer: Any) -> Any:
    (output,) = answer["outputs"]
    return np.array(output["data"], np.float32).reshape(output["shape"])
