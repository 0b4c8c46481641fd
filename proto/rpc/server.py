# SPDX-License-Identifier: Apache-2.0
"""The gRPC server: answers the methods of one service by a handler; errors become statuses, garbage becomes Malformed.

Invariant: no message, however wrong, ends the process or another caller's stream. A call holds a thread while it is open, also
one whose peer does nothing; streams and single calls have places of their own (places.py), so that neither keeps out the
other, nor those that stall those that do not. An answer is in the hands of gRPC one at a time for each call, so what nobody
reads does not pile up. What requests hold at a time is bounded (proto/work.py): frames before they are received, messages of
gRPC, which receives them by itself, before they are worked on.
"""

import logging
import resource
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from oarlock.proto.arrays import encoded, view_of
from oarlock.proto.bulk import Bulk, Parts, inlined, opened
from oarlock.proto.common_pb2 import SocketsReply
from oarlock.proto.errors import Internal, InvalidArgument, Malformed, PSError, Unavailable
from oarlock.proto.frames import BESIDE, REPLY, Frame, encode
from oarlock.proto.methods import SOCKETS, Method, methods_of
from oarlock.proto.pending import Pending, Waits
from oarlock.proto.rpc.counts import Counts
from oarlock.proto.rpc.credentials import server_credentials
from oarlock.proto.rpc.frame_server import FrameServer
from oarlock.proto.rpc.guard import Guard, Open, check_changes, refuse
from oarlock.proto.rpc.health import MAX_CALLS as MAX_HEALTH
from oarlock.proto.rpc.health import Health
from oarlock.proto.rpc.options import MAX_CALLS, SERVER_OPTIONS
from oarlock.proto.rpc.places import STALL_SECONDS, Places
from oarlock.proto.rpc.reflection import MAX_STREAMS, Reflection
from oarlock.proto.rpc.status import failure_of
from oarlock.proto.security import Security
from oarlock.proto.transport import dispatch
from oarlock.proto.version import check_protocol
from oarlock.proto.work import REQUEST_MEMORY_BYTES, Memory, Work

logger = logging.getLogger(__name__)

# Fewer could not be shared out.
MIN_THREADS = 16
# Of a message over gRPC there are, at a time, its bytes, the parsed message and its arrays.
COPIES = 3
# Connections of gRPC at once; a member has one to each process that it calls.
MAX_CONNECTIONS = 8192


class GrpcServer:
    """Serves ``handler`` as ``service`` at ``listen``: ``host:port`` (port 0: any free one) or ``unix:PATH``.

    ``serving``: what gRPC's health service, which is beside it, is to say.
    """

    def __init__(
        self,
        handler: object,
        service: str,
        *,
        listen: str,
        threads: int = 256,
        stall_seconds: float = STALL_SECONDS,
        frames: bool = True,
        request_memory_bytes: int = REQUEST_MEMORY_BYTES,
        security: Security | None = None,
        serving: Callable[[], bool] = lambda: True,
    ) -> None:
        self._security = security or Security()
        self.memory = Memory(request_memory_bytes, stall_seconds=stall_seconds)
        self._handler = handler
        self._service = service
        self._methods = methods_of(service)
        self._listen = listen
        self._threads = max(threads, MIN_THREADS)
        # A newcomer needs a thread in which to be let in or sent away: some are nobody's place.
        spare = max(2, self._threads // 16)
        streams = self._threads * 3 // 4 if any(m.streamed for m in self._methods) else 0
        self._streams = Places(streams, stall_seconds=stall_seconds)
        self._singles = Places(self._threads - spare - streams, stall_seconds=stall_seconds)
        # A connection of frames has a thread of its own; nobody has both such connections and streams.
        bulk = {m.frame: m for m in self._methods if m.frame} if frames else {}
        host = "" if listen.startswith("unix:") else listen.rpartition(":")[0]
        self._frames = (
            FrameServer(
                bulk,
                self._framed,
                host=host,
                connections=streams,
                memory=self.memory,
                stall_seconds=stall_seconds,
                tls=self._security.frames_context,
            )
            if bulk
            else None
        )
        self._health = Health(f"oarlock.{service}", serving, stall_seconds=stall_seconds)
        self._waits = Waits()
        self._server: grpc.Server | None = None
        self._pool: ThreadPoolExecutor | None = None
        self.address = listen
        self.counts = Counts()
        self._guard = Guard(
            self._security,
            self._methods_by_path(),
            health=self._health.behaviours(),
            known_health=self._health.behaviours_of_known(),
            reflection=Reflection(f"oarlock.{service}", stall_seconds=stall_seconds),
        )

    @property
    def denied(self) -> dict[str, int]:
        """How many calls were not let in, by what they lacked."""
        return dict(self._guard.denied)

    def open_calls(self) -> dict[str, int]:
        """Return how many calls hold a thread: streams, and single ones."""
        frames = len(self._frames) if self._frames is not None else 0
        return {"stream": len(self._streams), "single": len(self._singles), "frames": frames}

    def start(self) -> str:
        """Listen; return the address with the port that was given. InvalidArgument if nobody can listen there."""
        check_address(self._listen)
        self._security.check_listen(self._listen, "--listen")
        # Threads are made as they are needed; each worker's stream holds one.
        self._pool = ThreadPoolExecutor(self._threads + MAX_HEALTH + MAX_STREAMS, thread_name_prefix="oarlock-rpc")
        options = [*SERVER_OPTIONS, ("grpc.max_allowed_incoming_connections", most_connections())]
        server = grpc.server(self._pool, options=options, maximum_concurrent_rpcs=MAX_CALLS)
        server.add_generic_rpc_handlers((self._guard,))
        try:
            if self._security.serves_tls:
                port = server.add_secure_port(self._listen, server_credentials(self._security))
            else:
                port = server.add_insecure_port(self._listen)
        except RuntimeError as error:
            self._pool.shutdown()
            raise InvalidArgument(
                f"cannot listen on {self._listen}: taken, not an address of this machine, or malformed"
            ) from error
        if self._frames is not None:
            self._frames.start()
        server.start()
        self._server = server
        if not self._listen.startswith("unix:"):
            self.address = f"{self._listen.rsplit(':', 1)[0]}:{port}"
        return self.address

    def _methods_by_path(self) -> dict[str, tuple[Method, Open]]:
        methods: dict[str, tuple[Method, Open]] = {}
        for method in self._methods:
            methods[method.path] = (method, self._answer)
            if method.streamed:
                methods[method.path + "Stream"] = (method, self._answer_stream)
        return methods

    def _begun(self, method: Method, data: bytes, work: Work, role: str = "") -> Callable[[], bytes]:
        """Work on a message; return what returns the answer to it, for which it may have to wait. Both raise PSErrors."""
        begun = time.perf_counter()
        count, received = self.counts.of(method.name), len(data)
        try:
            work.copies = COPIES
            work.receives(COPIES * received)
            work.works()
            answer = self._answered(method, data, work, role)
        except PSError as error:
            count.add(received, 0, time.perf_counter() - begun, error)
            raise

        def rest() -> bytes:
            try:
                whole = _there(answer, work)
                reply = encoded(inlined(whole), f"{method.name}: the reply")
            except PSError as error:
                count.add(received, 0, time.perf_counter() - begun, error)
                raise
            count.add(received, len(reply), time.perf_counter() - begun)
            work.answers(len(reply))
            work.received()
            return reply

        return rest

    def _framed(self, method: Method, came: Frame | PSError, work: Work) -> Callable[[], list[memoryview]]:
        """Work on a frame (a PSError: why it was not received); return what returns the buffers of the answer, also if that is a
        failure."""
        begun = time.perf_counter()
        count, received = self.counts.of(method.name), 0

        def failed(error: PSError) -> list[memoryview]:
            _log_defect(method, error)
            count.add(received, 0, time.perf_counter() - begun, error)
            return encode(REPLY, method.reply(failure=failure_of(error)).SerializeToString())

        try:
            if isinstance(came, PSError):
                raise came
            received = len(came.message) + sum(part.nbytes for part in came.parts)
            work.copies = 1 if came.kind & BESIDE else COPIES
            answer = self._answered(method, came, work)
        except PSError as error:
            refusal = failed(error)
            return lambda: refusal

        def rest() -> list[memoryview]:
            try:
                message, parts = opened(_there(answer, work))
                data = encoded(message, f"{method.name}: the reply")
                buffers = encode(REPLY, data, parts)
            except PSError as error:
                return failed(error)
            made = len(data) + sum(view_of(part).nbytes for part in parts)
            count.add(received, made, time.perf_counter() - begun)
            work.answers(made)
            return buffers

        return rest

    def _answered(self, method: Method, sent: bytes | Frame, work: Work, role: str = "") -> Any:
        """Return the handler's reply, or the Pending that stands for it."""
        work.refuse_late()
        data = sent.message if isinstance(sent, Frame) else sent
        try:
            request = method.request.FromString(data)
        except DecodeError as error:
            raise Malformed(f"{method.name}: {len(data)} bytes that are no such message") from error
        check_changes(method, role, request)
        if method.name == SOCKETS:
            return self._sockets(request)
        if isinstance(sent, Frame):
            whole = Bulk(request, Parts(sent.parts))
            request = whole if sent.kind & BESIDE else inlined(whole)
        with work.here():
            return dispatch(self._handler, method.name, request)

    def _work(self, method: Method, context: grpc.ServicerContext, seconds: float | None) -> Work:
        return Work(
            self.memory,
            method.name,
            seconds=seconds,
            end=context.cancel,
            waits=self._waits,
            gone=lambda: not context.is_active(),
        )

    def _sockets(self, request: Any) -> SocketsReply:
        check_protocol(request.protocol)
        if self._frames is None:
            return SocketsReply()
        return SocketsReply(addresses=self._frames.addresses, token=self._frames.token)

    def _answer(self, method: Method, role: str) -> Callable[[Iterator[bytes], Any], Iterator[bytes]]:
        def answer(requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
            place = self._singles.enter(context.cancel, patient=True)
            if place is None:
                refuse(context, Unavailable(f"{method.name}: this process is ending"))
                return
            try:
                data = next(requests, None)
                place.works()
                if data is None:
                    raise Malformed(f"{method.name}: the call came without a message")
                with self._work(method, context, context.time_remaining()) as work:
                    rest = self._begun(method, data, work, role)
                    del data
                    reply = rest()
                    place.waits()
                    yield reply
            except PSError as error:
                _log_defect(method, error)
                refuse(context, error)
            finally:
                self._singles.leave(place)

        return answer

    def _answer_stream(self, method: Method, role: str) -> Callable[[Iterator[bytes], Any], Iterator[bytes]]:
        def answer(requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
            place = self._streams.enter(context.cancel, patient=False)
            if place is None:
                taken = f"{method.name}: all {len(self._streams)} streams of this process are taken"
                refuse(context, Unavailable(f"{taken}; a process of more threads has more"))
                return
            try:
                for data in requests:
                    place.works()
                    with self._work(method, context, None) as work:
                        try:
                            rest = self._begun(method, data, work, role)
                            data = b""
                            reply = rest()
                        except PSError as error:
                            _log_defect(method, error)
                            reply = method.reply(failure=failure_of(error)).SerializeToString()
                        data = b""
                        place.waits()
                        yield reply
                    place.waits()
            finally:
                self._streams.leave(place)

        return answer

    def stop(self, grace_seconds: float = 0.5) -> None:
        """Stop listening, give calls in flight the grace, and wait for it; idempotent."""
        self._health.stop()
        if self._frames is not None:
            self._frames.stop(grace_seconds)
        if self._server is not None and self._pool is not None:
            self.memory.close()
            self._singles.close()
            self._streams.close()
            stopped = self._server.stop(grace_seconds)
            stopped.wait(grace_seconds)
            self._waits.close()
            stopped.wait()
            self._pool.shutdown(wait=True)
            self._server = None


def check_address(listen: str) -> None:
    """Raise InvalidArgument for what gRPC would take for another address, or take away from another process."""
    if listen.startswith("unix:"):
        with socket.socket(socket.AF_UNIX) as probe:
            try:
                probe.connect(listen.removeprefix("unix:"))
            except OSError:
                # Nobody answers: gRPC replaces what a dead process left.
                return
        raise InvalidArgument(f"cannot listen on {listen}: taken by another process")
    host, _, port = listen.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise InvalidArgument(f"cannot listen on {listen!r}: give HOST:PORT with a port from 0 to 65535, or unix:PATH")


def most_connections() -> int:
    """Return how many connections gRPC may have: the process needs files of its own."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MAX_CONNECTIONS if soft == resource.RLIM_INFINITY else min(MAX_CONNECTIONS, soft // 2)


def _there(answer: Any, work: Work) -> Any:
    """Return the answer once it is there; what is kept of the request meanwhile is not what it came as."""
    if not isinstance(answer, Pending):
        return answer
    work.received()
    return work.wait(answer)


def _log_defect(method: Method, error: PSError) -> None:
    if isinstance(error, Internal):
        logger.error("event=internal_error method=%s", method.name, exc_info=error.__cause__)
