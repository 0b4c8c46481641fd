# SPDX-License-Identifier: Apache-2.0
"""Every method of the wire: its name, the messages that go in and come out, and who may call it.

Invariant: this table is the only list of methods; transports and servers are driven by it.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from google.protobuf.message import Message

from oarlock.proto import common_pb2 as common
from oarlock.proto import coordinator_pb2 as coordinator
from oarlock.proto import inference_pb2 as inference
from oarlock.proto import serving_pb2 as serving
from oarlock.proto import shard_pb2 as shard
from oarlock.proto.frames import LOOKUP, PULL, PUSH, REPLICATE
from oarlock.proto.roles import ADMINS, EVERYBODY, LOOKERS, MEMBERS

# Version of the messages. Two sides with different numbers refuse each other (VersionMismatch).
PROTOCOL = 1
# Where frames travel, and with which token, which the server of any service tells.
SOCKETS = "Wire.Sockets"
# The service of the Open Inference Protocol.
INFERENCE = "GRPCInferenceService"


@dataclass(frozen=True)
class Method:
    """One method: ``service.Name``, its messages, and the attribute of the handler that answers it."""

    name: str
    request: type[Message]
    reply: type[Message]
    # Whose callers may call it (proto/roles.py).
    roles: frozenset[str]
    # Travels as frames on sockets where both sides can (proto/frames.py), as this kind of frame; else on a long-lived stream of
    # its own. The reply has a field `failure`. 0: call by call.
    frame: int = 0
    # Takes as long as a disk does.
    slow: bool = False
    # Tells of a request that it changes something, where others of the method only look: then it takes the role admin.
    changes: Callable[[Any], bool] | None = None
    # As the protocol says that it is of.
    package: str = "oarlock"
    # What the process is there for: not among what callers of role read may ask so many times a second.
    counted: bool = True

    @property
    def streamed(self) -> bool:
        return bool(self.frame)

    @property
    def service(self) -> str:
        return self.name.split(".")[0]

    @property
    def path(self) -> str:
        service, method = self.name.split(".")
        return f"/{self.package}.{service}/{method}"

    @cached_property
    def attribute(self) -> str:
        name = self.name.split(".")[1]
        return "".join("_" + c.lower() if c.isupper() else c for c in name).lstrip("_")


def _inference(name: str, *, counted: bool = True) -> Method:
    """Return a method of the Open Inference Protocol."""
    request, reply = getattr(inference, f"{name}Request"), getattr(inference, f"{name}Response")
    return Method(f"{INFERENCE}.{name}", request, reply, EVERYBODY, package="inference", counted=counted)


def _undoes(request: shard.RowsRequest) -> bool:
    return bool(request.verb == shard.UNDO)


METHODS: dict[str, Method] = {
    m.name: m
    for m in (
        # Answered by the server of any service, to whom methods_of says.
        Method(SOCKETS, common.SocketsRequest, common.SocketsReply, EVERYBODY),
        Method("Shard.Hello", common.HelloRequest, common.HelloReply, EVERYBODY),
        Method("Shard.Pull", shard.PullRequest, shard.PullReply, MEMBERS, frame=PULL),
        Method("Shard.Push", shard.PushRequest, shard.PushReply, MEMBERS, frame=PUSH),
        Method("Shard.Marks", shard.MarksRequest, shard.MarksReply, MEMBERS),
        Method("Shard.Ranks", shard.RanksRequest, shard.RanksReply, MEMBERS),
        Method("Shard.Adopt", shard.AdoptRequest, shard.AdoptReply, MEMBERS, slow=True),
        Method("Shard.Close", shard.CloseRequest, common.Empty, MEMBERS),
        Method("Shard.Cut", shard.CutRequest, common.Empty, MEMBERS),
        Method("Shard.Abort", shard.AbortRequest, common.Empty, MEMBERS),
        Method("Shard.Write", shard.WriteRequest, shard.WriteReply, MEMBERS, slow=True),
        Method("Shard.Replace", shard.ReplaceRequest, shard.ReplaceReply, MEMBERS, slow=True),
        Method("Shard.Digest", shard.DigestRequest, shard.DigestReply, MEMBERS, slow=True),
        Method("Shard.Replicate", shard.ReplicateRequest, shard.ReplicateReply, MEMBERS, frame=REPLICATE),
        Method("Shard.Copy", shard.CopyRequest, common.Empty, MEMBERS),
        Method("Shard.HandOver", shard.HandOverRequest, common.Empty, MEMBERS),
        Method("Shard.Reopen", shard.ReopenRequest, common.Empty, MEMBERS),
        Method("Shard.Held", shard.HeldRequest, shard.HeldReply, MEMBERS),
        Method("Shard.Stats", shard.ShardStatsRequest, shard.ShardStatsReply, LOOKERS),
        Method("Shard.Rows", shard.RowsRequest, shard.RowsReply, LOOKERS, changes=_undoes),
        Method("Shard.Changes", shard.ChangesRequest, shard.ChangesReply, LOOKERS),
        Method("Coordinator.Hello", common.HelloRequest, common.HelloReply, EVERYBODY),
        Method("Coordinator.Join", coordinator.JoinRequest, coordinator.JoinReply, MEMBERS),
        Method("Coordinator.Heartbeat", coordinator.HeartbeatRequest, coordinator.HeartbeatReply, MEMBERS),
        Method("Coordinator.Placement", coordinator.PlacementRequest, common.Placement, MEMBERS),
        Method("Coordinator.Lease", coordinator.LeaseRequest, coordinator.LeaseReply, MEMBERS),
        Method("Coordinator.Gate", coordinator.GateRequest, coordinator.GateReply, MEMBERS),
        Method("Coordinator.CloseSplit", coordinator.CloseSplitRequest, common.Empty, MEMBERS),
        Method("Coordinator.Release", coordinator.ReleaseRequest, common.Empty, MEMBERS),
        Method("Coordinator.Leave", coordinator.LeaveRequest, common.Empty, MEMBERS),
        Method("Coordinator.Report", coordinator.ReportRequest, coordinator.ReportReply, MEMBERS),
        Method("Coordinator.Scale", coordinator.ScaleRequest, coordinator.ScaleReply, ADMINS),
        Method("Coordinator.Status", coordinator.StatusRequest, coordinator.StatusReply, LOOKERS),
        Method("Coordinator.Checkpoint", coordinator.CheckpointRequest, coordinator.CheckpointReply, ADMINS),
        Method("Coordinator.Rollback", coordinator.RollbackRequest, coordinator.RollbackReply, ADMINS),
        Method("Coordinator.LiveDigest", coordinator.LiveDigestRequest, coordinator.LiveDigestReply, LOOKERS),
        Method("Coordinator.Describe", coordinator.DescribeRequest, coordinator.DescribeReply, LOOKERS),
        Method("Coordinator.Stop", coordinator.StopRequest, common.Empty, ADMINS),
        Method("Serving.Lookup", serving.LookupRequest, serving.LookupReply, EVERYBODY, frame=LOOKUP),
        Method("Serving.Describe", serving.ModelRequest, serving.ModelReply, EVERYBODY),
        Method("Serving.Nearest", serving.NearestRequest, serving.NearestReply, EVERYBODY, counted=False),
        Method("Serving.Rollback", serving.ServeCutRequest, serving.ModelReply, ADMINS, slow=True),
        _inference("ServerLive"),
        _inference("ServerReady"),
        _inference("ModelReady"),
        _inference("ServerMetadata"),
        _inference("ModelMetadata"),
        _inference("ModelInfer", counted=False),
    )
}
# Services that the server of another one answers, too.
_BESIDE = {"Serving": (INFERENCE,)}


def methods_of(service: str) -> list[Method]:
    """Return what a server of ``service`` answers.

    The sockets of frames are for those who may call every method of the service that travels on them, and for nobody else: who
    is let in there may send frames of all their kinds.
    """
    services = (service, *_BESIDE.get(service, ()))
    own = [method for method in METHODS.values() if method.service in services]
    sockets = METHODS[SOCKETS]
    return [*own, replace(sockets, roles=sockets.roles.intersection(*(m.roles for m in own if m.frame)))]
