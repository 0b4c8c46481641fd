# SPDX-License-Identifier: Apache-2.0
"""The coordinator: answers members, and turns what it hears into decisions that are on disk before they are told.

Invariant: one lock covers all state; every answer that depends on a change is given after the change was committed.
Decisions are in members.py, work.py and placement.py; orders to shards are carried out by orders.py. Called from many threads.
"""

import json
import logging
import random
import secrets
from collections.abc import Callable
from dataclasses import asdict
from threading import RLock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from oarlock import __version__
from oarlock.checkpoint.manifest import Manifest
from oarlock.client.closed import ClosedSet
from oarlock.client.job import DONE, FAILED, GATHERING, OVER, STOPPED, STOPPING, TRAINING, WRITING, JobSpec
from oarlock.client.layout import Layout
from oarlock.client.router import ShardAddress, pack_placement
from oarlock.cluster.members import Member, Members
from oarlock.cluster.placement import balanced
from oarlock.cluster.store import Store
from oarlock.cluster.work import MAX_FAILURES, EpochResult, Work
from oarlock.proto.common_pb2 import Placement
from oarlock.proto.errors import InvalidArgument, Unavailable

logger = logging.getLogger(__name__)


class Coordinator:
    """The state of one job. ``clock()`` gives seconds that never go back; they are compared, never stored."""

    def __init__(self, store: Store, spec: JobSpec, *, clock: Callable[[], float], rng: random.Random) -> None:
        self.store = store
        self.spec = spec
        self.layout = Layout(spec.tables, spec.dense)
        self.clock = clock
        self.rng = rng
        self.lock = RLock()
        self.members = Members(spec.lease_seconds)
        self.work = Work(spec.splits, spec.evaluation_splits, spec.epochs, spec.metrics)
        self.phase = GATHERING
        self.reason = ""
        self.run = 1
        self.term = 0
        self.cut = 0
        self.generation = 0
        self.owners: NDArray[np.int32] = np.full(self.layout.blocks, -1, np.int32)
        self.shards: dict[int, ShardAddress] = {}
        # Path of the checkpoint that this run begins from; empty: first values.
        self.restore = ""
        # Shards that have adopted the newest placement, and that know the newest closed set.
        self.adopted: set[int] = set()
        self.stop_wanted: bool | None = None
        self.last_tick = 0.0
        self.checkpoints: list[dict[str, Any]] = []

    def open(self) -> None:
        """Take up the stored state under a new term. Call once, before the first message."""
        with self.lock, self.store as store:
            if store.fact("job") not in (None, self.spec.job):
                raise InvalidArgument(
                    f"this state belongs to job {store.fact('job')}, the job file says {self.spec.job}"
                )
            self.term = store.fact("term", 0) + 1
            store.set_fact("job", self.spec.job)
            store.set_fact("term", self.term)
            self.run, self.cut = store.fact("run", 1), store.fact("cut", 0)
            self.phase, self.reason = store.fact("phase", GATHERING), store.fact("reason", "")
            self.restore = store.fact("restore", "")
            self.stop_wanted = store.fact("stop", None)
            self.checkpoints = store.fact("checkpoints", [])
            closed = store.fact("closed", {"floor": 0, "above": []})
            self.work.closed = ClosedSet(closed["floor"], closed["above"])
            self.work.history = [EpochResult(**e) for e in store.epochs()]
            self.work.epoch = len(self.work.history)
            self.work.results = store.evaluations()
            counted = store.fact(
                "counted", {"samples": 0, "loss_sum": 0.0, "train_seconds": 0.0, "evaluate_seconds": 0.0}
            )
            for name, value in counted.items():
                setattr(self.work, name, value)
            self.work.all_touched = self.term > 1
            placed = store.placement()
            if placed is not None:
                self.generation = placed[0]
                self.owners = np.frombuffer(placed[1], np.int32).copy()
                self.shards = {s["id"]: ShardAddress(**s) for s in placed[2]}
            for value in store.members():
                self.members.add(Member(**value), self.clock())
            if self.phase == WRITING:
                # The order to write died with the earlier life: the cut never was.
                self.phase = TRAINING
        self.last_tick = self.clock()
        logger.info("event=coordinator_open term=%d run=%d phase=%s", self.term, self.run, self.phase)

    def begin_run(self, manifest: Manifest, path: str) -> None:
        """Go back to a committed checkpoint: a new run, whose closed set and results are the manifest's."""
        with self.lock, self.store as store:
            self.run = max(self.run, manifest.run) + 1
            self.cut = max(self.cut, manifest.cut)
            self.restore = path
            self.work.closed = ClosedSet(manifest.closed.floor, manifest.closed.above)
            saved = manifest.metrics
            self.work.history = [EpochResult(**e) for e in saved["history"]]
            self.work.epoch = len(self.work.history)
            self.work.results = {int(s): list(v) for s, v in saved["evaluations"].items()}
            for name, value in saved["counted"].items():
                setattr(self.work, name, value)
            self.work.all_touched = True
            self.generation += 1
            self.owners[:] = -1
            self.shards, self.adopted = {}, set()
            self.phase, self.reason, self.stop_wanted = GATHERING, "", None
            for member in self.members.all.values():
                if member.state == "alive":
                    member.state = "dead"
                    store.set_member(member.incarnation, member.record())
            store.clear_evaluations()
            store.clear_epochs()
            for split, sums in self.work.results.items():
                store.set_evaluation(split, sums)
            for result in self.work.history:
                store.set_epoch(result.epoch, asdict(result))
            store.set_placement(self.generation, self.owners.tobytes(), [])
            for name in ("run", "cut", "restore", "phase", "reason"):
                store.set_fact(name, getattr(self, name))
            store.set_fact("stop", None)
            self._record_work(store)
        logger.info("event=run_begun run=%d restore=%s", self.run, path)

    # What members are told

    def join(self, role: str, address: str, nonce: int, pid: int, host: str, reader: str) -> Member:
        """Take in a process under a new incarnation; the same nonce gets the same answer."""
        with self.lock:
            if self.phase in (STOPPING, *OVER):
                raise InvalidArgument(f"job {self.spec.name} takes nobody in any more: it is {self.phase}")
            known = self.members.by_nonce(nonce)
            if known is not None and known.state == "alive":
                return known
            if role == "shard" and self.phase != GATHERING:
                raise InvalidArgument(
                    f"job {self.spec.name} runs with {len(self.shards)} shards; adding one while it trains is not possible yet"
                )
            incarnation = secrets.randbits(62) | 1
            member = Member(incarnation, self.members.next_id(role), role, address, nonce, pid, host, reader)
            with self.store as store:
                store.set_member(incarnation, member.record())
            self.members.add(member, self.clock())
            logger.info("event=joined role=%s id=%d incarnation=%d address=%s", role, member.id, incarnation, address)
            if role == "shard" and len(self.members.alive("shard")) == self.spec.servers:
                self._place()
            return member

    def _place(self) -> None:
        shards = {m.id: ShardAddress(m.id, m.address, m.incarnation) for m in self.members.alive("shard")}
        owners = balanced(self.layout, list(shards))
        with self.store as store:
            self.generation += 1
            self.owners, self.shards, self.adopted = owners, shards, set()
            store.set_placement(self.generation, owners.tobytes(), [asdict(s) for s in shards.values()])
        logger.info("event=placed generation=%d shards=%d blocks=%d", self.generation, len(shards), len(owners))

    def placement(self) -> Placement:
        """Return the newest placement, once every shard has adopted it; Unavailable before."""
        with self.lock:
            if not self.placed:
                raise Unavailable(
                    f"the placement is not ready: {len(self.members.alive('shard'))} of {self.spec.servers} shards"
                )
            return pack_placement(self.generation, self.owners, self.shards)

    @property
    def placed(self) -> bool:
        return bool(self.shards) and self.adopted == set(self.shards)

    def has_adopted(self, shard: int, generation: int) -> None:
        """Note that a shard owns its blocks under ``generation``; training begins when all do."""
        with self.lock:
            if generation == self.generation:
                self.adopted.add(shard)
                if self.placed and self.phase == GATHERING:
                    self.set_phase(TRAINING)

    def set_phase(self, phase: str, reason: str = "") -> None:
        """Record and enter a phase."""
        with self.lock, self.store as store:
            self.phase, self.reason = phase, reason
            store.set_fact("phase", phase)
            store.set_fact("reason", reason)
        logger.log(logging.ERROR if phase == FAILED else logging.INFO, "event=phase phase=%s reason=%s", phase, reason)

    def fail(self, reason: str) -> None:
        with self.lock:
            if self.phase not in OVER:
                self.set_phase(FAILED, reason)

    def _record_work(self, store: Store) -> None:
        work = self.work
        store.set_fact("closed", {"floor": work.closed.floor, "above": sorted(work.closed.above)})
        store.set_fact("counted", self.counted())

    def counted(self) -> dict[str, Any]:
        """Return what the current epoch has counted so far."""
        work = self.work
        return {
            "samples": work.samples,
            "loss_sum": work.loss_sum,
            "train_seconds": work.train_seconds,
            "evaluate_seconds": work.evaluate_seconds,
        }

    def close_split(self, worker: int, split: int, samples: int, loss_sum: float) -> None:
        with self.lock:
            if self.work.close(worker, split, samples, loss_sum):
                with self.store as store:
                    self._record_work(store)

    def evaluated(self, worker: int, split: int, sums: list[float]) -> None:
        """Keep an evaluation split's sums; the last one of an epoch ends it."""
        if len(sums) != 1 + len(self.spec.metrics) or not all(np.isfinite(sums)):
            raise InvalidArgument(
                f"evaluation split {split}: {len(sums)} sums came, wanted {1 + len(self.spec.metrics)} finite ones"
            )
        with self.lock:
            if not self.work.evaluate(worker, split, sums):
                return
            with self.store as store:
                store.set_evaluation(split, sums)
                self.end_epoch_if_done(store)

    def end_epoch_if_done(self, store: Store) -> None:
        """Finish the epoch when it is trained and evaluated; begin a checkpoint if one is due."""
        work = self.work
        if work.finished or not (work.trained and work.evaluated):
            return
        self._count_time()
        result = work.finish_epoch()
        store.set_epoch(result.epoch, asdict(result))
        store.clear_evaluations()
        self._record_work(store)
        every = self.spec.checkpoint_epochs
        due = work.finished or (every > 0 and work.epoch % every == 0)
        if due:
            self.phase = WRITING
            store.set_fact("phase", WRITING)
        logger.info(
            "event=epoch_done epoch=%d loss=%.6f metrics=%s", result.epoch, result.loss, json.dumps(result.metrics)
        )

    def release(self, worker: int, kind: str, split: int, reason: str) -> None:
        with self.lock:
            if not self.work.release(worker, kind, split, reason):
                self.fail(f"{kind} split {split} met an error on {MAX_FAILURES} workers: {reason}")

    def member_gone(self, member: Member, state: str, error: str = "") -> None:
        """A member left or died: its leases go to others; a shard's blocks are lost until the job is resumed."""
        with self.lock:
            if member.state != "alive":
                return
            with self.store as store:
                member.state = state
                store.set_member(member.incarnation, member.record())
            freed = self.work.drop_worker(member.incarnation)
            logger.info(
                "event=member_gone role=%s id=%d state=%s splits_freed=%d error=%s",
                member.role,
                member.id,
                state,
                freed,
                error,
            )
            if member.role == "shard" and self.phase not in OVER and self.phase != GATHERING:
                where = f"shard {member.id} ({member.address}, pid {member.pid})"
                self.fail(
                    f"{where} is gone{': ' + error if error else ''}; go on from the last checkpoint with --resume"
                )

    def _count_time(self) -> None:
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
            now = self.clock()
            if now - self.last_tick > max(self.spec.heartbeat_seconds * 2, 1.0):
                # This process was paused itself: what it did not hear is not held against anybody.
                self.members.grant_full_term(now)
            self._count_time()
            for member in self.members.expired(now):
                self.member_gone(member, "dead", "its lease ended")
            if self.phase == TRAINING and self.stop_wanted is not None:
                self.set_phase(STOPPING, self.reason)
            if self.phase == TRAINING and self.work.finished:
                self.set_phase(DONE)
            elif self.phase == TRAINING and self.work.trained and self.work.evaluated:
                with self.store as store:
                    self.end_epoch_if_done(store)

    def stop(self, checkpoint: bool, reason: str) -> None:
        """Ask the job to end: workers finish their groups and leave, then a checkpoint is written (or not)."""
        with self.lock:
            if self.phase in OVER:
                return
            with self.store as store:
                self.stop_wanted = checkpoint
                store.set_fact("stop", checkpoint)
            if self.phase == GATHERING:
                self.set_phase(STOPPED, reason)
            elif self.phase == TRAINING:
                self.set_phase(STOPPING, reason)

    def committed(self, manifest: Manifest, path: str) -> None:
        """Note a committed checkpoint, and end the job if it was the last one."""
        with self.lock:
            with self.store as store:
                self.checkpoints.append({"cut": manifest.cut, "path": path, "epoch": manifest.epoch})
                store.set_fact("checkpoints", self.checkpoints)
            self.after_writing()

    def after_writing(self) -> None:
        """Leave the writing phase: to the end if all is trained or a stop was asked for, else back to training."""
        if self.phase == STOPPING or self.stop_wanted is not None:
            self.set_phase(STOPPED, self.reason)
        elif self.work.finished:
            self.set_phase(DONE)
        elif self.phase == WRITING:
            self.set_phase(TRAINING)
        self.last_tick = self.clock()

    def next_cut(self) -> int:
        """Take a number for a new checkpoint; it is never used again."""
        with self.lock, self.store as store:
            self.cut += 1
            store.set_fact("cut", self.cut)
            return self.cut

    def status(self) -> dict[str, Any]:
        """Return all that people ask about, JSON-ready."""
        with self.lock:
            work, best = self.work, self.work.best()
            return {
                "job": self.spec.job,
                "name": self.spec.name,
                "version": __version__,
                "recipe": self.spec.recipe,
                "seed": self.spec.seed,
                "phase": self.phase,
                "reason": self.reason,
                "run": self.run,
                "term": self.term,
                "generation": self.generation,
                "servers": self.spec.servers,
                "workers": self.spec.workers,
                **work.progress(),
                "best": asdict(best) if best else None,
                "history": [asdict(r) for r in work.history],
                "checkpoints": self.checkpoints,
                "members": [{**m.record(), "stats": m.stats} for m in self.members.all.values() if m.state == "alive"],
                "reader": "+".join(sorted({m.reader for m in self.members.all.values() if m.reader})),
                "blocks": {str(s): int((self.owners == s).sum()) for s in sorted(self.shards)},
            }
