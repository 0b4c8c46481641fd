# SPDX-License-Identifier: Apache-2.0
"""Clients of serving processes: rows of many tables by key, and the version of the model that they are of.

    client = Client("127.0.0.1:8500")
    found = client.lookup({"user": user_keys, "item": item_keys})
    found["user"]            float32[n, dim], in the order of the keys
    found.version.cut        the checkpoint that they are all of

    client = Client(["a:8500", "b:8500", "c:8500", "d:8500"])      servers of the parts of one model, with replicas

Invariant: nothing is kept of an answer, so each one is as fresh as its server; what can be mended by asking again (a connection
that broke, a server that begins) is asked again until the time is over. Client: any thread, any number at once. AsyncClient: one
event loop.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, TypeVar

from oarlock.embedding.partition import warm_up_once
from oarlock.proto.errors import DeadlineExceeded, InvalidArgument, NotFound, PSError, Unavailable
from oarlock.proto.methods import PROTOCOL
from oarlock.proto.rpc import BlockingTransport, GrpcTransport
from oarlock.proto.security import Security
from oarlock.proto.serving_pb2 import ModelReply, ModelRequest, ServeCutRequest
from oarlock.serving.asking import Question, Steps
from oarlock.serving.fleet import Counts, Fleet, ServedModel
from oarlock.serving.gather import looking_up, merged
from oarlock.serving.gather_nearest import NEAREST, Wanted, finding
from oarlock.serving.hedged import Hedged
from oarlock.serving.hedged_async import AsyncHedged, AsyncTender
from oarlock.serving.hedging import SHARE
from oarlock.serving.lookup_wire import Found, Keys, ModelVersion, checked_version, lookup_request, read_found
from oarlock.serving.nearest_wire import Neighbours, read_nearest
from oarlock.serving.rolling import roll_back, roll_back_async, rolling_back
from oarlock.serving.tender import Tender

T = TypeVar("T")

__all__ = ["AsyncClient", "Client", "Found", "ModelVersion", "lookup_request", "read_found"]

# How long a call may take, unless it is told otherwise.
TIMEOUT_SECONDS = 5.0
# A cut of many gigabytes is opened before the call that asked for it ends.
LOAD_SECONDS = 600.0
PAUSE_SECONDS = 0.02
MOST_PAUSE_SECONDS = 0.5


class Client:
    """Asks the server at ``address`` and waits for it, or (a sequence, in any order) the servers of a model's parts, of which a
    part may have several. ``frames`` = False: by gRPC alone.

    ``security``: the token that each call gives, and how the server has to show who it is; opened.

    ``hedge_share``: of the requests to several servers so many may go to two, where one is slow. ``counts``: what came of that.
    """

    def __init__(
        self,
        address: str | Sequence[str],
        *,
        timeout_seconds: float = TIMEOUT_SECONDS,
        frames: bool = True,
        security: Security | None = None,
        hedge_share: float = SHARE,
    ) -> None:
        self._timeout_seconds = timeout_seconds
        self._transport = BlockingTransport(frames=frames, security=security)
        self._closed = False
        self.address = address if isinstance(address, str) else ""
        self._fleet = None if isinstance(address, str) else Fleet(address, hedge_share=hedge_share)
        self.counts = Counts() if self._fleet is None else self._fleet.counts
        if self._fleet is not None:
            self._hedged = Hedged(self._fleet, self._transport)
            self._tender = Tender(self._fleet, self._transport)

    def lookup(
        self,
        tables: Mapping[str, Keys],
        *,
        version: ModelVersion | None = None,
        timeout_seconds: float | None = None,
    ) -> Found:
        """Return the rows of keys, by table; all of one version of the model. PSError says what is wrong.

        ``version``: of this one, such as an earlier answer had; NotFound if it is served no more, or not yet.
        """
        if self._fleet is not None:
            return self._of_fleet(
                lambda fleet, model, until: self._gathered(looking_up(fleet, model, tables, version), until),
                timeout_seconds,
            )
        request = lookup_request(tables, version=version)
        return checked_version(read_found(tables, self._call("Serving.Lookup", request, timeout_seconds)), version)

    def _gathered(self, steps: Steps[T], until: float) -> T:
        """Ask what ``steps`` yields, and return what it returns."""
        try:
            questions = next(steps)
            while True:
                try:
                    answers = self._hedged.ask(questions, until)
                except NotFound as error:
                    questions = steps.throw(error)
                else:
                    questions = steps.send(answers)
        except StopIteration as done:
            found: T = done.value
            return found

    def _of_fleet(self, work: Callable[[Fleet, ServedModel, float], T], timeout_seconds: float | None) -> T:
        """Return what ``work`` returns, done again while that may help."""
        assert self._fleet is not None, "asked only with several servers"
        # Not within the time of a call.
        warm_up_once()
        tries = _Tries(self._timeout_seconds if timeout_seconds is None else timeout_seconds, lambda: self._closed)
        while True:
            try:
                found = work(self._fleet, self._fleet.model(), tries.until)
            except PSError as error:
                if not error.retryable:
                    # Servers that do not go together, too, which somebody may put right.
                    self._tender.wake()
                    raise
                pause = tries.pause_after(error)
            else:
                if self._fleet.unsettled:
                    self._tender.wake()
                return found
            self._tender.wait(pause)

    def nearest(
        self,
        table: str,
        vectors: Any,
        k: int = 10,
        *,
        exact: bool = False,
        among: Keys | None = None,
        without: Keys | None = None,
        timeout_seconds: float | None = None,
    ) -> Neighbours:
        """Return the ``k`` rows nearest to each of vectors: float32[q, dim], or to one, best first.

        ``among``: only of these keys; ``without``: none of these. ``exact``: by comparing all rows, not by the index.
        """
        wanted = Wanted(table, vectors, k, exact, among, without)
        if self._fleet is not None:
            return self._of_fleet(
                lambda fleet, model, until: self._gathered(finding(fleet, model, wanted), until), timeout_seconds
            )
        request, shape = wanted.request()
        return read_nearest(self._call(NEAREST, request, timeout_seconds), shape)

    def describe(self, *, timeout_seconds: float | None = None) -> ModelReply:
        """Return what is served: tables, rows, version, cuts; of a model in parts what all of them have."""
        if self._fleet is None:
            reply: ModelReply = self._call("Serving.Describe", ModelRequest(protocol=PROTOCOL), timeout_seconds)
            return reply

        def ask(fleet: Fleet, model: ServedModel, until: float) -> ModelReply:
            return merged(model, list(self._hedged.ask(_describe_questions(model), until).values()))

        return self._of_fleet(ask, timeout_seconds)

    def rollback(self, cut: int = 0, *, newest: bool = False, timeout_seconds: float = LOAD_SECONDS) -> ModelReply:
        """Have the server serve ``cut`` (0: the next older one) and keep to it, or the ``newest`` and follow on from there.

        Of several servers all are told, once each has said that it has the cut; 0: the newest older one that all of them have.
        """
        if self._fleet is not None:
            return roll_back(self._transport, self._fleet.addresses, rolling_back(cut, newest=newest), timeout_seconds)
        request = ServeCutRequest(protocol=PROTOCOL, cut=cut, newest=newest)
        reply: ModelReply = self._call("Serving.Rollback", request, timeout_seconds, again=False)
        return reply

    def _call(self, method: str, request: Any, timeout_seconds: float | None, *, again: bool = True) -> Any:
        tries = _Tries(self._timeout_seconds if timeout_seconds is None else timeout_seconds, lambda: self._closed)
        while True:
            try:
                return self._transport.call(self.address, method, request, timeout_seconds=tries.seconds)
            except Unavailable as error:
                if not again:
                    raise
                pause = tries.pause_after(error)
            time.sleep(pause)

    def close(self) -> None:
        """Give back connections; idempotent. Later calls are InvalidArgument."""
        self._closed = True
        if self._fleet is not None:
            self._tender.close()
        self._transport.close()

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class AsyncClient:
    """The same on an event loop."""

    def __init__(
        self,
        address: str | Sequence[str],
        *,
        timeout_seconds: float = TIMEOUT_SECONDS,
        frames: bool = True,
        security: Security | None = None,
        hedge_share: float = SHARE,
    ) -> None:
        self._timeout_seconds = timeout_seconds
        self._transport = GrpcTransport(frames=frames, security=security)
        self._closed = False
        self.address = address if isinstance(address, str) else ""
        self._fleet = None if isinstance(address, str) else Fleet(address, hedge_share=hedge_share)
        self.counts = Counts() if self._fleet is None else self._fleet.counts
        if self._fleet is not None:
            self._hedged = AsyncHedged(self._fleet, self._transport)
            self._tender = AsyncTender(self._fleet, self._transport)

    async def lookup(
        self,
        tables: Mapping[str, Keys],
        *,
        version: ModelVersion | None = None,
        timeout_seconds: float | None = None,
    ) -> Found:
        """Return the rows of keys, by table; all of one version of the model, as ``Client.lookup`` does."""
        if self._fleet is not None:
            return await self._of_fleet(
                lambda fleet, model, until: self._gathered(looking_up(fleet, model, tables, version), until),
                timeout_seconds,
            )
        request = lookup_request(tables, version=version)
        return checked_version(
            read_found(tables, await self._call("Serving.Lookup", request, timeout_seconds)), version
        )

    async def _gathered(self, steps: Steps[T], until: float) -> T:
        try:
            questions = next(steps)
            while True:
                try:
                    answers = await self._hedged.ask(questions, until)
                except NotFound as error:
                    questions = steps.throw(error)
                else:
                    questions = steps.send(answers)
        except StopIteration as done:
            found: T = done.value
            return found

    async def _of_fleet(
        self, work: Callable[[Fleet, ServedModel, float], Awaitable[T]], timeout_seconds: float | None
    ) -> T:
        """Return what ``work`` returns, done again while that may help."""
        assert self._fleet is not None, "asked only with several servers"
        # Not within the time of a call.
        warm_up_once()
        tries = _Tries(self._timeout_seconds if timeout_seconds is None else timeout_seconds, lambda: self._closed)
        while True:
            try:
                found = await work(self._fleet, self._fleet.model(), tries.until)
            except PSError as error:
                if not error.retryable:
                    # Servers that do not go together, too, which somebody may put right.
                    self._tender.wake()
                    raise
                pause = tries.pause_after(error)
            else:
                if self._fleet.unsettled:
                    self._tender.wake()
                return found
            await self._tender.wait(pause)

    async def nearest(
        self,
        table: str,
        vectors: Any,
        k: int = 10,
        *,
        exact: bool = False,
        among: Keys | None = None,
        without: Keys | None = None,
        timeout_seconds: float | None = None,
    ) -> Neighbours:
        """Return the ``k`` rows nearest to each of vectors, as ``Client.nearest`` does."""
        wanted = Wanted(table, vectors, k, exact, among, without)
        if self._fleet is not None:
            return await self._of_fleet(
                lambda fleet, model, until: self._gathered(finding(fleet, model, wanted), until), timeout_seconds
            )
        request, shape = wanted.request()
        return read_nearest(await self._call(NEAREST, request, timeout_seconds), shape)

    async def describe(self, *, timeout_seconds: float | None = None) -> ModelReply:
        """Return what is served: tables, rows, version, cuts; of a model in parts what all of them have."""
        if self._fleet is None:
            reply: ModelReply = await self._call("Serving.Describe", ModelRequest(protocol=PROTOCOL), timeout_seconds)
            return reply

        async def ask(fleet: Fleet, model: ServedModel, until: float) -> ModelReply:
            return merged(model, list((await self._hedged.ask(_describe_questions(model), until)).values()))

        return await self._of_fleet(ask, timeout_seconds)

    async def rollback(
        self, cut: int = 0, *, newest: bool = False, timeout_seconds: float = LOAD_SECONDS
    ) -> ModelReply:
        """Have the server, or all of several, serve another cut, as ``Client.rollback`` does."""
        if self._fleet is not None:
            steps = rolling_back(cut, newest=newest)
            return await roll_back_async(self._transport, self._fleet.addresses, steps, timeout_seconds)
        request = ServeCutRequest(protocol=PROTOCOL, cut=cut, newest=newest)
        reply: ModelReply = await self._call("Serving.Rollback", request, timeout_seconds, again=False)
        return reply

    async def _call(self, method: str, request: Any, timeout_seconds: float | None, *, again: bool = True) -> Any:
        tries = _Tries(self._timeout_seconds if timeout_seconds is None else timeout_seconds, lambda: self._closed)
        while True:
            try:
                return await self._transport.call(self.address, method, request, timeout_seconds=tries.seconds)
            except Unavailable as error:
                if not again:
                    raise
                pause = tries.pause_after(error)
            await asyncio.sleep(pause)

    async def close(self) -> None:
        """Give back connections; idempotent. Later calls are InvalidArgument."""
        self._closed = True
        if self._fleet is not None:
            await self._tender.close()
        await self._transport.close()

    async def __aenter__(self) -> "AsyncClient":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


class _Tries:
    """The time of one call: ``seconds`` of it are left for the next try."""

    def __init__(self, seconds: float, closed: Callable[[], bool]) -> None:
        self.seconds = seconds
        self._closed = closed
        self.until = time.monotonic() + seconds
        self._pause = PAUSE_SECONDS

    def pause_after(self, error: PSError) -> float:
        """Return how long to wait before the next try; DeadlineExceeded if that leaves no time, InvalidArgument once closed."""
        if self._closed():
            raise InvalidArgument("this client is closed: make another one")
        pause, self._pause = self._pause, min(2 * self._pause, MOST_PAUSE_SECONDS)
        self.seconds = self.until - time.monotonic() - pause
        if self.seconds <= 0:
            raise DeadlineExceeded(f"not answered in time; the last try: {error}", **error.details) from None
        return pause


def _describe_questions(model: ServedModel) -> dict[int, Question]:
    return {part: Question("Serving.Describe", ModelRequest(protocol=PROTOCOL), 1) for part in range(model.parts)}
