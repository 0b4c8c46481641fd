# SPDX-License-Identifier: Apache-2.0
"""Sockets that carry frames: how their addresses are written, how they are set up on both sides, and how they are ended.

Invariant: a Shared socket is closed only while nobody uses it, so that no call under way meets another socket that was given
its number.
"""

import contextlib
import math
import socket
import struct
import time
from collections.abc import Iterator
from threading import Lock

from oarlock.proto.errors import Malformed
from oarlock.proto.rpc.options import SILENT_SECONDS
from oarlock.proto.rpc.tls_socket import TlsSocket, wrapped
from oarlock.proto.security import Security

# Before the name of a socket that has no file, reachable within one network namespace (Linux).
ABSTRACT = "unix-abstract:"
# Two megabytes in flight each way: fewer turns between sender and receiver. The system may allow less.
BUFFER_BYTES = 1 << 20
# How long a connection may take to be made, and then each word of its first exchange.
CONNECT_SECONDS = 2.0
HELLO_SECONDS = 5.0
# Of Linux's struct tcp_info: what was sent again, and asked, and not confirmed; milliseconds since something was.
_RETRANSMITS, _PROBES, _LAST_CONFIRMED, _INFO_BYTES = 2, 3, 56, 60
_MILLISECONDS = struct.Struct("=I")


class Shared:
    """A socket that one thread at a time uses, and that any thread may end."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._lock = Lock()
        self._used = False
        self._ended = False

    @contextlib.contextmanager
    def used(self) -> Iterator[socket.socket]:
        """Use the socket within the body; OSError if it was ended."""
        connection = self.enter()
        try:
            yield connection
        finally:
            self.leave()

    def enter(self) -> socket.socket:
        """Use the socket until ``leave``; OSError if it was ended."""
        with self._lock:
            if self._ended:
                raise ConnectionAbortedError("the connection was ended")
            self._used = True
        return self._connection

    def leave(self) -> None:
        """Use it no more."""
        with self._lock:
            self._used = False
            if self._ended:
                self._connection.close()

    def fileno(self) -> int:
        """Return the number of the socket, which is its own as long as somebody uses it."""
        return self._connection.fileno()

    def hush(self) -> None:
        """Hear nothing more; what is being sent goes on."""
        with self._lock:
            self._shut(socket.SHUT_RD)

    def end(self) -> None:
        """Close; whoever uses it gets OSError, or the end of what comes."""
        with self._lock:
            self._shut(socket.SHUT_RDWR)
            self._ended = True
            if not self._used:
                self._connection.close()

    def _shut(self, how: int) -> None:
        if not self._ended:
            # It may be at its end already.
            with contextlib.suppress(OSError):
                self._connection.shutdown(how)


def prepare(connection: socket.socket) -> None:
    """Set a new connection up for frames. Its first exchange is to be had within a time; `settle` it then."""
    connection.settimeout(HELLO_SECONDS)
    if connection.family != socket.AF_UNIX:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # A machine that lost power says nothing, nor does one behind a link that is cut.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, SILENT_SECONDS)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 2)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
    else:
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            # Not for TCP, which finds its own and is slower with a fixed one.
            connection.setsockopt(socket.SOL_SOCKET, option, BUFFER_BYTES)


def greet(connection: socket.socket) -> None:
    """Make the handshake of TLS, if there is any, within the time of the first exchange; OSError."""
    if isinstance(connection, TlsSocket):
        connection.do_handshake()


def silent(connection: socket.socket) -> bool:
    """Tell whether the other side's system has confirmed nothing for too long though it was asked: the link is cut, most likely.

    One that is alive confirms, however busy its process is. So what TCP's own limit would end, a process that reads nothing for a
    while (its memory is full), is not silent.
    """
    if connection.family == socket.AF_UNIX or not hasattr(socket, "TCP_INFO"):
        return False
    info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _INFO_BYTES)
    if len(info) < _INFO_BYTES:
        return False
    asked = max(info[_RETRANSMITS], info[_PROBES])
    heard: int = _MILLISECONDS.unpack_from(info, _LAST_CONFIRMED)[0]
    return asked > 1 and heard >= SILENT_SECONDS * 1000


def settle(connection: socket.socket) -> None:
    """From now on wait without end: a call of the system then moves megabytes, and whoever gives up ends the connection."""
    connection.setblocking(True)


def within(seconds: float, until: float) -> float:
    """Return ``seconds``, or what is left ``until`` then by the monotonic clock; more than 0, which would mean not to wait."""
    return max(0.001, min(seconds, until - time.monotonic()))


def connect(address: str, called: str, security: Security | None = None, until: float = math.inf) -> socket.socket:
    """Connect to ``address``, as a process that was called at ``called`` (of gRPC) told it. What could leave this
    machine goes over TLS if calls do. It takes no longer than ``until``, by the monotonic clock. OSError, PSError."""
    if address.startswith(ABSTRACT):
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            # It would wait without end for a process that was stopped.
            connection.settimeout(within(CONNECT_SECONDS, until))
            connection.connect("\0" + address.removeprefix(ABSTRACT))
        except BaseException:
            connection.close()
            raise
    else:
        host, _, port = address.rpartition(":")
        host = host or ("" if called.startswith("unix:") else called.rpartition(":")[0])
        if not port.isdecimal() or int(port) > 65535 or not host:
            raise Malformed(f"{called} offers a socket at {address[:80]!r}, which is no address")
        host = host.strip("[]")
        connection = socket.create_connection((host, int(port)), timeout=within(CONNECT_SECONDS, until))
        context = None if security is None else security.calling_context()
        if security is not None and context is not None:
            connection = wrapped(connection, context, name=security.spec.tls_name or host)
    try:
        prepare(connection)
        connection.settimeout(within(HELLO_SECONDS, until))
        greet(connection)
    except BaseException:
        connection.close()
        raise
    return connection
