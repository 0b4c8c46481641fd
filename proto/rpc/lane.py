# SPDX-License-Identifier: Apache-2.0
"""A lane: one long-lived stream for one method of one address. Calls are answered in the order in which they were sent.

Invariant: the n-th answer belongs to the n-th request, so once order can no longer be trusted (a timeout, a failed write) the
lane is broken: all that wait on it get Unavailable and the next call makes a new one. A stream costs about half of what as
many single calls cost (docs/performance.md). One event loop.
"""

import asyncio
from collections import deque
from collections.abc import Callable

from grpc import aio

from oarlock.proto.errors import DeadlineExceeded, PSError, Unavailable
from oarlock.proto.methods import Method

ErrorOf = Callable[[aio.AioRpcError, str, str], PSError]


class Lane:
    """Sends requests and hands out their answers."""

    def __init__(
        self,
        channel: aio.Channel,
        address: str,
        method: Method,
        error_of: ErrorOf,
        metadata: tuple[tuple[str, str], ...] = (),
    ) -> None:
        self.broken = False
        self._address = address
        self._method = method
        self._error_of = error_of
        self._waiting: deque[asyncio.Future[bytes]] = deque()
        self._writing = asyncio.Lock()
        self._stream = channel.stream_stream(method.path + "Stream")(metadata=metadata)
        self._reader = asyncio.ensure_future(self._read())

    async def call(self, request: bytes, timeout_seconds: float) -> bytes:
        """Return the answer to ``request``; DeadlineExceeded breaks the lane."""
        answer: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        try:
            async with asyncio.timeout(timeout_seconds):
                await self._send(request, answer)
                reply = await answer
        except TimeoutError:
            self._break(Unavailable(f"the stream to {self._address} was given up", address=self._address))
            raise DeadlineExceeded(
                f"{self._method.name} at {self._address}: no answer in time", address=self._address
            ) from None
        return reply

    async def _send(self, request: bytes, answer: asyncio.Future[bytes]) -> None:
        async with self._writing:
            if self.broken:
                raise Unavailable(f"the stream to {self._address} is broken", address=self._address)
            self._waiting.append(answer)
            try:
                await self._stream.write(request)
            except aio.AioRpcError as error:
                self._break(self._error_of(error, self._address, self._method.name))
            except (asyncio.InvalidStateError, aio.UsageError, aio.InternalError) as error:
                self._break(Unavailable(f"the stream to {self._address} has ended: {error}", address=self._address))
            except asyncio.CancelledError:
                # Whether it was sent is not known, so neither is whose the next answer is.
                self._break(Unavailable(f"the stream to {self._address} was given up", address=self._address))
                raise

    async def _read(self) -> None:
        """Hand answers to those who wait, first come first served."""
        reason: PSError
        try:
            while (reply := await self._stream.read()) is not aio.EOF:
                answer = self._waiting.popleft()
                if not answer.done():
                    answer.set_result(reply)
            status = await self._stream.code()
            reason = Unavailable(f"{self._address} ended the stream ({status})", address=self._address)
        except aio.AioRpcError as error:
            reason = self._error_of(error, self._address, self._method.name)
        except asyncio.CancelledError:
            reason = Unavailable(f"the stream to {self._address} is closed", address=self._address)
        except Exception as error:
            reason = Unavailable(f"the stream to {self._address} is out of step: {error}", address=self._address)
        self._break(reason)

    def _break(self, reason: PSError) -> None:
        if not self.broken:
            self.broken = True
            self._stream.cancel()
        while self._waiting:
            answer = self._waiting.popleft()
            if not answer.done():
                answer.set_exception(reason)

    async def close(self) -> None:
        """End the stream; whoever waits gets Unavailable."""
        self._break(Unavailable(f"the stream to {self._address} is closed", address=self._address))
        self._reader.cancel()
        await asyncio.gather(self._reader, return_exceptions=True)
