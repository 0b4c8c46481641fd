# SPDX-License-Identifier: Apache-2.0
"""An event loop whose time is virtual, and processes on it that can be killed and paused between any two steps.

Invariant: time passes only when nobody can do anything, and then at once; what happens depends on nothing but the program
and its seeds. What a dead or paused process would do next is held back whole: no ``finally`` of it runs. One thread.
"""

import asyncio
import contextvars
import heapq
import random
from collections import deque
from collections.abc import Callable, Coroutine
from concurrent.futures import Executor, Future
from typing import Any

BEGIN = 1000.0


class Stalled(Exception):
    """Everybody waits, and nothing will ever happen."""


class Process:
    """A process of the simulation: everything that is scheduled from its context belongs to it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._alive = True
        # Told when it dies.
        self.mourners: list[Callable[[], object]] = []
        self.paused = False
        self.context = contextvars.Context()
        self.context.run(_PROCESS.set, self)
        self._held: deque[asyncio.Handle] = deque()

    @property
    def alive(self) -> bool:
        return self._alive

    @alive.setter
    def alive(self, alive: bool) -> None:
        died, self._alive = self._alive and not alive, alive
        for each in self.mourners if died else ():
            each()

    def holds(self, handle: asyncio.Handle) -> bool:
        """Keep a step back if the process cannot take it now."""
        if self.alive and not self.paused:
            return False
        self._held.append(handle)
        return True

    def release(self) -> list[asyncio.Handle]:
        """Return the steps held back, which are to be taken now."""
        held = list(self._held)
        self._held.clear()
        return held

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call a function as this process."""
        return self.context.copy().run(function, *arguments)


_PROCESS: contextvars.ContextVar[Process] = contextvars.ContextVar("process")


class _Due(float):
    """When a timer runs out: compared as a number is, which costs a tenth of what comparing timers does."""

    __slots__ = ("timer",)
    timer: asyncio.TimerHandle


class VirtualLoop(asyncio.BaseEventLoop):
    """Runs what is ready in order; when nothing is, jumps to the next timer."""

    # asyncio's own queue, which its base class fills and leaves to a loop like this one to empty.
    _ready: deque[asyncio.Handle]
    _stopping: bool

    def __init__(self) -> None:
        super().__init__()
        self.now = BEGIN
        self._timers: list[_Due] = []

    def time(self) -> float:
        return self.now

    def call_at(  # type: ignore[override]
        self, when: float, callback: Callable[..., object], *args: Any, context: contextvars.Context | None = None
    ) -> asyncio.TimerHandle:
        timer = asyncio.TimerHandle(when, callback, args, self, context)
        due = _Due(when)
        due.timer = timer
        heapq.heappush(self._timers, due)
        return timer

    def call_later(  # type: ignore[override]
        self, delay: float, callback: Callable[..., object], *args: Any, context: contextvars.Context | None = None
    ) -> asyncio.TimerHandle:
        return self.call_at(self.now + delay, callback, *args, context=context)

    def call_soon(  # type: ignore[override]
        self, callback: Callable[..., object], *args: Any, context: contextvars.Context | None = None
    ) -> asyncio.Handle:
        handle = asyncio.Handle(callback, args, self, context)
        self._ready.append(handle)
        return handle

    def _run_once(self) -> None:
        """Run until the loop is to stop."""
        ready, timers = self._ready, self._timers
        while not self._stopping:
            if not ready:
                while timers and timers[0].timer.cancelled():
                    heapq.heappop(timers)
                if not timers:
                    raise Stalled("everybody waits, and nothing will ever happen")
                self.now = max(self.now, float(timers[0]))
                while timers and timers[0] <= self.now:
                    ready.append(heapq.heappop(timers).timer)
            for _ in range(len(ready)):
                handle = ready.popleft()
                if handle._cancelled:
                    continue
                process = handle._context.get(_PROCESS)  # type: ignore[attr-defined]
                if process is None or not process.holds(handle):
                    handle._run()

    def call_soon_threadsafe(  # type: ignore[override]
        self, callback: Callable[..., object], *args: Any, context: contextvars.Context | None = None
    ) -> asyncio.Handle:
        """There is one thread."""
        return self.call_soon(callback, *args, context=context)

    def run_in_executor(  # type: ignore[override]
        self, executor: Executor | None, function: Callable[..., Any], *args: Any
    ) -> "asyncio.Future[Any]":
        """What nobody gives a thread of its own is done at once, too: a real thread would take real time."""
        return super().run_in_executor(executor or Inline(), function, *args)

    def _write_to_self(self) -> None:
        """There is nobody to be woken up."""

    def start(self, process: Process, coroutine: Coroutine[Any, Any, Any]) -> "asyncio.Task[Any]":
        """Run a coroutine as ``process``."""
        return self.create_task(coroutine, context=process.context.copy())

    def resume(self, process: Process) -> None:
        """Let a paused process go on, with all that waited for it."""
        process.paused = False
        self._ready.extend(process.release())

    def dispose(self, processes: list[Process]) -> None:
        """Cancel all tasks, those of dead processes too, and run until none is left."""
        for _ in range(100):
            for process in processes:
                process.alive, process.paused = True, False
                self._ready.extend(process.release())
            tasks = asyncio.all_tasks(self)
            if not tasks:
                return
            for task in tasks:
                task.cancel()
            self.run_until_complete(self._settle(tasks))
        raise Stalled(f"tasks that cannot be cancelled: {asyncio.all_tasks(self)}")

    async def _settle(self, tasks: "set[asyncio.Task[Any]]") -> None:
        await asyncio.wait(tasks, timeout=1.0)


class Inline(Executor):
    """Does what it is given at once, in the caller's thread."""

    def submit(self, function: Callable[..., Any], /, *args: Any, **named: Any) -> "Future[Any]":
        future: Future[Any] = Future()
        try:
            future.set_result(function(*args, **named))
        except Exception as error:
            future.set_exception(error)
        return future


class Later(Executor):
    """Does each thing that it is given whole, and at some time within ``most_seconds``: as threads do, in no order."""

    def __init__(self, loop: VirtualLoop, rng: random.Random, most_seconds: float) -> None:
        self._loop = loop
        self._rng = rng
        self._most_seconds = most_seconds

    def submit(self, function: Callable[..., Any], /, *args: Any, **named: Any) -> "Future[Any]":
        future: Future[Any] = Future()

        def call() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(function(*args, **named))
            except Exception as error:
                future.set_exception(error)

        self._loop.call_later(self._rng.random() * self._most_seconds, call)
        return future
