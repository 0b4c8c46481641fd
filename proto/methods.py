# SPDX-License-Identifier: Apache-2.0
"""Every method of the wire: its name, and the messages that go in and come out.

Invariant: this table is the only list of methods; transports and servers are driven by it.
"""

from dataclasses import dataclass
from functools import cached_property

from google.protobuf.message import Message

from oarlock.proto import common_pb2 as common
from oarlock.proto import coordinator_pb2 as coordinator
from oarlock.proto import serving_pb2 as serving
from oarlock.proto import shard_pb2 as shard
from oarlock.proto.frames import LOOKUP, PULL, PUSH, REPLICATE

# Version of the messages. Two sides with different numbers refuse each other (VersionMismatch).
PROTOCOL = 1


@dataclass(frozen=True)
class Method:
    """One method: ``service.Name``, its messages, and the attribute of the handler that answers it."""

    name: str
    request: type[Message]
    reply: type[Message]
    # Travels as frames on sockets where both sides can (proto/frames.py), as this kind of frame; else on a long-lived stream of
    # its own. The reply has a field `failure`. 0: call by call.
    frame: int = 0
    # Takes as long as a disk does.
    slow: bool = False

    @property
    def streamed(self) -> bool:
        return bool(self.frame)

    @property
    def path(self) -> str:
        service, method = self.name.split(".")
        return f"/oarlock.{service}/{method}"

    @cached_property
    def attribute(self) -> str:
        name = self.name.split(".")[1]
        return "".join("_" + c.lower() if c.isupper() else c for c in name).lstrip("_")


METHODS: dict[str, Method] = {
    m.name: m
    for m in (
        # Answered by the server of any service that has bulk methods.
        Method("Wire.Sockets", common.SocketsRequest, common.SocketsReply),
        Method("Shard.Hello", common.HelloRequest, common.HelloReply),
        Method("Shard.Pull", shard.PullRequest, shard.PullReply, frame=PULL),
        Method("Shard.Push", shard.PushRequest, shard.PushReply, frame=PUSH),
        Method("Shard.Marks", shard.MarksRequest, shard.MarksReply),
        Method("Shard.Ranks", shard.RanksRequest, shard.RanksReply),
        Method("Shard.Adopt", shard.AdoptRequest, shard.AdoptReply, slow=True),
        Method("Shard.Close", shard.CloseRequest, common.Empty),
        Method("Shard.Cut", shard.CutRequest, common.Empty),
        Method("Shard.Abort", shard.AbortRequest, common.Empty),
        Method("Shard.Write", shard.WriteRequest, shard.WriteReply, slow=True),
        Method("Shard.Replace", shard.ReplaceRequest, shard.ReplaceReply, slow=True),
        Method("Shard.Digest", shard.DigestRequest, shard.DigestReply, slow=True),
        Method("Shard.Replicate", shard.ReplicateRequest, shard.ReplicateReply, frame=REPLICATE),
        Method("Shard.Copy", shard.CopyRequest, common.Empty),
        Method("Shard.HandOver", shard.HandOverRequest, common.Empty),
        Method("Shard.Reopen", shard.ReopenRequest, common.Empty),
        Method("Shard.Held", shard.HeldRequest, shard.HeldReply),
        Method("Shard.Stats", shard.ShardStatsRequest, shard.ShardStatsReply),
        Method("Shard.Rows", shard.RowsRequest, shard.RowsReply),
        Method("Coordinator.Hello", common.HelloRequest, common.HelloReply),
        Method("Coordinator.Join", coordinator.JoinRequest, coordinator.JoinReply),
        Method("Coordinator.Heartbeat", coordinator.HeartbeatRequest, coordinator.HeartbeatReply),
        Method("Coordinator.Placement", coordinator.PlacementRequest, common.Placement),
        Method("Coordinator.Lease", coordinator.LeaseRequest, coordinator.LeaseReply),
        Method("Coordinator.Gate", coordinator.GateRequest, coordinator.GateReply),
        Method("Coordinator.CloseSplit", coordinator.CloseSplitRequest, common.Empty),
        Method("Coordinator.Release", coordinator.ReleaseRequest, common.Empty),
        Method("Coordinator.Leave", coordinator.LeaveRequest, common.Empty),
        Method("Coordinator.Report", coordinator.ReportRequest, coordinator.ReportReply),
        Method("Coordinator.Scale", coordinator.ScaleRequest, coordinator.ScaleReply),
        Method("Coordinator.Status", coordinator.StatusRequest, coordinator.StatusReply),
        Method("Coordinator.Checkpoint", coordinator.CheckpointRequest, coordinator.CheckpointReply),
        Method("Coordinator.Rollback", coordinator.RollbackRequest, coordinator.RollbackReply),
        Method("Coordinator.LiveDigest", coordinator.LiveDigestRequest, coordinator.LiveDigestReply),
        Method("Coordinator.Describe", coordinator.DescribeRequest, coordinator.DescribeReply),
        Method("Coordinator.Stop", coordinator.StopRequest, common.Empty),
        Method("Serving.Lookup", serving.LookupRequest, serving.LookupReply, frame=LOOKUP),
        Method("Serving.Describe", serving.ModelRequest, serving.ModelReply),
        Method("Serving.Rollback", serving.ServeCutRequest, serving.ModelReply, slow=True),
    )
}
