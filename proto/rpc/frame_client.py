# SPDX-License-Identifier: Apache-2.0
"""Calls bulk methods of one process as frames: a few connections, each with one exchange at a time, on the event loop.

Invariant: a connection whose exchange was not finished, for whatever reason, is ended and never used again, so an answer always
belongs to the question before it. One event loop. A connection is made in a thread, of which each process has its own, so one
that cannot be reached keeps no other waiting; an exchange needs none: to hand it there and back cost more than its calls of the
system.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from oarlock.proto import frames
from oarlock.proto.common_pb2 import SocketsReply
from oarlock.proto.errors import DeadlineExceeded, Unavailable
from oarlock.proto.rpc.connection import Connection, Late
from oarlock.proto.rpc.turns import Turns
from oarlock.proto.security import Security

logger = logging.getLogger(__name__)

T = TypeVar("T")

# Exchanges with one process at a time; more wait. Each has a connection, and a thread on the other side.
CONNECTIONS = 4
# Connections are made one at a time; one that was given up leaves its thread a moment later, while another one begins.
THREADS = 2
# How long a process without sockets, or one that lets nobody in, is not asked again: another one may have taken its address.
ABSENT_SECONDS = 60.0


class _Full(Exception):
    """The other side lets no further connection in, beside those that are open."""


class FramePeer:
    """A process at ``address`` that may take frames; ``offer`` asks it on which sockets. ``security``: as for other calls."""

    def __init__(
        self,
        address: str,
        offer: Callable[[], Awaitable[SocketsReply | None]],
        *,
        security: Security | None = None,
    ) -> None:
        self._address = address
        self._security = security
        self._ask = offer
        self._offer: SocketsReply | None = None
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="oarlock-exchange")
        self._working: dict[asyncio.Future[Any], Connection] = {}
        self._opening = asyncio.Lock()
        self._open: set[Connection] = set()
        self._idle: list[Connection] = []
        self._places = Turns(CONNECTIONS)
        # Places for which the other side had no room, and until when they are not tried again.
        self._aside = 0
        self._aside_until = 0.0
        # Until when it counts as one that takes none, or that none can reach from here.
        self._absent_until = 0.0
        self._closed = False

    @property
    def absent(self) -> bool:
        """Whether frames cannot travel to it now."""
        return asyncio.get_running_loop().time() < self._absent_until

    async def call(
        self, buffers: list[memoryview], method: str, timeout_seconds: float, landing: frames.Landing | None = None
    ) -> frames.Frame | None:
        """Return the answer to a frame, or None if there are no sockets to send it on (``absent`` then); PSError.

        Its parts lie where ``landing`` says.
        """
        until = asyncio.get_running_loop().time() + timeout_seconds
        try:
            if not self._aside and self._places.free and self._unused() is not None:
                # It has to wait for nobody but the other side, which has a clock of its own.
                return await self._placed(buffers, until, landing)
            while True:
                async with asyncio.timeout_at(until):
                    found = await self._placed(buffers, until, landing)
                if found is not None or self.absent:
                    return found
        except (TimeoutError, Late):
            raise DeadlineExceeded(f"{method} at {self._address}: no answer in time", address=self._address) from None

    async def _placed(
        self, buffers: list[memoryview], until: float, landing: frames.Landing | None
    ) -> frames.Frame | None:
        """Return the answer, which is waited for ``until`` then; None if it is absent, or if there is a place less now."""
        if self._aside and asyncio.get_running_loop().time() >= self._aside_until:
            self._bring_back()
        await self._places.acquire(until)
        try:
            connection = self._unused()
            if connection is None:
                connection = await self._opened()
            else:
                self._idle.pop()
            frame = None if connection is None else await self._exchange(connection, buffers, until, landing)
        except _Full:
            # Not given back: calls wait for the connections that there are, of which at least one is open.
            self._aside += 1
            self._aside_until = asyncio.get_running_loop().time() + ABSENT_SECONDS
            return None
        except BaseException:
            self._places.release()
            raise
        self._places.release()
        return frame

    def _unused(self) -> Connection | None:
        """Return the connection that was idle last, without those that the other side has ended meanwhile."""
        while self._idle:
            if not self._idle[-1].ended:
                return self._idle[-1]
            self._open.discard(self._idle.pop())
        return None

    def _bring_back(self) -> None:
        for _ in range(self._aside):
            self._places.release()
        self._aside = 0

    async def _opened(self) -> Connection | None:
        """Return a new connection, or None if frames cannot travel to the other side."""
        async with self._opening:
            if self.absent:
                return None
            asked = False
            while True:
                if self._offer is None:
                    self._offer = await self._ask()
                    asked = True
                if self._offer is None:
                    break
                connection = Connection(self._security)
                if await self._in_thread(connection, connection.open, self._offer, self._address):
                    self._open.add(connection)
                    return connection
                self._check_open()
                if any(not each.ended for each in self._open):
                    raise _Full
                if asked:
                    break
                # What was offered earlier may have been another process.
                self._offer = None
            self._absent_until = asyncio.get_running_loop().time() + ABSENT_SECONDS
            self._offer = None
            logger.warning("event=no_frames address=%s (bulk data goes through gRPC, which is slower)", self._address)
            return None

    async def _exchange(
        self, connection: Connection, buffers: list[memoryview], until: float, landing: frames.Landing | None
    ) -> frames.Frame:
        try:
            self._check_open()
            # What is left of the time may be less than the caller gave: it had to wait for a place.
            buffers = frames.stamped(buffers, until - asyncio.get_running_loop().time())
            frame = await connection.exchange(buffers, until, landing)
        except BaseException as error:
            self._open.discard(connection)
            connection.end()
            if not isinstance(error, OSError):
                raise
            # The process may be another one by now: ask it anew, on new connections.
            self._offer = None
            self._end_idle()
            self._bring_back()
            raise Unavailable(f"the connection to {self._address} broke: {error}", address=self._address) from None
        self._idle.append(connection)
        return frame

    async def _in_thread(self, connection: Connection, work: Callable[..., T], *arguments: Any) -> T:
        """Return ``work(*arguments)``; who gives up waiting ends the connection, and the thread with it."""
        self._check_open()
        working = asyncio.get_running_loop().run_in_executor(self._threads, work, *arguments)
        self._working[working] = connection
        working.add_done_callback(self._worked)
        try:
            return await asyncio.shield(working)
        except asyncio.CancelledError:
            connection.end()
            raise

    def _check_open(self) -> None:
        if self._closed:
            raise Unavailable(f"the connection to {self._address} is closed", address=self._address)

    def _worked(self, done: "asyncio.Future[Any]") -> None:
        del self._working[done]
        if not done.cancelled():
            # Perhaps nobody waits for it any more: then its error is no news.
            done.exception()

    def _end_idle(self) -> None:
        for connection in self._idle:
            connection.end()
        self._open.difference_update(self._idle)
        self._idle.clear()

    async def close(self) -> None:
        """End all connections and threads; exchanges under way fail as soon as the loop turns. Idempotent."""
        self._closed = True
        self._end_idle()
        for connection in (*self._open, *self._working.values()):
            connection.end()
        try:
            # A connection that is being made ends by itself (sockets.CONNECT_SECONDS).
            if self._working:
                await asyncio.wait(list(self._working))
        finally:
            self._threads.shutdown(wait=not self._working)
