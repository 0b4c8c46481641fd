# SPDX-License-Identifier: Apache-2.0
"""The page of a process's metrics over HTTP or HTTPS: GET /metrics, and /healthz for who asks whether it lives; else 404.

Whoever ``allowed`` does not let in gets 401, whatever is asked for, but for /healthz.

Invariant: one thread serves everybody and waits for nobody: a connection has ``seconds`` for all that it wants, holds at most
``HEAD_BYTES`` of what its peer says, and when there are ``MAX_CONNECTIONS`` the oldest one goes. So half a request, a peer that
reads nothing or a crowd costs no thread, little memory, and no other's scrape. The thread is a daemon: it ends with the process.
"""

import argparse
import contextlib
import logging
import selectors
import socket
import ssl
import time
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from io import BytesIO
from threading import Thread

from oarlock.telemetry.exposition import CONTENT_TYPE

logger = logging.getLogger(__name__)

PATH = "/metrics"
HEALTH = "/healthz"
LOOPBACK = "127.0.0.1"
HEAD_BYTES = 16 << 10
MAX_CONNECTIONS = 32
# Those who are not let in yet: where there is no room for them either, a scraper comes again after a second.
BACKLOG = 512
SECONDS = 5.0
# What a peer may still send after it was answered; a connection that is closed on unread bytes takes the answer along.
LEFTOVER_BYTES = 256 << 10
# After a failed accept (no file descriptors left) there is nothing to do for so long.
PAUSE_SECONDS = 0.25
_CHUNK = 16 << 10


def read_port(text: str) -> int:
    """Return a port that a user gave; for argparse."""
    if not (text.isascii() and text.isdecimal()) or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r}: give a port from 0 (any free one) to 65535")
    return int(text)


class _Request(BaseHTTPRequestHandler):
    """One request whose head is at hand: the standard library reads it and forms the answer, both in memory."""

    error_message_format = "%(code)d %(message)s\n"
    error_content_type = "text/plain; charset=utf-8"

    def __init__(self, head: bytes, page: Callable[[], str], allowed: Callable[[str], bool]) -> None:
        # The base class would take a socket, and wait on it.
        self.rfile = BytesIO(head)
        self.wfile = self._out = BytesIO()
        self.client_address = ("", 0)
        self._page = page
        self._allowed = allowed

    def answer(self) -> bytes:
        """Return all that the peer is to get."""
        try:
            self.handle_one_request()
        except Exception as error:
            logger.warning("event=metrics_failed error=%s: %s", type(error).__name__, error)
            # Without whatever was put together so far.
            self._out.seek(0)
            self._out.truncate()
            self._headers_buffer: list[bytes] = []
            self.requestline, self.request_version, self.command = "", "HTTP/1.0", "GET"
            self.send_error(HTTPStatus.INTERNAL_SERVER_ERROR)
        return self._out.getvalue()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path == HEALTH:
            self._send(b"ok\n")
            return
        given = self.headers.get_all("Authorization", [])
        # Two of them are one too many: somebody else may go by the other one.
        if not self._allowed(given[0] if len(given) == 1 else ""):
            self.send_error(HTTPStatus.UNAUTHORIZED, "give a token of role read or admin: docs/security.md")
            return
        if path != PATH:
            self.send_error(HTTPStatus.NOT_FOUND, f"the metrics are at {PATH}")
            return
        # A label may hold what UTF-8 has no form for.
        self._send(self._page().encode(errors="replace"))

    def _send(self, body: bytes) -> None:
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", CONTENT_TYPE)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_HEAD = do_GET

    def send_response(self, code: int, message: str | None = None) -> None:
        super().send_response(code, message)
        if code == HTTPStatus.UNAUTHORIZED:
            self.send_header("WWW-Authenticate", "Bearer")

    def version_string(self) -> str:
        return "oarlock"

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing: anybody could fill the log."""


class _Connection:
    """A peer: what it said so far, what it is still to be sent, and until when it may stay."""

    def __init__(self, peer: socket.socket, end: float, answers: Callable[[bytes], bytes]) -> None:
        self.peer = peer
        self.end = end
        self._answers = answers
        self._shaken = not isinstance(peer, ssl.SSLSocket)
        # What TLS waits for, where that is not what is to be done.
        self._wants = 0
        self.head = bytearray()
        self.answer: memoryview | None = None
        self.leftover = 0

    def wants(self) -> int:
        return self._wants or (selectors.EVENT_WRITE if self.answer else selectors.EVENT_READ)

    def move(self) -> bool:
        """Read or write what can be without waiting; return False once it is over."""
        self._wants = 0
        try:
            if isinstance(self.peer, ssl.SSLSocket) and not self._shaken:
                self.peer.do_handshake()
                self._shaken = True
            goes_on = self._some()
            # What TLS has read already wakes nobody.
            while goes_on and not self.answer and isinstance(self.peer, ssl.SSLSocket) and self.peer.pending():
                goes_on = self._some()
            return goes_on
        except ssl.SSLWantReadError:
            self._wants = selectors.EVENT_READ
        except ssl.SSLWantWriteError:
            self._wants = selectors.EVENT_WRITE
        return True

    def _some(self) -> bool:
        if self.answer:
            self.answer = self.answer[self.peer.send(self.answer) :]
            if not self.answer:
                self.peer.shutdown(socket.SHUT_WR)
            return True
        data = self.peer.recv(_CHUNK)
        if not data:
            return False
        if self.answer is not None:
            self.leftover += len(data)
            return self.leftover <= LEFTOVER_BYTES
        self.head += data
        if len(self.head) > HEAD_BYTES:
            self.answer = memoryview(_TOO_LARGE)
        elif b"\r\n\r\n" in self.head or b"\n\n" in self.head:
            self.answer = memoryview(self._answers(bytes(self.head)))
        # To an empty line nothing is answered.
        return self.answer is None or len(self.answer) > 0


_TOO_LARGE = b"HTTP/1.0 431 Request Header Fields Too Large\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"


class MetricsServer:
    """Serves ``page()`` at ``host``:``port`` (0: any free port), from ``start()`` to ``stop()``.

    ``allowed`` tells of an Authorization header's value (empty: there is none) whether it opens the page; ``context()``: by
    what TLS goes for a newcomer, None: there is none.
    """

    def __init__(
        self,
        page: Callable[[], str],
        *,
        host: str = LOOPBACK,
        port: int = 0,
        seconds: float = SECONDS,
        allowed: Callable[[str], bool] = lambda header: True,
        context: Callable[[], ssl.SSLContext | None] = lambda: None,
    ) -> None:
        self._page = page
        self._allowed = allowed
        self._context = context
        self._host = host
        self._port = port
        self._seconds = seconds
        self._connections: dict[socket.socket, _Connection] = {}
        self._deaf_until = 0.0
        self._selector: selectors.BaseSelector
        self._listener: socket.socket
        self._wake: socket.socket
        self._woken: socket.socket
        self._thread: Thread | None = None

    def start(self) -> str:
        """Listen; return the address as host:port. OSError if nobody can listen there."""
        family, _, _, _, place = socket.getaddrinfo(
            self._host, self._port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        self._listener = socket.create_server(place[:2], family=family, backlog=BACKLOG)
        self._listener.setblocking(False)
        self._wake, self._woken = socket.socketpair()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._selector.register(self._woken, selectors.EVENT_READ)
        self._thread = Thread(target=self._serve, name="oarlock-metrics", daemon=True)
        self._thread.start()
        shown = f"[{self._host}]" if ":" in self._host else self._host
        return f"{shown}:{self._listener.getsockname()[1]}"

    def stop(self) -> None:
        """Stop listening and end the thread; idempotent."""
        if self._thread is None:
            return
        self._wake.close()
        self._thread.join()
        self._thread = None

    def _serve(self) -> None:
        try:
            while self._turn():
                pass
        finally:
            for connection in list(self._connections.values()):
                self._drop(connection)
            self._selector.close()
            self._listener.close()
            self._woken.close()

    def _turn(self) -> bool:
        """Deal with whoever can be dealt with now, or becomes so soon; return False at the end."""
        now = time.monotonic()
        ends = [c.end for c in self._connections.values()]
        if self._deaf_until:
            ends.append(self._deaf_until)
        for key, _ in self._selector.select(max(0.0, min(ends) - now) if ends else None):
            if key.fileobj is self._woken:
                return False
            if key.fileobj is self._listener:
                self._accept()
            # One before it in this round may have taken its place.
            elif key.data.peer in self._connections:
                self._move(key.data)
        now = time.monotonic()
        for connection in [c for c in self._connections.values() if c.end <= now]:
            self._drop(connection)
        if self._deaf_until and now >= self._deaf_until:
            self._deaf_until = 0.0
            self._selector.register(self._listener, selectors.EVENT_READ)
        return True

    def _accept(self) -> None:
        try:
            peer, _ = self._listener.accept()
        except (BlockingIOError, ConnectionError):
            return
        except OSError as error:
            logger.warning("event=metrics_accept_failed error=%s", error)
            self._selector.unregister(self._listener)
            self._deaf_until = time.monotonic() + PAUSE_SECONDS
            return
        if len(self._connections) >= MAX_CONNECTIONS:
            self._drop(next(iter(self._connections.values())))
        peer.setblocking(False)
        try:
            # Who is gone by now would be no socket of TLS.
            peer.getpeername()
            if (context := self._context()) is not None:
                peer = context.wrap_socket(peer, server_side=True, do_handshake_on_connect=False)
        except Exception as error:
            logger.debug("event=metrics_connection_failed error=%s: %s", type(error).__name__, error)
            peer.close()
            return
        connection = self._connections[peer] = _Connection(peer, time.monotonic() + self._seconds, self._answered)
        self._selector.register(peer, connection.wants(), connection)

    def _answered(self, head: bytes) -> bytes:
        return _Request(head, self._page, self._allowed).answer()

    def _move(self, connection: _Connection) -> None:
        before = connection.wants()
        try:
            goes_on = connection.move()
        except BlockingIOError:
            return
        except Exception as error:
            # Most likely the peer is gone. Whatever it is, the others are not.
            logger.debug("event=metrics_connection_failed error=%s: %s", type(error).__name__, error)
            goes_on = False
        if not goes_on:
            self._drop(connection)
        elif connection.wants() != before:
            self._selector.modify(connection.peer, connection.wants(), connection)

    def _drop(self, connection: _Connection) -> None:
        del self._connections[connection.peer]
        with contextlib.suppress(OSError, KeyError):
            self._selector.unregister(connection.peer)
        connection.peer.close()
