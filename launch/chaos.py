# SPDX-License-Identifier: Apache-2.0
"""Chaos: carries out a plan of events on a running job, and writes down what was done to whom, when, and what followed.

Invariant: whom it stopped it lets go on, also when it is cancelled; it touches only processes that the launcher started; what
it asks of the coordinator is what `oarlock scale` and `oarlock checkpoint` ask. An event that may not be yet is waited for, and
given up after ``PATIENCE_SECONDS``. One event loop, beside the launcher's `run`, which tells it each status.
"""

import asyncio
import signal
import time
from collections.abc import Callable, Iterable
from typing import Any

from oarlock.client.job import OVER, TRAINING, JobSpec
from oarlock.launch.chaos_events import CUT, KILL, STOP, Event, Plan, chosen, scaled, schedule, spared
from oarlock.launch.chaos_ledger import Entry, Ledger
from oarlock.launch.chaos_times import Recovered
from oarlock.launch.child import Child
from oarlock.launch.processes import LocalProcesses
from oarlock.launch.wanted import settled
from oarlock.proto.coordinator_pb2 import CheckpointRequest, ScaleRequest
from oarlock.proto.errors import PSError

WATCH_SECONDS = 0.05
PATIENCE_SECONDS = 90.0
ROLES = {"shard": "servers", "worker": "workers"}


class Chaos:
    """``run()`` carries out the plan's events once ``ready(status)``; the launcher's watcher calls ``watch``.

    ``events`` instead of those that the plan's seed draws.
    """

    def __init__(
        self,
        launched: LocalProcesses,
        spec: JobSpec,
        plan: Plan,
        *,
        events: Iterable[Event] | None = None,
        ready: Callable[[dict[str, Any]], bool] | None = None,
    ) -> None:
        self._launched = launched
        self._spec = spec
        self._plan = plan
        self._events = schedule(plan) if events is None else events
        self._ready = ready or under_way
        self._status: dict[str, Any] = {}
        self._told = asyncio.Event()
        self._begun = 0.0
        self._stopped: dict[int, Child] = {}
        self.ledger = Ledger()

    def watch(self, status: dict[str, Any]) -> None:
        """Hear what the coordinator says of the job, or that it does not answer."""
        self._status = status
        self._told.set()
        if "note" in status or not status:
            return
        for entry in self.ledger.entries:
            if entry.over is not None and (words := entry.over(status)):
                entry.followed, entry.over = words, None

    async def run(self) -> None:
        """Carry out all events, or as many as come before the job is over."""
        self._begun = time.monotonic()
        try:
            while not (self._trains and self._ready(self._status)):
                await self._news()
            for event in self._events:
                await asyncio.sleep(event.after)
                if not await self._carry_out(event):
                    return
            # A job may not end with somebody asleep in it.
            while self._stopped and self._status.get("phase") not in OVER:
                await self._news()
        finally:
            for child in list(self._stopped.values()):
                self._let_go(child)

    @property
    def _trains(self) -> bool:
        return self._status.get("phase") == TRAINING and "note" not in self._status

    async def _news(self) -> None:
        self._told.clear()
        await self._told.wait()

    async def _carry_out(self, event: Event) -> bool:
        """Do what an event says, once it may be; return False if the job ended before."""
        due = time.monotonic()
        how, _, role = event.kind.partition(" ")
        entry, why = Entry(event.kind, due - self._begun), "nothing was told"
        while time.monotonic() < due + PATIENCE_SECONDS:
            await self._news()
            if self._status.get("phase") in OVER:
                return False
            why = self._not_yet(how, role)
            if not why:
                why = (
                    self._strike(event, how, role, entry)
                    if how in (KILL, STOP)
                    else await self._ask(event, role, entry)
                )
            if not why:
                break
        entry.passed = why
        if why:
            entry.at = time.monotonic() - self._begun
        self.ledger.entries.append(entry)
        return True

    def _not_yet(self, how: str, role: str) -> str:
        if how in (KILL, STOP):
            running = {
                c.process.pid for c in self._launched.children if not c.ended and c.process.pid not in self._stopped
            }
            # A plan that begins with one worker means that one, too.
            left = max(1, self._spec.replicas) if role == "shard" else min(1, self._plan.workers[0] - 1)
            return spared(role, self._status, running, left)
        return "" if self._trains else "the coordinator does not say that the job trains"

    def _strike(self, event: Event, how: str, role: str, entry: Entry) -> str:
        members = {m["pid"]: m for m in self._status.get("members", ()) if m["role"] == role}
        living = [
            c
            for c in self._launched.children
            if c.role == role
            and not c.ended
            and c.process.pid not in self._stopped
            and (role == "coordinator" or c.process.pid in members)
        ]
        if not living:
            return f"no {role} is there"
        child = chosen(event.draw, living)
        member = members.get(child.process.pid, {"id": 0, "incarnation": 0})
        entry.target, entry.member, entry.incarnation = child.number, member["id"], member["incarnation"]
        self._moment(entry)
        if how == KILL:
            child.process.kill()
        else:
            child.process.send_signal(signal.SIGSTOP)
            self._stopped[child.process.pid] = child
            asyncio.get_running_loop().call_later(self._plan.stopped * self._spec.lease_seconds, self._let_go, child)
        if role == "coordinator":
            entry.over = self._answers_again(entry, child.process.pid)
        return ""

    def _answers_again(self, entry: Entry, pid: int) -> Callable[[dict[str, Any]], str]:
        def over(status: dict[str, Any]) -> str:
            coordinator = self._launched.children[0]
            again = (
                not coordinator.ended
                and coordinator.process.pid not in self._stopped
                and (coordinator.process.pid != pid or status["term"])
            )
            if again:
                entry.recovered = Recovered(time.monotonic() - entry.moment, 1)
            return f"answers in term {status.get('term', 0)}" if again else ""

        return over

    def _let_go(self, child: Child) -> None:
        if self._stopped.pop(child.process.pid, None) is not None:
            child.process.send_signal(signal.SIGCONT)

    async def _ask(self, event: Event, role: str, entry: Entry) -> str:
        """Ask the coordinator for a cut, or for other numbers; return why it could not be asked."""
        try:
            if event.kind == CUT:
                self._moment(entry)
                reply = await self._launched.call("Coordinator.Checkpoint", CheckpointRequest())
                entry.over = _cut_after(reply.last)
                return ""
            name, least_most = ROLES[role], {"shard": self._plan.shards, "worker": self._plan.workers}[role]
            now = self._status["scale"][name]
            wanted = scaled(event.draw, now, *least_most)
            if wanted == now:
                return f"there are {now} {name}, and no other number may be"
            self._moment(entry)
            await self._launched.call("Coordinator.Scale", ScaleRequest(**{name: wanted}))
        except PSError as error:
            return f"the coordinator did not take it: {error}"
        entry.numbers = f"{now} to {wanted}"
        entry.over = _scaled_to(name, wanted, entry.moment)
        return ""

    def _moment(self, entry: Entry) -> None:
        entry.moment = time.monotonic()
        entry.at = entry.moment - self._begun


def _cut_after(last: int) -> Callable[[dict[str, Any]], str]:
    def over(status: dict[str, Any]) -> str:
        made = next((c for c in status["checkpoints"] if c["cut"] > last), None)
        failed = status["cut"].get("failed", {"cut": 0})
        if made is not None:
            return f"cut {made['cut']} is committed"
        return f"cut {failed['cut']} was given up: {failed['error']}" if failed["cut"] > last else ""

    return over


def _scaled_to(name: str, wanted: int, since: float) -> Callable[[dict[str, Any]], str]:
    heard = False

    def over(status: dict[str, Any]) -> str:
        nonlocal heard
        if status["scale"][name] != wanted:
            # A status may have been on its way already.
            return "other numbers were asked for meanwhile" if heard else ""
        heard = True
        return f"so after {time.monotonic() - since:.1f} s" if settled(status) else ""

    return over


def under_way(status: dict[str, Any]) -> bool:
    """Whether all are there, and every worker trains."""
    samples = [m["stats"].get("samples", 0) for m in status["members"] if m["role"] == "worker"]
    return settled(status) and min(samples, default=0) > 0
