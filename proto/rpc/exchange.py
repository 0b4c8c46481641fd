# SPDX-License-Identifier: Apache-2.0
"""A connection for frames of a program without an event loop: one exchange at a time, in two steps.

Invariant: an answer belongs to the question before it: whatever else comes is an error, and after an error, or an exchange that
was not finished, the connection is ended by whoever has it (blocking.py). One thread at a time; ``end`` any.
"""

import contextlib
import logging
import socket
import struct
import time

from oarlock.proto import frames
from oarlock.proto.buffers import Buffers
from oarlock.proto.common_pb2 import SocketsReply
from oarlock.proto.errors import Malformed, PSError
from oarlock.proto.rpc import sockets
from oarlock.proto.rpc.connection import MAX_ADDRESSES
from oarlock.proto.rpc.tls_socket import TlsSocket
from oarlock.proto.security import Security

logger = logging.getLogger(__name__)

# An answer of so many bytes is taken in by one call of the system.
FIRST_BYTES = 1 << 15
_TIME = struct.Struct("@ll")
_LEAST_SECONDS = 0.001


class Exchange:
    """A connection, for one exchange at a time."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._shared = sockets.Shared(connection)
        self._receiver = frames.Receiver(connection, Buffers(frames.MOST_KEPT), first_bytes=FIRST_BYTES)
        self._seconds = 0.0

    def greet(self, token: bytes, until: float) -> None:
        """Have this process let in; OSError, PSError, Closed."""
        with self._shared.used() as connection:
            connection.settimeout(sockets.within(sockets.HELLO_SECONDS, until))
            frames.send(connection, frames.encode(frames.HELLO, token))
            _checked(self._receiver.receive(), self._receiver)
            sockets.settle(connection)

    def fileno(self) -> int:
        return self._shared.fileno()

    def start(self, buffers: list[memoryview], until: float) -> None:
        """Send a frame; ``finish`` or ``leave`` is next. TimeoutError once the monotonic clock says ``until``, OSError."""
        connection = self._shared.enter()
        try:
            seconds = until - time.monotonic()
            if seconds <= 0:
                raise TimeoutError
            self._limit(seconds)
            frames.send(connection, frames.stamped(buffers, seconds), lambda: self._go_on(until))
        except BlockingIOError:
            # What the system says at the end of the time that it was given.
            self._shared.leave()
            raise TimeoutError from None
        except BaseException:
            self._shared.leave()
            raise

    def finish(self, until: float) -> frames.Frame:
        """Return the answer; as ``start``, and Closed, PSError."""
        try:
            # What has come is taken in, however late it is.
            self._limit(max(_LEAST_SECONDS, until - time.monotonic()))
            head = self._receiver.head(moved=lambda: self._go_on(until))
            return _checked(self._receiver.body(head, lambda: self._go_on(until)), self._receiver)
        except BlockingIOError:
            raise TimeoutError from None
        finally:
            self._shared.leave()

    def leave(self) -> None:
        """Wait for no answer any more; the connection is to be ended."""
        self._shared.leave()

    def _go_on(self, until: float) -> None:
        """Have the system wait no longer than ``until``, after some bytes went or came; TimeoutError if that is over."""
        seconds = until - time.monotonic()
        if seconds <= 0:
            raise TimeoutError
        self._limit(seconds)

    def _limit(self, seconds: float) -> None:
        """Have the system wait for so long at most; by a limit of its own, which costs nothing for each call."""
        connection = self._connection
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


def opened_exchange(offer: SocketsReply, called: str, until: float, security: Security) -> Exchange | None:
    """Return a connection to the first of the offered addresses that lets this process in, None if none does ``until`` then."""
    for address in offer.addresses[:MAX_ADDRESSES]:
        with contextlib.ExitStack() as stack:
            try:
                made = Exchange(sockets.connect(address, called, security, until))
                stack.callback(made.end)
                made.greet(offer.token, until)
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
