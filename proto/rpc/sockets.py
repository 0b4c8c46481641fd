# SPDX-License-Identifier: Apache-2.0
"""Sockets that carry frames: how their addresses are written, and how they are set up on both sides."""

import socket

from oarlock.proto.errors import Malformed

# Before the name of a socket that has no file, reachable within one network namespace (Linux).
ABSTRACT = "unix-abstract:"
# Two megabytes in flight each way: fewer turns between sender and receiver. The system may allow less.
BUFFER_BYTES = 1 << 20
CONNECT_SECONDS = 2.0


def prepare(connection: socket.socket) -> None:
    """Set a new connection up for frames; blocking."""
    connection.setblocking(True)
    if connection.family != socket.AF_UNIX:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # A machine that lost power says nothing.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 60)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 10)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
    else:
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            # Not for TCP, which finds its own and is slower with a fixed one.
            connection.setsockopt(socket.SOL_SOCKET, option, BUFFER_BYTES)


def connect(address: str, called: str) -> socket.socket:
    """Connect to ``address``, as a process that was called at ``called`` (of gRPC) told it; OSError, Malformed."""
    if address.startswith(ABSTRACT):
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.connect("\0" + address.removeprefix(ABSTRACT))
        except BaseException:
            connection.close()
            raise
    else:
        host, _, port = address.rpartition(":")
        host = host or called.rpartition(":")[0]
        if not port.isdecimal() or int(port) > 65535 or not host or host.startswith("unix"):
            raise Malformed(f"{called} offers a socket at {address[:80]!r}, which is no address")
        connection = socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_SECONDS)
    prepare(connection)
    return connection
