# SPDX-License-Identifier: Apache-2.0
"""Asks several servers on an event loop: a task for each request that is under way; the first good answer wins.

Invariant: when `ask` is over, whatever lost is cancelled. One event loop.
"""

import asyncio
import contextlib
import time
from collections.abc import Coroutine, Iterable
from typing import Any

from oarlock.proto.errors import PSError
from oarlock.proto.methods import PROTOCOL
from oarlock.proto.rpc import GrpcTransport
from oarlock.proto.serving_pb2 import ModelRequest
from oarlock.serving.asking import Asking, Attempt, Question
from oarlock.serving.fleet import Fleet, Replica
from oarlock.serving.tender import DESCRIBE_SECONDS


class AsyncHedged:
    """Asks the servers of ``fleet``."""

    def __init__(self, fleet: Fleet, transport: GrpcTransport) -> None:
        self._fleet = fleet
        self._transport = transport

    async def ask(self, questions: dict[int, Question], until: float) -> dict[int, Any]:
        """Return the answer of each part, ``until`` then by the monotonic clock; PSError."""
        if len(questions) == 1:
            [(part, question)] = questions.items()
            return {part: await self._ask(part, question, until)}
        tasks = {part: _task(self._ask(part, question, until)) for part, question in questions.items()}
        try:
            return dict(zip(tasks, await asyncio.gather(*tasks.values()), strict=True))
        finally:
            _cancel(tasks.values())

    async def _ask(self, part: int, question: Question, until: float) -> Any:
        asking = Asking(self._fleet, part, question, until)
        tasks: dict[asyncio.Task[Any], Attempt] = {}

        def send(attempt: Attempt | None) -> None:
            if attempt is not None:
                seconds = attempt.until - time.monotonic()
                call = self._transport.call(
                    attempt.replica.address, question.method, question.request, timeout_seconds=seconds
                )
                attempt.sent = _task(call)
                tasks[attempt.sent] = attempt

        try:
            send(asking.begin())
            while True:
                seconds = max(0.0, asking.wake - time.monotonic())
                done, _ = await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
                # Good ones first: an error of the same moment takes no answer away.
                for task in sorted(done, key=_failed):
                    attempt = tasks.pop(task)
                    try:
                        answer = task.result()
                    except PSError as error:
                        send(asking.failed(attempt, error))
                        continue
                    asking.answered(attempt)
                    return answer
                for attempt in asking.late():
                    del tasks[attempt.sent]
                    attempt.sent.cancel()
                    send(asking.failed(attempt, asking.no_answer(attempt)))
                send(asking.hedge())
        finally:
            asking.give_up()
            _cancel(tasks)


class AsyncTender:
    """Asks servers what they have, in a task that is there only while there is one to be asked."""

    def __init__(self, fleet: Fleet, transport: GrpcTransport) -> None:
        self._fleet = fleet
        self._transport = transport
        self._changed = asyncio.Event()
        self._due = asyncio.Event()
        self._sleeps_until = 0.0
        self._task: asyncio.Task[None] | None = None
        # Servers that are asked: one that is silent keeps nobody from asking another one.
        self._asking: set[asyncio.Task[None]] = set()
        self._closed = False

    async def wait(self, seconds: float) -> None:
        """Wait until something was learnt, or so long."""
        self.wake()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._changed.wait()

    def wake(self) -> None:
        """Have servers asked that are to be."""
        seconds = self._fleet.seconds_to_due()
        if seconds is None or self._closed:
            return
        if self._task is None or self._task.done():
            self._task = asyncio.ensure_future(self._run())
        elif time.monotonic() + seconds < self._sleeps_until:
            # Another one is to be asked before those that it waits for.
            self._due.set()

    async def _run(self) -> None:
        while (seconds := self._fleet.seconds_to_due()) is not None:
            if seconds > 0:
                self._due.clear()
                self._sleeps_until = time.monotonic() + seconds
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(seconds):
                        await self._due.wait()
                self._sleeps_until = 0.0
            else:
                for each in self._fleet.due():
                    task = asyncio.ensure_future(self._describe(each))
                    self._asking.add(task)
                    task.add_done_callback(self._asking.discard)

    async def _describe(self, replica: Replica) -> None:
        request = ModelRequest(protocol=PROTOCOL)
        try:
            reply = await self._transport.call(
                replica.address, "Serving.Describe", request, timeout_seconds=DESCRIBE_SECONDS
            )
        except PSError as error:
            self._fleet.silent(replica, error)
        else:
            self._fleet.learn(replica, reply)
        # Whoever waits is woken, and later ones wait anew.
        self._changed.set()
        self._changed = asyncio.Event()

    async def close(self) -> None:
        """Ask no more; idempotent."""
        self._closed = True
        tasks = [*self._asking, *([self._task] if self._task is not None else [])]
        _cancel(tasks)
        await asyncio.gather(*tasks, return_exceptions=True)


def _task(work: Coroutine[Any, Any, Any]) -> "asyncio.Task[Any]":
    task = asyncio.ensure_future(work)
    task.add_done_callback(_heard)
    return task


def _heard(task: "asyncio.Task[Any]") -> None:
    """Have heard how a task ended: who lost ends as it likes."""
    if not task.cancelled():
        task.exception()


def _failed(task: "asyncio.Task[Any]") -> bool:
    return task.exception() is not None


def _cancel(tasks: Iterable["asyncio.Task[Any]"]) -> None:
    for task in tasks:
        task.cancel()
