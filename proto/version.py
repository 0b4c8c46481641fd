# SPDX-License-Identifier: Apache-2.0
"""The version handshake: both sides speak the same version of the messages, or say so and part."""

from oarlock.proto.common_pb2 import HelloReply, HelloRequest
from oarlock.proto.errors import VersionMismatch
from oarlock.proto.methods import PROTOCOL


def check_protocol(protocol: int) -> None:
    """Raise VersionMismatch unless the other side speaks our version of the messages."""
    if protocol != PROTOCOL:
        raise VersionMismatch(
            f"the caller speaks protocol {protocol}, this process {PROTOCOL}: install the same release of oarlock on both sides"
        )


def hello(request: HelloRequest, role: str, version: str) -> HelloReply:
    """Answer a greeting; VersionMismatch when the two sides cannot talk."""
    check_protocol(request.protocol)
    return HelloReply(protocol=PROTOCOL, version=version, role=role)
