# SPDX-License-Identifier: Apache-2.0
"""Lives of a job: real processes that are killed and stopped around cuts, or at any moment, and all at once; then it is resumed.

    strike     a worker or the coordinator is killed, or stopped for a while
    end        a shard is killed that may not be started again, and the launcher ends the job; or all processes are killed in the
               same moment
    next life  as ``--resume`` does: from the newest cut, on other numbers of shards and workers

Invariant: whom it stopped it lets go on; it touches only processes that the launcher started, and leaves none. Moments are
chosen by a seed among what the coordinator is seen to do: a new cut, further steps. One event loop per life.
"""

import asyncio
import contextlib
import random
import signal
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from oarlock.client.job import DONE, TRAINING, JobSpec
from oarlock.launch.child import Child
from oarlock.launch.config import RunConfig
from oarlock.launch.folder import create, resume
from oarlock.launch.processes import LocalProcesses
from oarlock.proto.errors import DeadlineExceeded, Unavailable

WATCH_SECONDS = 0.05
# What no life needs: one that takes longer hangs.
MOST_SECONDS = 240.0
STRIKES = ("kill worker", "kill worker", "kill coordinator", "stop worker", "stop coordinator")


@dataclass(frozen=True)
class Fate:
    """What is done to a job: ``strikes`` in all, ``at_cuts`` or whenever it goes on; ``deaths`` of a shard or of all processes.

    A job dies once ``cuts_before_death`` cuts of this life are committed and its share of the strikes was done. ``spread``:
    seconds within which a strike follows on what is seen; ``stopped``: for how long a process is, at most.
    """

    strikes: int
    deaths: int
    at_cuts: bool = True
    cuts_before_death: int = 1
    spread: float = 1.5
    stopped: float = 3.0
    kinds: tuple[str, ...] = STRIKES


@dataclass
class Lived:
    """A job that came to its end: what was done to it, how many cuts were committed, and how long it took."""

    spec: JobSpec
    folder: Path
    status: dict[str, Any] = field(default_factory=dict)
    done: Counter[str] = field(default_factory=Counter)
    cuts: int = 0
    # Numbers that came to nothing.
    given_up: int = 0
    shards: list[int] = field(default_factory=list)
    seconds: float = 0.0


class _AllKilled(Exception):
    """All processes of a life were killed at once."""


def live(folder: Path, run: RunConfig, fate: Fate, seed: int, shards: tuple[int, ...] = (1, 2, 3)) -> Lived:
    """Run a job to its end through all that ``fate`` has for it; ``shards``: the numbers of them that a new life may have."""
    rng = random.Random(seed)
    begun = time.monotonic()
    lived = Lived(create(folder, folder.name, run), folder)
    restore, spec = "", lived.spec
    for life in range(fate.deaths + 1):
        last = life == fate.deaths
        lived.shards.append(spec.servers)
        status = asyncio.run(_Life(spec, folder, restore, fate, lived, rng, last).run())
        if status.get("phase") == DONE:
            lived.status, lived.seconds = status, time.monotonic() - begun
            if not last:
                raise Unavailable(f"job {folder.name} was done before its life {life + 1} of {fate.deaths + 1} ended")
            return lived
        if lived.done["shard died"] + lived.done["all died"] <= life:
            raise Unavailable(f"job {folder.name} ended as {status.get('phase')}: {status.get('reason')}")
        choice = [n for n in shards if n != spec.servers] or list(shards)
        spec, restore = resume(folder, {"servers": rng.choice(choice), "workers": rng.choice((2, 3))})
    raise AssertionError("the last life ends the loop")


class _Life:
    """One life of a job."""

    def __init__(
        self, spec: JobSpec, folder: Path, restore: str, fate: Fate, lived: Lived, rng: random.Random, last: bool
    ) -> None:
        self._launched = LocalProcesses(spec, folder, restore=restore)
        self._fate = fate
        self._lived = lived
        self._rng = rng
        self._last = last
        self._struck = 0
        self._share = -(-fate.strikes // (fate.deaths + 1))
        self._seen: tuple[Any, ...] = ()
        self._cuts: set[int] = set()
        self._begun: set[int] = set()
        self._dying = False
        self._all_killed = False
        self._timers: list[asyncio.TimerHandle] = []
        self._stopped: list[Child] = []

    async def run(self) -> dict[str, Any]:
        """Return the last status of this life."""
        try:
            async with asyncio.timeout(MOST_SECONDS):
                return await self._launched.run(self._watch, WATCH_SECONDS)
        except _AllKilled:
            return {"phase": "killed"}
        except TimeoutError:
            raise DeadlineExceeded(f"a life of {self._lived.folder.name} took over {MOST_SECONDS:g} s") from None
        finally:
            for timer in self._timers:
                timer.cancel()
            for child in self._stopped:
                _signal(child, signal.SIGCONT)
            self._lived.cuts += len(self._cuts)
            self._lived.given_up += len(self._begun - self._cuts)

    def _watch(self, status: dict[str, Any]) -> bool:
        if self._all_killed:
            raise _AllKilled
        if "note" in status or status.get("phase") != TRAINING:
            return True
        run = status["run"]
        self._begun |= {status["cut"]["begun"]} - {0}
        # The one that this life began from is in the list, too.
        self._cuts |= {c["cut"] for c in status["checkpoints"] if c["cut"] in self._begun}
        seen = (run, status["cut"]["begun"]) if self._fate.at_cuts else (run, _progress(status))
        fresh, self._seen = seen != self._seen and bool(seen[1]), seen
        if self._dying:
            return True
        if self._struck >= self._share and not self._last and len(self._cuts) >= self._fate.cuts_before_death:
            self._dying = True
            self._after(self._fate.spread, self._die)
        elif fresh and self._struck < self._share and self._rng.random() < (1.0 if self._fate.at_cuts else 0.3):
            self._struck += 1
            self._after(self._fate.spread, self._strike)
        return True

    def _after(self, spread: float, function: Any) -> None:
        self._timers.append(asyncio.get_running_loop().call_later(self._rng.random() * spread, function))

    def _living(self, *roles: str) -> list[Child]:
        return [c for c in self._launched.children if c.role in roles and not c.ended]

    def _strike(self) -> None:
        how, role = self._rng.choice(self._fate.kinds).split()
        living = self._living(role)
        if not living:
            # It was killed a moment ago, and is struck in its next life.
            self._struck -= 1
            return
        child = self._rng.choice(living)
        self._lived.done[f"{how} {role}"] += 1
        if how == "kill":
            _signal(child, signal.SIGKILL)
            return
        _signal(child, signal.SIGSTOP)
        self._stopped.append(child)
        seconds = self._rng.uniform(0.2, self._fate.stopped)
        self._timers.append(asyncio.get_running_loop().call_later(seconds, _signal, child, signal.SIGCONT))

    def _die(self) -> None:
        if self._rng.random() < 0.5:
            self._lived.done["shard died"] += 1
            # It would go back by itself, on as many shards.
            self._launched.start_nobody_again()
            _signal(self._rng.choice(self._living("shard")), signal.SIGKILL)
            return
        self._lived.done["all died"] += 1
        for child in self._launched.children:
            _signal(child, signal.SIGKILL)
        self._all_killed = True


def _progress(status: dict[str, Any]) -> tuple[Any, ...]:
    """Return what changes while a job trains."""
    batches = sum(m["stats"].get("batches", 0) for m in status["members"] if m["role"] == "worker")
    return (status["epoch"], status["splits_closed"], batches) if batches else ()


def _signal(child: Child, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        child.process.send_signal(number)
