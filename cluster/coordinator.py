# SPDX-License-Identifier: Apache-2.0
"""The coordinator: answers members, and turns what it hears into decisions that are on disk before they are told.

Invariant: one lock covers all state; every answer that depends on a change is given after the change was committed.
Decisions are in members.py, work.py and placement.py; orders to shards are carried out by orders.py. Called from many threads.
"""

import logging
import random
from collections.abc import Callable
from threading import RLock
from typing import Any

from oarlock.checkpoint.manifest import Manifest
from oarlock.checkpoint.roots import Roots
from oarlock.client.job import DONE, FAILED, GATHERING, OVER, STOPPED, STOPPING, TRAINING, JobSpec
from oarlock.client.layout import Layout
from oarlock.client.router import ShardAddress
from oarlock.cluster.autoscaling import Autoscaling
from oarlock.cluster.beginning import Past
from oarlock.cluster.clocks import Clocks
from oarlock.cluster.copies import Copies
from oarlock.cluster.cuts import Cuts
from oarlock.cluster.epoch_end import end_epoch_if_done
from oarlock.cluster.events import Events
from oarlock.cluster.going_back import GoingBack, end_run
from oarlock.cluster.live_digest import LiveDigest
from oarlock.cluster.losses import Losses
from oarlock.cluster.members import MAX_ALIVE, Member, Members
from oarlock.cluster.ranks import work_of
from oarlock.cluster.record import Records
from oarlock.cluster.recoveries import Recoveries
from oarlock.cluster.recovery import go_back, take_up
from oarlock.cluster.rollback import Rollbacks
from oarlock.cluster.scaling import Scaling
from oarlock.cluster.splits import release
from oarlock.cluster.status import status_of
from oarlock.cluster.store import Store
from oarlock.proto.common_pb2 import Placement
from oarlock.proto.errors import InvalidArgument, Unavailable

logger = logging.getLogger(__name__)

# A worker that has not left so long after it was asked to is struck off.
STOP_SECONDS = 30.0
MAX_WARNINGS = 1000


class Coordinator:
    """The state of one job. ``clock()`` gives seconds that never go back; they are compared, never stored.

    ``goes_back``: whether somebody goes on with ``beginning.next_run`` when blocks are lost for good; else the job fails then.
    """

    def __init__(
        self,
        store: Store,
        spec: JobSpec,
        *,
        clock: Callable[[], float],
        rng: random.Random,
        goes_back: bool = False,
    ) -> None:
        self.store = store
        self.spec = spec
        # Where somebody may name checkpoints.
        self.roots = Roots()
        # As every member gets it.
        self.spec_json = spec.to_json()
        self.layout = Layout(spec.tables, spec.dense)
        self.clock = clock
        self.rng = rng
        self.metrics_address = ""
        self.lock = RLock()
        self.members = Members(spec.lease_seconds)
        self.work = work_of(spec, lambda: len(self.members.alive("worker")))
        self.clocks = Clocks()
        self.phase = GATHERING
        self.reason = ""
        self.run = 1
        # Whether a run was ever begun from a checkpoint.
        self.has_begun = False
        # Whether a run that is begun may have workers of another compute signature than those before it.
        self.accept_signature = False
        self.term = 0
        # Path of the checkpoint that this run begins from; empty: first values.
        self.restore = ""
        # Whether all shards of the placement have been told of it in this life: members may be.
        self.placed = False
        self.stop_wanted: bool | None = None
        self.stop_reason = ""
        self.stopping_since = 0.0
        # Whether an epoch's evaluation is being merged, by whoever reported its last split: the epoch ends in a moment.
        self.merging = False
        # When time was last counted, and when leases were last judged: a message may count before the first judgement.
        self.last_tick = 0.0
        self.judged = 0.0
        # What went wrong without ending the job.
        self.warnings: list[str] = []
        self.events = Events()
        self.cuts = Cuts(self)
        self.rollbacks = Rollbacks(self)
        self.live_digest = LiveDigest()
        self.copies = Copies(self)
        self.scaling = Scaling(spec, self.members, self.records)
        self.autoscaling = Autoscaling(self)
        self.recoveries = Recoveries(self.copies.deaths.recovered)
        self.losses = Losses(self.copies.deaths.counted)
        self.going_back = GoingBack(able=goes_back)
        # The file, for the coordinator of the next run: None while this one is in charge.
        self.handed_on: Store | None = None
        # Called when there may be something to tell shards; from any thread.
        self.wake: Callable[[], None] = lambda: None

    @property
    def records(self) -> Records:
        return self.copies.records

    @property
    def generation(self) -> int:
        return self.records.generation

    @property
    def shards(self) -> dict[int, ShardAddress]:
        """Shards that take part, by id."""
        return self.records.shards

    def open(self) -> None:
        """Take up the stored state under a new term. Call once, before the first message."""
        with self.lock:
            take_up(self)
            # An earlier life may have recorded that a shard came or went, and not what follows from it.
            if self.going_back.due:
                return
            for member in [m for m in self.members.all.values() if m.role == "shard" and m.state != "alive"]:
                self._shard_gone(member)
                if self.handed_on is not None:
                    return
            self._place_if_complete()
            if self.phase not in (GATHERING, *OVER) and not all(map(self.scaling.takes_part, self.scaling.usable())):
                # One came, and no more than that was recorded.
                self.copies.shard_came()

    def begin_run(self, manifest: Manifest | None, path: str, past: Past | None = None) -> None:
        """Go back to a committed checkpoint: a new run, whose closed set and results are the manifest's; None: first values.

        ``past``: what the folder of the job's checkpoints says of it, None: nothing.
        """
        past = past or Past()
        with self.lock:
            self.run, self.cuts.last = max(self.run, past.run), max(self.cuts.last, past.cut)
            self.events.adopt(past.events)
            go_back(self, manifest, path)

    # What members are told

    def join(self, role: str, address: str, nonce: int, pid: int, host: str, reader: str) -> Member:
        """Take in a process under a new incarnation; the same nonce gets the same answer."""
        with self.lock:
            known = self.members.by_nonce(role, nonce)
            if known is not None:
                # It heard nothing of its lease before this answer.
                return self.members.renew(known.incarnation, self.clock())
            self._refuse_if_over()
            if role == "shard":
                for old in self.members.alive("shard"):
                    if old.address == address:
                        self.member_gone(old, "dead", "another process listens at its address")
                # That may have ended the job.
                self._refuse_if_over()
            if len(self.members.alive(role)) >= MAX_ALIVE:
                raise Unavailable(f"job {self.spec.name} has {MAX_ALIVE} {role}s and takes in no more for now")
            if self.cuts.gate is not None and self.spec.mode != "hybrid":
                raise Unavailable(f"job {self.spec.name} takes in nobody for the moment in which a cut begins")
            incarnation = self.rng.getrandbits(62) | 1
            while incarnation in self.members.all:
                incarnation = self.rng.getrandbits(62) | 1
            member = Member(incarnation, self._next_id(role), role, address, nonce, pid, host, reader, self.run)
            with self.store as store:
                store.set_member(incarnation, member.record())
                for forgotten in self.members.forget():
                    store.delete_member(forgotten)
            self.members.add(member, self.clock())
            logger.info("event=joined role=%s id=%d incarnation=%d address=%s", role, member.id, incarnation, address)
            self._place_if_complete()
            if role == "shard" and self.phase != GATHERING:
                self.copies.shard_came()
            return member

    def _refuse_if_over(self) -> None:
        if self.phase in (STOPPING, *OVER):
            raise InvalidArgument(f"job {self.spec.name} takes nobody in any more: it is {self.phase}")

    def _next_id(self, role: str) -> int:
        """Return a number that nobody has; of a shard that comes later one that none ever had: words of the dead may be late."""
        if role == "shard" and self.phase != GATHERING:
            return 1 + max((m.id for m in self.members.all.values() if m.role == "shard"), default=-1)
        return self.members.next_id(role)

    def _place_if_complete(self) -> None:
        """Give all blocks to shards once there are enough; a shard more than that has none."""
        found = self.members.alive("shard")[: self.scaling.servers]
        if self.phase == GATHERING and not self.shards and len(found) >= self.scaling.servers:
            self.copies.place(found)

    def next_generation(self, store: Store, generation: int) -> None:
        """Begin a generation of the same placement, which all shards have adopted; within the transaction of ``store``."""
        self.records.begin_generation(store, generation)
        for shard in self.shards:
            self.copies.adoption.adopted(shard, self.generation, self.copies.adoption.listed)

    def placement(self, since: int = 0) -> Placement:
        """Return the newest placement, or what of it changed after a generation; Unavailable before every shard knows it."""
        with self.lock:
            if self.phase in OVER:
                raise InvalidArgument(f"job {self.spec.name} is over: {self.phase}")
            if not self.placed:
                raise Unavailable(
                    f"the placement is not ready: {len(self.members.alive('shard'))} of {self.scaling.servers} shards"
                )
            # Whoever asks though no record changed since asks for another reason.
            changed = since > 0 and bool((self.records.generations > since).any())
            return self.records.message(since if changed else 0)

    @property
    def adopted(self) -> set[int]:
        """Shards that have adopted the newest placement."""
        return {s for s in self.shards if self.copies.adoption.told.get(s, -1) >= self.generation}

    def has_adopted(self, shard: int, generation: int, listed: int | None = None) -> None:
        """Note that a shard has adopted ``generation``; training begins when all have adopted the newest."""
        with self.lock:
            adoption = self.copies.adoption
            adoption.adopted(shard, generation, adoption.listed if listed is None else listed)
            if not self.placed and self.shards and self.adopted == set(self.shards):
                self.placed = True
            if self.placed and self.phase == GATHERING:
                self.set_phase(TRAINING)
                self.scaling.settle(self.store)

    def set_phase(self, phase: str, reason: str = "") -> None:
        """Record and enter a phase."""
        with self.lock, self.store as store:
            self.phase, self.reason = phase, reason
            self.stopping_since = self.clock()
            store.set_fact("phase", phase)
            store.set_fact("reason", reason)
        logger.log(logging.ERROR if phase == FAILED else logging.INFO, "event=phase phase=%s reason=%s", phase, reason)

    def fail(self, reason: str) -> None:
        with self.lock:
            if self.phase not in OVER:
                self.set_phase(FAILED, reason)

    def warn(self, text: str) -> None:
        """Note what went wrong without ending the job; status shows it."""
        logger.warning("event=warning text=%s", text)
        with self.lock:
            if len(self.warnings) < MAX_WARNINGS:
                self.warnings.append(text)

    def abandon(self, reason: str) -> None:
        """Have members leave though nothing can be recorded any more. The process is about to end."""
        with self.lock:
            if self.phase not in OVER:
                self.phase, self.reason = FAILED, reason

    def record_work(self, store: Store) -> None:
        work = self.work
        store.set_fact("closed", {"floor": work.closed.floor, "above": sorted(work.closed.above)})
        store.set_fact("counted", self.counted())

    def counted(self, coming_back: int = 0) -> dict[str, Any]:
        """Return what the current epoch has counted so far, and will have once so many splits have come back."""
        names = ("samples", "steps", "loss_sum", "train_seconds", "evaluate_seconds")
        return {**{name: getattr(self.work, name) for name in names}, "given_back": self.work.given_back + coming_back}

    def member_gone(self, member: Member, state: str, error: str = "") -> None:
        """A member left or died: its leases go to others; a shard's blocks are lost until the job is resumed."""
        with self.lock:
            if member.state != "alive":
                return
            leases = self.work.leased_to(member.incarnation)
            if member.incarnation in self.clocks.unheard:
                # One that it opened before its turn has kept nothing yet.
                self.work.vanished(self.spec.open_splits)
            with self.store as store:
                member.state, member.error = state, error
                store.set_member(member.incarnation, member.record())
                # With it, or whoever starts after a death in between would not know that they were lost.
                store.set_fact("counted", self.counted(sum(kind == "train" for kind, _ in leases)))
            self.clocks.gone(member.incarnation)
            if member.role == "worker":
                self.losses.gone(member.incarnation)
            if self.cuts.gate is not None:
                self.cuts.gate.gone(member.incarnation)
            freed = len(leases)
            logger.info(
                "event=member_gone role=%s id=%d state=%s splits_freed=%d error=%s",
                member.role,
                member.id,
                state,
                freed,
                error,
            )
            if self.phase not in OVER and state == "dead" and member.role == "worker":
                self.warn(
                    f"worker {member.id} (pid {member.pid}) is gone: {error or 'no reason known'}; "
                    f"the {freed} splits that it had go to others"
                )
            for kind, split in leases:
                release(self, member.incarnation, kind, split, "")
            if member.role == "shard":
                self._shard_gone(member)

    def _shard_gone(self, member: Member) -> None:
        if not self.scaling.takes_part(member) or self.phase in OVER:
            return
        if self.phase == GATHERING:
            # Nothing was trained on it: whoever comes in its place starts from the same values.
            with self.store as store:
                self.records.clear(store)
            self.copies.adoption.begin_anew()
            self.placed = False
            self._place_if_complete()
        else:
            self.copies.deaths.shard_gone(member)

    def lost(self, member: Member | None, blocks: int) -> None:
        """Blocks of a shard are lost, and the job is to go back to the last cut: the one place for that. Under the lock.

        ``member``: who had them last; None: nobody knows.
        """
        if self.handed_on is None:
            end_run(self, member, blocks)

    def count_time(self) -> None:
        """Count the time until now as training, or as evaluation if all is trained. Under the lock."""
        now = self.clock()
        passed = max(0.0, now - self.last_tick)
        self.last_tick = now
        if self.phase == TRAINING and self.members.alive("worker"):
            if self.work.trained:
                self.work.evaluate_seconds += passed
            else:
                self.work.train_seconds += passed

    def tick(self) -> None:
        """Judge leases and move on phases that wait for nobody. Call every heartbeat."""
        with self.lock:
            if self.handed_on is not None:
                return
            self.store.check()
            now = self.clock()
            if now - self.judged > self.spec.heartbeat_seconds:
                # This process was paused itself: what it did not hear is not held against anybody.
                self.members.grant_full_term(now)
                self.stopping_since = now
            self.judged = now
            self.count_time()
            for member in self.members.expired(now):
                self.member_gone(member, "dead", "its lease ended")
            if self.phase == STOPPING and now - self.stopping_since > STOP_SECONDS:
                for member in self.members.alive("worker"):
                    self.member_gone(member, "dead", f"it did not leave within {STOP_SECONDS:g} s")
            if self.phase == TRAINING and self.stop_wanted is not None and not self.cuts.ends_together:
                self.set_phase(STOPPING, self.stop_reason)
            if self.phase == TRAINING and self.work.finished:
                self.set_phase(DONE)
            self.autoscaling.step()
            due = self.phase == TRAINING
        if due:
            end_epoch_if_done(self)

    def stop(self, checkpoint: bool, reason: str) -> None:
        """Ask the job to end: workers finish their groups and leave, then a checkpoint is written (or not)."""
        with self.lock:
            if self.phase in OVER:
                return
            if self.handed_on is not None:
                # The next run hears of it.
                self.stop_wanted, self.stop_reason = checkpoint, reason
                return
            with self.store as store:
                self.stop_wanted, self.stop_reason = checkpoint, reason
                store.set_fact("stop", checkpoint)
                store.set_fact("stop_reason", reason)
            if self.phase == GATHERING:
                self.set_phase(STOPPED, reason)
            elif self.phase == TRAINING and not self.cuts.ends_together:
                self.set_phase(STOPPING, reason)

    def status(self) -> dict[str, Any]:
        """Return all that people ask about, JSON-ready."""
        with self.lock:
            return status_of(self)
