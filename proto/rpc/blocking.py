# SPDX-License-Identifier: Apache-2.0
"""The transport of programs without an event loop: each call is made, and waited for, in the thread that calls.

A bulk method travels as a frame on a socket that the thread has to itself meanwhile: one call of the system there, one or two
back, and no thread is woken but the server's. All else, and bulk methods where the other side offers no sockets or none can be
reached, goes through gRPC. Invariant: every failure leaves as a PSError; a connection whose exchange was not finished is ended
and never used again, so an answer always belongs to the question before it. Any thread, any number at once.
"""

import contextlib
import logging
import socket
import struct
import time
from collections.abc import Callable
from threading import Lock
from typing import Any

import grpc
from google.protobuf.message import Message

from oarlock.proto import frames
from oarlock.proto.arrays import encoded
from oarlock.proto.buffers import Buffers
from oarlock.proto.bulk import Bulk, Parts, inlined, opened
from oarlock.proto.common_pb2 import SocketsReply, SocketsRequest
from oarlock.proto.errors import DeadlineExceeded, Malformed, NotFound, PSError, Unavailable, VersionMismatch
from oarlock.proto.methods import METHODS, PROTOCOL, SOCKETS, Method
from oarlock.proto.rpc import sockets
from oarlock.proto.rpc.client import OFFER_SECONDS, error_of, read_answer, roles_of_sockets
from oarlock.proto.rpc.connection import MAX_ADDRESSES
from oarlock.proto.rpc.credentials import open_blocking_channel
from oarlock.proto.rpc.frame_client import ABSENT_SECONDS
from oarlock.proto.rpc.guard import AUTHORIZATION
from oarlock.proto.rpc.tls_socket import TlsSocket
from oarlock.proto.security import Security

logger = logging.getLogger(__name__)

# Connections to a process that are kept when nobody uses them.
MOST_IDLE = 16
# An answer of so many bytes is taken in by one call of the system.
FIRST_BYTES = 1 << 14
_TIME = struct.Struct("@ll")


class BlockingTransport:
    """Calls processes by address: ``host:port`` or ``unix:PATH``. ``frames`` = False: by gRPC alone.

    ``security``: the token that each call gives, and how the other side has to show who it is.
    """

    def __init__(self, *, frames: bool = True, security: Security | None = None) -> None:
        self._frames = frames
        self._security = security or Security()
        self._peers: dict[str, _Peer] = {}
        self._lock = Lock()
        self._closed = False

    def call(self, address: str, method: str, request: Message | Bulk, *, timeout_seconds: float) -> Any:
        """Return the reply, or raise the error that the other side raised; DeadlineExceeded after the timeout.

        The reply to a Bulk is a Bulk.
        """
        found = METHODS.get(method)
        if found is None:
            raise NotFound(f"there is no method {method}", method=method)
        peer = self._peers.get(address) or self._peer(address)
        until = time.monotonic() + timeout_seconds
        if found.frame and self._frames:
            answer = peer.framed(found, request, until)
            if answer is not None:
                return answer
        data = encoded(inlined(request), f"{method} to {address}: the request")
        message = read_answer(address, found, peer.single(found, found.roles, data, until - time.monotonic()))
        return Bulk(message, ()) if isinstance(request, Bulk) else message

    def _peer(self, address: str) -> "_Peer":
        with self._lock:
            if self._closed:
                raise Unavailable(f"the connection to {address} is closed", address=address)
            return self._peers.setdefault(address, _Peer(address, self._security))

    def close(self) -> None:
        """End all connections, those in use too; idempotent."""
        with self._lock:
            self._closed = True
            peers, self._peers = list(self._peers.values()), {}
        for peer in peers:
            peer.close()


class _Peer:
    """A process at ``address``."""

    def __init__(self, address: str, security: Security) -> None:
        self._address = address
        self._security = security
        # The version of the certificates that the channel was made with.
        self._version = security.pem_version
        self._channel = open_blocking_channel(address, security)
        self._calls: dict[str, Callable[..., bytes]] = {}
        self._offer: SocketsReply | None = None
        self._idle: list[_Exchange] = []
        self._open: set[_Exchange] = set()
        self._lock = Lock()
        self._closed = False
        # Until when it counts as one that takes no frames, or that none can reach from here.
        self._absent_until = 0.0

    def framed(self, method: Method, request: Message | Bulk, until: float) -> Any:
        """Return the answer, or None if there are no sockets for frames."""
        message, parts = opened(request)
        kind = method.frame | (frames.BESIDE if isinstance(request, Bulk) else 0)
        data = encoded(message, f"{method.name} to {self._address}: the request")
        exchange = self._idle_one() or self._connect(roles_of_sockets(method), until)
        if exchange is None:
            return None
        try:
            frame = exchange.run(frames.encode(kind, data, parts), until)
        except BaseException as error:
            self._end(exchange)
            if isinstance(error, TimeoutError):
                raise DeadlineExceeded(
                    f"{method.name} at {self._address}: no answer in time", address=self._address
                ) from None
            if isinstance(error, OSError | frames.Closed):
                # The process may be another one by now: ask it anew, on new connections.
                self._forget()
                words = "it was ended" if isinstance(error, frames.Closed) else error
                raise Unavailable(f"the connection to {self._address} broke: {words}", address=self._address) from None
            raise
        self._give_back(exchange)
        reply = Bulk(read_answer(self._address, method, frame.message), Parts(frame.parts))
        return reply if isinstance(request, Bulk) else inlined(reply)

    def _idle_one(self) -> "_Exchange | None":
        with self._lock:
            return self._idle.pop() if self._idle else None

    def _give_back(self, exchange: "_Exchange") -> None:
        with self._lock:
            if not self._closed and len(self._idle) < MOST_IDLE and exchange in self._open:
                self._idle.append(exchange)
                return
        self._end(exchange)

    def _end(self, exchange: "_Exchange") -> None:
        with self._lock:
            self._open.discard(exchange)
        exchange.end()

    def _forget(self) -> None:
        """End the connections that nobody uses, and what is known of where to make others."""
        with self._lock:
            idle, self._idle, self._offer = self._idle, [], None
            self._open.difference_update(idle)
        for each in idle:
            each.end()

    def _connect(self, roles: frozenset[str], until: float) -> "_Exchange | None":
        """Return a new connection, or None if frames cannot travel to the other side; DeadlineExceeded, Unavailable.

        ``roles``: who is told of the sockets there.
        """
        if time.monotonic() < self._absent_until:
            return None
        asked = False
        while True:
            offer = self._offer
            if offer is None:
                offer, asked = self._asked(roles, until), True
                self._offer = offer
            exchange = None if offer is None else _opened(offer, self._address, self._security)
            if exchange is not None:
                with self._lock:
                    if not self._closed:
                        self._open.add(exchange)
                        return exchange
                exchange.end()
                raise Unavailable(f"the connection to {self._address} is closed", address=self._address)
            # What was offered earlier may have been another process.
            self._offer = None
            if asked:
                self._absent_until = time.monotonic() + ABSENT_SECONDS
                logger.warning(
                    "event=no_frames address=%s (bulk data goes through gRPC, which is slower)", self._address
                )
                return None

    def _asked(self, roles: frozenset[str], until: float) -> SocketsReply | None:
        """Return on which sockets the other side takes frames, if it says so."""
        method = METHODS[SOCKETS]
        data = SocketsRequest(protocol=PROTOCOL).SerializeToString()
        try:
            answer = self.single(method, roles, data, min(OFFER_SECONDS, until - time.monotonic()))
            offer: SocketsReply = read_answer(self._address, method, answer)
            return offer
        except (NotFound, VersionMismatch, Malformed):
            return None

    def single(self, method: Method, roles: frozenset[str], data: bytes, seconds: float) -> bytes:
        """Return the answer to a call of gRPC, which ``roles`` may make."""
        header = self._security.authorization(roles, self._address, method.name)
        metadata = () if header is None else ((AUTHORIZATION, header),)
        try:
            return self._call_of(method)(data, timeout=max(0.0, seconds), metadata=metadata)
        except grpc.RpcError as error:
            raise error_of(error, self._address, method.name) from None
        except ValueError as error:
            raise Unavailable(f"the connection to {self._address} is closed: {error}", address=self._address) from None

    def _call_of(self, method: Method) -> Callable[..., bytes]:
        version = self._security.pem_version
        with self._lock:
            if version != self._version and not self._closed:
                # Calls that are under way keep the channel before until they end.
                self._version, self._channel = version, open_blocking_channel(self._address, self._security)
                self._calls.clear()
            call = self._calls.get(method.name)
            if call is None:
                call = self._calls[method.name] = self._channel.unary_unary(method.path)
            return call

    def close(self) -> None:
        with self._lock:
            self._closed = True
            left = list(self._open)
            self._idle.clear()
            self._open.clear()
        for each in left:
            each.end()
        self._channel.close()


class _Exchange:
    """A connection, for one exchange at a time."""

    def __init__(self, connection: socket.socket) -> None:
        self._shared = sockets.Shared(connection)
        self._receiver = frames.Receiver(connection, Buffers(frames.MOST_KEPT), first_bytes=FIRST_BYTES)
        self._seconds = 0.0

    def greet(self, token: bytes) -> None:
        """Have this process let in; OSError, PSError, Closed."""
        with self._shared.used() as connection:
            frames.send(connection, frames.encode(frames.HELLO, token))
            _checked(self._receiver.receive(), self._receiver)
            sockets.settle(connection)

    def run(self, buffers: list[memoryview], until: float) -> frames.Frame:
        """Send a frame and return the answer; TimeoutError once the monotonic clock says ``until``, OSError, Closed, PSError."""

        def moved() -> None:
            if time.monotonic() > until:
                raise TimeoutError

        with self._shared.used() as connection:
            seconds = until - time.monotonic()
            if seconds <= 0:
                raise TimeoutError
            self._limit(connection, seconds)
            try:
                frames.send(connection, frames.stamped(buffers, seconds), moved)
                head = self._receiver.head()
                return _checked(self._receiver.body(head, moved), self._receiver)
            except BlockingIOError:
                # What the system says at the end of the time that it was given.
                raise TimeoutError from None

    def _limit(self, connection: socket.socket, seconds: float) -> None:
        """Have the system wait for so long at most; by a limit of its own, which costs nothing for each call."""
        # It need not be exact, but not less either: then the same serves for most calls.
        if not seconds <= self._seconds <= 1.1 * seconds:
            self._seconds = 1.05 * seconds
            if isinstance(connection, TlsSocket):
                # TLS asks the system anew where that gave up.
                connection.settimeout(self._seconds)
                return
            whole = int(self._seconds)
            limit = _TIME.pack(whole, int((self._seconds - whole) * 1e6) + 1)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)

    def end(self) -> None:
        """Close; whoever uses it gets an error."""
        self._shared.end()


def _opened(offer: SocketsReply, called: str, security: Security) -> _Exchange | None:
    """Return a connection to the first of the offered addresses that lets this process in, None if none does."""
    for address in offer.addresses[:MAX_ADDRESSES]:
        with contextlib.ExitStack() as stack:
            try:
                made = _Exchange(sockets.connect(address, called, security))
                stack.callback(made.end)
                made.greet(offer.token)
            except (OSError, frames.Closed, PSError) as error:
                logger.info("event=socket_refused address=%s called=%s error=%s", address, called, error)
                continue
            stack.pop_all()
            return made
    return None


def _checked(reply: frames.Frame, receiver: frames.Receiver) -> frames.Frame:
    if reply.kind != frames.REPLY:
        raise Malformed(f"a frame of kind {reply.kind} came as an answer")
    if receiver.ahead:
        raise Malformed("more came than an answer")
    return reply
