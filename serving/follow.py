# SPDX-License-Identifier: Apache-2.0
"""Following a job that trains: its live model is served, and kept as fresh as its shards tell.

    look     once a second, or at once when a shard does not know us: the coordinator says run, placement and cuts
    begin    a run that is new here begins with the newest cut of its line of history, read from the folder of cuts
    poll     four times a second, of each shard by a thread of its own: what changed, or blocks whole

Invariant: a model of another run takes the place of the one before in one assignment, with the rows of the cut that it began
from and nothing of the other run; what is served goes on to be while nobody answers, and ``problem`` says so. Rolled back to a
cut, that cut is served, while the live model is kept up to date behind it. ``current`` is read by any thread without a lock.
"""

import json
import logging
import time
from collections.abc import Callable, Sequence
from threading import Event, Lock, Thread
from typing import Any, Protocol

import numpy as np

from oarlock.checkpoint.manifest import Manifest
from oarlock.checkpoint.reading import Reading
from oarlock.client.job import OVER, JobSpec
from oarlock.client.layout import Layout
from oarlock.client.router import Routes, ShardAddress, unpack_changes, unpack_placement
from oarlock.proto.common_pb2 import Header
from oarlock.proto.coordinator_pb2 import DescribeReply, DescribeRequest, StatusReply, StatusRequest
from oarlock.proto.errors import Malformed, NotFound, PSError, Unavailable, WrongJob
from oarlock.proto.methods import PROTOCOL
from oarlock.proto.shard_pb2 import ChangesReply
from oarlock.serving.coordinator_told import line_in, newer_routes, newest_cut
from oarlock.serving.filling import fill
from oarlock.serving.live import Counts, Live
from oarlock.serving.live_index import LiveIndex
from oarlock.serving.live_recall import LAGS, Keeper, LiveRecall
from oarlock.serving.part import WHOLE, ModelPart
from oarlock.serving.recall import Asked, Recall, RecallSpec
from oarlock.serving.snapshot import Model, Progress, Version, created_of
from oarlock.serving.swap import Serving
from oarlock.serving.troubles import Pollers, Troubles
from oarlock.telemetry.histogram import Histogram

logger = logging.getLogger(__name__)

LOOK_SECONDS = 1.0
POLL_SECONDS = 0.25
CALL_SECONDS = 5.0
# How long a model without a cut may take until all blocks are here, before it is asked whether to go on.
WAIT_SECONDS = 0.1
# A live model that is so old may be older than a cut.
LAST_CUT_SECONDS = 3.0


class Call(Protocol):
    """One call of a method at an address; PSError."""

    def __call__(self, address: str, method: str, request: Any, *, timeout_seconds: float) -> Any: ...


class Following(Serving):
    """The live model of ``job`` (32 hex digits), whose coordinator is where ``address`` says, and whose cuts are in ``store``."""

    def __init__(
        self,
        store: Reading,
        call: Call,
        address: Callable[[], str],
        job: str,
        *,
        trust: bool = False,
        poll_seconds: float = POLL_SECONDS,
        look_seconds: float = LOOK_SECONDS,
        part: ModelPart = WHOLE,
        clock: Callable[[], float] = time.monotonic,
        recall: Sequence[RecallSpec] = (),
        dense: bool = False,
    ) -> None:
        super().__init__(store, trust=trust, look_seconds=look_seconds, recall=recall, part=part, clock=clock)
        self._call = call
        self._address = address
        self._job = job
        self._poll_seconds = poll_seconds
        # Whether dense parameters are followed, too.
        self._dense = dense
        self._live: Live | None = None
        # Its indexes, or those of the run that is about to be served.
        self._live_recall: LiveRecall | None = None
        self._recall_specs = tuple(recall)
        self._troubles = Troubles(self._tell, self._look_anew)
        self._keeper = Keeper(lambda: self._live_recall, self._troubles.said)
        # For how long changes of rows were not found yet, by their nearest ones.
        self.recall_lags = Histogram(LAGS)
        self._routes: Routes | None = None
        self._routing = Lock()
        self._looking = Lock()
        self._wake = Event()
        self._pollers = Pollers(lambda: self._routes, self.poll, self._troubles, self._over, poll_seconds, clock)
        self._counting = Lock()
        self.counts = Counts()
        self.polls = 0
        # How old the state of a shard's blocks is as it is put in place.
        self.freshness = Histogram([0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0])

    @property
    def ready(self) -> bool:
        return self._live is not None and (self.pinned or self._live.whole)

    @property
    def current(self) -> Model:
        """What is served now: the live model, or the cut that somebody went back to."""
        if self.pinned and self._snapshot is not None:
            return self._snapshot
        if self._live is None or not self.ready:
            raise Unavailable("this process is still getting its model from the job: ask again")
        return self._live

    @property
    def recall(self) -> Asked:
        """What is asked for nearest rows: the indexes of what is served."""
        if self.pinned and self._snapshot is not None:
            return self._recall
        if self._live_recall is None:
            raise Unavailable("this process is still getting its model from the job: ask again")
        return self._live_recall

    def recall_of(self, wanted: Version) -> Asked:
        """Return what is asked for nearest rows of a version: also of what is live, behind a cut that somebody went back to."""
        found = self._live_recall
        if not wanted.live:
            return super().recall_of(wanted)
        if found is None or not found.version.stands_for(wanted):
            raise NotFound(f"nearest rows of {wanted} are not to be had here", run=wanted.run)
        return found

    @property
    def live(self) -> Live | None:
        """The live model, also while another one is served; None before the first."""
        return self._live

    def _served(self) -> list[Model]:
        # Behind a cut that somebody went back to, other parts may still serve what is live.
        found, live = super()._served(), self._live
        return found if live is None or live in found else [*found, live]

    # Going back, and on again

    def release(self) -> Model:
        """Serve the live model again."""
        with self._loading:
            self._keep(self._snapshot)
            self.pinned, self._snapshot, self._recall = (
                False,
                None,
                Recall(self._recall_specs, keep=not self.part.whole),
            )
            self._refused.clear()
        return self.current

    # What the coordinator says

    def load(self, cut: int | None = None, *, progress: Progress = lambda done, total: None) -> Model:
        """Begin to follow; return once there is something to serve: a cut, or all blocks from the shards."""
        try:
            self.look()
        except PSError as error:
            # Nobody trains, it seems; what the job had last is served until somebody does.
            self._begin_without(error, progress)
        self.follow()
        while not (self.ready and self._live_recall is not None and self._live_recall.ready):
            # Nobody knows how many bytes there will be.
            progress(0, 0)
            self._over.wait(WAIT_SECONDS)
        return self.current

    @property
    def indexes(self) -> dict[str, LiveIndex]:
        """The indexes of what is followed, by table."""
        return {} if self._live_recall is None else self._live_recall.indexes

    def _begin_without(self, error: PSError, progress: Progress) -> None:
        try:
            manifest = self.store.load_manifest(None)
        except (PSError, OSError):
            # There is no cut either: why nobody answers is what helps.
            raise error from None
        if manifest.job != self._job:
            raise WrongJob(f"cut {manifest.cut} is of job {manifest.job}, and not of {self._job}") from error
        layout = Layout(tuple(manifest.table_specs().values()), tuple(manifest.dense_specs().values()))
        made = self._model(manifest.run, layout, manifest.seed)
        self._fill(made, manifest, progress)
        self._exchange(made)

    def look(self) -> bool:
        """Ask the coordinator what the job's run, placement and cuts are; return whether the run was new. PSError: no answer."""
        with self._looking:
            address = self._address()
            described: DescribeReply = self._call(
                address, "Coordinator.Describe", DescribeRequest(), timeout_seconds=CALL_SECONDS
            )
            if described.job.hex() != self._job:
                raise WrongJob(f"another job than {self._job} answers at {address}")
            reply: StatusReply = self._call(
                address, "Coordinator.Status", StatusRequest(), timeout_seconds=CALL_SECONDS
            )
            status = json.loads(reply.status)
            if not isinstance(status, dict):
                raise Malformed("the coordinator's status is no JSON object")
            spec = JobSpec.from_json(described.spec)
            layout = Layout(spec.tables, spec.dense)
            live = self._live
            anew = live is None or live.run != described.run
            if live is None or anew:
                live = self._begin(described.run, layout, spec.seed, status)
            live.cut = max(live.cut, newest_cut(status))
            routes = unpack_placement(layout, described.placement) if described.placement.shards else None
            with self._routing:
                before = None if anew else self._routes
                self._routes = (
                    routes if before is None or routes is None else newer_routes(before, described.placement, routes)
                )
            if status.get("phase") in OVER:
                raise Unavailable(f"job {spec.name} is {status['phase']}: nothing new comes")
            return anew

    def _model(self, run: int, layout: Layout, seed: int) -> Live:
        return Live(
            self._job,
            run,
            layout,
            seed,
            now=self._clock(),
            clock=self._clock,
            counts=self.counts,
            with_dense=self._dense,
            part=self.part,
        )

    def _exchange(self, made: Live) -> None:
        # First: no row of the run before is found near anything once the new one is served.
        self._live_recall = LiveRecall(self._recall_specs, made, clock=self._clock, lags=self.recall_lags)
        self._keep(self._live)
        self._live = made

    def _begin(self, run: int, layout: Layout, seed: int, status: dict[str, Any]) -> Live:
        """Serve the cut that a run began from, or has made, in place of what is served."""
        begun = time.monotonic()
        made = self._model(run, layout, seed)
        for cut in reversed(line_in(self.store, status)):
            try:
                manifest = self.store.load_manifest(cut)
                if manifest.job != self._job:
                    raise WrongJob(f"cut {cut} is of job {manifest.job}")
                self._fill(made, manifest, lambda done, total: None)
                break
            except (PSError, OSError, MemoryError) as error:
                self.failures += 1
                logger.warning("event=cut_not_loaded cut=%d error=%s", cut, error)
                made = self._model(run, layout, seed)
        self.swaps += self._live is not None
        self._exchange(made)
        self.load_seconds = time.monotonic() - begun
        logger.info("event=following run=%d cut=%d rows=%d seconds=%.2f", run, made.cut, made.rows, self.load_seconds)
        return made

    def take_last_cut(self) -> bool:
        """Take what the newest cut of this run has that is newer than what is served; return whether there is such a cut.

        For when nobody answers any more: what a job trained at its very end may be in its last cut alone.
        """
        live = self._live
        if live is None or live.age < LAST_CUT_SECONDS:
            return False
        with self._looking:
            try:
                manifest = self.store.load_manifest(None)
                if manifest.run != live.run or manifest.cut <= live.cut or manifest.job != self._job:
                    return False
                self._fill(live, manifest, lambda done, total: None)
            except (PSError, OSError, MemoryError) as error:
                self.failures += 1
                logger.warning("event=last_cut_not_loaded error=%s", error)
                return False
        logger.info("event=last_cut run=%d cut=%d rows=%d", live.run, live.cut, live.rows)
        return True

    def _fill(self, live: Live, manifest: Manifest, progress: Progress) -> None:
        """Give a model the blocks of a cut of its run, or of the one that it began from, that are newer than its own."""
        at = self._clock() - max(0.0, time.time() - created_of(manifest))
        fill(live, self.store, manifest, at, trust=self._trust, progress=progress)

    # What the shards say

    def poll(self, shard: ShardAddress) -> bool:
        """Ask a shard what changed, and apply it; return whether to ask for more at once. PSError: it did not answer well."""
        live, routes = self._live, self._routes
        if live is None or routes is None or routes.shards.get(shard.id) != shard:
            return False
        mine = routes.owners[: live.layout.blocks if self._dense else live.layout.dense_base] == shard.id
        mine[: live.layout.dense_base] &= live.mine
        numbers = np.flatnonzero(mine).astype(np.int32)
        if not len(numbers):
            return False
        header = Header(
            protocol=PROTOCOL,
            job=bytes.fromhex(self._job),
            run=live.run,
            target=shard.incarnation,
            generation=routes.generation,
        )
        with live.lock:
            request = live.question(shard, numbers, header)
        asked_at = self._clock()
        reply: ChangesReply = self._call(shard.address, "Shard.Changes", request, timeout_seconds=CALL_SECONDS)
        with live.lock:
            more = live.apply(shard, numbers, reply, asked_at)
        with self._counting:
            self.polls += 1
            if not reply.more:
                self.freshness.observe(self._clock() - asked_at + max(0.0, reply.age_seconds))
        if reply.moved.shape:
            self._moved(live, reply)
        return more

    def _moved(self, live: Live, reply: ChangesReply) -> None:
        """Take note of where blocks went, as a shard says; what it does not know the coordinator will."""
        if reply.HasField("where"):
            changes = unpack_changes(live.layout, reply.where)
            with self._routing:
                if self._routes is not None and not changes.whole:
                    self._routes = self._routes.after(changes, complete=False)
        self._wake.set()

    # Threads

    def follow(self) -> None:
        """Go on in threads, until ``close``."""
        self._thread = Thread(target=self._follow, name="oarlock-follow", daemon=True)
        self._thread.start()
        if self._recall_specs:
            self._keeper.start()

    def _follow(self) -> None:
        while not self._over.is_set():
            with self._troubles.said("the coordinator"):
                if self._routes is None or self._wake.is_set() or not self._over.wait(self._look_seconds):
                    self._wake.clear()
                    self.look()
            self._let_go()
            self._pollers.tend()
            if self._troubles:
                self.take_last_cut()
                self._over.wait(self._poll_seconds)
        self._pollers.join()

    def _tell(self, problem: str) -> None:
        if problem and not self.problem:
            logger.warning("event=not_fresh problem=%r", problem)
        self.problem = problem

    def _look_anew(self) -> None:
        """The coordinator knows better than a shard that refuses; a pause, since it may not yet."""
        self._wake.set()
        self._over.wait(self._poll_seconds)

    def close(self) -> None:
        """Follow no more; idempotent."""
        self._over.set()
        self._wake.set()
        super().close()
        self._keeper.close()
