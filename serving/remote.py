# SPDX-License-Identifier: Apache-2.0
"""A model whose rows are elsewhere: dense parameters and version are of what this process has, rows of the servers of its parts.

Invariant: rows of an answer are of the very version that the dense parameters are of, whichever server gave them: a server that
does not have it is not asked again for it, and if all of a part lack it the answer is Unavailable. Nothing is kept of rows. Any
thread.
"""

import logging
import math
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import replace
from threading import Event, Lock

import numpy as np
from numpy.typing import NDArray

from oarlock.embedding.hashing import table_salt
from oarlock.embedding.spec import TableSpec
from oarlock.proto.errors import (
    DeadlineExceeded,
    PSError,
    Unavailable,
)
from oarlock.proto.methods import PROTOCOL
from oarlock.proto.rpc import BlockingTransport
from oarlock.proto.security import Security
from oarlock.proto.serving_pb2 import ModelReply, ModelRequest
from oarlock.serving.agreeing import SeveralVersions, agreed_version, check_fits, check_form, held_by
from oarlock.serving.client import Client, ModelVersion
from oarlock.serving.fleet import Counts, ServedModel, TableForm
from oarlock.serving.lookup_wire import Found
from oarlock.serving.part import WHOLE, ModelPart
from oarlock.serving.snapshot import Model, Version, Wanted, unknown_table

logger = logging.getLogger(__name__)

# A server that has not said by then what it serves is not heard this time; once all parts have said it, others have less time.
DESCRIBE_SECONDS = 2.0
GRACE_SECONDS = 0.2
# How long it is told that rows were not to be had, where nobody asks any more.
FAILURE_SECONDS = 10.0
# Rows of a batch, which many callers wait for.
ROWS_SECONDS = 5.0
MOST_AT_ONCE = 64


class RowServers:
    """The servers at ``addresses``, which together have the rows of a model in parts."""

    def __init__(
        self, addresses: Sequence[str], *, security: Security | None = None, rows_seconds: float = ROWS_SECONDS
    ) -> None:
        self._addresses = list(dict.fromkeys(addresses))
        self._client = Client(self._addresses, timeout_seconds=rows_seconds, security=security)
        self._transport = BlockingTransport(security=security)
        threads = min(MOST_AT_ONCE, len(self._addresses))
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="oarlock-rows")
        self._last: RemoteModel | None = None
        self._lock, self._telling = Lock(), Lock()
        # Those that have not said yet what they serve.
        self._asked: dict[str, Future[ModelReply | PSError]] = {}
        # Of how many parts the model is; 0: nobody has said it.
        self._parts = 0
        # Which servers do not belong here, and why; empty: all do that answer.
        self.problem = ""
        # Why rows were not to be had lately; empty: they were. And whether another version may be served by now.
        self.failure = ""
        self._failed_at = 0.0
        self.stale = Event()
        # By table, as the servers said last: rows, and the form that they are kept in.
        self.held: dict[str, tuple[int, str]] = {}
        # The same: what is served of the one that is farthest behind was the model's state then, in seconds since Unix' epoch.
        self.since = math.inf

    @property
    def counts(self) -> Counts:
        return self._client.counts

    def __str__(self) -> str:
        return ", ".join(self._addresses)

    def model_of(self, base: Model) -> "RemoteModel":
        """Return the model with the rows of these servers, in place of the rows of ``base``; the same as long as that is."""
        last = self._last
        if last is not None and last.base is base:
            return last
        with self._lock:
            if self._last is None or self._last.base is not base:
                self._last = RemoteModel(base, self)
            return self._last

    def rows(self, tables: Mapping[str, NDArray[np.uint64]], version: Version) -> Found:
        """Return rows of a version; Unavailable if there are none of it, whatever is wrong with the servers."""
        try:
            found = self._client.lookup(tables, version=ModelVersion(version.run, version.cut, 0.0, version.live))
        except PSError as error:
            # Who asks is told no addresses, and of no fault as if it were his.
            if not self.failure:
                logger.warning("event=no_rows version=%s error=%s", version, error)
            self.failure = f"rows of {version} were not to be had: {error.message}"[:1000]
            self._failed_at = time.monotonic()
            self.stale.set()
            raise Unavailable(f"rows of {version} cannot be had now: ask again") from None
        if self.failure:
            self.failure = ""
        return found

    def agreed(self, job: str, tables: Mapping[str, TableSpec]) -> Version:
        """Ask all what they serve; return the newest version of ``tables`` of ``job`` that every part has a server of.

        Unavailable while there is none. A server that does not belong here is refused (InvalidArgument, WrongJob, SpecMismatch,
        Malformed) until they have agreed once, and left out from then on, with the reason in ``problem``.
        """
        forms = {name: TableForm(spec.dim, spec.blocks, int(table_salt(name))) for name, spec in tables.items()}
        replies: dict[str, ModelReply] = {}
        silent, misfits, parts = "", [], self._parts
        kept = {name: form for name, (_, form) in self.held.items()}
        with self._telling:
            told = self._told()
        for address, reply in told.items():
            if isinstance(reply, PSError):
                silent = silent or f"{address}: {reply}"
                continue
            try:
                parts = check_fits(address, reply, ServedModel(job, parts, forms))
                check_form(address, reply, kept)
                replies[address] = reply
            except PSError as error:
                misfits.append(error)
        self.problem = "; ".join(each.message for each in misfits)[:1000]
        if misfits and not (self._parts and replies):
            raise misfits[0]
        if not replies:
            raise Unavailable(f"no server of rows answers; {silent}")
        try:
            version = agreed_version(replies, parts)
        except SeveralVersions:
            raise
        except Unavailable as error:
            raise Unavailable(f"{error.message}{'; ' if silent else ''}{silent}") from None
        if not self._parts:
            # The client is to know, too, who belongs here.
            self._client.describe()
        if time.monotonic() - self._failed_at > FAILURE_SECONDS:
            # Nobody has asked since.
            self.failure = ""
        self._parts = parts
        self.held = held_by(replies)
        self.since = time.time() - max(reply.version.seconds_since for reply in replies.values())
        return version

    def _told(self) -> dict[str, ModelReply | PSError]:
        """Return what each server serves, or why it does not say; once all parts have said it, others are not waited for."""
        begun = time.monotonic()
        asked = {
            each: self._asked[each] if each in self._asked else self._pool.submit(self._ask, each)
            for each in self._addresses
        }
        left = set(asked.values())
        while left:
            answers = [each.result() for each in asked.values() if each.done()]
            parts = {each.part for each in answers if isinstance(each, ModelReply)}
            patience = GRACE_SECONDS if self._parts and len(parts) == self._parts else 2 * DESCRIBE_SECONDS
            seconds = begun + patience - time.monotonic()
            if seconds <= 0:
                break
            left = wait(left, seconds, FIRST_COMPLETED).not_done
        # Their answers are those of the next time.
        self._asked = {each: future for each, future in asked.items() if not future.done()}
        late = DeadlineExceeded("it has not said in time what it serves")
        return {each: future.result() if future.done() else late for each, future in asked.items()}

    def _ask(self, address: str) -> ModelReply | PSError:
        try:
            request = ModelRequest(protocol=PROTOCOL)
            reply: ModelReply = self._transport.call(
                address, "Serving.Describe", request, timeout_seconds=DESCRIBE_SECONDS
            )
            return reply
        except PSError as error:
            return error

    def close(self) -> None:
        """Give back connections and threads; idempotent."""
        # First: it ends the calls that the threads wait for.
        self._transport.close()
        self._client.close()
        self._pool.shutdown(cancel_futures=True)


class RemoteTable:
    """One table, of which this process knows what it is like."""

    def __init__(self, spec: TableSpec, model: "RemoteModel", servers: RowServers) -> None:
        self.spec = spec
        self.nbytes = 0
        self._model = model
        self._servers = servers

    @property
    def rows(self) -> int:
        """Rows that the servers have."""
        return self._servers.held.get(self.spec.name, (0, ""))[0]

    @property
    def form(self) -> str:
        return self._servers.held.get(self.spec.name, (0, self.spec.dtype))[1]

    def lookup(self, keys: NDArray[np.uint64], out: NDArray[np.float32]) -> int:
        """Write the weights of keys: uint64[n] to out: float32[n, dim]; return how many of them have no row."""
        return self._model.lookup(self.spec.name, keys, out)


class RemoteModel:
    """What ``base`` is, with rows of ``servers``."""

    def __init__(self, base: Model, servers: RowServers) -> None:
        self.base = base
        self.part: ModelPart = WHOLE
        self.job = base.job
        # Received, joined, and written to their place.
        self.copies = 3
        self.nbytes = base.nbytes
        self.tables = {name: RemoteTable(table.spec, self, servers) for name, table in base.tables.items()}
        self._servers = servers

    @property
    def version(self) -> Version:
        """What rows and dense parameters are of, as old as the older of them."""
        version = self.base.version
        return replace(version, created=min(version.created, self._servers.since)) if version.live else version

    @property
    def rows(self) -> int:
        return sum(table.rows for table in self.tables.values())

    @property
    def dense(self) -> NDArray[np.float32]:
        return self.base.dense

    def table(self, name: str) -> RemoteTable:
        """Return a table; UnknownTable says which there are."""
        found = self.tables.get(name)
        if found is None:
            raise unknown_table(name, self.tables)
        return found

    def lookup(self, table: str, keys: NDArray[np.uint64], out: NDArray[np.float32]) -> int:
        """Write the weights of keys: uint64[n] to out: float32[n, dim]; return how many of them have no row."""
        (missing,) = self.lookup_many([(table, keys, out)])
        assert missing is not None, "of one table that is asked for once it is known"
        return missing

    def lookup_many(self, wanted: Sequence[Wanted]) -> list[int | None]:
        """Do so for each (table, keys, out) of ``wanted``, all in one request to each part.

        How many keys have no row is told for a table as a whole: None for one that is wanted several times, unless it is none.
        """
        by_table: dict[str, list[int]] = {}
        for number, (name, _, _) in enumerate(wanted):
            by_table.setdefault(name, []).append(number)
        keys = {name: _joined([wanted[number][1] for number in numbers]) for name, numbers in by_table.items()}
        found = self._servers.rows(keys, self.base.version)
        missing: list[int | None] = [0] * len(wanted)
        for name, numbers in by_table.items():
            rows, at = found[name], 0
            for number in numbers:
                _, asked, out = wanted[number]
                out[:] = rows[at : at + len(asked)]
                at += len(asked)
                missing[number] = found.missing[name] if len(numbers) == 1 or not found.missing[name] else None
        return missing


def _joined(keys: Sequence[NDArray[np.uint64]]) -> NDArray[np.uint64]:
    return keys[0] if len(keys) == 1 else np.concatenate(keys)
