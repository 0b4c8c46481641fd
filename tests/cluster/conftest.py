# SPDX-License-Identifier: Apache-2.0
"""A coordinator under a clock that the test turns, spoken to by messages as its members would.

Gives the tests of copies their model, too: ``import copies_model``.
"""

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from oarlock.checkpoint.manifest import BlockEntry, ClosedSet, Manifest
from oarlock.client.job import JobSpec
from oarlock.cluster.coordinator import Coordinator
from oarlock.cluster.service import CoordinatorService
from oarlock.cluster.store import Store
from oarlock.embedding.spec import DenseSpec, TableSpec, to_json
from oarlock.proto import coordinator_pb2 as pb
from oarlock.proto.common_pb2 import Header
from oarlock.proto.methods import PROTOCOL
from tests.conftest import load_shared

# A model of shards with copies.
load_shared("cluster/copies_shard.py")
load_shared("cluster/copies_model.py")
load_shared("cluster/copies_faults.py")
# And a job with a scaler.
load_shared("cluster/scaled_job.py")

SPEC = JobSpec(
    job="0123456789abcdef" * 2,
    name="job",
    seed=3,
    recipe="nowhere:recipe",
    tables=(TableSpec("user", 4, blocks=8), TableSpec("item", 2, blocks=4)),
    dense=(DenseSpec("w", (10, 10), slice=30),),
    files=(),
    evaluation_files=(),
    splits=3,
    evaluation_splits=2,
    rows_per_split=10,
    evaluation_rows_per_split=10,
    batch_rows=5,
    epochs=2,
    servers=2,
    workers=2,
    metrics=("hr",),
)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Cluster:
    """One coordinator over one file, which may be killed and started again."""

    path: Path
    spec: JobSpec = SPEC
    clock: Clock = field(default_factory=Clock)
    rng: random.Random = field(default_factory=lambda: random.Random(1))
    store: Store = field(init=False)
    coordinator: Coordinator = field(init=False)
    service: CoordinatorService = field(init=False)
    questions: int = 0

    def start(self, open_it: bool = True) -> "Cluster":
        self.store = Store(self.path).open()
        self.coordinator = Coordinator(self.store, self.spec, clock=self.clock, rng=self.rng)
        self.service = CoordinatorService(self.coordinator)
        if open_it:
            self.coordinator.open()
        return self

    def kill(self) -> None:
        self.store.close()

    def restart(self) -> "Cluster":
        self.kill()
        return self.start()

    def pass_time(self, seconds: float, *alive: int) -> None:
        """Let time pass as the coordinator sees it, heartbeat by heartbeat, while ``alive`` renew their leases."""
        end = self.clock.now + seconds
        while self.clock.now < end:
            self.clock.now = min(end, self.clock.now + self.spec.heartbeat_seconds)
            for incarnation in alive:
                self.heartbeat(incarnation)
            self.coordinator.tick()

    def header(self, sender: int = 0, **other: Any) -> Header:
        c = self.coordinator
        fields = {
            "protocol": PROTOCOL,
            "job": self.spec.job_bytes,
            "run": c.run,
            "sender": sender,
            "term": c.term,
        }
        return Header(**{**fields, **other})

    def join(self, role: str, address: str = "", nonce: int = 0, **other: Any) -> Any:
        number = {"shard": pb.SHARD, "worker": pb.WORKER}[role]
        nonce = nonce or self.rng.getrandbits(63) | 1
        return self.service.join(
            pb.JoinRequest(protocol=PROTOCOL, role=number, address=address, nonce=nonce, pid=7, host="h", **other)
        )

    def heartbeat(self, sender: int, stats: str = "") -> Any:
        return self.service.heartbeat(pb.HeartbeatRequest(header=self.header(sender), stats=stats))

    def lease(self, sender: int, wanted: int = 1, *, held: list[int] | None = None, number: int = 0) -> Any:
        """Ask as a worker that holds ``held``, by default all that the coordinator thinks it does."""
        known = [split for kind, split in self.coordinator.work.leased_to(sender) if kind == "train"]
        evaluations = [split for kind, split in self.coordinator.work.leased_to(sender) if kind == "evaluate"]
        self.questions += 1
        number = number or self.questions
        request = pb.LeaseRequest(header=self.header(sender), wanted=wanted, number=number, evaluations=evaluations)
        request.held.extend(known if held is None else held)
        return self.service.lease(request)

    def close(self, sender: int, split: int, samples: int = 10, loss_sum: float = 5.0) -> None:
        self.service.close_split(
            pb.CloseSplitRequest(
                header=self.header(sender), work=pb.TRAIN, split=split, samples=samples, loss_sum=loss_sum
            )
        )

    def evaluated(self, sender: int, split: int, sums: list[float]) -> None:
        self.service.close_split(
            pb.CloseSplitRequest(header=self.header(sender), work=pb.EVALUATE, split=split, sums=sums)
        )

    def scored(self, sender: int, split: int, scores: bytes, sums: tuple[float, ...] = ()) -> None:
        header = self.header(sender)
        self.service.close_split(
            pb.CloseSplitRequest(header=header, work=pb.EVALUATE, split=split, scores=scores, sums=sums)
        )

    def release(self, sender: int, split: int, reason: str = "") -> None:
        self.service.release(pb.ReleaseRequest(header=self.header(sender), splits=[split], reason=reason))

    def leave(self, sender: int, error: str = "") -> None:
        self.service.leave(pb.LeaveRequest(header=self.header(sender), error=error))

    def status(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.service.status(pb.StatusRequest()).status)
        return found

    def shards(self) -> list[int]:
        """Let all shards join and adopt; return their incarnations."""
        joined = [self.join("shard", f"s:{self.rng.randrange(1, 60000)}").incarnation for _ in range(self.spec.servers)]
        self.adopt()
        return joined

    def adopt(self) -> None:
        for shard in list(self.coordinator.shards):
            self.coordinator.has_adopted(shard, self.coordinator.generation)

    def workers(self) -> list[int]:
        return [self.join("worker", reader="arrow").incarnation for _ in range(self.spec.workers)]

    def train_epoch(self, worker: int, loss: float = 5.0) -> None:
        epoch = self.coordinator.work.epoch
        while self.coordinator.work.epoch == epoch:
            reply = self.lease(worker)
            if reply.work == pb.TRAIN:
                self.close(worker, reply.splits[0], loss_sum=loss)
            elif reply.work == pb.EVALUATE:
                self.evaluated(worker, reply.splits[0], [4.0, 1.0])
            else:
                return

    def manifest(self, cut: int = 4) -> Manifest:
        """Return a manifest as Orders makes it, of the coordinator's present state."""
        c = self.coordinator
        spec, work = c.spec, c.work
        blocks = [("rows", t.name, b, 0) for t in spec.tables for b in range(t.blocks)]
        blocks += [
            ("dense", d.name, b, min(d.slice, d.size - b * d.slice)) for d in spec.dense for b in range(d.blocks)
        ]
        entries = [
            BlockEntry(kind=k, name=n, block=b, file=f"{k}-{n}-{b:05d}.arrow", bytes=1, rows=r, seq=0, sha256="0" * 64)
            for k, n, b, r in blocks
        ]
        values: dict[str, Any] = {
            "job": spec.job,
            "run": c.run,
            "cut": cut,
            "created": "2024-01-01T00:00:00+00:00",
            "seed": spec.seed,
            "tables": tuple(to_json(t) for t in spec.tables),
            "dense": tuple(to_json(d) for d in spec.dense),
            "recipe": spec.recipe,
            "config": {},
            "files": (),
            "closed": ClosedSet(work.closed.floor, tuple(sorted(work.closed.above))),
            "open_splits": tuple(work.open_splits()),
            "epoch": work.epoch,
            "step": work.closed.floor,
            "metrics": {
                "history": [vars(r) for r in work.history],
                "evaluations": {str(s): v for s, v in work.results.items() if isinstance(v, list)},
                "counted": c.counted(),
            },
            "best": {},
            "blocks": tuple(entries),
        }
        return Manifest(**values)

    def commit(self, cut: int = 1) -> None:
        """Make a cut as if its shards had answered."""
        cuts = self.coordinator.cuts
        if cuts.begun != cut:
            assert cuts.begin().cut == cut
        manifest = self.manifest(cut)
        cuts.open()
        cuts.commit(manifest, f"/cut-{cut:06d}")

    def give_up(self, cut: int, error: str) -> None:
        """Begin a cut that comes to nothing once its views have begun."""
        cuts = self.coordinator.cuts
        assert cuts.begin().cut == cut
        cuts.open()
        cuts.give_up(error)


@pytest.fixture
def make_cluster(tmp_path: Path) -> Iterator[Callable[..., Cluster]]:
    made: list[Cluster] = []

    def make(**changes: Any) -> Cluster:
        cluster = Cluster(tmp_path / f"state-{len(made)}.sqlite", replace(SPEC, **changes)).start()
        made.append(cluster)
        return cluster

    yield make
    for cluster in made:
        cluster.kill()


@pytest.fixture
def cluster(make_cluster: Callable[..., Cluster]) -> Cluster:
    return make_cluster()
