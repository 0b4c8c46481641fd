# SPDX-License-Identifier: Apache-2.0
"""Serves bulk methods as frames on sockets of their own, beside the gRPC server, which tells callers where and with which token.

Invariant: a connection that does not begin with the token is closed unheard. No frame, however wrong, ends the process or
another connection; a wrong one ends its own. A connection holds a thread while it is open; its requests are answered one after
the other, so what nobody reads does not pile up; one that stalls gives its place to a newcomer (places.py).
"""

import contextlib
import hmac
import logging
import secrets
import selectors
import socket
import threading
from collections.abc import Callable

from oarlock.proto import frames
from oarlock.proto.bulk import Bulk
from oarlock.proto.errors import PSError
from oarlock.proto.methods import Method
from oarlock.proto.rpc.places import STALL_SECONDS, Place, Places
from oarlock.proto.rpc.sockets import ABSTRACT, prepare

logger = logging.getLogger(__name__)

TOKEN_BYTES = 16
# Answers a method's request with its reply, a message or a Bulk; whatever goes wrong is in the reply's field `failure`.
Answer = Callable[[Method, frames.Frame], Bulk]


class FrameServer:
    """Listens at a TCP port beside ``host`` and at a name that only processes of this host (network namespace) can reach.

    ``host`` empty: only the latter.
    """

    def __init__(
        self,
        methods: dict[int, Method],
        answer: Answer,
        *,
        host: str,
        connections: int,
        stall_seconds: float = STALL_SECONDS,
    ) -> None:
        self._methods = methods
        self._answer = answer
        self._host = host
        self._places = Places(connections, stall_seconds=stall_seconds)
        self._listening: list[socket.socket] = []
        self._open: set[threading.Thread] = set()
        self._lock = threading.Lock()
        self._accepting: threading.Thread | None = None
        self._wake: tuple[socket.socket, socket.socket] | None = None
        self.token = secrets.token_bytes(TOKEN_BYTES)
        # Where this listens, best first.
        self.addresses: list[str] = []

    def __len__(self) -> int:
        """Return how many connections are open."""
        return len(self._places)

    def start(self) -> None:
        """Listen where that is possible; nowhere is no error, for there is gRPC."""
        name = f"oarlock-{secrets.token_hex(16)}"
        self._listen(ABSTRACT + name, socket.AF_UNIX, "\0" + name)
        if self._host:
            family = socket.AF_INET6 if ":" in self._host else socket.AF_INET
            self._listen("", family, (self._host.strip("[]"), 0))
        self._wake = socket.socketpair()
        self._accepting = threading.Thread(target=self._accept, name="oarlock-frames", daemon=True)
        self._accepting.start()

    def _listen(self, named: str, family: int, address: object) -> None:
        try:
            listening = socket.socket(family, socket.SOCK_STREAM)
        except OSError as error:
            logger.warning("event=no_frames family=%s error=%s", family, error)
            return
        try:
            listening.bind(address)  # type: ignore[arg-type]
            listening.listen(128)
            listening.setblocking(False)
        except OSError as error:
            logger.warning("event=no_frames address=%s error=%s", address, error)
            listening.close()
            return
        self._listening.append(listening)
        # The name under which others reach this host is the one that they called already.
        self.addresses.append(named or f":{listening.getsockname()[1]}")

    def _accept(self) -> None:
        assert self._wake is not None, "made before the thread"
        with selectors.DefaultSelector() as selector:
            for listening in (*self._listening, self._wake[1]):
                selector.register(listening, selectors.EVENT_READ)
            while True:
                ready = [key.fileobj for key, _ in selector.select()]
                if self._wake[1] in ready:
                    return
                for each in (each for each in self._listening if each in ready):
                    # The newcomer may have gone again.
                    with contextlib.suppress(OSError):
                        self._welcome(each.accept()[0])

    def _welcome(self, connection: socket.socket) -> None:
        prepare(connection)
        place = self._places.enter(lambda: _shut(connection), patient=False)
        if place is None:
            connection.close()
            return
        thread = threading.Thread(target=self._serve, args=(connection, place), name="oarlock-frames", daemon=True)
        with self._lock:
            self._open.add(thread)
        try:
            thread.start()
        except RuntimeError as error:
            logger.warning("event=no_thread error=%s", error)
            self._places.leave(place)
            connection.close()
            with self._lock:
                self._open.discard(thread)

    def _serve(self, connection: socket.socket, place: Place) -> None:
        try:
            with connection:
                self._converse(connection, place)
        except (OSError, frames.Closed):
            pass
        except PSError as error:
            logger.warning("event=frame_refused error=%s", error)
        except Exception:
            logger.exception("event=frame_failed")
        finally:
            self._places.leave(place)
            with self._lock:
                self._open.discard(threading.current_thread())

    def _converse(self, connection: socket.socket, place: Place) -> None:
        receiver = frames.Receiver(connection)
        hello = receiver.receive(most=4 * TOKEN_BYTES)
        if hello.kind != frames.HELLO or not hmac.compare_digest(hello.message, self.token):
            return
        frames.send(connection, frames.encode(frames.REPLY, b""))
        while True:
            frame = receiver.receive()
            method = self._methods.get(frame.kind & ~frames.BESIDE)
            if method is None:
                return
            place.works()
            reply = self._answer(method, frame)
            buffers = frames.encode(frames.REPLY, reply.message, reply.parts)
            # The next request may come into the same memory.
            del frame
            place.waits()
            frames.send(connection, buffers)
            del reply, buffers
            place.waits()

    def stop(self) -> None:
        """End all connections and wait for their threads; idempotent."""
        if self._accepting is None or self._wake is None:
            return
        self._wake[0].send(b"x")
        self._accepting.join()
        self._accepting = None
        for each in (*self._listening, *self._wake):
            each.close()
        self._places.close()
        self._places.end_all()
        while True:
            with self._lock:
                waiting = [t for t in self._open if t is not threading.current_thread()]
            if not waiting:
                return
            waiting[0].join()


def _shut(connection: socket.socket) -> None:
    # Closing alone would not wake the thread that waits on it.
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
