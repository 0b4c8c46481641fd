# SPDX-License-Identifier: Apache-2.0
"""Cuts: when one is due, and what the coordinator records and allows while one is made (SEMANTICS section 7).

    begin      its number is on disk; the gate stands: nobody joins, and once it is shut nothing is leased
    open       every owner has begun its view, or the cut is given up: training goes on, while views are written
    commit     the manifest is on disk; then it is recorded
    give_up    it never was; the one before stays

Invariant: a number is never used twice, and is on disk before anybody hears it; at most one cut is being made. A cut that an
earlier life had begun is adopted if its manifest is whole, else given up. The coordinator's lock covers it.
"""

import logging
from typing import TYPE_CHECKING, Any

from oarlock.checkpoint.line import Restore, line_of
from oarlock.checkpoint.manifest import Manifest
from oarlock.client.job import DONE, OVER, STOPPED, STOPPING, TRAINING, WRITING
from oarlock.cluster.gate import Gate
from oarlock.cluster.store import Store

if TYPE_CHECKING:
    from oarlock.cluster.coordinator import Coordinator

logger = logging.getLogger(__name__)

# The cut that a job ends with is tried again after these pauses: who is told that a disk is full may make room, and meanwhile
# shards have the model.
LAST_PAUSES = (1.0, 4.0, 15.0, 40.0)

# Heartbeats are sent so often, and each tells when the gate shuts: every worker has heard it once so many have passed.
HEARTBEATS_BEFORE_GATE = 1.25


class Cuts:
    """``last``: the newest number; ``opened``: the newest whose gate is open again; ``committed``: the newest of this run."""

    def __init__(self, coordinator: "Coordinator") -> None:
        self._c = coordinator
        self.last = 0
        self.opened = 0
        self.committed = 0
        self.gate: Gate | None = None
        # The one that was begun and neither committed nor given up; 0: none.
        self.begun = 0
        # Somebody asked for one.
        self.wanted = False
        self.checkpoints: list[dict[str, Any]] = []
        # The one that is kept since the epoch before it was the best one; 0: none.
        self.best = 0
        # The newest that came to nothing, and why.
        self.failed: dict[str, Any] = {}
        # Of the one to end with: how often it failed, and when it is tried again.
        self._failures, self._again = 0, 0.0
        # The epoch that it was in when the newest one was begun.
        self.epoch = 0
        # Whether no worker was alive when the step of the newest one was chosen.
        self.deserted = False
        # Whether a cut that all ranks were to end with came to nothing: they end wherever they are.
        self._ended_apart = False
        # Of the one that is being made: nobody trains until its views have begun; the job ends with it.
        self._holds = self.ends_job = False
        # Nobody had work when it was begun, nor waits for it.
        self.idle = False
        # When the newest one was begun, and how many steps the job had made.
        self._since_seconds = coordinator.clock()
        self._since_steps = 0

    def take_up(self, store: Store) -> None:
        """Load what was recorded."""
        self.last = self.opened = store.fact("cut", 0)
        self.begun = store.fact("begun", 0)
        self.committed = store.fact("committed", 0)
        self.checkpoints = store.fact("checkpoints", [])
        self.best = store.fact("best_cut", 0)
        self._since_seconds = self._c.clock()
        # A file of before it was recorded tells it where there was no cut; else what was done until now counts as saved.
        done = store.fact("counted", {}).get("steps", 0)
        self._since_steps = store.fact("cut_steps", done if self.last else 0)

    def go_back(self, store: Store, manifest: Manifest | None, path: str) -> None:
        """Begin a new run from ``manifest``, None: from first values. No cut of it is there yet."""
        if manifest is not None:
            self.last = max(self.last, manifest.cut)
        self.opened = self.last
        self.begun = self.committed = self._failures = 0
        if manifest is not None and manifest.job == self._c.spec.job:
            self.best = self._best_after(Restore(manifest.cut, self.last))
        else:
            self.best = 0
        store.set_fact("best_cut", self.best)
        if manifest is not None and path not in [known["path"] for known in self.checkpoints]:
            self.checkpoints.append({"cut": manifest.cut, "path": path, "epoch": manifest.epoch})
        # Those of the cut that it comes from, by now.
        self._since_seconds, self._since_steps = self._c.clock(), self._c.work.steps
        for name, value in (("cut", self.last), ("begun", 0), ("committed", 0), ("checkpoints", self.checkpoints)):
            store.set_fact(name, value)
        store.set_fact("cut_steps", self._since_steps)

    def _best_after(self, restore: Restore) -> int:
        """Return the one that is kept as the best, if it is of the line that this restore begins, else 0."""
        kept = [self.best] if self.best and self._c.spec.checkpoint_keep_best else []
        return max(line_of(kept, [*self._c.events.restores, restore]), default=0)

    def newest_path(self) -> str:
        """Return the path of the newest committed cut of this run, of the one that it began with if there is none, or nothing."""
        first = max((restore.last for restore in self._c.events.restores), default=0)
        mine = [known["path"] for known in self.checkpoints if known["cut"] > first]
        return mine[-1] if mine else self._c.restore

    def due(self) -> bool:
        """Whether a cut is to be made now."""
        c, spec = self._c, self._c.spec
        if c.phase in (WRITING, STOPPING) and c.clock() < self._again:
            return False
        if c.phase == WRITING:
            return True
        if c.phase == STOPPING:
            # An epoch that is all evaluated is not left open by its last moment.
            return c.stop_wanted is not False and not c.members.alive("worker") and not c.merging
        if c.phase != TRAINING:
            return False
        steps, seconds = c.work.steps - self._since_steps, c.clock() - self._since_seconds
        by_steps = 0 < spec.checkpoint_steps <= steps
        if self.ends_together:
            return True
        by_time = 0 < spec.checkpoint_seconds <= seconds and bool(c.members.alive("worker"))
        return self.wanted or by_steps or by_time

    @property
    def ends_together(self) -> bool:
        """Whether the job is to end with a cut that is made while it trains: after one step, for all ranks of a hybrid job.

        Workers leave when its views have begun. Without it each of them would leave in the middle of a step.
        """
        c = self._c
        if c.spec.mode != "hybrid" or c.phase != TRAINING or not c.stop_wanted or self._ended_apart:
            return False
        return bool(c.members.alive("worker"))

    @property
    def withholds(self) -> bool:
        """Whether nothing is leased, for a cut. Ranks of hybrid are, while its epoch is trained: it waits for a step of all."""
        c = self._c
        if c.spec.mode == "hybrid" and self.epoch == c.work.epoch and not c.work.trained:
            return False
        return self.gate_is_shut

    def begin(self) -> Gate:
        """Take a number, record it, and set up the gate."""
        c = self._c
        with c.lock:
            now = c.clock()
            gate = self._gate(now)
            with c.store as store:
                self.last = self.begun = gate.cut
                store.set_fact("cut", self.last)
                store.set_fact("begun", self.begun)
                store.set_fact("cut_steps", c.work.steps)
            self.wanted = False
            self._since_seconds, self._since_steps = now, c.work.steps
            self._holds = c.phase == WRITING
            self.ends_job = self.ends_together or (
                c.phase in (STOPPING, WRITING) and (c.work.finished or c.stop_wanted is not None)
            )
            self.epoch = c.work.epoch
            self.idle = not (self._holds or c.work.leases or c.clocks.unheard)
            self.gate = gate
            logger.info("event=cut_begun cut=%d workers=%d", self.last, len(gate.missing))
            return self.gate

    def stand(self) -> Gate:
        """Set up a gate for something else than a cut; its number is used up, and no manifest will ever have it."""
        c = self._c
        with c.lock:
            gate = self._gate(c.clock())
            # Of a cut that came to nothing and is made again: that one is still to come, and nobody trains before it.
            self._holds = self.ends_job = False
            self.epoch = c.work.epoch
            with c.store as store:
                self.last = gate.cut
                store.set_fact("cut", self.last)
            self.gate = gate
            return gate

    def _gate(self, now: float) -> Gate:
        """Return the gate of the next number."""
        pushing = self._pushing()
        # Whoever has nothing to push need not be asked.
        shuts = now + HEARTBEATS_BEFORE_GATE * self._c.spec.heartbeat_seconds if pushing else now
        # While it stands no record changes; once it is open moves go on, beside the writing.
        self._c.copies.held = False
        return Gate(self.last + 1, shuts=shuts, ends=shuts + self._c.spec.gate_seconds, workers=pushing)

    def _pushing(self) -> list[int]:
        """Return the workers that may have a push under way: those with a training split, or of whom that is not known.

        Under hybrid none of them is waited for: shards hold back what comes after the cut's step.
        """
        c = self._c
        if c.spec.mode == "hybrid":
            return []
        holders = {holder for (kind, _), holder in c.work.leases.items() if kind == "train"}
        return [m.incarnation for m in c.members.alive("worker") if m.incarnation in holders | c.clocks.unheard]

    @property
    def after_epoch(self) -> bool:
        """Whether the one that is being made is of the moment after an epoch: nobody has trained since."""
        return self._holds

    @property
    def gate_is_shut(self) -> bool:
        """Whether a gate stands, and the moment is there at which workers shut theirs."""
        return self.gate is not None and self._c.clock() >= self.gate.shuts

    def seconds_to_gate(self) -> float:
        return max(0.0, self.gate.shuts - self._c.clock()) if self.gate is not None else 0.0

    def open(self) -> None:
        """Let pushes go on: every owner has begun its view, so what is trained from now on is not in the cut."""
        c = self._c
        with c.lock:
            self.gate = None
            self.opened = self.last
            c.losses.opened(self.opened, self.committed)
            if self.ends_together:
                # Also one that was begun before anybody asked the job to stop.
                self.ends_job = True
                c.set_phase(STOPPING, c.stop_reason)
            if self._holds:
                self.ends_job = c.work.finished or c.stop_wanted is not None
                if not self.ends_job:
                    self._train()

    def commit(self, manifest: Manifest, path: str) -> None:
        """Note a committed checkpoint, and end the job if it was the last one."""
        c = self._c
        with c.lock:
            with c.store as store:
                self.begun, self.committed = 0, manifest.cut
                self.checkpoints.append({"cut": manifest.cut, "path": path, "epoch": manifest.epoch})
                for name in ("begun", "committed", "checkpoints"):
                    store.set_fact(name, getattr(self, name))
                store.set_fact("best_cut", self.best)
            if c.phase not in OVER and self.ends_job:
                c.set_phase(DONE if c.work.finished else STOPPED, "" if c.work.finished else c.stop_reason)

    def give_up(self, error: str, *, again: bool = False) -> None:
        """Note that the cut came to nothing. Training goes on, unless it was the one to end with: that is tried again some times.

        ``again``: what went wrong may pass: while nobody trains, the next look makes another one.
        """
        c = self._c
        with c.lock:
            cut, self.begun, self.gate = self.begun, 0, None
            self.opened = self.last
            with c.store as store:
                store.set_fact("begun", 0)
            self.failed = {"cut": cut, "error": error}
            logger.info("event=cut_given_up cut=%d error=%s", cut, error)
            self._ended_apart |= self.ends_together
            if c.phase in OVER or (again and (self.ends_job or self._holds)):
                return
            if self.ends_job and self._failures < len(LAST_PAUSES):
                pause = LAST_PAUSES[self._failures]
                self._failures, self._again = self._failures + 1, c.clock() + pause
                c.warn(f"the last checkpoint could not be written, it is tried again in {pause:g} s: {error}")
            elif self.ends_job:
                last = f"cut {self.checkpoints[-1]['cut']} is the newest one" if self.checkpoints else "there is none"
                c.fail(f"the last checkpoint could not be written: {error}; {last}")
            else:
                c.warn(f"checkpoint {cut} could not be written, training goes on: {error}")
                if self._holds:
                    self._train()

    def _train(self) -> None:
        """Let workers train on that waited for the cut."""
        self._holds = False
        self._c.set_phase(TRAINING)
        self._c.last_tick = self._c.clock()

    def told(self) -> dict[str, Any]:
        """Return what people ask: the newest number, the one being made (0: none) and how much of it shards said to have
        written, the best one, and the one that failed last."""
        found: dict[str, Any] = {"last": self.last, "begun": self.begun}
        if self.begun:
            told = [m.stats.get("writing") for m in self._c.members.alive("shard")]
            of = [each for each in told if isinstance(each, dict) and each.get("cut") == self.begun]
            for name in ("written_bytes", "bytes"):
                found[name] = sum(value for each in of if isinstance(value := each.get(name), int) and value >= 0)
        if self.best:
            found["best"] = self.best
        if self.failed:
            found["failed"] = self.failed
        return found
