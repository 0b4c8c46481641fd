# SPDX-License-Identifier: Apache-2.0
"""One job of `oarlock.benchmarks.end_to_end`: its coordinator behind the gate, here; its shard and workers, processes.

The processes are those of `oarlock train`, started by the product's own entry points; a job in one process and a worker behind a
slow wire have entry points of their own beside this file. Invariant: no process outlives ``close()``. One event loop.
"""

import asyncio
import contextlib
import os
import random
import time
import urllib.request
from collections.abc import Collection, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path

from oarlock.benchmarks.end_to_end_fill import fill
from oarlock.benchmarks.end_to_end_gate import Gate
from oarlock.benchmarks.processor import processor_seconds
from oarlock.client.job import FAILED, TRAINING
from oarlock.cluster.coordinator import Coordinator
from oarlock.cluster.members import Member
from oarlock.cluster.orders import Orders
from oarlock.cluster.process import run_coordinator
from oarlock.cluster.store import Store
from oarlock.launch.child import Child, start_child
from oarlock.launch.config import RunConfig
from oarlock.launch.folder import STATE_FILE, create
from oarlock.proto.errors import Unavailable
from oarlock.proto.rpc import GrpcServer, GrpcTransport

RECIPE = "oarlock.benchmarks.end_to_end_recipe:recipe"
# Leases outlast a busy machine; heartbeats are few, so that jobs that wait use no processor.
LEASE_SECONDS, HEARTBEAT_SECONDS = 60.0, 2.0
EPOCHS = 1 << 20
LOOK_SECONDS = 0.02
START_SECONDS, WINDOW_SECONDS, END_SECONDS = 120.0, 180.0, 10.0
SHARD, WORKER = "oarlock.ps", "oarlock.worker"
IN_PROCESS, DELAYED = "oarlock.benchmarks.end_to_end_inprocess", "oarlock.benchmarks.end_to_end_delayed"


@dataclass
class Window:
    """What one window took: seconds from its opening to the last answer, samples, processor seconds of all processes."""

    seconds: float
    samples: int
    processor: float
    # By how much each counter of the workers' metrics grew.
    counters: dict[str, float] = field(default_factory=dict)
    # Processors that others kept busy meanwhile.
    others: float = 0.0

    @property
    def speed(self) -> float:
        return self.samples / self.seconds


class GatedJob:
    """``start()``, then processes by ``add``, then ``ready`` and windows, then ``close()``."""

    def __init__(
        self,
        name: str,
        data: Path,
        folder: Path,
        options: dict[str, object],
        *,
        prefetch: int = 2,
        compute_threads: int = 1,
    ) -> None:
        self.name = name
        self._run = RunConfig(
            recipe=RECIPE,
            data=str(data),
            epochs=EPOCHS,
            servers=1,
            reader="arrow",
            checkpoint_epochs=0,
            prefetch=prefetch,
            compute_threads=compute_threads,
            lease_seconds=LEASE_SECONDS,
            heartbeat_seconds=HEARTBEAT_SECONDS,
            recipe_options=options,
        )
        self._data = data
        self._folder = folder
        self._children: dict[str, Child] = {}
        self._transport = GrpcTransport()
        self.gate: Gate
        self.rows = 0
        # The processes that train it and nothing else.
        self.workers: list[str] = []

    async def start(self) -> None:
        """Plan the job and have its coordinator listen."""
        self.spec = create(self._folder, self.name, self._run)
        self._store = Store(self._folder / STATE_FILE).open()
        self._coordinator = Coordinator(self._store, self.spec, clock=time.monotonic, rng=random.SystemRandom())
        self._coordinator.open()
        self.gate = Gate(self._coordinator)
        self.orders = Orders(self._coordinator, self._transport, self._folder / "checkpoints")
        # Questions that are kept hold a thread each.
        self._server = GrpcServer(self.gate, "Coordinator", listen="127.0.0.1:0", threads=64)
        self.address = self._server.start()
        self._running = asyncio.create_task(run_coordinator(self._coordinator, self.orders))

    def add(self, name: str, module: str, *arguments: str) -> None:
        """Start ``python -m module`` as a member of this job."""
        given = ["--coordinator", self.address, "--metrics-port", "0", *arguments]
        number = len(self._children)
        child = start_child(name, number, module, given, logs=self._folder / "logs", log_level="warning")
        self._children[name] = child

    def pids(self, names: Sequence[str]) -> list[int]:
        return [self._children[name].process.pid for name in names]

    def members(self, name: str, role: str = "worker") -> list[Member]:
        """Return the living members of a process, in the order of joining."""
        pid = self._children[name].process.pid
        return [m for m in self._coordinator.members.alive(role) if m.pid == pid]

    async def ready(self, workers: dict[str, int]) -> None:
        """Wait until the job trains and each process has so many workers that tell of themselves."""
        end = time.monotonic() + START_SECONDS
        while not (
            self._coordinator.phase == TRAINING
            and all(len([m for m in self.members(n) if "metrics" in m.stats]) >= k for n, k in workers.items())
        ):
            self._check()
            if time.monotonic() > end:
                raise Unavailable(f"job {self.name}: its processes did not join within {START_SECONDS:g} s")
            await asyncio.sleep(LOOK_SECONDS)

    def _check(self) -> None:
        for child in self._children.values():
            if child.ended:
                raise Unavailable(f"job {self.name}: {child.complaint()}")
        if self._coordinator.phase == FAILED:
            raise Unavailable(f"job {self.name}: {self._coordinator.reason}")
        if self._running.done():
            self._running.result()

    async def fill(self, name: str = "") -> None:
        """Have a member of process ``name``, or one of this process, create the rows that exist before anything is timed."""
        here = None if name else asyncio.create_task(self._fill_from_here())
        pid = self._children[name].process.pid if name else os.getpid()
        end = time.monotonic() + START_SECONDS
        while not (found := [m for m in self._coordinator.members.alive("worker") if m.pid == pid]):
            self._check()
            if time.monotonic() > end:
                raise Unavailable(f"job {self.name}: nobody came to create its rows within {START_SECONDS:g} s")
            await asyncio.sleep(LOOK_SECONDS)
        await self.wait(self.gate.open(1, {found[0].incarnation}))
        if here is not None:
            await here

    async def _fill_from_here(self) -> None:
        transport = GrpcTransport()
        try:
            await fill(transport, self.address, self._data)
        finally:
            await transport.close()

    async def wait(self, window: "Future[tuple[float, int]]") -> tuple[float, int]:
        """Return what became of a window; a process that ends meanwhile is an error."""
        waiting = asyncio.wrap_future(window)
        for _ in range(int(WINDOW_SECONDS)):
            await asyncio.wait([waiting], timeout=1.0)
            if waiting.done():
                return waiting.result()
            self._check()
        raise Unavailable(f"job {self.name}: a window did not end within {WINDOW_SECONDS:g} s")

    async def window(self, workers: dict[str, int], batches: int) -> Window:
        """Train about so many batches with the first ``workers[name]`` workers of each process."""
        chosen = [m for name, count in workers.items() for m in self.members(name)[:count]]
        per_split = max(1, self.spec.rows_per_split // self.spec.batch_rows)
        splits = max(1, round(batches / per_split))
        pids = [os.getpid(), *self.pids([n for n in self._children if n in workers or n == "shard"])]
        pages = {m.pid: str(m.stats["metrics"]) for m in chosen}
        before = await asyncio.to_thread(read_counters, pages.values())
        worked = processor_seconds(pids)
        seconds, samples = await self.wait(self.gate.open(splits, {m.incarnation for m in chosen}))
        processor = processor_seconds(pids) - worked
        after = await asyncio.to_thread(read_counters, pages.values())
        grown = {name: value - before.get(name, 0.0) for name, value in after.items()}
        return Window(seconds, samples, processor, grown)

    async def close(self) -> None:
        """End all processes, then the coordinator."""
        # As the shard's last heartbeat told.
        self.rows = sum(int(m.stats.get("rows", 0)) for m in self._coordinator.members.alive("shard"))
        for child in self._children.values():
            if child.process.stdin is not None:
                child.process.stdin.close()
        self.gate.shut()
        self._running.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._running
        end = time.monotonic() + END_SECONDS
        while any(not c.ended for c in self._children.values()) and time.monotonic() < end:
            await asyncio.sleep(LOOK_SECONDS)
        for child in self._children.values():
            if not child.ended:
                child.process.kill()
            child.process.wait()
        self._server.stop(0.0)
        await self._transport.close()
        self._store.close()


def read_counters(addresses: Collection[str]) -> dict[str, float]:
    """Return the sum over metrics pages of each sample, by its name without the labels that tell members apart."""
    total: dict[str, float] = {}
    for address in addresses:
        with urllib.request.urlopen(f"http://{address}/metrics", timeout=20.0) as page:
            lines = page.read().decode().splitlines()
        for line in lines:
            if line.startswith(("oarlock_worker_", "oarlock_rpc_client_")):
                name, _, value = line.rpartition(" ")
                total[without_member(name)] = total.get(without_member(name), 0.0) + float(value)
    return total


def without_member(name: str) -> str:
    """Return ``name{stage="compute"}`` of ``name{worker="1",stage="compute"}``."""
    head, _, labels = name.partition("{")
    kept = [label for label in labels.rstrip("}").split(",") if label and not label.startswith("worker=")]
    return f"{head}{{{','.join(kept)}}}" if kept else head


def pin(pids: Sequence[int], processors: set[int]) -> None:
    """Have all threads of some processes, and those that these begin, run on ``processors`` alone."""
    for pid in pids:
        for thread in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(ProcessLookupError):
                os.sched_setaffinity(int(thread.name), processors)
