# SPDX-License-Identifier: Apache-2.0
"""The gRPC transport: one channel per address, pulls and pushes on long-lived streams, everything else call by call.

Invariant: every failure leaves as a PSError. One event loop, from the first call to close().
"""

import asyncio
import time
from typing import Any

import grpc
from google.protobuf.message import DecodeError, Message
from grpc import aio

from oarlock.proto.arrays import encoded
from oarlock.proto.errors import Malformed, NotFound, PSError, Unavailable
from oarlock.proto.methods import METHODS, Method
from oarlock.proto.rpc.counts import Counts
from oarlock.proto.rpc.lane import Lane
from oarlock.proto.rpc.options import CLIENT_OPTIONS
from oarlock.proto.rpc.status import FAILURE_KEY, from_failure, from_status

# What grpc.aio says, in place of the status that came, of a write to a stream that the other side had ended just before.
WRITE_FAILED = "Internal error from Core"


class GrpcTransport:
    """Calls processes by address: ``host:port`` or ``unix:PATH``."""

    def __init__(self) -> None:
        self._channels: dict[str, aio.Channel] = {}
        self._calls: dict[tuple[str, str], Any] = {}
        self._lanes: dict[tuple[str, str], Lane] = {}
        self._closed = False
        self.counts = Counts()

    @property
    def connections(self) -> int:
        """How many addresses were called."""
        return len(self._channels)

    def _channel(self, address: str) -> aio.Channel:
        if self._closed:
            raise Unavailable(f"the connection to {address} is closed", address=address)
        found = self._channels.get(address)
        if found is None:
            found = self._channels[address] = aio.insecure_channel(address, options=CLIENT_OPTIONS)
        return found

    async def call(self, address: str, method: str, request: Message, *, timeout_seconds: float) -> Any:
        """Return the reply, or raise the error that the other side raised; DeadlineExceeded after the timeout."""
        found = METHODS.get(method)
        if found is None:
            raise NotFound(f"there is no method {method}", method=method)
        data = encoded(request, f"{method} to {address}: the request")
        begun = time.perf_counter()
        count = self.counts.of(method)
        received = 0
        try:
            reply = await self._sent(address, found, data, timeout_seconds)
            received = len(reply)
            answer = self._read(address, found, reply)
        except PSError as error:
            count.add(received, len(data), time.perf_counter() - begun, error)
            raise
        count.add(received, len(data), time.perf_counter() - begun)
        return answer

    async def _sent(self, address: str, method: Method, data: bytes, timeout_seconds: float) -> bytes:
        if method.streamed:
            return await self._lane(address, method).call(data, timeout_seconds)
        return await self._single(address, method, data, timeout_seconds)

    @staticmethod
    def _read(address: str, method: Method, reply: bytes) -> Any:
        try:
            answer: Any = method.reply.FromString(reply)
        except DecodeError as error:
            raise Malformed(
                f"{address} answered {method.name} with {len(reply)} bytes that are no such message"
            ) from error
        if method.streamed and answer.HasField("failure"):
            raise from_failure(answer.failure)
        return answer

    async def _single(self, address: str, method: Method, data: bytes, timeout_seconds: float) -> bytes:
        channel = self._channel(address)
        call = self._calls.get((address, method.name))
        if call is None:
            call = self._calls[address, method.name] = channel.unary_unary(method.path)
        try:
            reply: bytes = await call(data, timeout=timeout_seconds)
            return reply
        except aio.AioRpcError as error:
            raise error_of(error, address, method.name) from None
        except (aio.UsageError, aio.InternalError, ValueError) as error:
            raise Unavailable(f"the connection to {address} is closed: {error}", address=address) from None
        except asyncio.CancelledError:
            task = asyncio.current_task()
            # A channel that is closed cancels its calls, but nobody cancelled the caller.
            if self._closed and task is not None and not task.cancelling():
                raise Unavailable(f"the connection to {address} is closed", address=address) from None
            raise

    def _lane(self, address: str, method: Method) -> Lane:
        lane = self._lanes.get((address, method.name))
        if lane is None or lane.broken:
            lane = self._lanes[address, method.name] = Lane(self._channel(address), address, method, error_of)
        return lane

    async def close(self) -> None:
        """Give back connections and end the streams; idempotent."""
        self._closed = True
        for lane in self._lanes.values():
            await lane.close()
        for channel in self._channels.values():
            await channel.close()
        self._lanes.clear()
        self._channels.clear()
        self._calls.clear()


def error_of(error: aio.AioRpcError, address: str, method: str) -> PSError:
    """Return what a failed call means."""
    if error.code() is grpc.StatusCode.CANCELLED:
        return Unavailable(f"{method} at {address} was given up", address=address)
    trailing = dict(tuple(pair) for pair in error.trailing_metadata() or ())
    failure = trailing.get(FAILURE_KEY)
    if failure is None and error.code() is grpc.StatusCode.INTERNAL and error.details() == WRITE_FAILED:
        return Unavailable(f"{address} has ended the stream of {method}", address=address)
    return from_status(
        error.code(),
        error.details() or "",
        failure if isinstance(failure, bytes) else None,
        address=address,
        method=method,
    )
