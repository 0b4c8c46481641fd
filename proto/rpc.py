# SPDX-License-Identifier: Apache-2.0
"""gRPC: the only file that knows it. A client transport, a server, and the map between errors and status codes.

Invariant: `to_status` and `from_status` are total: every error class has a status and every status an error class, and an
error that crossed the wire has the class, message and details it had. No gRPC type leaves this file.
"""

import asyncio
import json
import logging
from concurrent.futures import ThreadPoolExecutor
from threading import Lock
from typing import Any

import grpc
from google.protobuf.message import DecodeError, Message

from oarlock.proto import errors
from oarlock.proto.arrays import MAX_MESSAGE_BYTES
from oarlock.proto.common_pb2 import Failure
from oarlock.proto.errors import CODES, InvalidArgument, Malformed, PSError
from oarlock.proto.methods import METHODS, Method
from oarlock.proto.transport import dispatch

logger = logging.getLogger(__name__)

FAILURE_KEY = "oarlock-failure-bin"
# Headers of a response have limits of their own: a longer message is cut, the code stays.
FAILURE_BYTES = 4096

OPTIONS = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.http2.max_frame_size", 16777215),
    ("grpc.enable_retries", 0),
    # Two processes must never share a port; a taken port is an error.
    ("grpc.so_reuseport", 0),
]
CLIENT_OPTIONS = [
    *OPTIONS,
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.min_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 1000),
]

_S = grpc.StatusCode
_STATUS: dict[type[PSError], grpc.StatusCode] = {
    errors.PSError: _S.UNKNOWN,
    errors.InvalidArgument: _S.INVALID_ARGUMENT,
    errors.Malformed: _S.INVALID_ARGUMENT,
    errors.SpecMismatch: _S.FAILED_PRECONDITION,
    errors.VersionMismatch: _S.FAILED_PRECONDITION,
    errors.UnknownTable: _S.NOT_FOUND,
    errors.NotFound: _S.NOT_FOUND,
    errors.WrongJob: _S.FAILED_PRECONDITION,
    errors.WrongRun: _S.FAILED_PRECONDITION,
    errors.WrongIncarnation: _S.FAILED_PRECONDITION,
    errors.StalePlacement: _S.ABORTED,
    errors.LeaseLost: _S.PERMISSION_DENIED,
    errors.Unavailable: _S.UNAVAILABLE,
    errors.DeadlineExceeded: _S.DEADLINE_EXCEEDED,
    errors.OutOfMemory: _S.RESOURCE_EXHAUSTED,
    errors.CorruptCheckpoint: _S.DATA_LOSS,
    errors.Internal: _S.INTERNAL,
}
# What a bare status means: one that gRPC itself or another program made.
_ERROR: dict[grpc.StatusCode, type[PSError]] = {
    _S.OK: errors.Internal,
    _S.CANCELLED: errors.Unavailable,
    _S.UNKNOWN: errors.PSError,
    _S.INVALID_ARGUMENT: errors.InvalidArgument,
    _S.DEADLINE_EXCEEDED: errors.DeadlineExceeded,
    _S.NOT_FOUND: errors.NotFound,
    _S.ALREADY_EXISTS: errors.InvalidArgument,
    _S.PERMISSION_DENIED: errors.LeaseLost,
    _S.RESOURCE_EXHAUSTED: errors.OutOfMemory,
    _S.FAILED_PRECONDITION: errors.InvalidArgument,
    _S.ABORTED: errors.StalePlacement,
    _S.OUT_OF_RANGE: errors.InvalidArgument,
    _S.UNIMPLEMENTED: errors.NotFound,
    _S.INTERNAL: errors.Internal,
    _S.UNAVAILABLE: errors.Unavailable,
    _S.DATA_LOSS: errors.CorruptCheckpoint,
    _S.UNAUTHENTICATED: errors.LeaseLost,
}


def to_status(error: PSError) -> tuple[grpc.StatusCode, str, bytes]:
    """Return the status, its text, and the bytes of the Failure message for ``error``."""
    message = error.message if len(error.message) <= FAILURE_BYTES else error.message[:FAILURE_BYTES] + " ..."
    details = json.dumps(error.details, default=str)
    failure = Failure(code=error.code, message=message, details=details if len(details) <= FAILURE_BYTES else "{}")
    return _STATUS[type(error)], message, failure.SerializeToString()


def from_status(status: grpc.StatusCode, text: str, failure: bytes | None, *, address: str, method: str) -> PSError:
    """Return the error that a failed call means; ``failure`` is the trailing metadata, if there was any."""
    if failure is not None:
        try:
            sent = Failure.FromString(failure)
            details = json.loads(sent.details or "{}")
            kind = CODES.get(sent.code, PSError)
            return kind(sent.message, **{k: v for k, v in details.items() if k != "message"})
        except (DecodeError, ValueError, AttributeError):
            logger.warning("event=failure_undecodable address=%s method=%s", address, method)
    kind = _ERROR[status]
    if status is _S.UNIMPLEMENTED:
        text = f"{address} does not answer {method}; is it an Oarlock process of this version? ({text})"
    elif status is _S.UNAVAILABLE:
        text = f"no answer from {address}: {text}"
    elif status is _S.DEADLINE_EXCEEDED:
        text = f"{method} at {address}: no answer in time"
    elif status is _S.RESOURCE_EXHAUSTED:
        text = f"{method} at {address}: a message is over the limit of {MAX_MESSAGE_BYTES} bytes ({text})"
    return kind(text or status.name, address=address, method=method)


class GrpcTransport:
    """Calls processes by address (``host:port`` or ``unix:PATH``); one channel an address, made when first used."""

    def __init__(self) -> None:
        self._channels: dict[str, grpc.Channel] = {}
        self._calls: dict[tuple[str, str], Any] = {}
        self._lock = Lock()

    def _callable(self, address: str, method: Method) -> Any:
        found = self._calls.get((address, method.name))
        if found is not None:
            return found
        with self._lock:
            channel = self._channels.get(address)
            if channel is None:
                channel = self._channels[address] = grpc.insecure_channel(address, options=CLIENT_OPTIONS)
            made = channel.unary_unary(
                method.path,
                request_serializer=method.request.SerializeToString,
                response_deserializer=method.reply.FromString,
            )
            self._calls[address, method.name] = made
            return made

    async def call(self, address: str, method: str, request: Message, *, timeout_seconds: float) -> Any:
        loop = asyncio.get_running_loop()
        answered: asyncio.Future[Any] = loop.create_future()

        def finish(rpc: Any) -> None:
            if answered.done():
                return
            if rpc.cancelled():
                answered.set_exception(errors.Unavailable(f"{method} at {address} was given up", address=address))
                return
            failed = rpc.exception()
            if failed is None:
                answered.set_result(rpc.result())
            else:
                answered.set_exception(_error_of(rpc, failed, address, method))

        def done(rpc: Any) -> None:
            # The loop may be gone when a late answer comes: nobody waits for it then.
            if not loop.is_closed():
                loop.call_soon_threadsafe(finish, rpc)

        try:
            rpc = self._callable(address, METHODS[method]).future(request, timeout=timeout_seconds)
        except ValueError as error:
            raise errors.Unavailable(f"the connection to {address} is closed", address=address) from error
        rpc.add_done_callback(done)
        try:
            return await answered
        except asyncio.CancelledError:
            rpc.cancel()
            raise

    def close(self) -> None:
        with self._lock:
            for channel in self._channels.values():
                channel.close()
            self._channels.clear()
            self._calls.clear()


def _error_of(rpc: Any, failed: BaseException, address: str, method: str) -> PSError:
    if not isinstance(failed, grpc.RpcError):
        return errors.Unavailable(
            f"{method} at {address} was given up: {failed or type(failed).__name__}", address=address
        )
    trailing = dict(rpc.trailing_metadata() or ())
    return from_status(rpc.code(), rpc.details() or "", trailing.get(FAILURE_KEY), address=address, method=method)


class GrpcServer:
    """Answers the methods of one service by a handler; errors become statuses, garbage becomes Malformed."""

    def __init__(self, handler: object, service: str, *, listen: str, threads: int = 8) -> None:
        self._handler = handler
        self._service = service
        self._listen = listen
        self._threads = threads
        self._server: grpc.Server | None = None
        self.address = listen

    def start(self) -> str:
        """Listen; return the address with the port that was given (for port 0)."""
        pool = ThreadPoolExecutor(self._threads, thread_name_prefix="oarlock-rpc")
        server = grpc.server(pool, options=OPTIONS)
        methods = {
            m.name.split(".")[1]: grpc.unary_unary_rpc_method_handler(self._answer(m))
            for m in METHODS.values()
            if m.name.startswith(self._service + ".")
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(f"oarlock.{self._service}", methods),))
        try:
            port = server.add_insecure_port(self._listen)
        except RuntimeError as error:
            raise InvalidArgument(
                f"cannot listen on {self._listen}: taken, not of this machine, or malformed"
            ) from error
        server.start()
        self._server = server
        self._pool = pool
        if not self._listen.startswith("unix:"):
            self.address = f"{self._listen.rsplit(':', 1)[0]}:{port}"
        return self.address

    def _answer(self, method: Method) -> Any:
        def answer(data: bytes, context: grpc.ServicerContext) -> bytes:
            try:
                try:
                    request = method.request.FromString(data)
                except DecodeError as error:
                    raise Malformed(f"{method.name}: {len(data)} bytes that are no such message") from error
                reply: bytes = dispatch(self._handler, method.name, request).SerializeToString()
                return reply
            except PSError as error:
                if isinstance(error, errors.Internal):
                    logger.exception("event=internal_error method=%s", method.name, exc_info=error.__cause__)
                code, text, failure = to_status(error)
                context.set_trailing_metadata(((FAILURE_KEY, failure),))
                context.set_code(code)
                context.set_details(text)
                return b""

        return answer

    def stop(self, grace_seconds: float = 1.0) -> None:
        """Stop listening, give calls in flight the grace, and wait for it; idempotent."""
        if self._server is not None:
            self._server.stop(grace_seconds).wait()
            self._pool.shutdown(wait=True)
            self._server = None
