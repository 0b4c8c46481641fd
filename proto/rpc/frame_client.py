# SPDX-License-Identifier: Apache-2.0
"""Calls bulk methods of one process as frames: a few connections, each with one exchange at a time, in threads of a pool.

Invariant: a connection whose exchange was not finished, for whatever reason, is closed and never used again, so an answer always
belongs to the question before it. One event loop; an exchange runs in a thread, where the bytes move without the interpreter's
lock.
"""

import asyncio
import contextlib
import logging
import socket
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor

from oarlock.proto import frames
from oarlock.proto.common_pb2 import SocketsReply
from oarlock.proto.errors import DeadlineExceeded, PSError, Unavailable
from oarlock.proto.rpc import sockets

logger = logging.getLogger(__name__)

# Exchanges with one process at a time; more wait. Each has a connection, and while it lasts a thread on both sides.
CONNECTIONS = 4
# How long a process without sockets is not asked again: another one may have taken its address.
ABSENT_SECONDS = 60.0


class Connection:
    """One connection; ``exchange`` is called in a thread, ``end`` from the event loop."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._receiver = frames.Receiver(connection)

    def exchange(self, buffers: list[memoryview]) -> frames.Frame:
        """Send a frame and return the answer to it; OSError, Closed or PSError, after which the connection is of no use."""
        frames.send(self._socket, buffers)
        return self._receiver.receive()

    def end(self) -> None:
        """Close; an exchange under way fails."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


def open_connection(offer: SocketsReply, called: str) -> Connection | None:
    """Connect to the first of the offered addresses that lets this process in; None if none does. In a thread."""
    hello = frames.encode(frames.HELLO, offer.token)
    for address in offer.addresses:
        try:
            made = Connection(sockets.connect(address, called))
        except (OSError, PSError) as error:
            logger.debug("event=no_socket address=%s called=%s error=%s", address, called, error)
            continue
        try:
            made.exchange(hello)
        except (OSError, frames.Closed, PSError) as error:
            logger.info("event=socket_refused address=%s called=%s error=%s", address, called, error)
            made.end()
            continue
        return made
    return None


class FramePeer:
    """A process at ``address`` that may take frames; ``offer`` asks it on which sockets."""

    def __init__(self, address: str, executor: Executor, offer: Callable[[], Awaitable[SocketsReply | None]]) -> None:
        self._address = address
        self._executor = executor
        self._ask = offer
        self._offer: SocketsReply | None = None
        self._asking = asyncio.Lock()
        self._idle: list[Connection] = []
        self._busy: set[Connection] = set()
        self._places = asyncio.Semaphore(CONNECTIONS)
        # Until when it counts as one that takes none, or that none can reach from here.
        self._absent_until = 0.0

    @property
    def absent(self) -> bool:
        """Whether frames cannot travel to it now."""
        return asyncio.get_running_loop().time() < self._absent_until

    async def call(self, buffers: list[memoryview], method: str, timeout_seconds: float) -> frames.Frame | None:
        """Return the answer to a frame, or None if there are no sockets to send it on (``absent`` then); PSError."""
        try:
            async with asyncio.timeout(timeout_seconds):
                async with self._places:
                    connection = await self._connected()
                    return None if connection is None else await self._exchange(connection, buffers)
        except TimeoutError:
            raise DeadlineExceeded(f"{method} at {self._address}: no answer in time", address=self._address) from None

    async def _connected(self) -> Connection | None:
        if self._idle:
            return self._idle.pop()
        async with self._asking:
            if self.absent:
                return None
            if self._offer is None:
                self._offer = await self._ask()
        offer = self._offer
        found = None
        if offer is not None:
            opening = asyncio.get_running_loop().run_in_executor(self._executor, open_connection, offer, self._address)
            try:
                found = await asyncio.shield(opening)
            except asyncio.CancelledError:
                opening.add_done_callback(_end_late)
                raise
        if found is None and not self._busy and not self._idle:
            self._absent_until = asyncio.get_running_loop().time() + ABSENT_SECONDS
            logger.warning("event=no_frames address=%s (bulk data goes through gRPC, which is slower)", self._address)
        if found is None and not self.absent:
            # It let others of ours in: it is full, or it has ended.
            self._offer = None
            raise Unavailable(f"{self._address} takes no further connection", address=self._address)
        return found

    async def _exchange(self, connection: Connection, buffers: list[memoryview]) -> frames.Frame:
        loop = asyncio.get_running_loop()
        self._busy.add(connection)
        exchanging = loop.run_in_executor(self._executor, connection.exchange, buffers)
        try:
            frame = await asyncio.shield(exchanging)
        except (OSError, frames.Closed) as error:
            # The process may be another one by now: ask it anew, on new connections.
            self._offer = None
            connection.end()
            self._end_idle()
            raise Unavailable(f"the connection to {self._address} broke: {error}", address=self._address) from None
        except BaseException:
            connection.end()
            exchanging.add_done_callback(_heard)
            raise
        finally:
            self._busy.discard(connection)
        self._idle.append(connection)
        return frame

    def close(self) -> None:
        """End all connections; exchanges under way fail."""
        for connection in self._busy:
            connection.end()
        self._end_idle()

    def _end_idle(self) -> None:
        for connection in self._idle:
            connection.end()
        self._idle.clear()


def _heard(done: "asyncio.Future[frames.Frame]") -> None:
    """Nobody waits for it any more: its error is no news."""
    if not done.cancelled():
        done.exception()


def _end_late(done: "asyncio.Future[Connection | None]") -> None:
    if not done.cancelled() and done.exception() is None and (made := done.result()) is not None:
        made.end()
