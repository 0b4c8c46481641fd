# SPDX-License-Identifier: Apache-2.0
"""The shard's service: every message's header is checked here, then the message goes to the shard or its blocks.

Invariant: before the process has joined its job every method but Hello answers Unavailable, and without a lease so do those of
workers: the rows would be old, and somebody else may own them. Called from many threads.
"""

import json
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np

from oarlock import __version__
from oarlock.checkpoint.chain import MAX_LINKS
from oarlock.checkpoint.place import Place, place_of
from oarlock.checkpoint.roots import Roots, roots_of
from oarlock.client.closed import ClosedSet
from oarlock.client.job import JobSpec
from oarlock.client.router import unpack_changes
from oarlock.proto.arrays import pack
from oarlock.proto.bulk import Bulk, opened
from oarlock.proto.common_pb2 import Empty, Header, HelloReply, HelloRequest
from oarlock.proto.errors import InvalidArgument, LeaseLost, Unavailable
from oarlock.proto.pending import Pending
from oarlock.proto.shard_pb2 import (
    AbortRequest,
    AdoptReply,
    AdoptRequest,
    ChangesReply,
    ChangesRequest,
    CloseRequest,
    CopyRequest,
    CutRequest,
    DigestReply,
    DigestRequest,
    HandOverRequest,
    HeldReply,
    HeldRequest,
    MarksReply,
    MarksRequest,
    PullReply,
    PullRequest,
    PushReply,
    PushRequest,
    RanksReply,
    RanksRequest,
    ReopenRequest,
    ReplaceReply,
    ReplaceRequest,
    ReplicateReply,
    ReplicateRequest,
    RowsReply,
    RowsRequest,
    ShardStatsReply,
    ShardStatsRequest,
    WriteReply,
    WriteRequest,
)
from oarlock.proto.version import hello
from oarlock.ps.adopting import adopt
from oarlock.ps.compacting import Compacting
from oarlock.ps.copying import Copying
from oarlock.ps.cutting import Cutting
from oarlock.ps.following import Following
from oarlock.ps.holdings import Order
from oarlock.ps.identity import Identity
from oarlock.ps.load import Load
from oarlock.ps.operations import sequences_of
from oarlock.ps.replace import Order as ReplaceOrder
from oarlock.ps.replace import Replacing
from oarlock.ps.request import read_blocks, read_generations, read_path
from oarlock.ps.rows import Rows
from oarlock.ps.shard import Shard, close_all
from oarlock.ps.view import Views
from oarlock.telemetry.histogram import Histogram

# Splits that one Marks request may ask for; a worker asks for the few that it opens.
MAX_SPLITS = 1024


class ShardService:
    """Answers the methods of ``Shard`` in proto/methods.py. Cold rows go to ``spill_folder``, None: the temporary folder.

    ``compact_links``: from which length on a chain of files is compacted. ``roots``: where requests may name checkpoints, beside
    where the job says that its own are; None: anywhere.
    """

    def __init__(
        self,
        *,
        spill_folder: Path | None = None,
        compact_links: int = MAX_LINKS,
        roots: Sequence[str] | None = None,
    ) -> None:
        self._given_roots = roots
        self._roots = Roots(roots)
        self._spill_folder = spill_folder
        self._joined: tuple[Identity, Shard] | None = None
        self._rows: Rows | None = None
        self._holds_lease: Callable[[], bool] = lambda: True
        self._term = 0
        self._ordering = Lock()
        self._cutting: Cutting
        self._place = Place()
        self._compact_links = compact_links
        self.compacting = Compacting(links=compact_links)
        self._replacing: Replacing
        self._following: Following
        self._copying: Copying
        self._timing = Lock()
        # Of those that were answered. Taken here: an update itself asks for no time.
        self.pull_seconds = Histogram()
        self.push_seconds = Histogram()
        # Only of a job with a scaler: nobody else asks for it, and it costs each push two locks.
        self._load: Load | None = None

    def configure(self, spec: JobSpec, identity: Identity, *, holds_lease: Callable[[], bool] = lambda: True) -> Shard:
        """Begin to answer as ``identity``, with the job's tables, as yet without blocks; InvalidArgument."""
        if self._given_roots is not None:
            self._roots = Roots(_all_roots(self._given_roots, spec))
        shard = Shard(spec, spill_folder=self._spill_folder)
        shard.holdings.me = identity.id
        self._holds_lease = holds_lease
        if spec.autoscale and self._load is None:
            self._load = Load()
        self._rows = Rows(shard, identity.id)
        self._place = place_of(spec)
        self._replacing = Replacing(shard)
        self._cutting = Cutting(shard, Views(shard, self.compacting, self._place), self._replacing)
        self._following, self._copying = Following(shard), Copying(shard)
        self._joined = (identity, shard)
        return shard

    def let_go(self) -> None:
        """Answer nothing any more of the run that is over, until the next one is configured.

        What threads are still about they bring to its end; tables go with the last of them, once another shard is configured.
        """
        self.compacting.stop()
        self.compacting = Compacting(links=self._compact_links)
        if self._joined is not None:
            (_, shard), self._joined = self._joined, None
            self._cutting.let_go()
            weakref.finalize(shard, close_all, shard.tables)

    def end(self) -> None:
        """Give back what the shard has besides memory, after the last call."""
        self.compacting.stop()
        if self._joined is not None:
            self._joined[1].close()

    def _in_run(self) -> tuple[Identity, Shard]:
        # Looked at once: a run may end between two looks.
        joined = self._joined
        if joined is None:
            raise Unavailable("this shard has not joined its job yet")
        return joined

    def _shard(self, header: Header) -> tuple[Identity, Shard]:
        found = self._in_run()
        found[0].check(header)
        return found

    def _leased(self, header: Header) -> Shard:
        """As _shard, for workers."""
        identity, shard = self._shard(header)
        if not self._holds_lease():
            raise Unavailable(
                f"the lease of shard {identity.id} ran out: it waits for the coordinator", shard=identity.id
            )
        return shard

    def _order(self, header: Header) -> tuple[Identity, Shard]:
        """As _shard, for orders: those of a coordinator that another one has replaced are refused."""
        found = self._shard(header)
        if header.term < self._term:
            raise LeaseLost(f"the order is of term {header.term}, a coordinator of term {self._term} is in charge")
        return found

    def _take(self, header: Header) -> tuple[Identity, Shard]:
        """As _order, and note who is in charge. For orders that were read: what is malformed tells nothing about that."""
        with self._ordering:
            found = self._order(header)
            self._term = header.term
        return found

    def _path(self, path: str, what: str) -> str:
        found = read_path(path, what)
        self._roots.check(found)
        return found

    def hello(self, request: HelloRequest) -> HelloReply:
        return hello(request, "shard", __version__)

    def pull(self, request: PullRequest | Bulk) -> PullReply | Bulk | Pending:
        begun = time.perf_counter()
        reply = self._leased(opened(request)[0].header).pull(request)
        self._took(self.pull_seconds, begun)
        return reply

    def push(self, request: PushRequest | Bulk) -> PushReply | Pending:
        begun = time.perf_counter()
        if self._load is None:
            reply = self._pushed(request)
        else:
            with self._load:
                reply = self._pushed(request)
        self._took(self.push_seconds, begun)
        return reply

    def _pushed(self, request: PushRequest | Bulk) -> PushReply | Pending:
        return self._leased(opened(request)[0].header).push(request)

    def _took(self, seconds: Histogram, begun: float) -> None:
        with self._timing:
            seconds.observe(time.perf_counter() - begun)

    def marks(self, request: MarksRequest) -> MarksReply:
        shard = self._leased(request.header)
        if len(request.splits) > MAX_SPLITS:
            raise InvalidArgument(f"{len(request.splits)} splits asked for, at most {MAX_SPLITS} in one message")
        return MarksReply(next=shard.next_groups(list(request.splits)))

    def ranks(self, request: RanksRequest) -> RanksReply:
        if request.hold:
            self._order(request.header)
            shard = self._take(request.header)[1]
        else:
            shard = self._leased(request.header)
        if shard.staged is None:
            return RanksReply()
        with shard.push_lock:
            shard.staged.hold(request.hold)
            lowest, highest = shard.staged.range()
            return RanksReply(commits=shard.staged.told(), lowest=lowest, highest=highest)

    def close(self, request: CloseRequest) -> Empty:
        shard = self._order(request.header)[1]
        closed = ClosedSet.unpack(request.closed, shard.closed_window)
        self._take(request.header)[1].close_splits(closed)
        return Empty()

    def adopt(self, request: AdoptRequest) -> AdoptReply:
        identity, shard = self._order(request.header)
        told = unpack_changes(shard.layout, request.placement)
        closed = ClosedSet.unpack(request.closed, shard.closed_window)
        restore = request.restore and self._path(request.restore, "the checkpoint to restore")
        create = read_blocks(shard.layout, request.create) if request.HasField("create") else None
        self._take(request.header)
        options = self._place.options_for(restore)
        shard.reports.in_charge(request.header.term)
        adopt(shard, identity.id, told, closed, restore, create=create, options=options)
        return AdoptReply(generation=shard.generation, rows=sum(t.rows for t in shard.tables))

    def replicate(self, request: ReplicateRequest | Bulk) -> ReplicateReply:
        message, parts = opened(request)
        self._shard(message.header)
        return self._following.take(message, parts)

    def copy(self, request: CopyRequest) -> Empty:
        shard = self._order(request.header)[1]
        numbers, generations = read_generations(shard.layout, request.blocks, request.generations)
        self._take(request.header)
        self._copying.give(numbers, generations, request.shard, request.leisurely)
        return Empty()

    def hand_over(self, request: HandOverRequest) -> Empty:
        shard = self._order(request.header)[1]
        numbers, generations = read_generations(shard.layout, request.blocks, request.generations)
        self._take(request.header)
        self._copying.hand_over(numbers, generations, request.shard, Order(request.header.term, request.order))
        return Empty()

    def reopen(self, request: ReopenRequest) -> Empty:
        shard = self._order(request.header)[1]
        numbers, generations = read_generations(shard.layout, request.blocks, request.generations)
        self._take(request.header)
        self._copying.reopen(numbers, generations, Order(request.term, request.order))
        return Empty()

    def held(self, request: HeldRequest) -> HeldReply:
        shard = self._order(request.header)[1]
        numbers = read_blocks(shard.layout, request.blocks)
        self._take(request.header)
        with shard.push_lock:
            here = shard.holdings.here[numbers]
            generations = np.where(here, shard.holdings.generations[numbers], 0).astype(np.uint64)
            sequences = np.where(here, sequences_of(shard, numbers), 0).astype(np.uint64)
        return HeldReply(generations=pack(generations), sequences=pack(sequences))

    def cut(self, request: CutRequest) -> Empty:
        self._take(request.header)
        self._cutting.begin(request.cut, request.workers, request.committed, request.commits, at=request.at)
        return Empty()

    def abort(self, request: AbortRequest) -> Empty:
        self._take(request.header)
        self._cutting.abort(request.cut)
        return Empty()

    def write(self, request: WriteRequest) -> WriteReply:
        self._order(request.header)
        root = self._path(request.root, "the folder of checkpoints")
        self._take(request.header)
        entries = self._cutting.write(request.cut, root, alone=request.alone)
        if entries is None:
            return WriteReply(torn=True)
        return WriteReply(entries=json.dumps([asdict(e) for e in entries]), trouble=self.compacting.trouble)

    def digest(self, request: DigestRequest) -> DigestReply:
        self._take(request.header)
        found = self._cutting.digest(request.cut)
        if found is None:
            return DigestReply(torn=True)
        return DigestReply(digest=found[0].to_bytes(16, "big"), rows=found[1])

    def replace(self, request: ReplaceRequest) -> ReplaceReply:
        self._order(request.header)
        path = self._path(request.path, "the checkpoint to go back to")
        shard = self._take(request.header)[1]
        if not request.number:
            return ReplaceReply(rows=self._replacing.read(request.table, path))
        order = ReplaceOrder(request.table, path, request.number, frozenset(request.workers), request.generation)
        return ReplaceReply(rows=self._replacing.apply(shard, order))

    def stats(self, request: ShardStatsRequest) -> ShardStatsReply:
        self._shard(request.header)
        return ShardStatsReply(stats=json.dumps(self.told()))

    def told(self) -> dict[str, Any]:
        """Return what the shard holds and has done, its chains of files included."""
        _, shard = self._in_run()
        done, writing = self.compacting.told(), self.writing
        return {
            **shard.stats(),
            **({"compaction": done} if any(done.values()) else {}),
            **({"writing": writing} if writing else {}),
            **({"load": self._load.told()} if self._load is not None else {}),
        }

    @property
    def writing(self) -> dict[str, int] | None:
        """Return how far the cut is that is being written, None if none is: its number, bytes that are written, and in all."""
        return self._cutting.writing if self._joined is not None else None

    def rows(self, request: RowsRequest) -> RowsReply:
        self._leased(request.header)
        assert self._rows is not None, "made before the shard answers anything"
        return self._rows.answer(request)

    def changes(self, request: ChangesRequest) -> ChangesReply:
        return self._leased(request.header).changes.answer(request)


def _all_roots(given: Sequence[str], spec: JobSpec) -> tuple[str, ...]:
    if not (given or spec.checkpoint_path):
        raise InvalidArgument(
            f"job {spec.name} keeps its checkpoints in its own folder, which this shard does not know and so could not write to: "
            "give it --root FOLDER, the job's folder or its `checkpoints`, or give the job a checkpoint_path (docs/security.md)"
        )
    return (*given, *roots_of(spec))
