# SPDX-License-Identifier: Apache-2.0
"""The gRPC transport: one channel per address. Pulls and pushes travel as frames on sockets of their own if the other side offers
any, else on long-lived streams; everything else call by call.

Invariant: every failure leaves as a PSError. One event loop, from the first call to close().
"""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.message import DecodeError, Message
from grpc import aio

from oarlock.proto.arrays import encoded, view_of
from oarlock.proto.bulk import Bulk, Landing, Parts, inlined, opened
from oarlock.proto.common_pb2 import SocketsReply, SocketsRequest
from oarlock.proto.errors import Malformed, NotFound, PSError, Unavailable, VersionMismatch
from oarlock.proto.frames import BESIDE, encode
from oarlock.proto.methods import METHODS, PROTOCOL, SOCKETS, Method, methods_of
from oarlock.proto.roles import ADMINS
from oarlock.proto.rpc.counts import Counts
from oarlock.proto.rpc.credentials import open_channel
from oarlock.proto.rpc.frame_client import FramePeer
from oarlock.proto.rpc.guard import AUTHORIZATION
from oarlock.proto.rpc.lane import Lane
from oarlock.proto.rpc.status import FAILURE_KEY, from_failure, from_status
from oarlock.proto.security import Security

# What grpc.aio says, in place of the status that came, of a write to a stream that the other side had ended just before.
WRITE_FAILED = "Internal error from Core"
# Calls that are under way when a channel with newer certificates takes the place of theirs.
RETIRE_SECONDS = 60.0
# How long a process may take to say on which sockets it takes frames.
OFFER_SECONDS = 5.0


@dataclass
class Moved:
    """Bytes of one call, as far as it came."""

    received: int = 0
    sent: int = 0


class GrpcTransport:
    """Calls processes by address: ``host:port`` or ``unix:PATH``. ``frames`` = False: by gRPC alone.

    ``security``: the token that each call gives, and how the other side has to show who it is.
    """

    def __init__(self, *, frames: bool = True, security: Security | None = None) -> None:
        self._frames = frames
        self._security = security or Security()
        self._peers: dict[str, FramePeer] = {}
        # Whose sockets of frames are at an address depends on the service that is there.
        self._sockets_roles: dict[str, frozenset[str]] = {}
        # Each with the version of the certificates that it was made with.
        self._channels: dict[str, tuple[int, aio.Channel]] = {}
        self._retiring: set[asyncio.Task[None]] = set()
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
        version = self._security.pem_version
        found = self._channels.get(address)
        if found is not None and found[0] != version:
            self._retire(address, found[1])
            found = None
        if found is None:
            found = self._channels[address] = (version, open_channel(address, self._security))
        return found[1]

    def _retire(self, address: str, channel: aio.Channel) -> None:
        """Let the calls of a channel end, and make no more on it."""
        of_it = [key for key in (*self._calls, *self._lanes) if key[0] == address]
        lanes = [lane for key in of_it if (lane := self._lanes.pop(key, None)) is not None]
        for key in of_it:
            self._calls.pop(key, None)

        async def end() -> None:
            for lane in lanes:
                await lane.close()
            await channel.close(RETIRE_SECONDS)

        task = asyncio.ensure_future(end())
        self._retiring.add(task)
        task.add_done_callback(self._retiring.discard)

    def _metadata(self, address: str, method: Method, request: Any) -> tuple[tuple[str, str], ...]:
        changes = method.changes is not None and method.changes(request)
        roles = ADMINS if changes else method.roles
        if method.name == SOCKETS:
            roles = self._sockets_roles.get(address, roles)
        header = self._security.authorization(roles, address, method.name)
        return () if header is None else ((AUTHORIZATION, header),)

    async def call(self, address: str, method: str, request: Message | Bulk, *, timeout_seconds: float) -> Any:
        """Return the reply, or raise the error that the other side raised; DeadlineExceeded after the timeout.

        The reply to a Bulk is a Bulk. Its parts are good until the last of them is given up.
        """
        found = METHODS.get(method)
        if found is None:
            raise NotFound(f"there is no method {method}", method=method)
        begun = time.perf_counter()
        count = self.counts.of(method)
        moved = Moved()
        try:
            answer = await self._answered(address, found, request, timeout_seconds, moved)
        except PSError as error:
            count.add(moved.received, moved.sent, time.perf_counter() - begun, error)
            raise
        count.add(moved.received, moved.sent, time.perf_counter() - begun)
        return answer

    async def _answered(
        self, address: str, method: Method, request: Message | Bulk, timeout_seconds: float, moved: Moved
    ) -> Any:
        if method.frame and self._frames:
            answer = await self._framed(address, method, request, timeout_seconds, moved)
            if answer is not None:
                return answer
        data = encoded(inlined(request), f"{method.name} to {address}: the request")
        moved.sent = len(data)
        if method.streamed:
            reply = await self._lane(address, method).call(data, timeout_seconds)
        else:
            metadata = self._metadata(address, method, request)
            reply = await self._single(address, method, data, metadata, timeout_seconds)
        moved.received = len(reply)
        message = _Reader(address, method).read(reply)
        return Bulk(message, ()) if isinstance(request, Bulk) else message

    async def _framed(
        self, address: str, method: Method, request: Message | Bulk, timeout_seconds: float, moved: Moved
    ) -> Any:
        """Return the answer, or None if the other side has no sockets for frames."""
        peer = self._peers.get(address)
        if peer is None:
            self._sockets_roles[address] = roles_of_sockets(method)
            peer = self._peers[address] = self._peer(address)
        if peer.absent:
            return None
        message, parts = opened(request)
        kind = method.frame | (BESIDE if isinstance(request, Bulk) else 0)
        data = encoded(message, f"{method.name} to {address}: the request")
        buffers = encode(kind, data, parts)
        reader = _Reader(address, method, request.landing if isinstance(request, Bulk) else None)
        frame = await peer.call(buffers, method.name, timeout_seconds, reader.land if reader.landing else None)
        if frame is None:
            return None
        moved.sent = len(data) + sum(view_of(part).nbytes for part in parts)
        moved.received = len(frame.message) + sum(part.nbytes for part in frame.parts)
        reply = Bulk(reader.read(frame.message), Parts(frame.parts))
        return reply if isinstance(request, Bulk) else inlined(reply)

    def _peer(self, address: str) -> FramePeer:
        self._channel(address)

        async def offer() -> SocketsReply | None:
            try:
                request = SocketsRequest(protocol=PROTOCOL)
                answer: SocketsReply = await self.call(address, SOCKETS, request, timeout_seconds=OFFER_SECONDS)
                return answer
            except (NotFound, VersionMismatch, Malformed):
                return None

        return FramePeer(address, offer, security=self._security)

    async def _single(
        self, address: str, method: Method, data: bytes, metadata: tuple[tuple[str, str], ...], timeout_seconds: float
    ) -> bytes:
        channel = self._channel(address)
        call = self._calls.get((address, method.name))
        if call is None:
            call = self._calls[address, method.name] = channel.unary_unary(method.path)
        try:
            reply: bytes = await call(data, timeout=timeout_seconds, metadata=metadata)
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
        channel = self._channel(address)
        lane = self._lanes.get((address, method.name))
        if lane is None or lane.broken:
            metadata = self._metadata(address, method, None)
            lane = self._lanes[address, method.name] = Lane(channel, address, method, error_of, metadata)
        return lane

    async def close(self) -> None:
        """Give back connections and end the streams; idempotent."""
        self._closed = True
        await asyncio.gather(*(peer.close() for peer in self._peers.values()))
        for lane in self._lanes.values():
            await lane.close()
        for _, channel in self._channels.values():
            await channel.close()
        for task in tuple(self._retiring):
            task.cancel()
        await asyncio.gather(*self._retiring, return_exceptions=True)
        self._peers.clear()
        self._lanes.clear()
        self._channels.clear()
        self._calls.clear()


def roles_of_sockets(method: Method) -> frozenset[str]:
    """Return who is told of the sockets on which ``method`` travels."""
    return next(each.roles for each in methods_of(method.service) if each.name == SOCKETS)


class _Reader:
    """Reads the answer to one request: once, though where its parts belong has to be known before all of it is there."""

    def __init__(self, address: str, method: Method, landing: Landing | None = None) -> None:
        self._address = address
        self._method = method
        self._answer: Any = None
        self.landing = landing

    def _parsed(self, data: bytes) -> Any:
        if self._answer is None:
            self._answer = _parsed(self._address, self._method, data)
        return self._answer

    def land(self, data: bytes, lengths: Sequence[int]) -> Sequence[memoryview | None]:
        """Return where the parts of an answer are to lie; Malformed."""
        assert self.landing is not None, "looked at before"
        return self.landing(self._parsed(data), lengths)

    def read(self, data: bytes) -> Any:
        """Return the answer, or raise what it says; Malformed."""
        return _checked(self._method, self._parsed(data))


def read_answer(address: str, method: Method, data: bytes) -> Any:
    """Return the answer to a call, or raise what it says; Malformed."""
    return _checked(method, _parsed(address, method, data))


def _parsed(address: str, method: Method, data: bytes) -> Any:
    try:
        return method.reply.FromString(data)
    except DecodeError as error:
        raise Malformed(f"{address} answered {method.name} with {len(data)} bytes that are no such message") from error


def _checked(method: Method, answer: Any) -> Any:
    if method.streamed and answer.HasField("failure"):
        raise from_failure(answer.failure)
    return answer


def error_of(error: Any, address: str, method: str) -> PSError:
    """Return what a failed call, of an event loop or of a thread, means."""
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
