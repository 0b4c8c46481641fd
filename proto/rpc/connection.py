# SPDX-License-Identifier: Apache-2.0
"""A connection for frames, on the client's side: made in a thread, then used on the event loop for one exchange at a time.

Invariant: the loop watches the socket from the first exchange to its end, not for each exchange anew, which cost more than the
bytes of a small one. Whatever comes while no answer is due, and whatever follows an answer, ends the connection: so an answer
belongs to the question before it. Nothing is received any more once `exchange` is over, however it ended, so arrays that parts
land in are the caller's again.
"""

import asyncio
import logging
import socket
import threading

from oarlock.proto import frames
from oarlock.proto.buffers import Buffers
from oarlock.proto.common_pb2 import SocketsReply
from oarlock.proto.errors import Malformed, PSError
from oarlock.proto.rpc import sockets
from oarlock.proto.rpc.tls_socket import ahead
from oarlock.proto.security import Security

logger = logging.getLogger(__name__)

# Calls of the system for one answer in one turn of the event loop; each takes in what a socket's buffer holds.
TURNS = 16
# Addresses of one offer that are tried.
MAX_ADDRESSES = 4
# Between two looks whether the other side's machine is there, while an answer is due.
LOOK_SECONDS = 1.0
_MORE = "more came than an answer"


class Late(Exception):
    """No answer came in time."""


class Connection:
    """One connection; ``open`` is called in a thread, all else on the event loop. ``ended``: whether it is of no use."""

    def __init__(self, security: Security | None = None) -> None:
        self._security = security
        self._shared: sockets.Shared | None = None
        self._socket: socket.socket | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._buffers = Buffers(frames.MOST_KEPT)
        self._first = memoryview(bytearray(frames.FIRST_BYTES))
        self._ended = threading.Event()
        self._answer: _Answer | None = None
        self._writable: asyncio.Future[None] | None = None
        self._timer: asyncio.TimerHandle | None = None

    @property
    def ended(self) -> bool:
        return self._ended.is_set()

    def open(self, offer: SocketsReply, called: str) -> bool:
        """Connect to the first of the offered addresses that lets this process in; False if none does."""
        hello = frames.encode(frames.HELLO, offer.token)
        for address in offer.addresses[:MAX_ADDRESSES]:
            if self._ended.is_set():
                break
            try:
                made = sockets.connect(address, called, self._security)
            except (OSError, PSError) as error:
                logger.debug("event=no_socket address=%s called=%s error=%s", address, called, error)
                continue
            self._shared = sockets.Shared(made)
            try:
                with self._shared.used() as connection:
                    frames.send(connection, hello)
                    receiver = frames.Receiver(connection)
                    _checked(receiver.receive())
                    if receiver.ahead or ahead(connection):
                        raise Malformed(_MORE)
                    connection.setblocking(False)
            except (OSError, frames.Closed, PSError) as error:
                logger.info("event=socket_refused address=%s called=%s error=%s", address, called, error)
                self._shared.end()
                continue
            if not self._ended.is_set():
                self._socket = made
                return True
            self._shared.end()
        return False

    async def exchange(
        self, buffers: list[memoryview], until: float | None = None, landing: frames.Landing | None = None
    ) -> frames.Frame:
        """Send a frame and return the answer to it; its parts lie where ``landing`` says.

        OSError, PSError, or Late once the loop's clock says ``until``. The connection is of no use after any of them.
        """
        if self._socket is None or self.ended:
            raise ConnectionAbortedError("the connection was ended")
        loop = asyncio.get_running_loop()
        if self._loop is None:
            self._loop = loop
            loop.add_reader(self._socket, self._readable)
        answer = self._answer = _Answer(self._first, self._buffers, loop.create_future(), landing)
        self._watch_from_now(answer, until)
        try:
            await self._send(loop, self._socket, buffers)
            return _checked(await answer.done)
        finally:
            self._answer = None
            if self._timer is not None:
                self._timer.cancel()
            if not answer.done.cancel() and not answer.done.cancelled():
                # Sending may have failed by itself: then what else went wrong is no news.
                answer.done.exception()

    def _watch_from_now(self, answer: "_Answer", until: float | None) -> None:
        """Have an exchange looked at in a while, and when it is too late."""
        loop = asyncio.get_running_loop()
        look = loop.time() + LOOK_SECONDS
        self._timer = loop.call_at(look if until is None else min(look, until), self._watch, answer, until)

    def _watch(self, answer: "_Answer", until: float | None) -> None:
        """Have an exchange fail once it is too late, or once nobody is there any more to answer it."""
        if self._answer is not answer or self._socket is None:
            return
        if until is not None and asyncio.get_running_loop().time() >= until:
            self._fail(Late())
        elif sockets.silent(self._socket):
            self._fail(ConnectionAbortedError("nothing is confirmed there: the link is cut, or the machine is gone"))
        else:
            self._watch_from_now(answer, until)

    async def _send(
        self, loop: asyncio.AbstractEventLoop, connection: socket.socket, buffers: list[memoryview]
    ) -> None:
        left = frames.Sending(buffers)
        more = True
        while more:
            try:
                more = left.some(connection)
            except BlockingIOError:
                self._writable = loop.create_future()
                loop.add_writer(connection, self._wake)
                try:
                    await self._writable
                finally:
                    self._writable = None
                    if not self.ended:
                        loop.remove_writer(connection)

    def _wake(self) -> None:
        if self._writable is not None and not self._writable.done():
            self._writable.set_result(None)

    def _readable(self) -> None:
        """Take in what is there."""
        answer = self._answer
        if answer is None or answer.done.done() or self._socket is None:
            # The end of the connection, most likely.
            self.end()
            return
        try:
            answer.more(self._socket)
        except BlockingIOError:
            return
        except Exception as error:
            self._fail(error)
            self.end()

    def _fail(self, error: Exception) -> None:
        """Have the exchange under way end by ``error``."""
        for waiting in (self._writable, None if self._answer is None else self._answer.done):
            if waiting is not None and not waiting.done():
                waiting.set_exception(error)

    def end(self) -> None:
        """Close; an exchange under way fails."""
        self._ended.set()
        if self._socket is not None and self._loop is not None:
            # Before the number of the socket is given to another one.
            self._loop.remove_reader(self._socket)
            self._loop.remove_writer(self._socket)
        self._socket = None
        if self._shared is not None:
            self._shared.end()
        self._fail(ConnectionAbortedError("the connection was ended"))


class _Answer:
    """An answer on its way in, taken in as it comes; ``done`` wakes who waits for it once all is there."""

    def __init__(
        self,
        first: memoryview,
        buffers: Buffers,
        done: "asyncio.Future[frames.Frame]",
        landing: frames.Landing | None,
    ) -> None:
        self._first = first
        self._at = 0
        self._buffers = buffers
        self._landing = landing
        self._body: frames.Body | None = None
        self.done = done

    def more(self, connection: socket.socket) -> None:
        """Take in what is there, but leave the loop to others after a while; OSError, Malformed, OutOfMemory."""
        turn = 0
        # What TLS has read ahead wakes nobody.
        while turn < TURNS or ahead(connection):
            turn += 1
            if self._body is None:
                self._begin(connection)
            else:
                self._body.took(_some(connection.recvmsg_into(self._body.room)[0]))
            if self._body is not None and not self._body.room:
                if ahead(connection):
                    raise Malformed(_MORE)
                self.done.set_result(self._body.frame())
                return

    def _begin(self, connection: socket.socket) -> None:
        self._at += _some(connection.recv_into(self._first[self._at :]))
        if self._at >= frames.HEAD_BYTES:
            head = frames.read_head(self._first[: frames.HEAD_BYTES])
            if self._at > frames.HEAD_BYTES + head.length:
                raise Malformed(_MORE)
            self._body = frames.Body(head, self._first[frames.HEAD_BYTES : self._at], self._buffers, self._landing)


def _some(count: int) -> int:
    if not count:
        raise ConnectionResetError("the other side has ended it")
    return count


def _checked(reply: frames.Frame) -> frames.Frame:
    if reply.kind != frames.REPLY:
        raise Malformed(f"a frame of kind {reply.kind} came as an answer")
    return reply
