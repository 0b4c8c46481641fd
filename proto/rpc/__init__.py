# SPDX-License-Identifier: Apache-2.0
"""gRPC: the only folder that knows it. No gRPC type leaves it.

Reading order: status (errors), server, client, frame_server and frame_client (the sockets that pulls and pushes travel on), lane
(the streams that take their place).
"""

from oarlock.proto.rpc.blocking import BlockingTransport
from oarlock.proto.rpc.client import GrpcTransport
from oarlock.proto.rpc.server import GrpcServer
from oarlock.proto.rpc.status import from_status, to_status

__all__ = ["BlockingTransport", "GrpcServer", "GrpcTransport", "from_status", "to_status"]
