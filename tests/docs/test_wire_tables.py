# SPDX-License-Identifier: Apache-2.0
"""The tables of ``docs/wire.md`` are those of the code: methods, header, dtypes, errors, limits."""

import importlib
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from google.protobuf.message import Message

from oarlock.client.closed import ClosedSet
from oarlock.client.job import JobSpec
from oarlock.client.router import ShardAddress, pack_placement
from oarlock.cluster.coordinator import Coordinator
from oarlock.cluster.service import CoordinatorService
from oarlock.cluster.store import Store
from oarlock.embedding.spec import DenseSpec, TableSpec
from oarlock.proto import common_pb2, errors, shard_pb2
from oarlock.proto.arrays import pack
from oarlock.proto.common_pb2 import DType, Header, HelloRequest
from oarlock.proto.coordinator_pb2 import (
    ADDED,
    SHARD,
    TRAIN,
    WORKER,
    CheckpointRequest,
    CloseSplitRequest,
    DescribeRequest,
    GateRequest,
    HeartbeatRequest,
    JoinRequest,
    LeaseRequest,
    LeaveRequest,
    LiveDigestRequest,
    PlacementRequest,
    ReleaseRequest,
    ReportRequest,
    RollbackRequest,
    ScaleRequest,
    StatusRequest,
    StopRequest,
)
from oarlock.proto.errors import CODES, PSError
from oarlock.proto.methods import METHODS, PROTOCOL
from oarlock.proto.rpc import to_status
from oarlock.proto.rpc.status import FAILURE_KEY
from oarlock.proto.shard_pb2 import (
    QUARANTINE,
    AbortRequest,
    AdoptRequest,
    CloseRequest,
    CopyRequest,
    CutRequest,
    DenseGradients,
    DigestRequest,
    HandOverRequest,
    HeldRequest,
    MarksRequest,
    PullRequest,
    PushRequest,
    RanksRequest,
    ReopenRequest,
    ReplaceRequest,
    ReplicateRequest,
    RowsRequest,
    ShardStatsRequest,
    TableKeys,
    WriteRequest,
)
from oarlock.proto.transport import dispatch
from oarlock.ps.identity import Identity
from oarlock.ps.service import ShardService

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "wire.md").read_text(encoding="utf-8")

SPEC = JobSpec(
    job=bytes(range(16)).hex(),
    name="tables",
    seed=1,
    recipe="none:none",
    tables=(TableSpec("user", 2, blocks=2),),
    dense=(DenseSpec("bias", (1,)),),
    files=(),
    evaluation_files=(),
    splits=1000,
    evaluation_splits=0,
    rows_per_split=100,
    evaluation_rows_per_split=1,
    batch_rows=10,
    epochs=1,
    servers=1,
    workers=1,
    metrics=("auc",),
)
INCARNATION = 4
SHARDS = {n: ShardAddress(n, f"shard-{n}", INCARNATION + n) for n in (0, 1)}
PLACEMENT = pack_placement(1, np.zeros(3, np.int32), SHARDS)


def header(**changes: Any) -> Header:
    """Return a header for the shard."""
    values = {"protocol": PROTOCOL, "job": SPEC.job_bytes, "run": 1, "target": INCARNATION, "term": 1}
    return Header(**{**values, **changes})


@pytest.fixture
def shard() -> ShardService:
    """A shard that has all blocks, untrained."""
    service = ShardService()
    service.configure(SPEC, Identity(SPEC.job_bytes, 1, 0, INCARNATION))
    service.adopt(AdoptRequest(header=header(), placement=PLACEMENT))
    return service


@pytest.fixture
def coordinator(tmp_path: Path) -> Iterator[Coordinator]:
    store = Store(tmp_path / "state.sqlite").open()
    made = Coordinator(store, SPEC, clock=lambda: 0.0, rng=random.Random(0))
    made.open()
    yield made
    store.close()


def named(call: Callable[[], object]) -> set[str]:
    """Return the name of the error that a call ends with; empty: none."""
    try:
        call()
    except PSError as error:
        return {type(error).__name__}
    return set()


def rows(head: str) -> list[list[str]]:
    """Return the cells of the table whose first column is called ``head``."""
    found = re.search(rf"^\| {head} \|.*\n\|[-|]+\n((?:\|.*\n)+)", TEXT, re.MULTILINE)
    assert found is not None, head
    return [[cell.strip() for cell in line.strip("|\n").split("|")] for line in found[1].splitlines()]


def quoted(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def test_every_method_is_in_the_table_with_its_messages() -> None:
    table = rows("method")
    assert [quoted(row[0]) for row in table] == [[name] for name in METHODS]
    for row in table:
        found = METHODS[quoted(row[0])[0]]
        assert quoted(row[1]) == [found.request.DESCRIPTOR.name, found.reply.DESCRIPTOR.name]
        assert all(row[2:]), row
    for name, method in METHODS.items():
        if method.streamed:
            assert f"`{method.path}Stream`" in TEXT, name
    bare = {n.split(".")[1] for n, m in METHODS.items() if "header" not in m.request.DESCRIPTOR.fields_by_name}
    assert bare == set(quoted(re.search(r"except (`Sockets`.*?)\. It is", TEXT, re.DOTALL)[1]))  # type: ignore[index]


def test_the_header_is_the_one_of_the_table() -> None:
    known = [(str(f.number), [f.name]) for f in Header.DESCRIPTOR.fields]
    assert [(row[0], quoted(row[1])) for row in rows("number")] == known


WRONG = {"protocol": 2, "job": b"x" * 16, "run": 2, "sender": 5, "target": 5, "generation": 9, "term": 0, "cut": 9}


def refused(column: int, field: str) -> set[str]:
    """Return the name of the error in a column of the header's table."""
    return set(quoted(next(row for row in rows("number") if quoted(row[1]) == [field])[column])[:1])


@pytest.mark.parametrize("field", WRONG)
def test_a_wrong_header_is_refused_as_the_table_says(field: str, shard: ShardService, coordinator: Coordinator) -> None:
    wrong = header(**{field: WRONG[field]})
    assert named(lambda: shard.close(CloseRequest(header=wrong))) == refused(4, field)
    service = CoordinatorService(coordinator)
    joined = service.join(JoinRequest(protocol=PROTOCOL, role=WORKER, nonce=1))
    right = {"sender": joined.incarnation, "target": 0, "term": joined.term}
    # A shard heard of a newer coordinator; a coordinator hears of one from its members.
    wrong = header(**{**right, field: joined.term + 1 if field == "term" else WRONG[field]})
    assert named(lambda: service.heartbeat(HeartbeatRequest(header=wrong))) == refused(5, field)
    assert named(lambda: service.heartbeat(HeartbeatRequest(header=header(**right)))) == set()


def test_greetings_name_the_version_themselves(shard: ShardService, coordinator: Coordinator) -> None:
    service = CoordinatorService(coordinator)
    assert named(lambda: shard.hello(HelloRequest(protocol=2))) == {"VersionMismatch"}
    assert named(lambda: service.hello(HelloRequest(protocol=2))) == {"VersionMismatch"}
    assert named(lambda: service.join(JoinRequest(protocol=2, role=SHARD, nonce=1))) == {"VersionMismatch"}


def test_the_first_wrong_field_names_the_error(shard: ShardService) -> None:
    for names in (["protocol", "job", "run", "target"], ["job", "run", "target"], ["run", "target"], ["target"]):
        wrong = header(**{name: WRONG[name] for name in names})
        assert named(lambda wrong=wrong: shard.pull(PullRequest(header=wrong))) == refused(4, names[0])
    assert named(lambda: ShardService().pull(PullRequest(header=header()))) == {"Unavailable"}


def test_dtypes_are_those_of_the_table() -> None:
    row = next(row for row in re.findall(r"^\| 2 \| `dtype` \|(.*)\|$", TEXT, re.MULTILINE))
    assert re.findall(r"(\d) `(\w+)`", row) == [(str(number), name) for name, number in DType.items() if number]
    assert [f.name for f in common_pb2.Array.DESCRIPTOR.fields] == ["data", "dtype", "shape", "part"]
    assert pack(np.array([1, 2], "<u4")).data == b"\1\0\0\0\2\0\0\0"


def test_what_the_page_refuses_in_keys_is_refused(shard: ShardService) -> None:
    def answer(keys: list[int], blocks: list[int], counts: list[int], table: int = 0) -> set[str]:
        arrays = (np.array(keys, np.uint64), np.array(blocks, np.int32), np.array(counts, np.int32))
        keys_, blocks_, counts_ = map(pack, arrays)
        message = TableKeys(table=table, keys=keys_, blocks=blocks_, counts=counts_)
        return named(lambda: shard.pull(PullRequest(header=header(), tables=[message])))

    assert answer([4, 7, 9], [0, 1], [1, 2]) == answer([], [], []) == set()
    wrong = [([4], [0, 1], [1, 0]), ([7, 9], [1, 1], [1, 1]), ([4], [2], [1]), ([4], [0], [2]), ([4], [1], [1])]
    assert [answer(*each) for each in wrong] == [{"Malformed"}] * len(wrong)
    assert answer([], [], [], table=1) == {"UnknownTable"}


def test_errors_are_those_of_the_table() -> None:
    known = [
        [str(code), f"`{kind.__name__}`", "yes" if kind.retryable else "no", to_status(kind("x"))[0].name]
        for code, kind in sorted(CODES.items())
    ]
    assert rows("code") == known
    assert f"`{FAILURE_KEY}`" in TEXT
    number = shard_pb2.PullReply.DESCRIPTOR.fields_by_name["failure"].number
    assert f"`failure` ({number})" in TEXT


def test_limits_are_those_of_the_table() -> None:
    for what, value, where, beyond in rows("what"):
        path, *name = quoted(where)
        assert (ROOT / path).exists()
        if name:
            module = importlib.import_module("oarlock." + path.removesuffix(".py").replace("/", "."))
            assert getattr(module, name[0]) == int(value), what
        elif value != "blocks of the job":
            # A bound that has no name: 2^31 itself, or what is below it.
            assert "1 << 31" in (ROOT / path).read_text(encoding="utf-8")
            assert int(value) in (1 << 31, (1 << 31) - 1)
        assert all(hasattr(errors, error) for error in quoted(beyond)), what


def test_fields_of_a_placement_are_those_of_the_table() -> None:
    told = {quoted(row[0])[0] for row in rows("field")}
    assert told == {field.name for field in common_pb2.Placement.DESCRIPTOR.fields}


def test_a_message_has_no_more_parts_than_the_job_has_blocks(shard: ShardService) -> None:
    for parts, wrong in ((3, set()), (4, {"Malformed"})):
        request = PullRequest(header=header(), tables=[TableKeys()] * parts)
        assert named(lambda request=request: shard.pull(request)) == wrong


def test_the_version_is_the_one_of_the_page() -> None:
    assert f"`PROTOCOL` in `proto/methods.py` is {PROTOCOL}." in TEXT


# What the page says of a message that is sent again


def test_a_shard_takes_every_message_again(shard: ShardService, tmp_path: Path) -> None:
    dense = DenseGradients(blocks=pack(np.array([2], np.int32)), gradients=pack(np.ones(1, np.float32)), rate=0.5)
    closed = ClosedSet(0, [3]).pack()
    # Of one block of the two, which goes to nobody that is there.
    block, born = pack(np.array([1], np.int32)), pack(np.array([1], np.uint64))
    swept = shard_pb2.SweptRows(gone=pack(np.array([7], np.uint64)), decayed=pack(np.array([], np.uint64)))
    told = shard_pb2.Operation(blocks=block, generations=born, sequences=born, swept=swept)
    requests: dict[str, Message] = {
        "Shard.Hello": HelloRequest(protocol=PROTOCOL),
        "Shard.Pull": PullRequest(header=header(), dense=dense.blocks),
        "Shard.Push": PushRequest(header=header(), split=3, group=1, dense=[dense]),
        "Shard.Marks": MarksRequest(header=header(), splits=[3]),
        "Shard.Ranks": RanksRequest(header=header()),
        "Shard.Adopt": AdoptRequest(header=header(), placement=PLACEMENT),
        "Shard.Close": CloseRequest(header=header(), closed=closed),
        "Shard.Cut": CutRequest(header=header(), cut=1, workers=[7]),
        "Shard.Digest": DigestRequest(header=header(), cut=1),
        "Shard.Write": WriteRequest(header=header(), cut=1, root=str(tmp_path)),
        "Shard.Abort": AbortRequest(header=header(), cut=1),
        "Shard.Replace": ReplaceRequest(header=header(), table="user", path=str(tmp_path / "cut-000009")),
        "Shard.Stats": ShardStatsRequest(header=header()),
        "Shard.Rows": RowsRequest(header=header(), verb=QUARANTINE),
        "Shard.Changes": shard_pb2.ChangesRequest(
            header=header(), blocks=pack(np.array([1], np.int32)), sequences=born
        ),
        "Shard.Held": HeldRequest(header=header(), blocks=block),
        "Shard.Replicate": ReplicateRequest(header=header(sender=INCARNATION), stream=9, operations=[told]),
        "Shard.Copy": CopyRequest(header=header(), blocks=block, generations=born, shard=1),
        "Shard.HandOver": HandOverRequest(header=header(), blocks=block, generations=born, shard=1, order=2),
        "Shard.Reopen": ReopenRequest(header=header(), blocks=block, generations=born, term=1, order=2),
    }
    assert set(requests) == {name for name in METHODS if name.startswith("Shard.")}
    for name, request in requests.items():
        if name == "Shard.Replace":
            # Of a checkpoint that is there: tests/ps/test_replace.py.
            for _ in range(2):
                assert named(lambda request=request: shard.replace(request)) == {"NotFound"}
            continue
        first, second = dispatch(shard, name, request), dispatch(shard, name, request)
        if name == "Shard.Push":
            assert (first.applied, first.skipped, second.applied, second.skipped) == (1, 0, 0, 1)
        else:
            if name == "Shard.Changes":
                # How long ago that was.
                first.age_seconds = second.age_seconds = 0
            assert first == second, name
    older = pack_placement(0, np.zeros(3, np.int32), SHARDS)
    assert named(lambda: shard.adopt(AdoptRequest(header=header(), placement=older))) == {"InvalidArgument"}
    before = shard.held(HeldRequest(header=header(), blocks=block))
    change = common_pb2.Placement(
        shards=PLACEMENT.shards, generation=1, owners=pack(np.array([1], np.int32)), blocks=block, generations=born
    )
    shard.adopt(AdoptRequest(header=header(), placement=change))
    assert shard.held(HeldRequest(header=header(), blocks=block)) == before, (
        "a record that is not newer changes nothing"
    )


def test_a_coordinator_takes_every_message_again(coordinator: Coordinator) -> None:
    service = CoordinatorService(coordinator)
    owner = service.join(JoinRequest(protocol=PROTOCOL, role=SHARD, nonce=1, address="127.0.0.1:1"))
    coordinator.has_adopted(0, coordinator.generation)
    join = JoinRequest(protocol=PROTOCOL, role=WORKER, nonce=2)
    joined = service.join(join)
    mine = header(sender=joined.incarnation, target=0, term=joined.term)
    theirs = header(sender=owner.incarnation, target=0, term=owner.term)
    block, born = pack(np.array([1], np.int32)), pack(np.array([1], np.uint64))
    requests: dict[str, Message] = {
        "Coordinator.Hello": HelloRequest(protocol=PROTOCOL),
        "Coordinator.Join": join,
        "Coordinator.Heartbeat": HeartbeatRequest(header=mine, stats="{}"),
        "Coordinator.Placement": PlacementRequest(header=mine),
        "Coordinator.Lease": LeaseRequest(header=mine, wanted=2, number=5),
        "Coordinator.Gate": GateRequest(header=mine, cut=1),
        "Coordinator.CloseSplit": CloseSplitRequest(header=mine, work=TRAIN, split=0, samples=100),
        "Coordinator.Release": ReleaseRequest(header=mine, splits=[1]),
        "Coordinator.Report": ReportRequest(header=theirs, told=ADDED, blocks=block, generations=born, shard=1),
        "Coordinator.Scale": ScaleRequest(workers=3),
        "Coordinator.Leave": LeaveRequest(header=mine),
        "Coordinator.Status": StatusRequest(),
        "Coordinator.Describe": DescribeRequest(),
        "Coordinator.Checkpoint": CheckpointRequest(),
        "Coordinator.LiveDigest": LiveDigestRequest(),
        "Coordinator.Rollback": RollbackRequest(table="user", path="/somewhere/cut-000004"),
        "Coordinator.Stop": StopRequest(reason="enough"),
    }
    assert set(requests) == {name for name in METHODS if name.startswith("Coordinator.")}
    for name, request in requests.items():
        first = dispatch(service, name, request)
        if name == "Coordinator.Leave":
            assert named(lambda name=name, request=request: dispatch(service, name, request)) == {"LeaseLost"}
        elif name == "Coordinator.Lease":
            assert list(first.splits) == list(dispatch(service, name, request).splits) == [0, 1]
            late = LeaseRequest(header=mine, wanted=2, number=4)
            assert named(lambda late=late: service.lease(late)) == {"Unavailable"}
        else:
            assert dispatch(service, name, request) == first, name
    # Closed once, however often it was said.
    assert (coordinator.work.samples, 0 in coordinator.work.closed) == (100, True)
