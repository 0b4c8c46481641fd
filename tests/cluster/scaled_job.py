# SPDX-License-Identifier: Apache-2.0
"""A job with a scaler, whose members do at once what is wanted of them, under a clock that the test turns."""

import json
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from oarlock.client.autoscale import Autoscale
from oarlock.cluster.moving import CONFIRM, COPY, HAND
from oarlock.proto import coordinator_pb2 as pb
from oarlock.proto.arrays import pack

POLICY: dict[str, Any] = {
    "server_bytes": 1000,
    "looks": 2,
    "look_seconds": 10.0,
    "cool_down_seconds": 60.0,
    "stale_seconds": 5.0,
}


@dataclass
class Told:
    """What a member counts; its clock is not the coordinator's."""

    clock: float
    counts: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(("samples", "cpu", "pushing", "pushes"), 0.0)
    )


class Job:
    """A job whose members do what is wanted, and tell what the test says.

    ``bytes``: of all shards; ``busy`` and ``pushes``: of each shard, the number of pushes at a time; ``speed``: samples/s of a
    worker.
    """

    def __init__(
        self, make_cluster: Any, *, servers: int = 2, workers: int = 2, replicas: int = 0, **policy: Any
    ) -> None:
        values = {"servers_most": 4, "workers_most": 0, **POLICY, **policy}
        self.cluster = make_cluster(servers=servers, workers=workers, replicas=replicas, autoscale=Autoscale(**values))
        self.bytes, self.busy, self.pushes, self.speed = 800, 0.1, 0.1, 100.0
        self.told: dict[int, Told] = {}
        # By incarnation, what is told in the place of the truth.
        self.lies: dict[int, dict[str, Any]] = {}
        self.silent: set[int] = set()
        self.ports = 0
        self.cluster.shards()
        self.cluster.workers()

    @property
    def numbers(self) -> tuple[int, int]:
        return self.cluster.coordinator.scaling.servers, self.cluster.coordinator.scaling.workers

    @property
    def said(self) -> str:
        look = self.cluster.status()["autoscale"]["look"]
        return look["said"] if look else ""

    def decisions(self) -> list[tuple[int, int]]:
        return [(d["servers"], d["workers"]) for d in self.cluster.status()["autoscale"]["decisions"]]

    def alive(self, role: str) -> list[Any]:
        return self.cluster.coordinator.members.alive(role)

    def run(self, seconds: float) -> None:
        """Let time pass, heartbeat by heartbeat."""
        c, step = self.cluster.coordinator, self.cluster.spec.heartbeat_seconds
        for _ in range(round(seconds / step)):
            self.cluster.clock.now += step
            for role in ("shard", "worker"):
                for number, member in enumerate(self.alive(role)):
                    if member.incarnation not in self.silent:
                        self.beat(member, step, number)
            self.obey()
            c.tick()

    def beat(self, member: Any, seconds: float, number: int) -> None:
        told = self.told.setdefault(member.incarnation, Told(7.0 + 1000 * number))
        told.clock += seconds
        rates = {"samples": self.speed, "cpu": 0.02, "pushing": self.busy, "pushes": self.pushes}
        for name, rate in rates.items():
            told.counts[name] += rate * seconds
        counts = told.counts
        stats: dict[str, Any] = {"clock": told.clock, "samples": counts["samples"]}
        if member.role == "shard":
            load = {
                "cpu_seconds": counts["cpu"],
                "pushing_seconds": counts["pushing"],
                "pushes_seconds": counts["pushes"],
            }
            load |= {"processors": 2.0, "resident_bytes": 0, "limit_bytes": 0}
            held = int(self.bytes / len(self.cluster.coordinator.shards))
            stats = {"clock": told.clock, "bytes": held, "load": load}
        lie = self.lies.get(member.incarnation, {})
        if "load" in stats:
            stats["load"] |= {name: value for name, value in lie.items() if name in stats["load"]}
        stats |= {name: value for name, value in lie.items() if name in stats}
        reply = self.cluster.heartbeat(member.incarnation, json.dumps(stats))
        if reply.leave:
            self.cluster.leave(member.incarnation)

    def obey(self) -> None:
        """Have as many members as are wanted, and blocks where they are wanted."""
        c = self.cluster.coordinator
        for role, wanted in (("shard", c.scaling.servers), ("worker", c.scaling.workers)):
            for member in self.alive(role):
                if role == "worker" and member.incarnation in c.scaling.leaves:
                    self.cluster.leave(member.incarnation)
            there = [m for m in self.alive(role) if m.incarnation not in c.scaling.leaves]
            for _ in range(wanted - len(there)):
                self.ports += 1
                self.cluster.join(role, f"s:{self.ports + 60000}" if role == "shard" else "")
        for _ in range(100):
            orders = c.copies.step()
            self.cluster.adopt()
            for order in orders:
                self.report(order)
            for block, flight in list(c.copies.moving.flights.items()):
                if flight.stage == CONFIRM:
                    self.send(c.shards[flight.owner].incarnation, pb.CONFIRMED, block, flight.generation)
            if c.copies.at_rest:
                return

    def report(self, order: Any) -> None:
        owner = self.cluster.coordinator.shards[order.owner].incarnation
        if order.kind == COPY:
            self.send(owner, pb.ADDED, order.block, order.generation, shard=order.shard)
        if order.kind == HAND:
            told = {"shard": order.shard, "term": order.term, "order": order.order}
            self.send(owner, pb.HANDED, order.block, order.generation, **told)

    def send(self, sender: int, told: Any, block: int, generation: int, **other: Any) -> None:
        blocks, generations = np.array([block], np.int32), np.array([generation], np.uint64)
        header = self.cluster.header(sender)
        self.cluster.service.report(
            pb.ReportRequest(header=header, told=told, blocks=pack(blocks), generations=pack(generations), **other)
        )
