# SPDX-License-Identifier: Apache-2.0
"""A job whose tables are full when it begins, and whose workers note every push that was acknowledged.

Invariant: its processes are those of checkpoint_peer.py; nothing else of the job differs from the product's. One event loop.
"""

import asyncio
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from oarlock.benchmarks.checkpoint_gaps import NOTES, groups
from oarlock.benchmarks.checkpoint_peer import MODULE
from oarlock.benchmarks.checkpoint_recipe import RECIPE
from oarlock.benchmarks.end_to_end_job import GatedJob

MEMORY = Path("/dev/shm")
# Of what a person would set: heartbeats of a second announce gates in good time.
LEASE_SECONDS, HEARTBEAT_SECONDS = 60.0, 0.5
MANY_SPLITS = 1 << 40


class NotedJob(GatedJob):
    """``begin()``, ``train()``, ``rest()``, ``close()``. ``fields``: of its RunConfig."""

    def __init__(
        self, name: str, data: Path, folder: Path, options: dict[str, object], workers: int, **fields: Any
    ) -> None:
        super().__init__(name, data, folder, options)
        self._run = replace(
            self._run,
            recipe=RECIPE,
            lease_seconds=LEASE_SECONDS,
            heartbeat_seconds=HEARTBEAT_SECONDS,
            workers=workers,
            **fields,
        )
        self.names = [f"worker{n}" for n in range(workers)]
        # In memory: on a disk that much is written to each of their lines would wait for it, and count as a pause of training.
        self._noted = tempfile.TemporaryDirectory(prefix="oarlock-", dir=MEMORY if MEMORY.is_dir() else folder.parent)

    async def begin(self) -> None:
        """Start all processes, and wait until they are ready to train."""
        await self.start()
        for number in range(self._run.servers):
            self.add(f"shard{number}", MODULE, "shard", "--data", str(self._data))
        for name in self.names:
            self.add(name, MODULE, "worker", "--pushes", str(self._pushes(name)))
        await self.ready(dict.fromkeys(self.names, 1))

    def _pushes(self, name: str) -> Path:
        return Path(self._noted.name) / f"{name}.pushes"

    def notes(self) -> list[NDArray[np.void]]:
        """Return what each worker noted so far, a line for a group."""
        return [groups(np.fromfile(self._pushes(name), NOTES)) for name in self.names]

    async def train(self) -> None:
        """Let all workers train until ``rest``."""
        self._window = self.gate.open(MANY_SPLITS)

    async def pause(self, seconds: float) -> None:
        """Let the job go on for a while; a process that ended is an error."""
        await asyncio.sleep(seconds)
        self._check()

    async def rest(self) -> None:
        """Wait until nobody trains: no more splits are handed out, and those that are under way have ended."""
        self.gate.rest()
        await self.wait(self._window)

    async def close(self) -> None:
        await super().close()
        self._noted.cleanup()
