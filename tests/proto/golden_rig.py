# SPDX-License-Identifier: Apache-2.0
"""One message of every type, with every field set, for ``test_golden``. A conftest loads it as ``golden_rig``."""

from typing import Any

import numpy as np
from google.protobuf.message import Message

from oarlock.proto import coordinator_pb2, shard_pb2
from oarlock.proto.arrays import pack
from oarlock.proto.common_pb2 import (
    Array,
    ClosedSplits,
    Empty,
    Failure,
    Header,
    HelloReply,
    HelloRequest,
    Member,
    Placement,
    SocketsReply,
    SocketsRequest,
)
from oarlock.proto.coordinator_pb2 import (
    EVALUATE,
    SHARD,
    TRAIN,
    Clock,
    CloseSplitRequest,
    HeartbeatReply,
    HeartbeatRequest,
    JoinReply,
    JoinRequest,
    LeaseReply,
    LeaseRequest,
    LeaveRequest,
    LossCount,
    LossQuestion,
    PlacementRequest,
    ReleaseRequest,
)
from oarlock.proto.shard_pb2 import (
    UNDO,
    AbortRequest,
    AdoptReply,
    AdoptRequest,
    CloseRequest,
    Codec,
    CutRequest,
    DenseGradients,
    MarksReply,
    MarksRequest,
    Packed,
    PullReply,
    PullRequest,
    PushReply,
    PushRequest,
    RankCommits,
    RanksReply,
    RanksRequest,
    RowsReply,
    RowsRequest,
    ShardStatsReply,
    ShardStatsRequest,
    TableGradients,
    TableKeys,
    WriteReply,
    WriteRequest,
)

JOB = bytes(range(16))
KEYS = np.array([5, (1 << 64) - 1], np.uint64)
BLOCKS = np.array([0, 3], np.int32)
COUNTS = np.array([1, 1], np.int32)
GRADIENTS = np.array([[1.0, -2.0], [0.5, 0.0]], np.float32)


def int32(*values: int) -> Array:
    return pack(np.array(values, np.int32))


def float32(*values: float) -> Array:
    return pack(np.array(values, np.float32))


def header(**more: int) -> Header:
    return Header(protocol=1, job=JOB, run=2, sender=3, target=4, **more)


def keys() -> TableKeys:
    return TableKeys(table=1, keys=pack(KEYS), blocks=pack(BLOCKS), counts=pack(COUNTS))


def full_keys() -> TableKeys:
    versions = pack(np.array([300, 0], np.uint32))
    return TableKeys(table=1, keys=pack(KEYS), blocks=pack(BLOCKS), counts=pack(COUNTS), versions=versions, bound=10)


def gradients() -> TableGradients:
    return TableGradients(keys=keys(), gradients=pack(GRADIENTS), rate=0.5)


def full_gradients() -> TableGradients:
    more = {"occurrences": pack(np.array([3, 1], np.uint32)), "clicks": float32(2.0, 0.5)}
    return TableGradients(keys=keys(), gradients=pack(GRADIENTS), rate=0.5, packed=packed(1, 2, 3, 4), **more)


def dense() -> DenseGradients:
    return DenseGradients(blocks=int32(7), gradients=float32(0.25), rate=0.125)


def full_dense() -> DenseGradients:
    return DenseGradients(blocks=int32(7), gradients=float32(0.25), rate=0.125, packed=packed(5, 6))


def codec(k: int = 3) -> Codec:
    return Codec(codec=4, k=k, zstd=True)


def packed(*payload: int) -> Packed:
    return Packed(codec=codec(), payload=pack(np.array(payload, np.uint8)), values=300)


def commits() -> RankCommits:
    steps, samples = np.array([70_001, 70_000], np.uint64), np.array([512, 300], np.uint64)
    return RankCommits(steps=pack(steps), samples=pack(samples))


def placement() -> Placement:
    members = [Member(id=1, address="unix:/s", incarnation=2**62 + 1)]
    return Placement(generation=9, owners=int32(1, 0, -1), shards=[MEMBER, *members])


def full_placement() -> Placement:
    """A change."""
    return Placement(
        generation=9,
        owners=int32(300, 1),
        shards=[MEMBER, Member(id=1, address="unix:/s", incarnation=2**62 + 1)],
        blocks=int32(3, 7),
        since=7,
        generations=generations(9, 8),
        members=pack(np.array([[300, 1, -1], [1, -1, -1]], np.int32)),
    )


def generations(*values: int) -> Array:
    return pack(np.array(values, np.uint64))


def uint8(*values: int) -> Array:
    return pack(np.array(values, np.uint8))


def operation(**does: Any) -> shard_pb2.Operation:
    return shard_pb2.Operation(
        blocks=int32(3, 7), generations=generations(9, 8), sequences=generations(70_001, 2), **does
    )


def image() -> shard_pb2.BlockImage:
    return shard_pb2.BlockImage(
        records=uint8(1, 2),
        others=uint8(3),
        waiting=pack(KEYS),
        waited=pack(np.array([2, 1], np.uint32)),
        sketch=uint8(0, 4),
        left=5,
        splits=generations(300, 301),
        groups=generations(4, 5),
        closed=CLOSED,
        staged=[PushRequest(split=1, rank=3)],
        step=70_000,
    )


def failure() -> Failure:
    return Failure(code=11, message="block 7 is elsewhere", details='{"block": 7}')


FULL = header(generation=9, term=6, cut=7)
MEMBER = Member(id=300, address="127.0.0.1:5000", incarnation=(1 << 63) - 1)
CLOSED = ClosedSplits(floor=1000, bitmap=b"\x05\x80")
OPENED: dict[str, Any] = {"opened": 12, "gate": 13, "gate_seconds": 0.25}
CLOCK = Clock(active=True, acknowledged=200, heard=190)
HELD: dict[str, Any] = {"held": [300, 301], "evaluations": [40]}
TOLD: dict[str, Any] = {"term": 6, "generation": 9, "phase": "training", "step": 70000, "minimum": 190}
LOSS = LossCount(generation=300, pushes=70000, more=True)

MESSAGES: dict[str, Message] = {
    type(message).__name__: message
    for message in (
        Array(data=GRADIENTS.tobytes(), dtype=3, shape=GRADIENTS.shape, part=5),
        FULL,
        HelloRequest(protocol=1, version="0.1.0"),
        SocketsRequest(protocol=1),
        SocketsReply(addresses=[":99", "a"], token=bytes([1, 2, 3, 4])),
        HelloReply(protocol=1, version="0.1.0", role="shard"),
        failure(),
        full_placement(),
        MEMBER,
        CLOSED,
        Empty(),
        full_keys(),
        codec(),
        packed(1, 2, 3),
        PullRequest(
            header=FULL,
            tables=[full_keys()],
            dense=int32(7),
            number=301,
            codecs=[codec(), Codec()],
            dense_codec=codec(5),
            rank=3,
            state=70_001,
            samples=512,
        ),
        PullReply(
            rows=[pack(GRADIENTS)],
            dense=float32(0.25),
            pushes=500,
            packed=[packed(9)],
            packed_dense=packed(8, 7),
            positions=[int32(0, 1)],
            versions=[pack(np.array([311, 1], np.uint32))],
            waits=True,
            lowest=70_000,
            highest=70_001,
            generation=9,
            failure=failure(),
        ),
        full_gradients(),
        full_dense(),
        PushRequest(
            header=FULL,
            split=300,
            group=5,
            tables=[full_gradients()],
            dense=[full_dense()],
            step=70000,
            number=301,
            seen=40_001,
            rank=3,
        ),
        PushReply(applied=2, skipped=3, moved=int32(7), refused=1, failure=failure(), where=full_placement()),
        MarksRequest(header=FULL, splits=[300, 1 << 40]),
        MarksReply(next=[0, 6, 300]),
        commits(),
        RanksRequest(header=FULL, hold=13),
        RanksReply(commits=commits(), lowest=70_000, highest=70_001),
        AdoptRequest(
            header=FULL,
            placement=placement(),
            closed=CLOSED,
            restore="/jobs/a/checkpoints/cut-000012",
            create=int32(3, 7),
        ),
        AdoptReply(generation=9, rows=1 << 33),
        CloseRequest(header=FULL, closed=CLOSED),
        WriteRequest(header=FULL, cut=13, root="/jobs/a/checkpoints", alone=True),
        WriteReply(entries="[]", torn=True, trouble="table u"),
        CutRequest(header=FULL, cut=13, workers=[71, 72], committed=12, commits=commits(), at=70000),
        AbortRequest(header=FULL, cut=13),
        shard_pb2.ReplaceRequest(
            header=FULL, table="user", path="/cut-000012", number=13, workers=[7, 300], generation=10
        ),
        shard_pb2.ReplaceReply(rows=70000),
        shard_pb2.DigestRequest(header=FULL, cut=13),
        shard_pb2.DigestReply(digest=bytes(range(16)), rows=70000, torn=True),
        shard_pb2.ReplicateRequest(
            header=FULL,
            stream=(1 << 64) - 1,
            first=300,
            operations=[operation(applied=shard_pb2.AppliedStep(step=4, samples=5))],
        ),
        operation(push=PushRequest(split=300, group=5, dense=[dense()]), tick=70_000),
        shard_pb2.SweptRows(gone=pack(KEYS), decayed=pack(KEYS[:1])),
        shard_pb2.UndoneRows(keys=keys(), steps=2),
        shard_pb2.AppliedStep(step=70_000, samples=512),
        image(),
        shard_pb2.ReplicateReply(next=301, refused=int32(7), generations=generations(9), failure=failure()),
        shard_pb2.CopyRequest(
            header=FULL, blocks=int32(3, 7), shard=300, generations=generations(9, 8), leisurely=True
        ),
        shard_pb2.HandOverRequest(header=FULL, blocks=int32(3, 7), shard=300, generations=generations(9, 8), order=12),
        shard_pb2.ReopenRequest(header=FULL, blocks=int32(3, 7), generations=generations(9, 8), term=6, order=12),
        shard_pb2.HeldRequest(header=FULL, blocks=int32(3, 7)),
        shard_pb2.HeldReply(generations=generations(9, 0), sequences=generations(70_001, 0)),
        ShardStatsRequest(header=FULL),
        ShardStatsReply(stats='{"rows": 3}'),
        RowsRequest(
            header=FULL, verb=UNDO, keys=keys(), block=3, least=(1 << 64) - 2, tick=70000, steps=2, number=(1 << 63) - 1
        ),
        RowsReply(
            keys=pack(KEYS),
            present=int32(1, 0),
            weights=pack(GRADIENTS),
            state=pack(GRADIENTS[:, :1]),
            counters=pack(np.array([[7], [8]], np.uint32)),
            more=True,
            next=(1 << 64) - 1,
            facts=['{"key": 5}'],
            undone=int32(2, 1),
            refused=300,
        ),
        JoinRequest(
            protocol=1,
            role=SHARD,
            address="127.0.0.1:5000",
            nonce=(1 << 63) - 1,
            pid=4242,
            host="h",
            reader="arrow",
            signature='{"blas": "b"}',
        ),
        JoinReply(
            job=JOB,
            run=2,
            term=6,
            id=1,
            incarnation=(1 << 62) + 1,
            spec="{}",
            lease_seconds=5.0,
            heartbeat_seconds=0.5,
            placement=placement(),
            opened=12,
        ),
        CLOCK,
        HeartbeatRequest(
            header=FULL, stats='{"batches": 8}', clock=CLOCK, **HELD, asking=True, ranks=[0, 2], losses=[LOSS]
        ),
        LOSS,
        LossQuestion(generation=300, cut=12, blocks=int32(3, 7)),
        HeartbeatReply(**TOLD, **OPENED, committed=11, leave=True, lost=[LossQuestion(cut=12)]),
        PlacementRequest(header=FULL, whole=True),
        LeaseRequest(header=FULL, wanted=2, number=17, held=[300, 301], evaluations=[40], clock=CLOCK, ranks=[0, 2]),
        LeaseReply(
            work=TRAIN,
            splits=[302, 304],
            fresh=[True, False],
            retry_seconds=0.05,
            minimum=190,
            **OPENED,
            ranks=[1, 3],
            epoch=7,
        ),
        CloseSplitRequest(
            header=FULL,
            work=EVALUATE,
            split=300,
            samples=10000,
            loss_sum=0.75,
            sums=[100.0, 62.5],
            groups=5,
            scores=b"SCOR\1",
        ),
        ReleaseRequest(header=FULL, splits=[300, 301], evaluations=[40], reason="bad file"),
        LeaveRequest(header=FULL, error="out of disk"),
        coordinator_pb2.ReportRequest(
            header=FULL,
            told=coordinator_pb2.HANDED,
            blocks=int32(3, 7),
            generations=generations(9, 8),
            shard=300,
            order=12,
            term=6,
        ),
        coordinator_pb2.ReportReply(record=full_placement()),
        coordinator_pb2.ScaleRequest(servers=5, workers=300),
        coordinator_pb2.ScaleReply(servers=5, workers=300, said="2 more shards"),
        coordinator_pb2.StatusRequest(),
        coordinator_pb2.StatusReply(status='{"phase": "training"}'),
        coordinator_pb2.GateRequest(header=FULL, cut=13),
        coordinator_pb2.GateReply(opened=12),
        coordinator_pb2.CheckpointRequest(),
        coordinator_pb2.CheckpointReply(last=12),
        coordinator_pb2.RollbackRequest(table="user", path="/cut-000012"),
        coordinator_pb2.RollbackReply(number=3),
        coordinator_pb2.LiveDigestRequest(),
        coordinator_pb2.LiveDigestReply(last=12),
        coordinator_pb2.StopRequest(checkpoint=True, reason="asked to"),
        coordinator_pb2.DescribeRequest(),
        coordinator_pb2.DescribeReply(job=JOB, run=2, spec="{}", placement=placement(), step=70000),
    )
}
# Of what an operation may have done a message says one thing only.
OPERATIONS: dict[str, Message] = {
    "operation-swept": operation(swept=shard_pb2.SweptRows(gone=pack(KEYS))),
    "operation-undone": operation(undone=shard_pb2.UndoneRows(keys=keys(), steps=2)),
    "operation-applied": operation(applied=shard_pb2.AppliedStep(step=70_000, samples=512)),
    "operation-image": operation(image=image()),
}
EARLIER: dict[str, Message] = {
    "pull": PullRequest(header=header(), tables=[keys()], dense=int32(7)),
    "push": PushRequest(header=header(generation=9), split=300, group=5, tables=[gradients()], dense=[dense()]),
}
