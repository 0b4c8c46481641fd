# SPDX-License-Identifier: Apache-2.0
"""The transport of programs without an event loop: each call is made, and waited for, in the thread that calls; or begun by
``begin``, so that one thread has several under way.

A bulk method travels as a frame on a socket that the thread has to itself meanwhile: one call of the system there, one or two
back, and no thread is woken but the server's. All else, and bulk methods where the other side offers no sockets or none can be
reached, goes through gRPC. Invariant: every failure leaves as a PSError; a connection whose exchange was not finished is ended
and never used again, so an answer always belongs to the question before it. Any thread, any number at once.
"""

import logging
import math
import os
import time
from threading import Lock
from typing import Any, Protocol

import grpc
from google.protobuf.message import Message

from oarlock.proto import frames
from oarlock.proto.arrays import encoded
from oarlock.proto.bulk import Bulk, Parts, inlined, opened
from oarlock.proto.common_pb2 import SocketsReply, SocketsRequest
from oarlock.proto.errors import DeadlineExceeded, Malformed, NotFound, Unavailable, VersionMismatch
from oarlock.proto.methods import METHODS, PROTOCOL, SOCKETS, Method
from oarlock.proto.rpc.client import OFFER_SECONDS, error_of, read_answer, roles_of_sockets
from oarlock.proto.rpc.credentials import open_blocking_channel
from oarlock.proto.rpc.exchange import Exchange, opened_exchange
from oarlock.proto.rpc.frame_client import ABSENT_SECONDS
from oarlock.proto.rpc.guard import AUTHORIZATION
from oarlock.proto.security import Security

logger = logging.getLogger(__name__)

# A process that lets nobody in within so long has no sockets for frames, as far as one can tell.
HASTY_SECONDS = 0.5
# Connections to a process that are kept when nobody uses them.
MOST_IDLE = 16


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

    def begin(
        self,
        address: str,
        method: str,
        request: Message | Bulk,
        *,
        timeout_seconds: float,
        connect_seconds: float = math.inf,
    ) -> "Begun":
        """Send a request and return the call, whose answer is to be taken; as ``call`` else.

        ``connect_seconds``: if there is no connection after so long, Unavailable; the call waits no longer than that.
        """
        found = METHODS.get(method)
        if found is None:
            raise NotFound(f"there is no method {method}", method=method)
        peer = self._peers.get(address) or self._peer(address)
        until = time.monotonic() + timeout_seconds
        if found.frame and self._frames:
            begun = peer.begin_framed(found, request, until, connect_seconds)
            if begun is not None:
                return begun
        data = encoded(inlined(request), f"{method} to {address}: the request")
        return peer.begin_single(found, data, until - time.monotonic(), bulk=isinstance(request, Bulk))

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
        self._calls: dict[str, Any] = {}
        self._offer: SocketsReply | None = None
        self._idle: list[Exchange] = []
        self._open: set[Exchange] = set()
        self._lock = Lock()
        self._closed = False
        # Until when it counts as one that takes no frames, or that none can reach from here.
        self._absent_until = 0.0

    def framed(self, method: Method, request: Message | Bulk, until: float) -> Any:
        """Return the answer, or None if there are no sockets for frames."""
        begun = self.begin_framed(method, request, until)
        return None if begun is None else begun.take()

    def begin_framed(
        self, method: Method, request: Message | Bulk, until: float, connect_seconds: float = math.inf
    ) -> "_Framed | None":
        """Send a frame and return the call, or None if there are no sockets for frames; Unavailable as ``begin`` has it."""
        message, parts = opened(request)
        kind = method.frame | (frames.BESIDE if isinstance(request, Bulk) else 0)
        data = encoded(message, f"{method.name} to {self._address}: the request")
        exchange = self._idle_one()
        if exchange is None:
            try:
                exchange = self._connect(roles_of_sockets(method), min(until, time.monotonic() + connect_seconds))
            except DeadlineExceeded:
                if time.monotonic() >= until:
                    raise
                raise Unavailable(
                    f"{self._address}: no connection after {connect_seconds} s", address=self._address
                ) from None
        if exchange is None:
            return None
        try:
            exchange.start(frames.encode(kind, data, parts), until)
        except BaseException as error:
            raise self._broken(exchange, method, error) from None
        return _Framed(self, exchange, method, until, bulk=isinstance(request, Bulk))

    def finish_framed(self, exchange: Exchange, method: Method, until: float, *, bulk: bool) -> Any:
        """Return the answer to a frame that was sent."""
        try:
            frame = exchange.finish(until)
        except BaseException as error:
            raise self._broken(exchange, method, error) from None
        self._give_back(exchange)
        reply = Bulk(read_answer(self._address, method, frame.message), Parts(frame.parts))
        return reply if bulk else inlined(reply)

    def _broken(self, exchange: Exchange, method: Method, error: BaseException) -> BaseException:
        """End a connection whose exchange failed; return what that is to the caller."""
        self.end(exchange)
        if isinstance(error, TimeoutError):
            return DeadlineExceeded(f"{method.name} at {self._address}: no answer in time", address=self._address)
        if isinstance(error, OSError | frames.Closed):
            # The process may be another one by now: ask it anew, on new connections.
            self._forget()
            words = "it was ended" if isinstance(error, frames.Closed) else error
            return Unavailable(f"the connection to {self._address} broke: {words}", address=self._address)
        return error

    def _idle_one(self) -> Exchange | None:
        with self._lock:
            return self._idle.pop() if self._idle else None

    def _give_back(self, exchange: Exchange) -> None:
        with self._lock:
            if not self._closed and len(self._idle) < MOST_IDLE and exchange in self._open:
                self._idle.append(exchange)
                return
        self.end(exchange)

    def end(self, exchange: Exchange) -> None:
        """End a connection, which is not used again."""
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

    def _connect(self, roles: frozenset[str], until: float) -> Exchange | None:
        """Return a new connection, or None if frames cannot travel to the other side; DeadlineExceeded, Unavailable.

        ``roles``: who is told of the sockets there.
        """
        if time.monotonic() < self._absent_until:
            return None
        asked, begun = False, time.monotonic()
        while True:
            offer = self._offer
            if offer is None:
                offer, asked = self._asked(roles, until), True
                self._offer = offer
            exchange = None if offer is None else opened_exchange(offer, self._address, until, self._security)
            if exchange is not None:
                with self._lock:
                    if not self._closed:
                        self._open.add(exchange)
                        return exchange
                exchange.end()
                raise Unavailable(f"the connection to {self._address} is closed", address=self._address)
            # What was offered earlier may have been another process.
            self._offer = None
            now = time.monotonic()
            if now >= until and now - begun < HASTY_SECONDS:
                # Who waits for no time says nothing about the other side.
                raise DeadlineExceeded(f"{self._address}: no answer in time", address=self._address)
            if asked:
                self._absent_until = now + ABSENT_SECONDS
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
            answer: bytes = self._call_of(method)(data, timeout=max(0.0, seconds), metadata=metadata)
            return answer
        except grpc.RpcError as error:
            raise error_of(error, self._address, method.name) from None
        except ValueError as error:
            raise Unavailable(f"the connection to {self._address} is closed: {error}", address=self._address) from None

    def begin_single(self, method: Method, data: bytes, seconds: float, *, bulk: bool) -> "_Single":
        """Begin a call of gRPC."""
        header = self._security.authorization(method.roles, self._address, method.name)
        metadata = () if header is None else ((AUTHORIZATION, header),)
        try:
            told = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        except OSError as error:
            raise Unavailable(f"{self._address} cannot be called now: {error}", address=self._address) from None
        try:
            future = self._call_of(method).future(data, timeout=max(0.0, seconds), metadata=metadata)
        except ValueError as error:
            os.close(told)
            raise Unavailable(f"the connection to {self._address} is closed: {error}", address=self._address) from None
        return _Single(self._address, method, future, told, bulk=bulk)

    def _call_of(self, method: Method) -> Any:
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


class Begun(Protocol):
    """A call under way. ``fileno``: what becomes readable once there is something to ``take``; one thread at a time."""

    def fileno(self) -> int: ...

    def take(self) -> Any:
        """Return the reply, or raise the error; waits for what is not there yet."""

    def drop(self) -> None:
        """Have no answer; in place of ``take``."""


class _Framed:
    """A call that travels as a frame."""

    def __init__(self, peer: _Peer, exchange: Exchange, method: Method, until: float, *, bulk: bool) -> None:
        self._peer = peer
        self._exchange = exchange
        self._method = method
        self._until = until
        self._bulk = bulk

    def fileno(self) -> int:
        return self._exchange.fileno()

    def take(self) -> Any:
        return self._peer.finish_framed(self._exchange, self._method, self._until, bulk=self._bulk)

    def drop(self) -> None:
        self._exchange.leave()
        self._peer.end(self._exchange)


class _Single:
    """A call of gRPC, whose threads say by a descriptor, ``told``, that it is over."""

    def __init__(self, address: str, method: Method, future: Any, told: int, *, bulk: bool) -> None:
        self._address = address
        self._method = method
        self._future = future
        self._bulk = bulk
        self._lock = Lock()
        self._over = False
        self._told = told
        future.add_done_callback(self._tell)

    def _tell(self, future: Any) -> None:
        with self._lock:
            if not self._over:
                os.eventfd_write(self._told, 1)

    def _end(self) -> None:
        with self._lock:
            self._over = True
            os.close(self._told)

    def fileno(self) -> int:
        return self._told

    def take(self) -> Any:
        try:
            data = self._future.result()
        except (grpc.RpcError, grpc.FutureCancelledError) as error:
            if isinstance(error, grpc.RpcError):
                raise error_of(error, self._address, self._method.name) from None
            raise Unavailable(f"the connection to {self._address} is closed", address=self._address) from None
        finally:
            self._end()
        message = read_answer(self._address, self._method, data)
        return Bulk(message, ()) if self._bulk else message

    def drop(self) -> None:
        self._end()
        self._future.cancel()
