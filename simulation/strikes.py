# SPDX-License-Identifier: Apache-2.0
"""What a schedule's faults do to a world: to its messages, processes, links, files and memory.

Invariant: a fault strikes between two events, never in the middle of one; what it breaks comes back after a while. One thread.
"""

import asyncio
import random
from abc import ABC, abstractmethod
from collections import Counter
from dataclasses import replace
from typing import Any

from oarlock.ps.service import ShardService
from oarlock.simulation.faults import HEARTBEAT_SECONDS, WIRE, Fault, Schedule
from oarlock.simulation.loop import BEGIN, Process, VirtualLoop
from oarlock.simulation.state import WatchedStore
from oarlock.simulation.wire import Call, Wire


class Strikes(ABC):
    """The half of a world that faults are done to by."""

    schedule: Schedule
    loop: VirtualLoop
    rng: random.Random
    wire: Wire
    store: WatchedStore
    counts: Counter[str]
    coordinator_process: Process
    shard_processes: list[Process]
    workers: list[Process]
    services: list[ShardService]
    leaving: dict[str, asyncio.Event]
    # The message that is struck at, and who gets it.
    struck: tuple[Call, Process]

    def __init__(self) -> None:
        self._paused_at = BEGIN
        # Since when the coordinator could judge leases.
        self._able_since = BEGIN

    @abstractmethod
    def _note(self, what: str, request: Any = None, reply: Any = None) -> None: ...

    @abstractmethod
    def _later(self, seconds: float, function: Any, *arguments: Any) -> None: ...

    @abstractmethod
    def _start_worker(self) -> None: ...

    @abstractmethod
    def _end_coordinator(self, process: Process, seconds: float) -> None: ...

    @property
    def shards_now(self) -> list[Process]:
        """The shards that a fault may choose among."""
        return self.shard_processes

    @property
    def services_now(self) -> list[ShardService]:
        return self.services

    def _strike(self, fault: Fault) -> None:
        self.counts[fault.kind] += 1
        self._note(f"fault: {fault}")
        if fault.kind in WIRE:
            self.wire.armed.append(fault)
        else:
            getattr(self, f"_{fault.kind}")(fault)

    def _chosen(self, fault: Fault) -> Process | None:
        return self.workers[fault.who % len(self.workers)] if self.workers else None

    def _kill_worker(self, fault: Fault) -> None:
        process = self._chosen(fault)
        if process is not None:
            process.alive = False
            self.workers.remove(process)
            self._later(fault.seconds, self._start_worker)

    def _pause(self, process: Process | None, seconds: float) -> None:
        if process is not None and process.alive and not process.paused:
            process.paused = True
            if process is self.coordinator_process:
                self._paused_at = self.loop.now
            self._later(seconds, self._resume, process)

    def _resume(self, process: Process) -> None:
        if process is self.coordinator_process and self.loop.now - self._paused_at > HEARTBEAT_SECONDS:
            # It notices that it was away (K3); a shorter absence it may take for a slow machine.
            self._able_since = self.loop.now
        if self.rng.random() < 0.5:
            self.loop.resume(process)
            self.wire.resume(process)
        else:
            # What was sent to it is handled by other threads than the one whose timers have run out.
            process.paused = False
            self.wire.resume(process)
            self._later(self.schedule.latency, self._release, process)

    def _release(self, process: Process) -> None:
        if not process.paused:
            self.loop.resume(process)

    def _pause_worker(self, fault: Fault) -> None:
        self._pause(self._chosen(fault), fault.seconds)

    def _pause_coordinator(self, fault: Fault) -> None:
        self._pause(self.coordinator_process, fault.seconds)

    def _pause_shard(self, fault: Fault) -> None:
        if self.shards_now:
            self._pause(self.shards_now[fault.who % len(self.shards_now)], fault.seconds)

    # What strikes at a message

    def _hold(self, fault: Fault) -> None:
        self.struck[0].held = fault.seconds

    def _again(self, fault: Fault) -> None:
        self.wire.repeat(self.struck[0], fault.seconds)

    def _freeze(self, fault: Fault) -> None:
        call = self.struck[0]
        call.held = fault.seconds * self.rng.random()
        self._pause(call.sender, fault.seconds)

    def _echo(self, fault: Fault) -> None:
        self.wire.armed.append(replace(fault, kind="late", method="Shard.Replicate"))

    def _stun(self, fault: Fault) -> None:
        self._pause(self.struck[1], fault.seconds)

    # Not in the middle of the event that it is struck by: what was begun there is done.
    def _kill_coordinator(self, fault: Fault) -> None:
        self._later(0.0, lambda: self._end_coordinator(self.coordinator_process, fault.seconds))

    def _tear(self, fault: Fault) -> None:
        self.store.tear = fault.who

    def _cut(self, fault: Fault) -> None:
        if not self.shards_now:
            # Between two lives of a job.
            return
        shard = self.shards_now[fault.who // 2 % len(self.shards_now)].name
        worker = self._chosen(fault)
        pair = (shard, "coordinator") if fault.who % 2 or worker is None else (worker.name, shard)
        if fault.who == 4 and worker is not None:
            pair = (worker.name, "coordinator")
        link = frozenset(pair)
        self.wire.cuts.add(link)
        self._later(fault.seconds, self.wire.cuts.discard, link)

    def _refuse(self, fault: Fault) -> None:
        """The next push to one table of one shard meets the end of memory, after earlier parts of it were applied."""
        services = self.services_now
        joined = services[fault.who % len(services)]._joined if services else None
        if joined is None:
            return
        table: Any = joined[1].tables[fault.who // 3 % 2]

        def push(*arguments: Any, **named: Any) -> Any:
            del table.push
            raise MemoryError("no memory left")

        table.push = push

    def _join(self, fault: Fault) -> None:
        if len(self.workers) < 4:
            self._start_worker()

    def _leave(self, fault: Fault) -> None:
        process = self._chosen(fault)
        if process is not None:
            process.call(self.leaving[process.name].set)
            self._later(fault.seconds, self._start_worker)
