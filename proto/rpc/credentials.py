# SPDX-License-Identifier: Apache-2.0
"""TLS of gRPC's two sides, from files that may be replaced while the process runs (proto/security.py).

Invariant: a server shows the newest certificate that could be used to every newcomer; connections that there are go on. A
client's channel has the files that it was made with: who calls makes another one once they are newer (client.py). Any thread.
"""

from typing import Any

import grpc
from grpc import aio

from oarlock.proto.rpc.options import CLIENT_OPTIONS
from oarlock.proto.security import Security
from oarlock.proto.tls import Pem


def server_credentials(security: Security) -> grpc.ServerCredentials:
    """Return what a server that has a certificate listens with."""
    mutual = security.spec.mutual_tls

    def configuration(pem: Pem) -> Any:
        authorities = pem.authorities if mutual else None
        return grpc.ssl_server_certificate_configuration([(pem.key, pem.certificate)], authorities)

    first = security.pem
    assert first is not None, "asked before"
    shown = security.pem_version

    def newer() -> Any:
        """Return what is to be shown from now on; None: the same. Asked at every handshake, one at a time."""
        nonlocal shown
        version, pem = security.pem_version, security.pem
        if pem is None or version == shown:
            return None
        shown = version
        return configuration(pem)

    return grpc.dynamic_ssl_server_credentials(configuration(first), newer, require_client_authentication=mutual)


def open_channel(address: str, security: Security) -> aio.Channel:
    """Return a channel of an event loop to a process, which has to show its certificate if there is TLS."""
    credentials, options = _client_credentials(security)
    if credentials is None:
        return aio.insecure_channel(address, options=options)
    return aio.secure_channel(address, credentials, options=options)


def open_blocking_channel(address: str, security: Security) -> grpc.Channel:
    """Return the same for threads."""
    credentials, options = _client_credentials(security)
    if credentials is None:
        return grpc.insecure_channel(address, options=options)
    return grpc.secure_channel(address, credentials, options=options)


def _client_credentials(security: Security) -> tuple[grpc.ChannelCredentials | None, list[tuple[str, Any]]]:
    """Return what a client goes by (None: no TLS), and the options of its channels."""
    pem = security.pem
    options: list[tuple[str, Any]] = list(CLIENT_OPTIONS)
    if pem is None or not security.calls_tls:
        return None, options
    if security.spec.tls_name:
        options.append(("grpc.ssl_target_name_override", security.spec.tls_name))
    credentials = grpc.ssl_channel_credentials(
        root_certificates=pem.authorities or None,
        private_key=pem.key or None,
        certificate_chain=pem.certificate or None,
    )
    return credentials, options
