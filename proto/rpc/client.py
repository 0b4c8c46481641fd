# SPDX-License-Identifier: Apache-2.0
"""The gRPC transport: one channel per address, pulls and pushes on long-lived streams, everything else call by call.

Invariant: every failure leaves as a PSError. One event loop, from the first call to close().
"""

from typing import Any

import grpc
from google.protobuf.message import Message
from grpc import aio

from oarlock.proto.errors import PSError, Unavailable
from oarlock.proto.methods import METHODS, Method
from oarlock.proto.rpc.lane import Lane
from oarlock.proto.rpc.options import CLIENT_OPTIONS
from oarlock.proto.rpc.status import FAILURE_KEY, from_status


class GrpcTransport:
    """Calls processes by address: ``host:port`` or ``unix:PATH``."""

    def __init__(self) -> None:
        self._channels: dict[str, aio.Channel] = {}
        self._calls: dict[tuple[str, str], Any] = {}
        self._lanes: dict[tuple[str, str], Lane] = {}
        self._closed = False

    def _channel(self, address: str) -> aio.Channel:
        if self._closed:
            raise Unavailable(f"the connection to {address} is closed", address=address)
        found = self._channels.get(address)
        if found is None:
            found = self._channels[address] = aio.insecure_channel(address, options=CLIENT_OPTIONS)
        return found

    async def call(self, address: str, method: str, request: Message, *, timeout_seconds: float) -> Any:
        """Return the reply, or raise the error that the other side raised; DeadlineExceeded after the timeout."""
        found = METHODS[method]
        if found.streamed:
            return await self._lane(address, found).call(request, timeout_seconds)
        call = self._calls.get((address, method))
        if call is None:
            call = self._calls[address, method] = self._channel(address).unary_unary(
                found.path,
                request_serializer=found.request.SerializeToString,
                response_deserializer=found.reply.FromString,
            )
        try:
            return await call(request, timeout=timeout_seconds)
        except aio.AioRpcError as error:
            raise error_of(error, address, method) from None
        except (aio.UsageError, aio.InternalError, ValueError) as error:
            raise Unavailable(f"the connection to {address} is closed: {error}", address=address) from None

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
    return from_status(
        error.code(),
        error.details() or "",
        failure if isinstance(failure, bytes) else None,
        address=address,
        method=method,
    )
