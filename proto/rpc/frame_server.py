# SPDX-License-Identifier: Apache-2.0
"""Serves bulk methods as frames on sockets of their own, beside the gRPC server, which tells callers where and with which token.

Invariant: a connection that does not begin with the token is closed unheard. No frame, however wrong, ends the process or
another connection; a wrong one ends its own. A connection holds a thread while it is open; its requests are answered one after
the other, so what nobody reads does not pile up; one that stalls gives its place to a newcomer (places.py). A frame is received
once there is memory for it (work.py); one for which there is none in time is read to its end, kept by nobody, and refused.
"""

import hmac
import logging
import secrets
import selectors
import socket
import ssl
import threading
import time
from collections.abc import Callable

from oarlock.proto import frames
from oarlock.proto.errors import PSError
from oarlock.proto.methods import Method
from oarlock.proto.pending import Waits
from oarlock.proto.rpc.places import STALL_SECONDS, Place, Places
from oarlock.proto.rpc.sockets import ABSTRACT, Shared, greet, prepare, settle
from oarlock.proto.rpc.tls_socket import wrapped
from oarlock.proto.work import Memory, Work

logger = logging.getLogger(__name__)

TOKEN_BYTES = 16
# Works on a method's request, or on one that was refused unread, and returns what returns the buffers of the answer: that may
# have to be waited for, when nobody looks at the request any more. Whatever goes wrong is in the reply's field `failure`.
Answer = Callable[[Method, frames.Frame | PSError, Work], Callable[[], list[memoryview]]]
# How long nobody is let in after that failed: for want of files, most likely, and the one at the door stays there.
REST_SECONDS = 0.1


class FrameServer:
    """Listens at a TCP port beside ``host`` and at a name that only processes of this host (network namespace) can reach.

    ``host`` empty: only the latter. ``tls``: gives what TCP goes over TLS with; what cannot leave this machine needs none.
    """

    def __init__(
        self,
        methods: dict[int, Method],
        answer: Answer,
        *,
        host: str,
        connections: int,
        memory: Memory | None = None,
        stall_seconds: float = STALL_SECONDS,
        tls: Callable[[], ssl.SSLContext | None] = lambda: None,
    ) -> None:
        self._tls = tls
        self._memory = Memory() if memory is None else memory
        self._methods = methods
        self._answer = answer
        self._host = host
        self._places = Places(connections, stall_seconds=stall_seconds)
        self._waits = Waits()
        self._listening: list[socket.socket] = []
        self._open: dict[threading.Thread, Shared] = {}
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
            # What cannot be used is said now.
            self._tls()
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
        with selectors.DefaultSelector() as selector, selectors.DefaultSelector() as ending:
            for listening in (*self._listening, self._wake[1]):
                selector.register(listening, selectors.EVENT_READ)
            ending.register(self._wake[1], selectors.EVENT_READ)
            while True:
                ready = [key.fileobj for key, _ in selector.select()]
                if self._wake[1] in ready:
                    return
                for each in (each for each in self._listening if each in ready):
                    try:
                        self._welcome(self._secured(each.accept()[0]))
                    except (BlockingIOError, ConnectionError):
                        # The newcomer has gone again.
                        continue
                    except (OSError, RuntimeError) as error:
                        logger.warning("event=nobody_let_in error=%s", error)
                        ending.select(REST_SECONDS)

    def _secured(self, connection: socket.socket) -> socket.socket:
        """Return a newcomer's connection with TLS, if it is to have any; OSError."""
        context = None if connection.family == socket.AF_UNIX else self._tls()
        return connection if context is None else wrapped(connection, context)

    def _welcome(self, connection: socket.socket) -> None:
        """Give a newcomer a place and a thread, or close the connection."""
        shared = Shared(connection)
        place = None
        try:
            prepare(connection)
            place = self._places.enter(shared.end, patient=False)
            if place is None:
                shared.end()
                return
            thread = threading.Thread(target=self._serve, args=(shared, place), name="oarlock-frames", daemon=True)
            thread.start()
        except BaseException:
            if place is not None:
                self._places.leave(place)
            shared.end()
            raise
        with self._lock:
            self._open = {t: s for t, s in self._open.items() if t.is_alive()}
            self._open[thread] = shared

    def _serve(self, shared: Shared, place: Place) -> None:
        try:
            with shared.used() as connection:
                self._converse(connection, shared, place)
        except (OSError, frames.Closed):
            pass
        except PSError as error:
            logger.warning("event=frame_refused error=%s", error)
        except Exception:
            logger.exception("event=frame_failed")
        finally:
            shared.end()
            self._places.leave(place)

    def _converse(self, connection: socket.socket, shared: Shared, place: Place) -> None:
        greet(connection)
        receiver = frames.Receiver(connection, self._memory.buffers)
        hello = receiver.receive(most=4 * TOKEN_BYTES)
        if hello.kind != frames.HELLO or not hmac.compare_digest(hello.message, self.token):
            return
        del hello
        frames.send(connection, frames.encode(frames.REPLY, b""))
        settle(connection)
        while True:
            head = receiver.head()
            method = self._methods.get(head.kind & ~frames.BESIDE)
            if method is None:
                logger.warning("event=frame_refused error=a frame of kind %s", head.kind)
                return
            with Work(
                self._memory,
                method.name,
                seconds=head.seconds,
                end=shared.end,
                waits=self._waits,
                gone=lambda: _gone(connection),
            ) as work:
                self._exchange(connection, receiver, head, method, work, place)

    def _exchange(
        self,
        connection: socket.socket,
        receiver: frames.Receiver,
        head: frames.Head,
        method: Method,
        work: Work,
        place: Place,
    ) -> None:
        """Answer the request that begins with ``head``."""

        def moved() -> None:
            place.waits()
            work.moved()

        came: frames.Frame | PSError
        try:
            # Who waits for memory stalls nobody.
            place.works()
            work.receives(head.memory)
        except PSError as error:
            place.waits()
            receiver.skip(head)
            came = error
        else:
            place.waits()
            came = receiver.body(head, moved)
        place.works()
        work.works()
        rest = self._answer(method, came, work)
        # The next request may come into the same memory; and who waits for others must not keep theirs out.
        del came
        work.received()
        buffers = rest()
        moved()
        frames.send(connection, buffers, moved)
        place.waits()

    def stop(self, grace_seconds: float = 0.0) -> None:
        """Let nobody in and hear nothing more; end all connections after the grace, wait for their threads. Idempotent."""
        if self._accepting is None or self._wake is None:
            return
        self._wake[0].send(b"x")
        self._accepting.join()
        self._accepting = None
        for each in (*self._listening, *self._wake):
            each.close()
        self._places.close()
        with self._lock:
            left = {t: s for t, s in self._open.items() if t is not threading.current_thread()}
        for shared in left.values():
            shared.hush()
        self._memory.close()
        end = time.monotonic() + grace_seconds
        for thread in left:
            thread.join(max(0.0, end - time.monotonic()))
        self._waits.close()
        self._places.end_all()
        for thread in left:
            thread.join()


def _gone(connection: socket.socket) -> bool:
    """Tell whether the other side has ended the connection."""
    try:
        # Of TLS, too, the bare socket tells it.
        return not socket.socket.recv(connection, 1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except BlockingIOError:
        return False
    except OSError:
        return True
