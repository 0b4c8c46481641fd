# SPDX-License-Identifier: Apache-2.0
"""One schedule, run: the real coordinator, shards and workers as processes of a virtual loop, struck by the schedule's faults.

Invariant: the classes are those of the real processes; only time, the wire, the store's file and the engine that starts
processes again are the simulation's. Checks run after every event. One thread.
"""

import asyncio
import contextlib
import contextvars
import random
from collections import Counter
from pathlib import Path
from typing import Any

from oarlock.client.job import FAILED, OVER
from oarlock.cluster.coordinator import Coordinator
from oarlock.cluster.orders import Orders
from oarlock.cluster.process import run_coordinator
from oarlock.cluster.service import CoordinatorService
from oarlock.proto.errors import LeaseLost, OutOfMemory, PSError, WrongRun
from oarlock.proto.methods import METHODS
from oarlock.ps.process import run_shard
from oarlock.ps.service import ShardService
from oarlock.ps.shard import Shard
from oarlock.simulation.copies_checker import CopiesChecker
from oarlock.simulation.cuts import Cuts
from oarlock.simulation.data import Data
from oarlock.simulation.faults import HYBRID, SYNC, Outcome, Schedule
from oarlock.simulation.invariants import Checker, Violation
from oarlock.simulation.kept import Kept
from oarlock.simulation.loop import BEGIN, Inline, Later, Process, Stalled, VirtualLoop
from oarlock.simulation.mixed_checker import MixedChecker
from oarlock.simulation.rank_checker import RankChecker
from oarlock.simulation.residuals import Residuals
from oarlock.simulation.resuming import LOOK_SECONDS, Resuming
from oarlock.simulation.staleness import Bound
from oarlock.simulation.state import Committed, WatchedStore
from oarlock.simulation.wire import Call, Killed, Wire
from oarlock.worker.process import run_worker

COORDINATOR = "in-process:coordinator"
# A job that is not over so long after it began will never be: its faults have all passed by then.
MOST_SECONDS = 600.0
RESTART_SECONDS = 0.2


class World(Resuming):
    """A job of the simulation. ``log``: a list that is told of every event, for people."""

    def __init__(self, schedule: Schedule, data: Data, folder: Path, log: list[str] | None = None) -> None:
        super().__init__()
        self.schedule = schedule
        self.loop = VirtualLoop()
        self.loop.set_exception_handler(self._unhandled)
        self.spec = data.spec(schedule)
        self.rng = random.Random(schedule.seed)
        self.data = data
        self.folder = folder
        self.log = log
        self.wire = Wire(
            self.loop, random.Random(schedule.seed + 1), schedule.latency, self._event, self._before, self._answered
        )
        self.counts: Counter[str] = Counter()
        self._begin_anew()
        self.processes: list[Process] = []
        self.coordinator: Coordinator
        self.coordinator_process: Process
        self.store: WatchedStore
        self.services: list[ShardService] = []
        self.shard_processes: list[Process] = []
        self.workers: list[Process] = []
        self.leaving: dict[str, asyncio.Event] = {}
        self.events = 0
        self.violation = ""
        self._faults = list(schedule.faults)
        # How often a worker was heard at a gate.
        self._gates = 0
        self._refusing: set[int] = set()
        # When each member sent what the coordinator last answered.
        self._renewed: dict[str, float] = {}
        # When the coordinator last heard of each member.
        self._heard: dict[int, float] = {}
        self._finished = self.loop.create_future()

    def _begin_anew(self) -> None:
        """Watch the job that ``spec`` says, in ``folder``, from its begin."""
        self.committed = Committed()
        kinds = {SYNC: RankChecker, HYBRID: MixedChecker}
        self.checker = kinds.get(self.schedule.mode, Checker)(self.spec, self.data, self.committed)
        self.bound = Bound(self.schedule.staleness, follows=not self.schedule.elastic)
        self.kept = Kept(self.spec)
        self.residuals = Residuals(self.spec)
        checkpoints = self.folder / "checkpoints"
        self.cuts = self.checker.cuts(checkpoints) or Cuts(self.spec, checkpoints)
        self._follow_copies()

    def _follow_copies(self) -> None:
        """Watch the copies of a life of the job from its begin."""
        self.copies: CopiesChecker | None = None
        if self.schedule.elastic:
            self.copies = CopiesChecker(self.spec, self.committed, self.checker, self._living, self.counts)

    def _went_back(self, cut: int) -> None:
        """Watch on from a cut. What follows a job from its begin sees no more of it."""
        self.checker.went_back()
        self.cuts.went_back(self.coordinator, cut)
        self._follow_copies()
        self.bound = Bound(self.schedule.staleness, follows=not self.schedule.elastic)
        self._lost_sight()

    def _lost_sight(self, number: int | None = None) -> None:
        self.kept.follows = self.residuals.kept = False
        if number is not None and (joined := self.services[number]._joined) is not None:
            self.checker.gone(joined[1])

    # Running

    def run(self) -> Outcome:
        try:
            self.loop.run_until_complete(self._play())
        except Stalled as error:
            self._violated(f"L1: {error}")
        except Violation as error:
            self._violated(str(error))
        except Exception as error:
            self._violated(f"L2: {type(error).__name__}: {error}")
        finally:
            self.wire.closed = True
            took = self.loop.now - BEGIN
            asyncio.set_event_loop(None)
            try:
                self.loop.dispose(self.processes)
            finally:
                self.store.close()
                self.loop.close()
                for service in self.services:
                    service.end()
        return Outcome(self.violation, self.events, took, self.counts)

    async def _play(self) -> None:
        self._start_coordinator()
        for _ in range(self.schedule.shards):
            self._start_shard()
        for _ in range(self.schedule.workers):
            self._start_worker()
        while not self.violation and self.committed.facts.get("phase") not in OVER:
            await asyncio.sleep(0.25)
            if self.committed.facts.get("phase") == FAILED and self._lost(self.committed.facts.get("reason", "")):
                self._lose()
            if self.loop.now - BEGIN > MOST_SECONDS:
                raise Violation(
                    f"L1: the job is not over after {MOST_SECONDS:g} s: {self.coordinator.status()['phase']}"
                )
        if self.violation:
            return
        if self.committed.facts["phase"] == FAILED:
            raise Violation(f"L2: the job failed: {self.committed.facts['reason']}")
        # Who is killed now takes nothing along: all of it is in the last cut.
        dead = {m.incarnation for m in self.coordinator.members.all.values() if m.state == "dead"}
        # A late message finds the shards as they are, and must find nothing to do.
        await asyncio.sleep(max(0.0, self.wire.last_copy - self.loop.now) + 1.0)
        if not self.violation:
            joined = [s._joined for s in self.services_now if s._joined is not None]
            found = [(identity.id, shard) for identity, shard in joined if identity.incarnation not in dead]
            if self.copies is not None:
                self.copies.finish()
            owners = self.coordinator.copies.records.owners
            for number, shard in found:
                # Some have not heard of the last records any more.
                shard.holdings.owned[:] = (owners == number) & shard.holdings.here
            shards = [shard for _, shard in found]
            self.checker.finish(self.coordinator, shards)
            self.residuals.finish(self.coordinator, shards)

    def _violated(self, what: str) -> None:
        if not self.violation:
            self.violation = what

    def _unhandled(self, loop: Any, context: dict[str, Any]) -> None:
        if isinstance(error := context.get("exception"), Violation):
            self._violated(str(error))
        elif not self.wire.closed:
            self._violated(f"L2: {context['message']}: {type(error).__name__}: {error}")

    # Events

    def _before(self, process: Process, call: Call) -> bool:
        self._strike_at(call, process, before=True)
        return not process.alive

    def _answered(self, process: Process, call: Call, reply: Any) -> None:
        if call.method == "Shard.Push" and self.copies is not None and process in self.shards_now:
            self.copies.acknowledged(METHODS[call.method].request.FromString(call.data), reply)

    def _event(self, process: Process | None, call: Call, request: Any, reply: Any) -> None:
        self.events += 1
        if call.method in ("Coordinator.Join", "Coordinator.Heartbeat") and process is None:
            # Counted from the sending of what was answered.
            self._renewed[call.sender.name] = max(call.sent, self._renewed.get(call.sender.name, BEGIN))
        if process is not None:
            self.counts[call.method] += 1
            self._note(f"{call.method} {call.sender.name} -> {process.name}", request, reply)
            self._check(process, call, request, reply)
        # Under hybrid nobody stands at a gate: shards are asked whether they have come to the step.
        word = "Shard.Cut" if self.schedule.mode == HYBRID else "Coordinator.Gate"
        if call.method == word and process is not None:
            self._gates += 1
            for fault in self.schedule.at_gates:
                if fault.at == self._gates:
                    self._strike(fault)
        if process is not None:
            self._strike_at(call, process, before=False)
        while self._faults and self._faults[0].at <= self.events:
            self._strike(self._faults.pop(0))

    def _check(self, process: Process, call: Call, request: Any, reply: Any) -> None:
        if process is self.coordinator_process:
            if hasattr(request, "header") and not isinstance(reply, PSError):
                self._heard[request.header.sender] = self.loop.now
            if call.method == "Coordinator.Join" and reply is not None and not isinstance(reply, PSError):
                self._heard[reply.incarnation] = self.loop.now
            if call.method == "Coordinator.Lease" and reply is not None:
                self.cuts.leased(request, reply)
            self.bound.answered(call.method, request, reply)
            if call.method == "Coordinator.Gate":
                self.cuts.stood(request.header.sender, request.cut)
            self.residuals.answered(call.method, request)
            self.checker.answered(call.method, request, reply)
            if self.copies is not None:
                self.copies.handled(None, call.method, request, reply)
        elif process in self.shards_now:
            number = self.shard_processes.index(process)
            joined = self.services[number]._joined
            if joined is not None:
                self._check_shard(number, joined[1], call.method, request, reply)

    def _check_shard(self, number: int, shard: Shard, method: str, request: Any, reply: Any) -> None:
        # One that was struck off refuses, and has what nobody acknowledges any more.
        living = not self.schedule.elastic or shard in self._living().values()
        if living:
            self.checker.handled(shard, method, request, reply)
        if self.copies is not None:
            self.copies.handled(shard, method, request, reply)
        if method == "Shard.Push":
            if living:
                self.checker.pushed(shard, request.split)
            self.kept.pushed(shard)
            self.residuals.pushed(shard, request, reply)
            self.cuts.pushed(request, reply)
            if not isinstance(reply, PSError):
                self.bound.pushed(number, request)
        elif method == "Shard.Pull" and not isinstance(reply, PSError):
            self.checker.pulled(number, self.loop.now - self._renewed.get(f"shard-{number}", BEGIN))
            if lacking := self.bound.violation(number, request):
                raise Violation(f"S1: {lacking}")
            if wrong := self.kept.violation(request, reply):
                raise Violation(f"V1: {wrong}")
        elif method in ("Shard.Close", "Shard.Adopt"):
            self.checker.told_closed(shard)

    def _note(self, what: str, request: Any = None, reply: Any = None) -> None:
        if self.log is not None:
            text = f"{self.events:4d} {self.loop.now - BEGIN:8.3f} {what}"
            for name in ("split", "group", "splits", "wanted", "held"):
                if hasattr(request, name):
                    text += f" {name}={getattr(request, name)}"
            if isinstance(reply, PSError):
                text += f" -> {type(reply).__name__}: {reply}"
            self.log.append(text)

    # Processes

    def _process(self, name: str) -> Process:
        process = Process(name)
        self.processes.append(process)
        return process

    def _start_coordinator(self) -> None:
        process = self.coordinator_process = self._process("coordinator")
        self.store, self._able_since = self._make_store(process), self.loop.now

        def begin() -> None:
            self.store.open()
            c = self.coordinator = Coordinator(self.store, self.spec, clock=self.loop.time, rng=self.rng)
            c.open()
            self._opened(c)
            gone = c.member_gone

            def member_gone(member: Any, state: str, error: str = "") -> None:
                if member.state != "alive":
                    gone(member, state, error)
                    return
                self._judge(member, error)
                self.bound.gone(member.incarnation)
                self.residuals.ended(c, member.incarnation)
                try:
                    gone(member, state, error)
                finally:
                    self._struck(member)

            c.member_gone = member_gone  # type: ignore[method-assign]
            self.wire.serve(process, COORDINATOR, CoordinatorService(c))

        with contextlib.suppress(Killed):
            process.call(begin)
        orders = Orders(self.coordinator, self.wire.link(process), self.folder / "checkpoints", executor=Inline())
        task = self.loop.start(process, run_coordinator(self.coordinator, orders))
        task.add_done_callback(lambda t: self._ended(process, t))

    def _make_store(self, process: Process) -> WatchedStore:
        return WatchedStore(self.folder / "state.sqlite", self.committed, lambda: self._coordinator_died(process))

    def _opened(self, c: Coordinator) -> None:
        self._take_up(c)
        self.cuts.watch(c)

    def _judge(self, member: Any, error: str) -> None:
        self._note(f"member gone: {member.role} {member.id} {error}")
        if error == "its lease ended":
            silent = self.loop.now - max(self._heard.get(member.incarnation, BEGIN), self._able_since)
            self.checker.judged(f"{member.role} {member.id}", silent)

    def _coordinator_died(self, process: Process) -> None:
        if not self.wire.closed:
            self._end_coordinator(process, self.rng.random())

    def _end_coordinator(self, process: Process, seconds: float) -> None:
        if process.alive:
            process.alive = False
            self.store.close()
            self._later(RESTART_SECONDS + seconds, self._start_coordinator)

    def _start_shard(self) -> None:
        number = len(self.shard_processes)
        process = self._process(f"shard-{number}")
        # Few cuts are made here: chains count as long as soon as they are chains.
        service = ShardService(compact_links=2)
        # Where one of the life before was.
        address = f"in-process:shard-{number - self._first_shard}"
        self.wire.serve(process, address, service)
        self.services.append(service)
        self.shard_processes.append(process)
        rng = random.Random(self.schedule.seed * 31 + number)
        running = run_shard(self.wire.link(process), COORDINATOR, service, address, rng=rng, executor=Inline())
        task = self.loop.start(process, running)
        task.add_done_callback(lambda t: self._ended(process, t))

    def _start_worker(self) -> None:
        if self.committed.facts.get("phase") in OVER:
            return
        process = self._process(f"worker-{sum(p.name.startswith('worker') for p in self.processes)}")
        self.workers.append(process)
        rng = random.Random(self.rng.getrandbits(32))
        leaving = self.leaving[process.name] = asyncio.Event()
        computing = Later(self.loop, rng, self.schedule.latency) if self.spec.compute_threads > 1 else None
        link, reader = self.wire.link(process), self.data.reader
        worker = run_worker(link, COORDINATOR, reader, Inline(), rng=rng, leaving=leaving, computing=computing)
        self.loop.start(process, worker).add_done_callback(lambda t: self._ended(process, t))

    def _ended(self, process: Process, task: "asyncio.Task[Any]") -> None:
        if self.wire.closed or task.cancelled() or not process.alive:
            return
        error = task.exception()
        self._note(f"{process.name} ended: {error!r}")
        if process.name.startswith("worker"):
            self._worker_ended(process, error)
            return
        if self.schedule.elastic and process in self.shard_processes:
            process.alive = False
        self._later(LOOK_SECONDS, self._shard_ended, process)
        # One that comes when the job is over is sent away.
        late = isinstance(error, PSError) and self.committed.facts.get("phase") in OVER
        if error is not None and not isinstance(error, LeaseLost) and not late:
            self._violated(f"L2: {process.name} ended by {type(error).__name__}: {error}")

    def _worker_ended(self, process: Process, error: BaseException | None) -> None:
        if process not in self.workers:
            # Left over from an earlier life, and told so.
            self.counts["left over"] += 1
            if error is not None and not isinstance(error, PSError):
                self._violated(f"L2: {process.name} ended by {type(error).__name__}: {error}")
            return
        self.workers.remove(process)
        if error is None:
            return
        self.counts[f"worker ended by {type(error).__name__}"] += 1
        late = isinstance(error, PSError) and self.committed.facts.get("phase") in OVER
        memory = isinstance(error, OutOfMemory) and self.counts["refuse"]
        if not (memory or late or isinstance(error, LeaseLost | WrongRun)):
            self._violated(f"L2: {process.name} ended by {type(error).__name__}: {error}")
        self._later(RESTART_SECONDS, self._start_worker)

    def _later(self, seconds: float, function: Any, *arguments: Any) -> None:
        def call() -> None:
            if not self.wire.closed:
                function(*arguments)

        # Not as the process that happens to run: what the engine does, no process does.
        self.loop.call_later(seconds, call, context=contextvars.Context())
