# SPDX-License-Identifier: Apache-2.0
"""The wire of the simulation: messages travel as bytes, take time, and meet the faults of a schedule.

Invariant: a handler runs as the process that it belongs to, whole and at one instant; what a dead process would have heard
is lost, what a paused one is told waits. Every delivery, of a request or of an answer, is one event, also where the answer comes
later (a Pending). One thread.
"""

import asyncio
import contextvars
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from oarlock.proto.errors import DeadlineExceeded, PSError, Unavailable
from oarlock.proto.methods import METHODS
from oarlock.proto.pending import Pending
from oarlock.proto.transport import dispatch
from oarlock.simulation.faults import LEASE_SECONDS, Fault
from oarlock.simulation.loop import Process, VirtualLoop

# How long until a caller learns that a connection broke: the other side said so; or said nothing, longer than a lease.
BREAK_SECONDS = 0.05
KEEPALIVE_SECONDS = 1.5 * LEASE_SECONDS


class Killed(BaseException):
    """The process that runs this dies here."""


@dataclass(eq=False)
class Call:
    """A request on its way and the future of its answer; copies of a late message have no one who waits."""

    sender: Process
    address: str
    method: str
    data: bytes
    answer: asyncio.Future[Any] | None
    faults: set[str] = field(default_factory=set)
    seconds: float = 0.0
    sent: float = 0.0
    # By so much later it arrives than it would.
    held: float = 0.0


class Wire:
    """Connects processes by address. ``event(process, call, request, reply)`` is told of every delivery, ``before`` of requests
    that are about to be handled, and says whether who should handle one has just died; ``answered`` of replies that are sent."""

    def __init__(
        self,
        loop: VirtualLoop,
        rng: random.Random,
        latency: float,
        event: Callable[[Process | None, Call, Any, Any], None],
        before: Callable[[Process, Call], bool] = lambda process, call: False,
        answered: Callable[[Process, Call, Any], None] = lambda process, call, reply: None,
    ) -> None:
        self._loop = loop
        self._rng = rng
        self._latency = latency
        self._event = event
        self._before = before
        self._answered = answered
        self._nowhere = contextvars.Context()
        self._listeners: dict[str, tuple[Process, object]] = {}
        self._inboxes: dict[Process, deque[Call]] = {}
        # Calls that a process has not answered yet.
        self._pending: dict[Process, list[Call]] = {}
        # Faults that wait for the next message of their method.
        self.armed: list[Fault] = []
        # Pairs of processes that cannot reach each other now.
        self.cuts: set[frozenset[str]] = set()
        self.closed = False
        # When the last of the repeated messages arrives.
        self.last_copy = 0.0

    def serve(self, process: Process, address: str, handler: object) -> None:
        self._listeners[address] = (process, handler)
        process.mourners.append(lambda: self._died(process))

    def _died(self, process: Process) -> None:
        for call in self._pending.pop(process, ()):
            self._broken(call)

    def link(self, process: Process) -> "Link":
        """Return the transport of a process."""
        return Link(self, process)

    def resume(self, process: Process) -> None:
        """Deliver what waited for a paused process."""
        for call in self._inboxes.pop(process, ()):
            self._later(0.0, self._deliver, call)

    def _later(self, seconds: float, function: Callable[..., None], *arguments: Any) -> None:
        self._loop.call_later(seconds, self._land, function, arguments, context=self._nowhere)

    def _land(self, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        if not self.closed:
            function(*arguments)

    def send(self, call: Call) -> None:
        if not call.sender.alive or self.closed:
            return
        call.sent = self._loop.now
        for fault in [f for f in self.armed if f.method == call.method]:
            self.armed.remove(fault)
            if fault.kind == "late":
                self.repeat(call, fault.seconds)
            else:
                call.faults.add(fault.kind)
                call.seconds = max(call.seconds, fault.seconds)
        if "lose" in call.faults:
            self._broken(call)
            return
        self._later(self._pause() + (call.seconds if "slow" in call.faults else 0.0), self._deliver, call)

    def repeat(self, call: Call, seconds: float) -> None:
        """Deliver a message once more."""
        copy = Call(call.sender, call.address, call.method, call.data, None, sent=call.sent)
        self._later(seconds, self._deliver, copy)
        self.last_copy = max(self.last_copy, self._loop.now + seconds)

    def _pause(self) -> float:
        return self._rng.random() * self._latency

    def _broken(self, call: Call) -> None:
        """The caller learns of it soon, or when nobody answers to the connection's signs of life."""
        if call.answer is not None:
            seconds = BREAK_SECONDS if self._rng.random() < 0.5 else KEEPALIVE_SECONDS
            self._later(seconds, self._arrive, call, None, Unavailable("the connection broke"))

    def _deliver(self, call: Call) -> None:
        found = self._listeners.get(call.address)
        if found is None or not found[0].alive:
            self._later(BREAK_SECONDS, self._arrive, call, None, Unavailable(f"nothing answers at {call.address}"))
            return
        process, handler = found
        if frozenset((process.name, call.sender.name)) in self.cuts:
            self._broken(call)
            return
        if self._waits(process, call):
            return
        if self._before(process, call):
            self._broken(call)
            return
        if call.held:
            seconds, call.held = call.held, 0.0
            self._later(seconds, self._deliver, call)
            self.last_copy = max(self.last_copy, self._loop.now + seconds)
            return
        if self._waits(process, call):
            return
        request = METHODS[call.method].request.FromString(call.data)
        reply, error = None, None
        try:
            reply = process.call(dispatch, handler, call.method, request)
        except PSError as raised:
            error = raised
        except Killed:
            # It has no process any more that could answer.
            self._event(process, call, request, None)
            self._broken(call)
            return
        if isinstance(reply, Pending):
            # What it was asked to do it has done, and only the answer has to wait.
            self._event(process, call, request, reply.so_far)
            self._wait(process, call, reply)
        else:
            self._event(process, call, request, error if reply is None else reply)
            self._send_back(process, call, reply, error)

    def _waits(self, process: Process, call: Call) -> bool:
        """Put a message by for a process that is paused."""
        if process.paused:
            self._inboxes.setdefault(process, deque()).append(call)
        return process.paused

    def _wait(self, process: Process, call: Call, pending: Pending) -> None:
        """Answer once that is given: right after the step that gave it."""
        self._pending.setdefault(process, []).append(call)
        pending.add_done_callback(lambda: self._later(0.0, self._resolved, process, call, pending))
        if "deaf" in call.faults and self._rng.random() < 0.5:
            # The caller may learn of it, and ask again, long before that.
            self._broken(call)

    def _resolved(self, process: Process, call: Call, pending: Pending) -> None:
        waiting = self._pending.get(process, [])
        if call not in waiting:
            # The process has died, with all its connections.
            return
        waiting.remove(call)
        reply, error = None, None
        try:
            reply = pending.result()
        except PSError as raised:
            error = raised
        self._send_back(process, call, reply, error)

    def _send_back(self, process: Process, call: Call, reply: Any, error: PSError | None) -> None:
        data = None if reply is None else reply.SerializeToString()
        if reply is not None:
            self._answered(process, call, reply)
        if "deaf" in call.faults or (not process.alive and self._rng.random() < 0.5):
            self._broken(call)
        else:
            extra = call.seconds if "slow_reply" in call.faults else 0.0
            self._later(self._pause() + extra, self._answer, process, call, data, error)

    def _answer(self, process: Process, call: Call, data: bytes | None, error: PSError | None) -> None:
        if frozenset((process.name, call.sender.name)) in self.cuts:
            self._broken(call)
        else:
            self._arrive(call, data, error)

    def _arrive(self, call: Call, data: bytes | None, error: PSError | None) -> None:
        if call.answer is None or call.answer.done() or not call.sender.alive:
            return
        self._event(None, call, None, None)
        if error is not None:
            call.answer.set_exception(error)
        else:
            call.answer.set_result(METHODS[call.method].reply.FromString(data or b""))


class Link:
    """The transport of one process."""

    def __init__(self, wire: Wire, process: Process) -> None:
        self._wire = wire
        self._process = process

    async def call(self, address: str, method: str, request: Any, *, timeout_seconds: float) -> Any:
        """Return the reply or raise what the other side raised; DeadlineExceeded after the timeout."""
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Any] = loop.create_future()
        timer = loop.call_later(timeout_seconds, _expire, answer, method, address)
        self._wire.send(Call(self._process, address, method, request.SerializeToString(), answer))
        try:
            return await answer
        finally:
            timer.cancel()

    async def close(self) -> None:
        """Nothing to give back."""


def _expire(answer: asyncio.Future[Any], method: str, address: str) -> None:
    if not answer.done():
        answer.set_exception(DeadlineExceeded(f"{method} at {address}: no answer in time"))
