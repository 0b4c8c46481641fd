# SPDX-License-Identifier: Apache-2.0
"""An HTTP/1.1 server, with TLS where there is some: a thread for each connection, of which there are so many and no more.

Invariant: a newcomer is let in always, unless every connection is being worked for: where there is no room, who has been silent
for longest goes. A peer has a limited time for a head, a body and to take an answer, and none holds memory for a body that was
not admitted by its head. Whatever a peer sends, the others are served. ``answer`` is called in the connections' threads.
"""

import contextlib
import logging
import socket
import ssl
import time
from collections.abc import Callable
from http import HTTPStatus
from threading import Condition, Thread

import numpy as np

from oarlock.proto.errors import InvalidArgument
from oarlock.serving.http_request import (
    END,
    HEAD_BYTES,
    Refused,
    Request,
    Response,
    error_response,
    head_of,
    parse_head,
)

logger = logging.getLogger(__name__)

MAX_CONNECTIONS = 128
BACKLOG = 512
MAX_BODY_BYTES = 64 << 20
# Of all bodies that are received or worked on.
BODIES_BYTES = 256 << 20
# For a head once it began, for a peer that is to take an answer, and for TLS to begin.
SECONDS = 5.0
# How long a connection may be silent between two requests.
IDLE_SECONDS = 60.0
# What a body and an answer have to move at, beside SECONDS.
BYTES_PER_SECOND = 1 << 20
# What a peer may still send after it was refused; a connection that is closed on unread bytes takes the answer along.
LEFTOVER_BYTES = 256 << 10
# Connections that are ending already while newcomers have their places: at most so many beside the others.
_SPARE = 8
_CHUNK = 64 << 10
_PAUSE_SECONDS = 0.25
_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"

Admit = Callable[[Request], Response | None]
Answer = Callable[[Request], Response]


class _Gone(Exception):
    """The peer went, was too slow, or had to go."""


class _Connection:
    """A peer; ``since``: when it was last heard of, ``busy``: it is worked for, ``ended``: another one takes its place."""

    def __init__(self, peer: socket.socket) -> None:
        self.peer = peer
        self.thread: Thread | None = None
        self.since = time.monotonic()
        self.busy = False
        self.ended = False
        self.buffer = bytearray()

    def receive(self, until: float, into: memoryview | None = None) -> int:
        """Receive something; return how many bytes came."""
        left = until - time.monotonic()
        if left <= 0:
            raise _Gone
        self.peer.settimeout(left)
        if into is not None:
            count = self.peer.recv_into(into[:_CHUNK])
        else:
            data = self.peer.recv(_CHUNK)
            count = len(data)
            self.buffer += data
        if not count:
            raise _Gone
        self.since = time.monotonic()
        return count

    def head(self, idle_seconds: float, seconds: float) -> bytes:
        """Return the next head, without the empty line at its end."""
        until = time.monotonic() + (idle_seconds if not self.buffer else seconds)
        begun = bool(self.buffer)
        while (end := self.buffer.find(END)) < 0:
            if len(self.buffer) > HEAD_BYTES:
                break
            self.receive(until)
            if not begun:
                begun, until = True, time.monotonic() + seconds
        if end < 0 or end > HEAD_BYTES:
            raise Refused(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, f"a head has {HEAD_BYTES} bytes at most")
        head = bytes(self.buffer[:end])
        del self.buffer[: end + len(END)]
        return head

    def body(self, length: int, seconds: float) -> memoryview:
        """Return a body of ``length`` bytes."""
        # Pages that nothing came for are no memory.
        whole = np.empty(length, np.uint8).data
        have = min(length, len(self.buffer))
        whole[:have] = self.buffer[:have]
        del self.buffer[:have]
        until = time.monotonic() + seconds + length / BYTES_PER_SECOND
        while have < length:
            have += self.receive(until, whole[have:])
        return whole

    def send(self, parts: list[bytes | memoryview], seconds: float) -> None:
        """Send all of it."""
        size = sum(len(part) for part in parts)
        until = time.monotonic() + seconds + size / BYTES_PER_SECOND
        for part in [b"".join(parts)] if size <= _CHUNK else parts:
            left = memoryview(part)
            while left:
                rest = until - time.monotonic()
                if rest <= 0:
                    raise _Gone
                self.peer.settimeout(rest)
                left = left[self.peer.send(left) :]


class HttpServer:
    """Serves ``answer`` at ``listen`` (host:port, port 0: any free one).

    ``admit`` sees a head before anything of its body is taken: what it returns is answered in its place. ``context()``: by what
    TLS goes for a newcomer, None: there is none.
    """

    def __init__(
        self,
        answer: Answer,
        *,
        listen: str,
        admit: Admit = lambda request: None,
        context: Callable[[], ssl.SSLContext | None] = lambda: None,
        connections: int = MAX_CONNECTIONS,
        seconds: float = SECONDS,
        idle_seconds: float = IDLE_SECONDS,
    ) -> None:
        self._answer = answer
        self._listen = listen
        self._admit = admit
        self._context = context
        self._most = connections
        self._seconds = seconds
        self._idle_seconds = idle_seconds
        self._changed = Condition()
        self._connections: set[_Connection] = set()
        self._bodies = 0
        self._over = False
        self._listener: socket.socket | None = None
        self._thread: Thread | None = None
        # By status.
        self.answered: dict[int, int] = {}

    @property
    def connections(self) -> int:
        return len(self._connections)

    def start(self) -> str:
        """Listen; return the address with its port. InvalidArgument if nobody can listen there."""
        host, _, port = self._listen.rpartition(":")
        if not host or not port.isdecimal() or int(port) > 65535:
            raise InvalidArgument(f"cannot listen on {self._listen!r}: give HOST:PORT with a port from 0 to 65535")
        try:
            family, _, _, _, place = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)[0]
            self._listener = socket.create_server(place[:2], family=family, backlog=BACKLOG)
        except OSError as error:
            raise InvalidArgument(f"cannot listen on {self._listen}: {error.strerror or error}") from None
        self._thread = Thread(target=self._accept, args=(self._listener,), name="oarlock-http", daemon=True)
        self._thread.start()
        return f"{host}:{self._listener.getsockname()[1]}"

    def stop(self, grace_seconds: float = 0.5) -> None:
        """Let nobody in any more, answer what is under way within the grace; idempotent."""
        if self._listener is None or self._thread is None:
            return
        until = time.monotonic() + grace_seconds
        with self._changed:
            self._over = True
            for connection in self._connections:
                if not connection.busy:
                    _end(connection.peer)
        _end(self._listener)
        self._thread.join()
        self._listener.close()
        with self._changed:
            self._changed.wait_for(lambda: not self._connections, max(0.0, until - time.monotonic()))
            left = list(self._connections)
        for connection in left:
            _end(connection.peer)
        for connection in left:
            if connection.thread is not None:
                connection.thread.join()
        self._listener = self._thread = None

    def _accept(self, listener: socket.socket) -> None:
        while not self._over:
            try:
                peer, _ = listener.accept()
            except ConnectionError:
                continue
            except OSError as error:
                if not self._over:
                    logger.warning("event=http_accept_failed error=%s", error)
                    with self._changed:
                        self._changed.wait_for(lambda: self._over, _PAUSE_SECONDS)
                continue
            if not self._let_in(peer):
                peer.close()

    def _let_in(self, peer: socket.socket) -> bool:
        connection = _Connection(peer)
        with self._changed:
            if self._over or len(self._connections) >= self._most + _SPARE:
                return False
            if len(self._connections) >= self._most:
                silent = [each for each in self._connections if not each.busy and not each.ended]
                if not silent:
                    return False
                victim = min(silent, key=lambda each: each.since)
                victim.ended = True
                _end(victim.peer)
            self._connections.add(connection)
            connection.thread = Thread(target=self._serve, args=(connection,), name="oarlock-http-peer", daemon=True)
            connection.thread.start()
        return True

    def _serve(self, connection: _Connection) -> None:
        try:
            with contextlib.suppress(_Gone, OSError):
                connection.peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                if (context := self._context()) is not None:
                    connection.peer.settimeout(self._seconds)
                    # At once the connection's own: another thread may have to end it.
                    connection.peer = wrapped = context.wrap_socket(
                        connection.peer, server_side=True, do_handshake_on_connect=False
                    )
                    wrapped.do_handshake()
                while self._one(connection):
                    pass
        except Exception:
            logger.exception("event=http_connection_failed")
        finally:
            connection.peer.close()
            with self._changed:
                self._connections.discard(connection)
                self._changed.notify_all()

    def _one(self, connection: _Connection) -> bool:
        """Answer the next request; return whether another one may follow."""
        try:
            request = parse_head(connection.head(self._idle_seconds, self._seconds))
            if request.length > MAX_BODY_BYTES:
                raise Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"a body has {MAX_BODY_BYTES} bytes at most")
        except Refused as refused:
            self._refuse(connection, error_response(refused.status, refused.text))
            return False
        if (refusal := self._admit(request)) is not None:
            if request.length:
                self._refuse(connection, refusal)
                return False
            self._send(connection, refusal, request.keeps)
            return request.keeps
        if not self._take(request.length):
            words = "overloaded: too many bodies are under way: ask again in a moment"
            self._refuse(connection, error_response(HTTPStatus.SERVICE_UNAVAILABLE, words, (("Retry-After", "1"),)))
            return False
        try:
            if request.length and "expect" in request.headers and not connection.buffer:
                connection.send([_CONTINUE], self._seconds)
            request = request._replace(body=connection.body(request.length, self._seconds))
            with self._changed:
                connection.busy = True
            try:
                response = self._answer(request)
                keeps = request.keeps and not self._over
                self._send(connection, response, keeps)
            finally:
                with self._changed:
                    connection.busy = False
            return keeps
        finally:
            self._take(-request.length)

    def _take(self, size: int) -> bool:
        with self._changed:
            if size > 0 and self._bodies + size > BODIES_BYTES:
                return False
            self._bodies += size
            return True

    def _send(self, connection: _Connection, response: Response, keeps: bool) -> None:
        with self._changed:
            self.answered[response.status.value] = self.answered.get(response.status.value, 0) + 1
        connection.send([head_of(response, keeps=keeps), *response.parts], self._seconds)

    def _refuse(self, connection: _Connection, response: Response) -> None:
        """Answer, and take in what the peer is sending already, or it would not see the answer."""
        self._send(connection, response, keeps=False)
        if not isinstance(connection.peer, ssl.SSLSocket):
            connection.peer.shutdown(socket.SHUT_WR)
        until, left = time.monotonic() + self._seconds / 5, LEFTOVER_BYTES
        while left > 0:
            connection.buffer.clear()
            left -= connection.receive(until)


def _end(peer: socket.socket) -> None:
    """Wake whoever waits for a socket: there is nothing to come."""
    with contextlib.suppress(OSError):
        peer.shutdown(socket.SHUT_RDWR)
