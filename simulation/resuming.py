# SPDX-License-Identifier: Apache-2.0
"""What follows the loss of a shard: the whole job ends, and goes on from its newest committed cut on other shards.

    a shard dies        nobody, or the launcher, sees it; meanwhile the others go on as they would, also with a cut
    the job ends        its coordinator and shards with it; some workers are left over, and are told that their run is over
    the job goes on     as ``--resume`` does: the same state file, the next run, other numbers of shards and workers
    there is no cut     a new job begins, with a state, a number and a folder of its own

Invariant: what a schedule says decides who dies when; what was there before a loss has no say in what comes after it. One thread.
"""

import contextlib
from dataclasses import replace
from pathlib import Path
from typing import Any

from oarlock.checkpoint.format import cut_folder
from oarlock.checkpoint.store import LocalStore, open_checkpoint
from oarlock.client.job import DONE, FAILED, OVER, STOPPED, TRAINING, JobSpec
from oarlock.cluster.coordinator import Coordinator
from oarlock.cluster.service import CoordinatorService
from oarlock.proto.coordinator_pb2 import HANDED, ReportRequest, ScaleRequest
from oarlock.proto.errors import PSError
from oarlock.ps.service import ShardService
from oarlock.ps.shard import Shard
from oarlock.simulation.faults import HANDED_OVER, LEASE_SECONDS, Fault
from oarlock.simulation.loop import Process
from oarlock.simulation.state import Committed
from oarlock.simulation.strikes import Strikes
from oarlock.simulation.wire import Call, Killed

# The launcher looks so often whether a process has ended.
LOOK_SECONDS = 0.25
# Of workers, which of them outlive the job that they belong to.
LEFT_OVER = 0.3
# That somebody may want.
MOST_SHARDS = 4


class Resuming(Strikes):
    """The half of a world that loses shards, and goes on. ``lives``: how often it began."""

    spec: JobSpec
    folder: Path
    committed: Committed
    cuts: Any
    coordinator: Coordinator

    def __init__(self) -> None:
        super().__init__()
        self.lives = 1
        # The shards of this life are those from here on.
        self._first_shard = 0
        # What a coordinator is told to begin from, unless it has recorded the run that does.
        self._restore, self._run_before = "", 0
        # Messages of cuts that were handled so far, by method.
        self._handled: dict[str, int] = {}

    @property
    def shards_now(self) -> list[Process]:
        """The shards of this life; dead ones, too."""
        return self.shard_processes[self._first_shard :]

    @property
    def services_now(self) -> list[ShardService]:
        return self.services[self._first_shard :]

    def _living(self) -> dict[int, Shard]:
        """Return the shards that nobody has struck off, by id."""
        found = {}
        for process, service in zip(self.shards_now, self.services_now, strict=True):
            if process.alive and service._joined is not None:
                identity, shard = service._joined
                if self.committed.members.get(identity.incarnation, {}).get("state") == "alive":
                    found[identity.id] = shard
        return found

    def _start_coordinator(self) -> None:
        raise NotImplementedError

    def _start_shard(self) -> None:
        raise NotImplementedError

    def _begin_anew(self) -> None:
        """Forget all of the job that was, and know the one that ``spec`` says."""
        raise NotImplementedError

    def _lost_sight(self, number: int | None = None) -> None:
        """An owner may do what nobody acknowledges any more: what follows each change of a row follows it no more.

        ``number``: of a shard that is gone.
        """
        raise NotImplementedError

    def _went_back(self, cut: int) -> None:
        """What is watched is at a cut again."""
        raise NotImplementedError

    # A shard dies

    def _struck(self, member: Any) -> None:
        """A shard was judged; a coordinator that died before that was on disk has not judged it."""
        recorded = self.committed.members.get(member.incarnation, {}).get("state")
        if member.role == "shard" and recorded != "alive":
            joined = enumerate(service._joined for service in self.services)
            self._lost_sight(*(n for n, each in joined if each and each[0].incarnation == member.incarnation))

    def _kill_shard(self, fault: Fault) -> None:
        living = [process for process in self.shards_now if process.alive]
        if living and self.committed.facts.get("phase") not in OVER:
            process = living[fault.who % len(living)]
            process.alive = False
            self._lost_sight(self.shard_processes.index(process))
            # Seen by who started it, or by nobody: then its lease ends.
            seen = self.rng.random() * 2 * LOOK_SECONDS if self.rng.random() < 0.7 else 2 * LEASE_SECONDS
            self._later(fault.seconds + seen, self._shard_ended, process)

    def _strike_at(self, call: Call, process: Process, *, before: bool) -> None:
        """Strike what the schedule has for this message, which ``process`` is about to handle, or has handled."""
        if self.cuts.committed < self.schedule.cuts_before:
            return
        self.struck, names = (call, process), [call.method]
        if call.method == "Coordinator.Report" and ReportRequest.FromString(call.data).told == HANDED:
            names.append(HANDED_OVER)
        for name in names:
            count = self._handled[name] = self._handled.get(name, 0) + before
            for fault in self.schedule.at_cuts:
                if (fault.method, fault.at, bool(fault.who % 2)) == (name, count, before):
                    self._strike(replace(fault, who=fault.who // 2))

    def _shard_ended(self, process: Process) -> None:
        """The launcher sees that a shard ended: it ends the job, whatever the coordinator knows of it, or starts another one."""
        if process not in self.shards_now or self.committed.facts.get("phase") in (DONE, STOPPED):
            return
        if self.schedule.elastic and self.committed.facts.get("phase") != FAILED:
            self._start_missing()
        else:
            self._lose()

    # Shards come and go

    def _scale(self, fault: Fault) -> None:
        """Somebody wants another number of shards, and the launcher starts those that are missing."""
        c, process = self.coordinator, self.coordinator_process
        servers = max(1 + self.spec.replicas, 1 + fault.who % MOST_SHARDS)
        if process.alive and self.committed.facts.get("phase") == TRAINING:
            with contextlib.suppress(PSError, Killed):
                process.call(CoordinatorService(c).scale, ScaleRequest(servers=servers))
            self._later(fault.seconds, self._start_missing)

    def _start_missing(self) -> None:
        """Start as many shards as are wanted and are not there."""
        wanted = (self.committed.facts.get("scale") or {"servers": self.spec.servers})["servers"]
        living = sum(process.alive for process in self.shards_now)
        if self.committed.facts.get("phase") not in OVER:
            for _ in range(wanted - living):
                self._start_shard()

    # The job goes on

    def _lost(self, reason: str) -> bool:
        """Whether a job that failed for ``reason`` lost a shard, and is to be resumed."""
        return reason.startswith(("shard", "no shard"))

    def _lose(self) -> None:
        """End all that is left of this life, and begin the next one a while later."""
        self.lives += 1
        self.counts["resumed"] += 1
        self._note("the job lost a shard and is resumed")
        for process in self.shards_now:
            process.alive = False
        for process in list(self.workers):
            if self.rng.random() >= LEFT_OVER:
                process.alive = False
        self.workers.clear()
        self._first_shard = len(self.shard_processes)
        was_there = self.coordinator_process.alive
        self.coordinator_process.alive = False
        self.store.close()
        # What is on disk of a job that ended says nothing of the next life.
        self.committed.facts.pop("phase", None)
        manifest = LocalStore(self.folder / "checkpoints").latest()
        shards = self.rng.randint(1, 3)
        self.spec = replace(self.spec, servers=shards, replicas=min(self.schedule.replicas, shards - 1))
        if manifest is None:
            self.folder = self.folder / "anew"
            self.folder.mkdir()
            self.spec = replace(self.spec, job=f"{self.lives:032x}")
            self._restore = ""
            self._begin_anew()
            self.counts["begun anew"] += 1
        else:
            path = str(self.folder / "checkpoints" / cut_folder(manifest.cut))
            self._restore, self._run_before = path, self._recorded()
            self._went_back(manifest.cut)
        if was_there:
            self._later(self.rng.random(), self._start_coordinator)
        for _ in range(shards):
            self._later(self.rng.random(), self._start_shard)
        for _ in range(self.schedule.workers):
            self._later(self.rng.random(), self._start_worker)

    def _recorded(self) -> int:
        return int(self.committed.facts.get("run", 1))

    def _take_up(self, c: Coordinator) -> None:
        """As the coordinator's process does at its start: begin the run that it was told of, unless that is recorded."""
        if self._restore and c.run == self._run_before:
            c.begin_run(open_checkpoint(self._restore)[1], self._restore)
