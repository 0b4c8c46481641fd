# SPDX-License-Identifier: Apache-2.0
"""A coordinator as it stands behind its port, with good messages for each method. Invariant: that of targets.py."""

import json
from pathlib import Path
from typing import ClassVar

import cluster_rig
import numpy as np
import targets

from oarlock.cluster.coordinator import MAX_WARNINGS
from oarlock.cluster.members import MAX_ALIVE, MAX_GONE
from oarlock.proto import coordinator_pb2 as pb
from oarlock.proto.arrays import pack
from oarlock.proto.common_pb2 import HelloRequest
from oarlock.proto.methods import PROTOCOL


class CoordinatorTarget(targets.Target):
    """A coordinator with two shards and two workers that train; its file is in memory."""

    service = "Coordinator"
    weights: ClassVar = {
        "Coordinator.Hello": 2,
        "Coordinator.Join": 8,
        "Coordinator.Heartbeat": 20,
        "Coordinator.Placement": 5,
        "Coordinator.Lease": 20,
        "Coordinator.CloseSplit": 25,
        "Coordinator.Release": 10,
        "Coordinator.Leave": 2,
        "Coordinator.Status": 4,
        "Coordinator.Describe": 4,
        "Coordinator.Gate": 4,
        "Coordinator.Checkpoint": 1,
        "Coordinator.Rollback": 2,
        "Coordinator.LiveDigest": 1,
        "Coordinator.Report": 10,
        "Coordinator.Scale": 2,
        "Coordinator.Stop": 1,
    }

    def build(self):
        self.close()
        self.cluster = cluster_rig.Cluster(Path(":memory:")).start()
        self.handler = self.cluster.service
        self.coordinator = self.cluster.coordinator
        self.shards = self.cluster.shards()
        self.workers = self.cluster.workers()

    def header(self, sender):
        return self.cluster.header(sender, term=self.coordinator.term)

    def close(self):
        if hasattr(self, "cluster"):
            self.cluster.kill()

    def messages(self):
        one, two = self.workers
        self.handler.lease(pb.LeaseRequest(header=self.header(one), wanted=2, number=1))
        train = {"header": self.header(one), "work": pb.TRAIN, "samples": 10, "loss_sum": 5.0, "groups": 2}
        join = {"protocol": PROTOCOL, "pid": 7, "host": "h"}
        return {
            "Coordinator.Hello": [HelloRequest(protocol=PROTOCOL, version="1")],
            "Coordinator.Join": [
                pb.JoinRequest(role=pb.WORKER, nonce=5, reader="arrow", **join),
                pb.JoinRequest(role=pb.SHARD, nonce=6, address="new:1", **join),
            ],
            "Coordinator.Heartbeat": [
                pb.HeartbeatRequest(header=self.header(one), stats='{"samples": 5}', clock=pb.Clock(active=True)),
                pb.HeartbeatRequest(header=self.header(self.shards[0]), stats='{"rows": 3, "tables": {"user": 3}}'),
            ],
            "Coordinator.Placement": [pb.PlacementRequest(header=self.header(one))],
            "Coordinator.Lease": [
                pb.LeaseRequest(header=self.header(one), wanted=1, number=1, held=[0, 1], clock=pb.Clock(active=True)),
                pb.LeaseRequest(header=self.header(two), wanted=2, number=1),
            ],
            "Coordinator.CloseSplit": [
                pb.CloseSplitRequest(split=0, **train),
                pb.CloseSplitRequest(split=1, **train),
                pb.CloseSplitRequest(header=self.header(one), work=pb.EVALUATE, split=0, sums=[4.0, 1.0]),
            ],
            "Coordinator.Release": [
                pb.ReleaseRequest(header=self.header(one), splits=[1], evaluations=[0], reason="it broke")
            ],
            "Coordinator.Leave": [pb.LeaveRequest(header=self.header(two), error="it broke")],
            "Coordinator.Status": [pb.StatusRequest()],
            "Coordinator.Describe": [pb.DescribeRequest()],
            "Coordinator.Gate": [pb.GateRequest(header=self.header(one), cut=1)],
            "Coordinator.Checkpoint": [pb.CheckpointRequest()],
            "Coordinator.LiveDigest": [pb.LiveDigestRequest()],
            "Coordinator.Rollback": [pb.RollbackRequest(table="user", path="/somewhere/cut-000003")],
            "Coordinator.Report": [
                pb.ReportRequest(
                    header=self.header(self.shards[0]),
                    told=told,
                    blocks=pack(np.array([0, 1], np.int32)),
                    generations=pack(np.full(2, self.coordinator.generation, np.uint64)),
                    shard=1,
                    order=1,
                    term=self.coordinator.term,
                )
                for told in (pb.ADDED, pb.HANDED, pb.CONFIRMED, pb.LACKING, pb.SLOW)
            ],
            "Coordinator.Scale": [pb.ScaleRequest(servers=3), pb.ScaleRequest(servers=1, workers=1)],
            "Coordinator.Stop": [pb.StopRequest(checkpoint=True, reason="enough")],
        }

    def fingerprint(self):
        """Return all that a message may change but for what a header alone changes: the sender's lease."""
        c, work = self.coordinator, self.coordinator.work
        return (
            [(m.incarnation, m.state, m.asked, str(m.stats)) for m in c.members.all.values()],
            (c.generation, c.scaling.servers, c.scaling.workers, frozenset(c.scaling.leaves)),
            dict(work.leases),
            work.closed.floor,
            tuple(work.closed.above),
            dict(work.results),
            (work.epoch, work.samples, work.loss_sum, len(work.touched), str(work.failures)),
            None if c.cuts.gate is None else (c.cuts.gate.missing, c.cuts.gate.workers),
            (
                c.phase,
                c.reason,
                c.stop_wanted,
                c.stop_reason,
                c.generation,
                c.cuts.last,
                c.cuts.wanted,
                str((c.rollbacks.wanted, c.rollbacks.decided, c.live_digest.wanted)),
                len(c.warnings),
                c.copies.records.owners.tobytes(),
                str((c.scaling.servers, c.scaling.workers, sorted(c.scaling.leaves))),
            ),
        )

    def check_bounds(self):
        c = self.coordinator
        assert len(c.members.alive("worker")) <= MAX_ALIVE
        assert len(c.members.all) <= 2 * MAX_ALIVE + MAX_GONE
        assert len(c.work.leases) <= c.spec.splits + c.spec.evaluation_splits
        assert len(c.warnings) <= MAX_WARNINGS
        assert json.dumps(c.counted(), allow_nan=False)

    def renew(self):
        if self.inputs:
            # Whatever was accepted, time can go on, people can ask, and the state can be written down.
            c = self.coordinator
            for _ in range(3):
                self.cluster.clock.now += 2.0
                c.tick()
            assert json.dumps(c.status(), allow_nan=False).encode()
            json.dumps(c.status(), ensure_ascii=False, allow_nan=False).encode()
        super().renew()
