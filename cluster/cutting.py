# SPDX-License-Identifier: Apache-2.0
"""Cutting: a cut from its gate to its manifest, as orders to shards (SEMANTICS section 7).

    gate     workers that push come to the gate; who does not come in time ends the attempt
    cut      every owner begins its view; workers push again
    write    every owner writes its view, while training goes on
    commit   the manifest appears in one atomic step, then it is recorded

Invariant: what the manifest says of the job (closed splits, counts, results) is of the moment at which all views have begun and
no worker pushes yet: a split that is closed then is whole in every view, and one that an owner knows as closed is among them.
Whatever fails on the way leaves training and the cut before as they were. One event loop; files are dealt with in a thread of
``executor`` (None: of the loop's own).
"""

import asyncio
import json
import logging
from collections import Counter
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor
from pathlib import Path
from threading import Lock
from typing import Any, TypeVar

from oarlock.checkpoint.format import cut_folder
from oarlock.checkpoint.line import line_of
from oarlock.checkpoint.manifest import BlockEntry, Manifest
from oarlock.checkpoint.place import check_owner, place_of
from oarlock.checkpoint.store import CheckpointStore
from oarlock.checkpoint.transforms_file import write_transforms
from oarlock.client.gate import PATIENCE
from oarlock.client.job import TRAINING, WRITING
from oarlock.client.router import ShardAddress
from oarlock.cluster.coordinator import Coordinator
from oarlock.cluster.gate import Gate
from oarlock.cluster.live_digest import digest_now
from oarlock.cluster.moment import Moment, moment_of
from oarlock.cluster.ranks import cut_step, hold_still
from oarlock.cluster.rollback import roll_back
from oarlock.cluster.together import all_done
from oarlock.data.scores import merit
from oarlock.proto.common_pb2 import Header
from oarlock.proto.errors import CorruptCheckpoint, PSError, Unavailable
from oarlock.proto.shard_pb2 import AbortRequest, CutRequest, RankCommits, WriteRequest
from oarlock.telemetry.stages import Stages

logger = logging.getLogger(__name__)

WRITE_SECONDS = 600.0
# An order that was lost is given again; who has carried it out already answers the same.
FIRST_PAUSE_SECONDS, MOST_PAUSE_SECONDS = 0.005, 0.5
# A view of hybrid begins after a step of all ranks, which is waited for so long: those that have made it wait for the last one
# anyhow, and one that is gone has another host by then. Between two questions a part of what was waited so far goes by.
STEP_SECONDS, PART_OF_STEP = 30.0, 8
# Between two looks whether all workers are at the gate.
LOOK_SECONDS = 0.001

T = TypeVar("T")
Send = Callable[[ShardAddress, str, Any, float], Awaitable[Any]]


class Cutting:
    """Makes the cuts that are due; ``step()`` looks once. ``send`` and ``header`` are those of the coordinator's orders.

    They go to ``checkpoints``, unless the job says another place.
    """

    def __init__(
        self,
        coordinator: Coordinator,
        checkpoints: Path,
        send: Send,
        header: Callable[[ShardAddress], Header],
        stages: Stages,
        executor: Executor | None,
    ) -> None:
        self._c = coordinator
        self._place = place_of(coordinator.spec)
        self._root = self._place.path or str(checkpoints)
        self._send = send
        self._header = header
        self._stages = stages
        self._executor = executor
        # "committed" and "failed" ones of this process.
        self.counts: Counter[str] = Counter()
        self._looked = False
        # Held while something is done in a thread.
        self._busy = Lock()
        # When moves were last not in the way.
        self._held_since = coordinator.clock()

    async def step(self) -> None:
        """Make a cut if one is due."""
        c = self._c
        if not c.placed:
            return
        if not self._looked:
            await self._adopt_or_give_up()
            self._looked = True
        if not self._may_begin():
            return
        # Before a cut: what is half done is in none, and where cuts follow each other it would never have its turn.
        if c.rollbacks.due():
            await roll_back(c, self._ordered, self._gathered)
            return
        if c.live_digest.wanted and c.phase in (TRAINING, WRITING):
            await digest_now(c, self._ordered, self._gathered, self._begun, self._abort)
            return
        with c.lock:
            due = c.cuts.due()
        if not due:
            return
        # Before the gate stands: a store that hangs holds up nobody who trains.
        wrong = await self._look_for_owner()
        with c.lock:
            gate = c.cuts.begin() if c.cuts.due() else None
        if gate is not None:
            with self._stages.time("checkpoint", cut=gate.cut):
                await self._make(gate, wrong)

    def _may_begin(self) -> bool:
        """Hold back moves while something is due, and return whether none is in the middle of one."""
        c, copies = self._c, self._c.copies
        with c.lock:
            digest = c.live_digest.wanted and c.phase in (TRAINING, WRITING)
            copies.held = c.rollbacks.due() or digest or c.cuts.due()
            if not copies.held or copies.calm:
                self._held_since = c.clock()
                return copies.held
            if c.clock() - self._held_since > c.spec.gate_seconds and copies.moving.closed:
                # Whoever should have reported by now does not keep pushes waiting.
                copies.moving.give_up_closed()
            return False

    def _store(self) -> CheckpointStore:
        return self._place.store(self._root)

    async def _run(self, function: Callable[..., T], *arguments: Any) -> T:
        def call() -> T:
            with self._busy:
                return function(*arguments)

        return await asyncio.get_running_loop().run_in_executor(self._executor, call)

    async def close(self) -> None:
        """Wait until a thread has ended what it does for somebody who was cancelled."""
        await self._run(lambda: None)

    async def _adopt_or_give_up(self) -> None:
        """Deal with the cut that an earlier life of this coordinator had begun."""
        c = self._c
        cut = c.cuts.begun
        if not cut:
            if c.cuts.last > c.cuts.committed:
                # A digest's, perhaps: its views would keep what changes until the next cut, and nobody else lets them go.
                await self._abort(c.cuts.last)
            return
        try:
            manifest = await self._run(self._store().load_manifest, cut)
            if (manifest.job, manifest.run) != (c.spec.job, c.run):
                raise CorruptCheckpoint(f"cut {cut} is of another history")
        except (PSError, OSError) as error:
            c.cuts.give_up(f"the coordinator was started again while it was made ({error})", again=True)
            await self._abort(cut)
            return
        self._committed(manifest)

    async def _look_for_owner(self) -> PSError | OSError | None:
        """Return why no cut may be written, if something is in the way."""
        try:
            await self._run(self._check_owner)
        except (PSError, OSError) as error:
            return error
        return None

    async def _make(self, gate: Gate, wrong: PSError | OSError | None = None) -> None:
        """Make a cut, or give it up; ``wrong``: why nothing may be written."""
        c = self._c
        # Whether something may have been written, and whether its manifest may be there: the answer to a put that failed says
        # nothing of what comes of it.
        begun = put = False
        try:
            if wrong is not None:
                raise wrong
            begun = True
            await self._gathered(gate)
            moment = await self._begun(gate)
            manifest = moment.manifest(c.spec, await self._written(gate.cut))
            put = True
            await self._run(self._commit, manifest)
        except (PSError, OSError) as error:
            self.counts["failed"] += 1
            again = isinstance(error, PSError) and error.retryable
            if put and isinstance(error, CorruptCheckpoint):
                # Files of chains are not what they should be, and no cut that follows on them can be: the next one is whole.
                c.cuts.committed = 0
            c.cuts.give_up(str(error), again=again)
            await self._abort(gate.cut)
            if begun and not put:
                # Not before: what is half written there may be another job's.
                await self._run(self._discard, gate.cut)
            return
        # The manifest is what counts; old cuts go before the job can be over with this one.
        await self._run(self._clean, manifest.cut)
        self._committed(manifest)

    async def _begun(self, gate: Gate) -> Moment:
        """Have the views of all shards begin, and workers push again; return the job as it was then."""
        c = self._c
        moment = commits = None
        at = 0
        if c.spec.ranks:
            commits, step = await hold_still(c, gate.cut, self._ordered)
            with c.lock:
                if c.spec.mode == "sync":
                    # Ranks stand at no gate: they go on with the first views that have begun.
                    moment = moment_of(c, gate.cut)
                else:
                    # Shards keep them back until they write.
                    c.cuts.deserted = not c.members.alive("worker")
                    at = cut_step(c, step)
                    logger.info("event=cut_step cut=%d step=%d at=%d", gate.cut, step, at)
        await self._cut(gate.cut, gate.workers, commits, at)
        if gate.workers and not c.spec.ranks and c.clock() >= gate.shuts + PATIENCE * c.spec.gate_seconds:
            # Whoever said that it stood at the gate may have opened it since: this process may have been stopped for a while.
            raise Unavailable(
                f"views began so late that workers may have opened their gates of cut {gate.cut} by themselves"
            )
        with c.lock:
            # Not before: owners may have forgotten marks of splits that were closed since. Nor later: nobody pushes yet.
            moment = moment or moment_of(c, gate.cut)
            c.cuts.open()
        return moment

    def _check_owner(self) -> None:
        """Raise InvalidArgument if another job has its checkpoints where this one's go."""
        store = self._store()
        # Of what it has committed itself it is the owner.
        if store.cuts()[-1:] != [self._c.cuts.committed]:
            check_owner(store, self._c.spec.job)

    def _commit(self, manifest: Manifest) -> None:
        """Make the cut exist. Once it is there it is not given up for an error after that: it is made to stay."""
        store = self._store()
        write_transforms(store.files, self._c.spec.transforms)
        try:
            store.commit(manifest)
        except OSError:
            if not store.is_committed(manifest.cut):
                raise
            store.commit(manifest)

    def _discard(self, cut: int) -> None:
        """Delete what was written of a cut that came to nothing: a disk that is full has room for the next one."""
        try:
            self._store().discard_incomplete(below=cut + 1)
        except (OSError, PSError) as error:
            logger.info("event=not_discarded cut=%d error=%s", cut, error)

    def _committed(self, manifest: Manifest) -> None:
        self.counts["committed"] += 1
        self._c.cuts.commit(manifest, f"{self._root}/{cut_folder(manifest.cut)}")

    async def _gathered(self, gate: Gate) -> None:
        """Wait until all workers are at the gate; Unavailable if one is late."""
        c = self._c
        await asyncio.sleep(max(0.0, gate.shuts - c.clock()))
        while not gate.passed:
            if c.clock() > gate.ends:
                late = [m.id for m in c.members.alive("worker") if m.incarnation in gate.missing]
                raise Unavailable(
                    f"worker {', '.join(map(str, late))} did not stop pushing within {c.spec.gate_seconds:g} s of its gate"
                )
            await asyncio.sleep(LOOK_SECONDS)

    async def _cut(self, cut: int, workers: list[int], commits: RankCommits | None, at: int) -> None:
        """Have every owner begin its view; under hybrid at step ``at``, before which it answers Unavailable."""

        seconds, part_of_wait = self._c.spec.gate_seconds, 1
        if self._c.spec.mode == "hybrid":
            seconds, part_of_wait = max(seconds, STEP_SECONDS), PART_OF_STEP

        async def one(shard: ShardAddress) -> None:
            known = self._c.cuts.committed
            request = CutRequest(cut=cut, workers=workers, committed=known, commits=commits, at=at)
            await self._ordered(shard, "Cut", request, seconds, part_of_wait)

        await all_done(map(one, self._owners()))

    async def _written(self, cut: int) -> list[BlockEntry]:
        """Have every owner write its view; return the entries of all blocks."""

        async def one(shard: ShardAddress) -> list[BlockEntry]:
            alone = self._c.cuts.ends_job or self._c.cuts.idle
            request = WriteRequest(cut=cut, root=self._root, alone=alone)
            reply = await self._ordered(shard, "Write", request, WRITE_SECONDS)
            if reply.torn:
                raise Unavailable(f"a worker pushed to shard {shard.id} without waiting for its gate to open")
            if reply.trouble and (told := f"shard {shard.id}: {reply.trouble}") not in self._c.warnings:
                self._c.warn(told)
            return [BlockEntry(**e) for e in json.loads(reply.entries)]

        return [entry for part in await all_done(map(one, self._owners())) for entry in part]

    def _owners(self) -> list[ShardAddress]:
        return list(self._c.shards.values())

    async def _ordered(
        self, shard: ShardAddress, order: str, request: Any, seconds: float, part_of_wait: int = 1
    ) -> Any:
        """Give an order until it is answered, for ``seconds``; pauses are about a part of the time waited so far."""
        clock = asyncio.get_running_loop().time
        end, pause = clock() + seconds, FIRST_PAUSE_SECONDS
        while True:
            request.header.CopyFrom(self._header(shard))
            try:
                # No single answer is waited for as long as a step of all ranks may take.
                each = self._c.spec.gate_seconds if order == "Cut" else seconds
                return await self._send(shard, order, request, max(0.001, min(each, end - clock())))
            except PSError as error:
                if not error.retryable or clock() + pause >= end or self._c.shards.get(shard.id) != shard:
                    raise
            await asyncio.sleep(pause)
            pause = min(pause * (1 + 1 / part_of_wait), MOST_PAUSE_SECONDS)

    async def _abort(self, cut: int) -> None:
        """Have views let go; who does not hear it lets it go with the next cut."""

        async def one(shard: ShardAddress) -> None:
            request = AbortRequest(header=self._header(shard), cut=cut)
            await self._send(shard, "Abort", request, self._c.spec.gate_seconds)

        for result in await asyncio.gather(*map(one, self._owners()), return_exceptions=True):
            if isinstance(result, BaseException) and not isinstance(result, PSError):
                raise result

    def _best(self, store: CheckpointStore, line: list[int]) -> list[int]:
        """Return those of ``line`` that are kept for what the evaluation of their epoch found, best first."""
        c, spec = self._c, self._c.spec
        if not spec.checkpoint_keep_best or not spec.metrics:
            return []
        first = spec.metrics[0]
        every = store.best_cuts(len(store.cuts()), first, merit=lambda value: merit(first, value))
        found = [cut for cut in every if cut in line][: spec.checkpoint_keep_best]
        c.cuts.best = found[0] if found else 0
        return found

    def _clean(self, cut: int) -> None:
        """Delete old cuts, but for the one of the best epoch if that is kept."""
        c, store = self._c, self._store()
        try:
            # Cuts of abandoned runs are not counted, and go with those of the line that are older than they are.
            cuts = [n for n in store.cuts() if store.newest([n]) is not None]
            line = line_of(cuts, c.events.restores)
            oldest = line[-c.spec.checkpoints_kept :][0]
            pinned = [*self._best(store, line), *c.rollbacks.pinned(str(store.files.root))]
            store.keep_last(sum(n >= oldest for n in cuts), pinned=pinned)
            store.discard_incomplete(below=cut)
        except OSError as error:
            c.warn(f"old checkpoints in {self._root} could not be deleted: {error}")
