# SPDX-License-Identifier: Apache-2.0
"""The service of a serving process: messages in, messages out.

Invariant: an answer is of one snapshot, whose version it carries; a request that is wrong in one place is refused whole. What is
asked for is counted and checked before any memory is taken for it. Called from many threads at once.
"""

import contextlib
import time
from collections.abc import Sequence
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from oarlock.embedding.hashing import table_salt
from oarlock.proto.arrays import MAX_MESSAGE_BYTES, Part, pack, unpack
from oarlock.proto.buffers import Buffers
from oarlock.proto.bulk import Bulk, opened
from oarlock.proto.errors import InvalidArgument, Malformed, OutOfMemory, Unavailable, WrongJob
from oarlock.proto.serving_pb2 import (
    LookupReply,
    LookupRequest,
    ModelReply,
    ModelRequest,
    ModelVersion,
    NearestReply,
    NearestRequest,
    ServeCutRequest,
    ServedTable,
    TableFound,
)
from oarlock.proto.version import check_protocol
from oarlock.proto.work import expects
from oarlock.serving.nearest_wire import answer_nearest
from oarlock.serving.snapshot import Model, Version
from oarlock.serving.swap import Serving
from oarlock.telemetry.histogram import Histogram

# Of one request, all tables together; a table may be named more than once.
MAX_KEYS = 1 << 20
MAX_TABLES = 1024
# Answers' buffers that are kept for the next ones.
_KEPT = 16


class ServingService:
    """Answers look-ups from what ``serving`` serves."""

    def __init__(self, serving: Serving, *, max_keys: int = MAX_KEYS) -> None:
        self.serving = serving
        self._max_keys = max_keys
        self._buffers = Buffers(_KEPT)
        self._lock = Lock()
        self.lookup_seconds = Histogram()
        self.nearest_seconds = Histogram()
        # By table: keys that were asked for, and those without a row.
        self.asked: dict[str, int] = {}
        self.missing: dict[str, int] = {}

    def lookup(self, request: LookupRequest | Bulk) -> LookupReply | Bulk:
        """Return the rows of keys, of one snapshot."""
        message, parts = opened(request)
        _check_version(message.protocol)
        snapshot = self._asked_of(message)
        wanted = self._wanted(snapshot, message, parts)
        beside: list[Part] | None = [] if isinstance(request, Bulk) else None
        reply = LookupReply(version=_version(snapshot.version))
        begun = time.perf_counter()
        counts = []
        asked = [
            (name, k, self._buffers.array((len(k), snapshot.tables[name].spec.dim), np.float32)) for name, k in wanted
        ]
        for (name, keys, rows), missing in zip(asked, snapshot.lookup_many(asked), strict=True):
            assert missing is not None, "of a table that is named once"
            reply.tables.append(TableFound(rows=pack(rows, beside), missing=missing))
            counts.append((name, len(keys), missing))
        self._count(counts, time.perf_counter() - begun)
        return reply if beside is None else Bulk(reply, beside)

    def _asked_of(self, message: LookupRequest) -> Model:
        """Return what a request is to be answered from; WrongJob, NotFound where that is not served here."""
        snapshot = self._of_job(message.job)
        return self.serving.version(_wanted(message.version)) if message.HasField("version") else snapshot

    def _of_job(self, job: str) -> Model:
        """Return what is served; WrongJob unless it is of ``job``, if that is said."""
        snapshot = self.serving.current
        if job and job != snapshot.job:
            raise WrongJob(f"what is served here is of job {snapshot.job}, and not of {job[:64]!r}")
        return snapshot

    def rows_of(self, snapshot: Model, name: str, keys: NDArray[np.uint64]) -> tuple[NDArray[np.float32], int]:
        """Return the rows of keys of one table, for whoever speaks another protocol, and how many keys have none."""
        begun = time.perf_counter()
        rows = self._buffers.array((len(keys), snapshot.tables[name].spec.dim), np.float32)
        missing = snapshot.tables[name].lookup(keys, rows)
        self._count([(name, len(keys), missing)], time.perf_counter() - begun)
        return rows, missing

    def _wanted(self, snapshot: Model, message: Any, parts: Sequence[Part]) -> list[tuple[str, NDArray[np.uint64]]]:
        """Return (table, keys: uint64[n]) for each table of a request, whose answer there is memory for."""
        if len(message.tables) > MAX_TABLES:
            raise Malformed(f"a request names {len(message.tables)} tables; the limit is {MAX_TABLES}")
        wanted, keys, size = [], 0, 0
        for each in message.tables:
            table = snapshot.table(each.table)
            found = unpack(each.keys, np.uint64, f"keys of {each.table}", parts=parts)
            keys += len(found)
            size += 4 * len(found) * table.spec.dim
            wanted.append((each.table, found))
        self.check_keys(keys, size, snapshot.copies)
        if snapshot.copies > 1 and len({name for name, _ in wanted}) < len(wanted):
            raise InvalidArgument("a table is named twice, and rows are had of other servers here: name each once")
        for name, found in wanted:
            snapshot.part.check(snapshot.tables[name].spec, found)
        return wanted

    def check_keys(self, keys: int, size: int, copies: int = 1) -> None:
        """Raise unless a request may ask for ``keys`` keys, whose rows take ``size`` bytes, and there is memory for as many
        ``copies`` of those."""
        if keys > self._max_keys:
            raise InvalidArgument(
                f"a request asks for {keys} keys; the limit is {self._max_keys}: ask for them in parts"
            )
        if size > MAX_MESSAGE_BYTES:
            raise OutOfMemory(
                f"the rows of {keys} keys take {size} bytes; an answer may have {MAX_MESSAGE_BYTES}: ask for them in parts"
            )
        expects(copies * size)

    def _count(self, counts: list[tuple[str, int, int]], seconds: float) -> None:
        with self._lock:
            self.lookup_seconds.observe(seconds)
            for name, asked, missing in counts:
                self.asked[name] = self.asked.get(name, 0) + asked
                self.missing[name] = self.missing.get(name, 0) + missing

    def nearest(self, request: NearestRequest) -> NearestReply:
        """Return the rows nearest to vectors."""
        _check_version(request.protocol)
        # Unavailable until there is one.
        model, serving = self._of_job(request.job), self.serving
        recall = serving.recall_of(_wanted(request.version)) if request.HasField("version") else serving.recall
        begun = time.perf_counter()
        reply = answer_nearest(recall, model, request, self._max_keys)
        with self._lock:
            self.nearest_seconds.observe(time.perf_counter() - begun)
        return reply

    def describe(self, request: ModelRequest) -> ModelReply:
        """Say what is served."""
        _check_version(request.protocol)
        return self._model(self.serving.current)

    def rollback(self, request: ServeCutRequest) -> ModelReply:
        """Serve another cut; once it is answered, it is served."""
        _check_version(request.protocol)
        if request.newest and request.cut:
            raise InvalidArgument(f"the newest cut is asked for, and cut {request.cut}: ask for one of them")
        serving = self.serving
        try:
            return self._model(serving.release() if request.newest else serving.roll_back(request.cut))
        except OSError as error:
            raise Unavailable(f"the folder of cuts cannot be read: {error}") from None

    def _model(self, snapshot: Model) -> ModelReply:
        serving = self.serving
        cuts: list[int] = []
        # The folder may be out of reach for the moment; what is served is not.
        with contextlib.suppress(OSError):
            cuts = serving.store.cuts()
        return ModelReply(
            job=snapshot.job,
            version=_version(snapshot.version),
            tables=[
                ServedTable(
                    name=name,
                    dim=table.spec.dim,
                    rows=table.rows,
                    dtype=table.form,
                    bytes=table.nbytes,
                    absent=table.spec.absent,
                    blocks=table.spec.blocks,
                    salt=int(table_salt(name)),
                )
                for name, table in snapshot.tables.items()
            ],
            pinned=serving.pinned,
            cuts=cuts,
            problem=serving.problem,
            part=snapshot.part.number,
            parts=snapshot.part.parts,
        )


def _check_version(protocol: int) -> None:
    """Refuse another version of the messages; who does not say which is taken at its word, as a client of other make may."""
    if protocol:
        check_protocol(protocol)


def _wanted(version: ModelVersion) -> Version:
    return Version(version.run, version.cut, 0.0, version.live)


def _version(version: Version) -> ModelVersion:
    return ModelVersion(run=version.run, cut=version.cut, seconds_since=version.age(), live=version.live)
