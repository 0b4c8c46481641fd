# SPDX-License-Identifier: Apache-2.0
"""Clients of a serving process: rows of many tables by key, and the version of the model that they are of.

    client = Client("127.0.0.1:8500")
    found = client.lookup({"user": user_keys, "item": item_keys})
    found["user"]            float32[n, dim], in the order of the keys
    found.version.cut        the checkpoint that they are all of

Invariant: nothing is kept of an answer, so each one is as fresh as its server; what can be mended by asking again (a connection
that broke, a server that begins) is asked again until the time is over. Client: any thread, any number at once. AsyncClient: one
event loop.
"""

import asyncio
import operator
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from oarlock.proto.arrays import Part, pack, unpack
from oarlock.proto.bulk import Bulk, opened
from oarlock.proto.errors import DeadlineExceeded, InvalidArgument, Malformed, Unavailable
from oarlock.proto.methods import PROTOCOL
from oarlock.proto.rpc import BlockingTransport, GrpcTransport
from oarlock.proto.security import Security
from oarlock.proto.serving_pb2 import (
    LookupRequest,
    ModelReply,
    ModelRequest,
    NearestRequest,
    ServeCutRequest,
    TableLookup,
)
from oarlock.serving.nearest_wire import Neighbours, nearest_request, read_nearest

Keys = NDArray[np.uint64] | Sequence[int]
# How long a call may take, unless it is told otherwise.
TIMEOUT_SECONDS = 5.0
# A cut of many gigabytes is opened before the call that asked for it ends.
LOAD_SECONDS = 600.0
PAUSE_SECONDS = 0.02
MOST_PAUSE_SECONDS = 0.5


class ModelVersion(NamedTuple):
    """Which state of the model an answer is of. ``seconds_since``: how old it was by the server's clock."""

    run: int
    cut: int
    seconds_since: float


class Found(Mapping[str, NDArray[np.float32]]):
    """Rows by table: float32[n, dim] each, in the order of its keys; ``missing``: by table, how many keys have no row.

    What a key without a row reads as is the table's rule, as in training: its first value, or zeros.
    """

    __slots__ = ("_rows", "missing", "version")

    def __init__(self, rows: dict[str, NDArray[np.float32]], missing: dict[str, int], version: ModelVersion) -> None:
        self._rows = rows
        self.missing = missing
        self.version = version

    def __getitem__(self, table: str) -> NDArray[np.float32]:
        return self._rows[table]

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def __repr__(self) -> str:
        shapes = ", ".join(f"{name}: {list(rows.shape)}" for name, rows in self._rows.items())
        return f"Found({shapes}; {self.version})"


class Client:
    """Asks the server at ``address`` and waits for it. ``frames`` = False: by gRPC alone.

    ``security``: the token that each call gives, and how the server has to show who it is; opened.
    """

    def __init__(
        self,
        address: str,
        *,
        timeout_seconds: float = TIMEOUT_SECONDS,
        frames: bool = True,
        security: Security | None = None,
    ) -> None:
        self.address = address
        self._timeout_seconds = timeout_seconds
        self._transport = BlockingTransport(frames=frames, security=security)

    def lookup(self, tables: Mapping[str, Keys], *, timeout_seconds: float | None = None) -> Found:
        """Return the rows of keys, by table; all of one version of the model. PSError says what is wrong."""
        request = lookup_request(tables)
        return read_found(tables, self._call("Serving.Lookup", request, timeout_seconds))

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
        request, shape = _nearest_request(table, vectors, k, exact, among, without)
        return read_nearest(self._call("Serving.Nearest", request, timeout_seconds), shape)

    def describe(self, *, timeout_seconds: float | None = None) -> ModelReply:
        """Return what is served: tables, rows, version, cuts."""
        reply: ModelReply = self._call("Serving.Describe", ModelRequest(protocol=PROTOCOL), timeout_seconds)
        return reply

    def rollback(self, cut: int = 0, *, newest: bool = False, timeout_seconds: float = LOAD_SECONDS) -> ModelReply:
        """Have the server serve ``cut`` (0: the next older one) and keep to it, or the ``newest`` and follow on from there."""
        request = ServeCutRequest(protocol=PROTOCOL, cut=cut, newest=newest)
        reply: ModelReply = self._call("Serving.Rollback", request, timeout_seconds, again=False)
        return reply

    def _call(self, method: str, request: Any, timeout_seconds: float | None, *, again: bool = True) -> Any:
        tries = _Tries(self._timeout_seconds if timeout_seconds is None else timeout_seconds)
        while True:
            try:
                return self._transport.call(self.address, method, request, timeout_seconds=tries.seconds)
            except Unavailable as error:
                if not again:
                    raise
                pause = tries.pause_after(error)
            time.sleep(pause)

    def close(self) -> None:
        """Give back connections; idempotent."""
        self._transport.close()

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class AsyncClient:
    """The same on an event loop."""

    def __init__(
        self,
        address: str,
        *,
        timeout_seconds: float = TIMEOUT_SECONDS,
        frames: bool = True,
        security: Security | None = None,
    ) -> None:
        self.address = address
        self._timeout_seconds = timeout_seconds
        self._transport = GrpcTransport(frames=frames, security=security)

    async def lookup(self, tables: Mapping[str, Keys], *, timeout_seconds: float | None = None) -> Found:
        """Return the rows of keys, by table; all of one version of the model. PSError says what is wrong."""
        request = lookup_request(tables)
        return read_found(tables, await self._call("Serving.Lookup", request, timeout_seconds))

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
        request, shape = _nearest_request(table, vectors, k, exact, among, without)
        return read_nearest(await self._call("Serving.Nearest", request, timeout_seconds), shape)

    async def describe(self, *, timeout_seconds: float | None = None) -> ModelReply:
        """Return what is served: tables, rows, version, cuts."""
        reply: ModelReply = await self._call("Serving.Describe", ModelRequest(protocol=PROTOCOL), timeout_seconds)
        return reply

    async def rollback(
        self, cut: int = 0, *, newest: bool = False, timeout_seconds: float = LOAD_SECONDS
    ) -> ModelReply:
        """Have the server serve ``cut`` (0: the next older one) and keep to it, or the ``newest`` and follow on from there."""
        request = ServeCutRequest(protocol=PROTOCOL, cut=cut, newest=newest)
        reply: ModelReply = await self._call("Serving.Rollback", request, timeout_seconds, again=False)
        return reply

    async def _call(self, method: str, request: Any, timeout_seconds: float | None, *, again: bool = True) -> Any:
        tries = _Tries(self._timeout_seconds if timeout_seconds is None else timeout_seconds)
        while True:
            try:
                return await self._transport.call(self.address, method, request, timeout_seconds=tries.seconds)
            except Unavailable as error:
                if not again:
                    raise
                pause = tries.pause_after(error)
            await asyncio.sleep(pause)

    async def close(self) -> None:
        """Give back connections; idempotent."""
        await self._transport.close()

    async def __aenter__(self) -> "AsyncClient":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


class _Tries:
    """The time of one call: ``seconds`` of it are left for the next try."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._until = time.monotonic() + seconds
        self._pause = PAUSE_SECONDS

    def pause_after(self, error: Unavailable) -> float:
        """Return how long to wait before the next try; DeadlineExceeded if that leaves no time for it."""
        pause, self._pause = self._pause, min(2 * self._pause, MOST_PAUSE_SECONDS)
        self.seconds = self._until - time.monotonic() - pause
        if self.seconds <= 0:
            raise DeadlineExceeded(f"not answered in time; the last try: {error}", **error.details) from None
        return pause


def _nearest_request(
    table: str, vectors: Any, k: int, exact: bool, among: Keys | None, without: Keys | None
) -> tuple[NearestRequest, tuple[int, ...]]:
    """Return the request for nearest rows, and the shape of its answer."""
    filters = (None if keys is None else _keys(f"a filter of {table}", keys) for keys in (among, without))
    only, never = filters
    return nearest_request(table, vectors, k, exact=exact, among=only, without=never)


def lookup_request(tables: Mapping[str, Keys]) -> Bulk:
    """Return the request for keys of tables; InvalidArgument names a table whose keys are none."""
    parts: list[Part] = []
    asked = [TableLookup(table=name, keys=pack(_keys(name, keys), parts)) for name, keys in tables.items()]
    return Bulk(LookupRequest(protocol=PROTOCOL, tables=asked), parts)


def _keys(name: str, keys: Keys) -> NDArray[np.uint64]:
    if isinstance(keys, np.ndarray):
        if keys.dtype == np.uint64 and keys.ndim == 1:
            return keys
        right = keys.ndim == 1 and keys.dtype.kind in "iu" and not (keys.size and keys.min() < 0)
        found = keys
    else:
        try:
            # Not numpy's own way, by which integers on both sides of 2^63 become floating-point numbers.
            values = [operator.index(key) for key in keys]
        except TypeError:
            values = [-1]
        right = not values or (min(values) >= 0 and max(values) < 1 << 64)
        found = np.array(values if right else [], np.uint64)
    if not right:
        raise InvalidArgument(f"keys of {name}: give integers from 0 to 2^64 - 1, in one dimension")
    return found.astype(np.uint64)


def read_found(tables: Mapping[str, Keys], reply: Any) -> Found:
    """Return what an answer says; Malformed if it is not one to this question."""
    message, parts = opened(reply)
    if len(message.tables) != len(tables):
        raise Malformed(f"rows of {len(message.tables)} tables came, {len(tables)} were asked for")
    rows, missing = {}, {}
    for (name, keys), found in zip(tables.items(), message.tables, strict=True):
        values = unpack(found.rows, np.float32, f"rows of {name}", dims=2, parts=parts)
        if len(values) != len(keys):
            raise Malformed(f"{len(values)} rows of {name} came for {len(keys)} keys")
        rows[name], missing[name] = _own(values), found.missing
    version = message.version
    return Found(rows, missing, ModelVersion(version.run, version.cut, version.seconds_since))


def _own(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return values that their reader may change: where they were received, if that is memory of their own."""
    try:
        values.flags.writeable = True
    except ValueError:
        return values.copy()
    return values
