# SPDX-License-Identifier: Apache-2.0
"""Killer: kills and stops processes of a running job, at moments that a seed decides.

Invariant: whom it stopped it lets go on, also when it is cancelled itself; it only touches processes that the launcher started.
One event loop, beside the launcher's `run`.
"""

import asyncio
import itertools
import random
import signal
from collections.abc import Callable
from dataclasses import dataclass

from oarlock.launch.child import Child
from oarlock.launch.processes import LocalProcesses

KILLABLE = ("worker", "coordinator")


@dataclass
class Harm:
    """What was done to a job's processes so far."""

    worker_kills: int = 0
    coordinator_kills: int = 0
    worker_stops: int = 0
    coordinator_stops: int = 0

    @property
    def kills(self) -> int:
        return self.worker_kills + self.coordinator_kills

    @property
    def stops(self) -> int:
        return self.worker_stops + self.coordinator_stops

    def __add__(self, other: "Harm") -> "Harm":
        return Harm(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))


@dataclass(frozen=True)
class Rhythm:
    """Seconds between two kills of a worker, two of the coordinator, two stops of either; and how long a stop lasts."""

    worker: float = 2.0
    coordinator: float = 5.0
    stop: float = 8.0
    stopped: float = 3.0


class Killer:
    """Does harm to the processes of ``launched`` in a rhythm, until it is cancelled."""

    def __init__(self, launched: LocalProcesses, rhythm: Rhythm, seed: int) -> None:
        self._launched = launched
        self._rhythm = rhythm
        self._rng = random.Random(seed)
        self.harm = Harm()

    async def run(self) -> None:
        """Kill and stop for ever. Shards are left alone: a job does not outlive one of them."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._every(self._rhythm.worker, lambda: self._kill("worker")))
            group.create_task(self._every(self._rhythm.coordinator, lambda: self._kill("coordinator")))
            group.create_task(self._stop_now_and_then())

    async def _every(self, seconds: float, harm: Callable[[], None]) -> None:
        while True:
            # The mean is what is asked for; the moments are not in step with each other.
            await asyncio.sleep(seconds * (0.5 + self._rng.random()))
            harm()

    def _living(self, *roles: str) -> list[Child]:
        return [c for c in self._launched.children if c.role in roles and not c.ended]

    def _kill(self, role: str) -> None:
        living = self._living(role)
        if not living:
            return
        self._rng.choice(living).process.kill()
        if role == "worker":
            self.harm.worker_kills += 1
        else:
            self.harm.coordinator_kills += 1

    async def _stop_now_and_then(self) -> None:
        # Either role as often as the other, although there are more workers.
        for role in itertools.cycle(self._rng.sample(KILLABLE, 2)):
            await asyncio.sleep(self._rhythm.stop * (0.5 + self._rng.random()))
            living = self._living(role)
            if not living:
                continue
            chosen = self._rng.choice(living)
            chosen.process.send_signal(signal.SIGSTOP)
            if chosen.role == "worker":
                self.harm.worker_stops += 1
            else:
                self.harm.coordinator_stops += 1
            try:
                await asyncio.sleep(self._rhythm.stopped * (1.0 + self._rng.random() / 2))
            finally:
                chosen.process.send_signal(signal.SIGCONT)
