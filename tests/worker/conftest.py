# SPDX-License-Identifier: Apache-2.0
"""Whole jobs on one loop whose time is virtual: the real coordinator, shards and workers, and a wire that the test bends.

Nothing here sleeps: time passes only when nobody can do anything, and then at once. So a run is the same every time.
"""

import asyncio
import contextlib
import random
import sys
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import Executor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from oarlock.checkpoint.store import LocalStore
from oarlock.client.job import JobSpec
from oarlock.cluster.coordinator import Coordinator
from oarlock.cluster.orders import Orders
from oarlock.cluster.process import run_job
from oarlock.cluster.service import CoordinatorService
from oarlock.cluster.store import Store
from oarlock.data.files import files_to_json, list_files
from oarlock.data.reader import open_reader
from oarlock.data.splits import plan_splits
from oarlock.embedding.hashing import table_salt
from oarlock.embedding.keys import KeySorter
from oarlock.proto.errors import StalePlacement, Unavailable
from oarlock.proto.methods import METHODS
from oarlock.proto.transport import InProcess
from oarlock.ps.process import run_shard
from oarlock.ps.service import ShardService
from oarlock.simulation.loop import Inline, VirtualLoop
from oarlock.worker.process import run_worker
from oarlock.worker.trainer import Trainer

COORDINATOR = "in-process:coordinator"
# What faults strike.
FAULTY = ("Shard.Pull", "Shard.Push")


@dataclass
class Wire:
    """Delivers messages after pauses drawn from ``rng``; some pushes once more, much later. ``log`` tells what happened when.

    ``bend(method, request)``, if given, is awaited before delivery: it may wait, raise, or note. ``faults`` strike messages of
    pulls and pushes with these probabilities: ``drop`` (half of the time it is the answer that is lost), ``duplicate``,
    ``delay`` (by seconds), ``reorder`` (what is sent next arrives before it).
    """

    inner: InProcess
    rng: random.Random
    seconds: float = 0.05
    doubled: float = 0.0
    bend: Callable[[str, Any], Awaitable[None]] | None = None
    log: list[tuple[str, str, Any]] = field(default_factory=list)
    later: set[asyncio.Task[None]] = field(default_factory=set)
    faults: dict[str, float] = field(default_factory=dict)
    struck: Counter[str] = field(default_factory=Counter)
    passed: asyncio.Event | None = None

    async def call(self, address: str, method: str, request: Any, *, timeout_seconds: float) -> Any:
        data = request.SerializeToString()
        sent = METHODS[method].request.FromString(data)
        self.log.append(("sent", method, sent))
        drop = await self._strike(method)
        duplicate = method in FAULTY and self._strikes("duplicate")
        if duplicate or (method == "Shard.Push" and self.rng.random() < self.doubled):
            task = asyncio.ensure_future(self._again(address, method, data))
            self.later.add(task)
        if self.bend is not None:
            await self.bend(method, sent)
        await asyncio.sleep(self.rng.random() * self.seconds)
        if drop == "request":
            raise Unavailable("the connection broke")
        reply = await self.inner.call(address, method, sent, timeout_seconds=timeout_seconds)
        await asyncio.sleep(self.rng.random() * self.seconds)
        if drop:
            raise Unavailable("the connection broke")
        self.log.append(("answered", method, sent))
        return reply

    def _strikes(self, kind: str) -> bool:
        strikes = kind in self.faults and self.rng.random() < self.faults[kind]
        self.struck[kind] += strikes
        return strikes

    async def _strike(self, method: str) -> str:
        """Hold a message back, if that is its lot; return what of it is lost."""
        if method not in FAULTY or not self.faults:
            return ""
        if self.passed is not None:
            self.passed.set()
        if self._strikes("delay"):
            await asyncio.sleep(self.rng.random() * 8)
        if self._strikes("reorder"):
            self.passed = asyncio.Event()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.passed.wait(), 1)
        return self.rng.choice(("request", "answer")) if self._strikes("drop") else ""

    async def _again(self, address: str, method: str, data: bytes) -> None:
        await asyncio.sleep(self.rng.random() * 20)
        # After the end of the job a shard has no lease any more, or its blocks went elsewhere, and nobody hears what it answers.
        with contextlib.suppress(Unavailable, StalePlacement):
            await self.inner.call(address, method, METHODS[method].request.FromString(data), timeout_seconds=1)

    def calls(self, method: str, event: str = "sent") -> list[Any]:
        return [request for e, m, request in self.log if e == event and m == method]

    async def close(self) -> None:
        pass


class Job:
    """A counting job over files in ``folder``; ``changes`` are fields of its spec."""

    def __init__(self, folder: Path, rng: np.random.Generator, **changes: Any) -> None:
        self.folder = folder
        self.data: dict[str, np.ndarray[Any, Any]] = {}
        for name, rows, group in (
            ("train", changes.pop("rows", 240), changes.pop("group_rows", 20)),
            ("test", 40, 10),
        ):
            (folder / name).mkdir(parents=True)
            self.data[name] = rng.integers(0, 90, (rows, 2))
            table = pa.table({"a": self.data[name][:, 0], "b": self.data[name][:, 1]})
            for part, first in enumerate(range(0, rows, max(1, rows // 2))):
                piece = table.slice(first, max(1, rows // 2))
                pq.write_table(piece, folder / name / f"part-{part}.parquet", row_group_size=group)
        self.spec = self._spec(changes)
        self.wire = Wire(InProcess(), random.Random(int(rng.integers(1 << 30))))
        self.services = [ShardService() for _ in range(self.spec.servers)]
        self.workers: list[asyncio.Task[Trainer | None]] = []
        self.background: list[asyncio.Task[Any]] = []
        self.service: CoordinatorService
        self.reader: Any = open_reader("arrow")
        # Reads and encodes, beside compute threads; None: all is done on the loop.
        self.threads: Executor | None = None

    def _spec(self, changes: dict[str, Any]) -> JobSpec:
        import counting_recipe as counting

        values = {
            "recipe": "counting_recipe:recipe",
            "tables": counting.TABLES,
            "dense": counting.DENSE,
            "metrics": ("count",),
            "rows_per_split": 20,
            "evaluation_rows_per_split": 10,
            "batch_rows": 6,
            "epochs": 2,
            "servers": 2,
            "workers": 1,
            "checkpoint_epochs": 0,
            **changes,
        }
        files, test = list_files(self.folder / "train"), list_files(self.folder / "test")
        return JobSpec(
            job="00112233445566778899aabbccddeeff",
            name="count",
            seed=5,
            files=tuple(files_to_json(files)),
            evaluation_files=tuple(files_to_json(test)),
            splits=len(plan_splits(files, values["rows_per_split"])),
            evaluation_splits=len(plan_splits(test, values["evaluation_rows_per_split"])),
            **values,
        )

    def run(self, scene: Callable[["Job"], Awaitable[Any]]) -> float:
        """Start coordinator and shards, play ``scene``, end everything; return the virtual seconds it took.

        Nothing may be left running but what the scene cancelled. With ``threads`` time is not virtual.
        """

        async def play() -> float:
            loop = asyncio.get_running_loop()
            store = Store(self.folder / "state.sqlite").open()
            checkpoints = LocalStore(self.folder / "checkpoints")
            first = Coordinator(store, self.spec, clock=loop.time, rng=random.Random(3), goes_back=True)
            self.service = CoordinatorService(first)
            try:
                first.open()
                self.wire.inner.serve(self.service, COORDINATOR)
                self.background = [asyncio.ensure_future(run_job(self.service, self._orders_of, checkpoints))]
                begun = loop.time()
                await scene(self)
                took = loop.time() - begun
                if self.wire.later:
                    await asyncio.wait(self.wire.later)
                for task in (*self.background, *self.workers):
                    task.cancel()
                await asyncio.gather(*self.background, *self.workers, return_exceptions=True)
                left = [t for t in asyncio.all_tasks() if t is not asyncio.current_task() and t not in self.wire.later]
                assert not left, left
            finally:
                self.coordinator.store.close()
            return took

        with asyncio.Runner(loop_factory=None if self.threads is not None else VirtualLoop) as runner:
            return runner.run(play())

    @property
    def coordinator(self) -> Coordinator:
        """The coordinator of the newest run."""
        return self.service.newest

    @contextlib.contextmanager
    def _orders_of(self, coordinator: Coordinator) -> Iterator[Orders]:
        executor = Inline() if self.threads is None else None
        yield Orders(coordinator, self.wire.inner, self.folder / "checkpoints", executor=executor)

    def start_shards(self) -> None:
        for number in range(len(self.services)):
            self.start_shard(number)

    def start_shard(self, number: int) -> asyncio.Task[None]:
        address = self.wire.inner.serve(self.services[number], f"in-process:shard-{number}")
        shard = run_shard(self.wire.inner, COORDINATOR, self.services[number], address, rng=random.Random(number))
        self.background.append(asyncio.ensure_future(shard))
        return self.background[-1]

    def start_worker(self) -> asyncio.Task[Trainer | None]:
        worker = run_worker(
            self.wire,
            COORDINATOR,
            self.reader,
            self.threads or Inline(),
            rng=random.Random(50 + len(self.workers)),
            compute_in_threads=self.threads is not None,
        )
        self.workers.append(asyncio.ensure_future(worker))
        return self.workers[-1]

    def start(self) -> None:
        self.start_shards()
        for _ in range(self.spec.workers):
            self.start_worker()

    async def until(self, condition: Callable[[], Any]) -> None:
        while not condition():
            await asyncio.sleep(0.01)

    async def to_the_end(self) -> None:
        """Run the job with all its workers until it is over."""
        self.start()
        await asyncio.gather(*self.workers)
        await asyncio.gather(*self.background)

    # What came of it

    def counts(self) -> np.ndarray[Any, Any]:
        """Return how often each key 0 to 89 was counted."""
        return self.rows()[:, 0]

    def rows(self) -> np.ndarray[Any, Any]:
        """Return the rows of the keys 0 to 89."""
        dim = self.spec.tables[0].dim
        out = np.zeros((90, dim), np.float32)
        for service in self.services:
            assert service._joined is not None
            shard = service._joined[1]
            order = np.arange(8, dtype=np.int32)
            found = KeySorter().build(np.arange(90, dtype=np.uint64), table_salt("key"), 3, order)
            at = 0
            for block, count in zip(found.blocks.tolist(), found.counts.tolist(), strict=True):
                keys = found.keys[at : at + count]
                if shard.owned[block]:
                    rows = np.empty((count, dim), np.float32)
                    shard.tables[0].pull(keys, np.array([block], np.int32), np.array([count], np.int32), rows)
                    out[keys.astype(np.int64)] = rows
                at += count
        return out

    def batches(self) -> float:
        """Return the dense value: how many batches were counted."""
        for service in self.services:
            assert service._joined is not None
            shard = service._joined[1]
            if shard.owned[8]:
                value = np.empty(1, np.float32)
                shard.dense[0].pull_block(0, value)
                return float(value[0])
        raise AssertionError("nobody owns the dense block")

    def occurrences(self) -> np.ndarray[Any, Any]:
        """Return how often each key 0 to 89 stands in the training files."""
        return np.bincount(self.data["train"].ravel(), minlength=90).astype(np.float32)

    def batches_per_epoch(self) -> int:
        plan = plan_splits(list_files(self.folder / "train"), self.spec.rows_per_split)
        return sum(-(-split.rows // self.spec.batch_rows) for split in plan)

    def groups_per_epoch(self) -> int:
        plan = plan_splits(list_files(self.folder / "train"), self.spec.rows_per_split)
        return sum(self.spec.groups(split.rows) for split in plan)

    def check_counted_once(self) -> None:
        epochs = self.spec.epochs
        np.testing.assert_array_equal(self.counts(), self.occurrences() * epochs)
        assert self.batches() == self.batches_per_epoch() * epochs
        assert self.coordinator.work.steps == self.groups_per_epoch() * epochs
        assert [r.samples for r in self.coordinator.work.history] == [len(self.data["train"])] * epochs


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    import counting_recipe

    yield counting_recipe
    for part in (counting_recipe.seen, counting_recipe.draws, counting_recipe.poison, counting_recipe.bomb):
        part.clear()
    with contextlib.suppress(KeyError):
        del sys.modules["counting_recipe"]


@pytest.fixture
def make_job(tmp_path: Path, rng: np.random.Generator, counting: Any) -> Callable[..., Job]:
    number = iter(range(100))

    def make(**changes: Any) -> Job:
        # Jobs that are to have the same files are given generators of the same seed.
        return Job(tmp_path / f"job-{next(number)}", changes.pop("rng", rng), **changes)

    return make
