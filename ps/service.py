# SPDX-License-Identifier: Apache-2.0
"""The shard's service: every message's header is checked here, then the message goes to the shard or its blocks.

Invariant: before the process has joined its job every method but Hello answers Unavailable, and without a lease so do those of
workers: the rows would be old, and somebody else may own them. Called from many threads.
"""

import json
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
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
from oarlock.ps.view import View, Views
from oarlock.telemetry.histogram import Histogram

# Splits that one Marks request may ask for; a worker asks for the few that it opens.
MAX_SPLITS = 1024


class ShardService:
    """Answers the methods of ``Shard`` in proto/methods.py. Cold rows go to ``spill_folder``, None: the temporary folder.

    ``compact_links``: from which length on a chain of files is compacted. ``roots``: where requests may name checkpoints; none:
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
        self._views: Views
        self._place = Place()
        self._compact_links = compact_links
        self.compacting = Compacting(links=compact_links)
        self._replacing: Replacing
        self._following: Following
        self._copying: Copying
        # The cut whose view is being read, by one thread; 0: none.
        self._reading, self._read = Lock(), 0
        self._timing = Lock()
        # Of those that were answered. Taken here: an update itself asks for no time.
        self.pull_seconds = Histogram()
        self.push_seconds = Histogram()
        self._load = Load()
        # Nobody else asks for it.
        self._tells_load = False

    def configure(self, spec: JobSpec, identity: Identity, *, holds_lease: Callable[[], bool] = lambda: True) -> Shard:
        """Begin to answer as ``identity``, with the job's tables, as yet without blocks."""
        shard = Shard(spec, spill_folder=self._spill_folder)
        shard.holdings.me = identity.id
        self._holds_lease = holds_lease
        self._tells_load = bool(spec.autoscale)
        self._rows = Rows(shard, identity.id)
        self._place = place_of(spec)
        if self._given_roots is not None:
            self._roots = Roots(self._given_roots or roots_of(spec))
        self._views = Views(shard, self.compacting, self._place)
        self._replacing = Replacing(shard)
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
            with shard.push_lock:
                self._views.let_go()
            weakref.finalize(shard, close_all, shard.tables)

    def end(self) -> None:
        """Give back what the shard has besides memory, after the last call."""
        self.compacting.stop()
        if self._joined is not None:
            self._joined[1].close()

    def _shard(self, header: Header) -> tuple[Identity, Shard]:
        if self._joined is None:
            raise Unavailable("this shard has not joined its job yet")
        self._joined[0].check(header)
        return self._joined

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

    def pull(self, request: PullRequest | Bulk) -> PullReply | Bulk:
        begun = time.perf_counter()
        reply = self._leased(opened(request)[0].header).pull(request)
        self._took(self.pull_seconds, begun)
        return reply

    def push(self, request: PushRequest | Bulk) -> PushReply | Pending:
        begun = time.perf_counter()
        with self._load:
            reply = self._leased(opened(request)[0].header).push(request)
        self._took(self.push_seconds, begun)
        return reply

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
        self._copying.give(numbers, generations, request.shard)
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
        _, shard = self._take(request.header)
        with shard.push_lock:
            if shard.cuts.is_new(request.cut):
                staged = shard.staged
                if staged is not None and not staged.level(request.cut, request.commits, request.at):
                    raise Unavailable(
                        f"the blocks here are at step {staged.range()[0]}, the cut is of step {request.at}",
                        not_yet=True,
                    )
                shard.cuts.begin(request.cut, request.workers)
                self._views.begin(request.cut, request.committed)
                # A cut comes before a table goes back, or after it.
                self._replacing.forget()
        return Empty()

    def abort(self, request: AbortRequest) -> Empty:
        _, shard = self._take(request.header)
        with shard.push_lock:
            if shard.staged is not None:
                shard.staged.let_go(request.cut)
            if shard.cuts.give_up(request.cut):
                self._views.let_go()
        return Empty()

    def write(self, request: WriteRequest) -> WriteReply:
        self._order(request.header)
        root = self._path(request.root, "the folder of checkpoints")
        _, shard = self._take(request.header)
        with shard.push_lock:
            view = self._views.of(request.cut)
            self._begun(shard, view)
        if view.torn:
            return WriteReply(torn=True)
        with self._alone(view):
            entries = self._views.write(view, root, alone=request.alone)
        return WriteReply(entries=json.dumps([asdict(e) for e in entries]), trouble=self.compacting.trouble)

    @contextmanager
    def _alone(self, view: View) -> Iterator[None]:
        """Have a view be read by nobody else; Unavailable while another one is, or this one.

        Nobody waits for that here: in a store that hangs it may be for good, and each such order would keep a thread.
        """
        with self._reading:
            busy, self._read = self._read, self._read or view.number
        if busy:
            raise Unavailable(
                f"cut {busy} is still under way here: if that lasts, see whether its store answers",
                cut=busy,
                not_yet=True,
            )
        try:
            yield
        finally:
            self._read = 0

    def _begun(self, shard: Shard, view: View) -> None:
        """Take note that all views have begun, and what the cut says of its job is taken. The push lock is held."""
        if view.torn is None:
            view.torn = shard.cuts.torn
        if shard.staged is not None:
            shard.staged.let_go(view.number)

    def digest(self, request: DigestRequest) -> DigestReply:
        _, shard = self._take(request.header)
        with shard.push_lock:
            view = self._views.of(request.cut)
            self._begun(shard, view)
        if view.torn:
            return DigestReply(torn=True)
        with self._alone(view):
            if view.digested is None:
                view.digested = view.digest()
            value, rows = view.digested
        return DigestReply(digest=value.to_bytes(16, "big"), rows=rows)

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
        assert self._joined is not None, "asked of a shard that has joined"
        done, writing = self.compacting.told(), self.writing
        return {
            **self._joined[1].stats(),
            **({"compaction": done} if any(done.values()) else {}),
            **({"writing": writing} if writing else {}),
            **({"load": self._load.told()} if self._tells_load else {}),
        }

    @property
    def writing(self) -> dict[str, int] | None:
        """Return how far the cut is that is being written, None if none is: its number, bytes that are written, and in all."""
        return self._views.writing if self._joined is not None else None

    def rows(self, request: RowsRequest) -> RowsReply:
        self._leased(request.header)
        assert self._rows is not None, "made before the shard answers anything"
        return self._rows.answer(request)

    def changes(self, request: ChangesRequest) -> ChangesReply:
        return self._leased(request.header).changes.answer(request)
