# SPDX-License-Identifier: Apache-2.0
"""gRPC's standard health service, grpc.health.v1, of every process: orchestrators and load balancers ask whether to send
requests here. Anybody may.

Invariant: it says what ``serving`` says at that moment, about this process as a whole (the empty name) and its
service; another name is NOT_FOUND. Threads are held by ``MAX_CHECKS`` questions that are still to come and by ``MAX_WATCHES``
watches of strangers and as many of those whom the guard knows, so that neither keeps out the other; while there are as many of
the first, a Check is answered unread, for the process as a whole. Threads of the server.
"""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from threading import Event
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from oarlock.proto.health_pb2 import HealthCheckRequest, HealthCheckResponse
from oarlock.proto.rpc.places import STALL_SECONDS, Place, Places

CHECK, WATCH = "/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch"
MAX_CHECKS, MAX_WATCHES = 8, 8
# Threads that health may hold.
MAX_CALLS = MAX_CHECKS + 2 * MAX_WATCHES
# How soon who watches hears of a change.
LOOK_SECONDS = 0.2

Behaviour = Callable[[Iterator[bytes], Any], Iterator[bytes]]


class Health:
    """Answers for ``service``; ``serving`` tells whether it is served."""

    def __init__(self, service: str, serving: Callable[[], bool], *, stall_seconds: float = STALL_SECONDS) -> None:
        self._services = ("", service)
        self._serving = serving
        self._checks = Places(MAX_CHECKS, stall_seconds=stall_seconds)
        self._watches = Places(MAX_WATCHES, stall_seconds=stall_seconds)
        self._known_watches = Places(MAX_WATCHES, stall_seconds=stall_seconds)
        self._over = Event()

    def behaviours(self) -> dict[str, Behaviour]:
        """Return what works on calls, by path: as streams, so that a thread begins with a call, not with its question."""
        return {CHECK: self._check, WATCH: partial(self._watch, self._watches)}

    def behaviours_of_known(self) -> dict[str, Behaviour]:
        """Return what works on those of callers who are told apart from strangers, where that is another thing."""
        return {WATCH: partial(self._watch, self._known_watches)}

    def stop(self) -> None:
        """Say NOT_SERVING, and end all watches."""
        self._over.set()
        for places in (self._checks, self._watches, self._known_watches):
            places.close()

    def _status(self, service: str) -> Any:
        if service not in self._services:
            return HealthCheckResponse.SERVICE_UNKNOWN
        serves = not self._over.is_set() and self._serving()
        return HealthCheckResponse.SERVING if serves else HealthCheckResponse.NOT_SERVING

    def _check(self, questions: Iterator[bytes], context: Any) -> Iterator[bytes]:
        with _held(self._checks, context) as place:
            service = "" if place is None else _asked(questions, context)
            if place is not None:
                place.works()
            status = self._status(service)
            if status == HealthCheckResponse.SERVICE_UNKNOWN:
                context.abort(grpc.StatusCode.NOT_FOUND, f"there is no service {service[:200]!r} here")
            if place is not None:
                place.waits()
            yield _answer(status)

    def _watch(self, watches: Places, questions: Iterator[bytes], context: Any) -> Iterator[bytes]:
        with _held(watches, context) as place:
            if place is None:
                words = f"{MAX_WATCHES} others watch already; ask by Check, or give a token if you gave none"
                context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, words)
                return
            service, told = _asked(questions, context), -1
            while context.is_active() and not self._over.is_set():
                status = self._status(service)
                if status != told:
                    told = status
                    place.waits()
                    yield _answer(status)
                place.works()
                self._over.wait(LOOK_SECONDS)


@contextlib.contextmanager
def _held(places: Places, context: Any) -> Iterator[Place | None]:
    """Hold a place, if one can be had, while the body runs."""
    place = places.enter(context.cancel, patient=False)
    try:
        yield place
    finally:
        if place is not None:
            places.leave(place)


def _asked(questions: Iterator[bytes], context: Any) -> str:
    data = next(questions, None)
    try:
        if data is not None:
            return str(HealthCheckRequest.FromString(data).service)
    except DecodeError:
        pass
    words = "nothing, which is" if data is None else f"{len(data)} bytes that are"
    context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"{words} no HealthCheckRequest")
    return ""


def _answer(status: Any) -> bytes:
    return bytes(HealthCheckResponse(status=status).SerializeToString())
