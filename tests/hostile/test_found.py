# SPDX-License-Identifier: Apache-2.0
"""What random messages, and the search for what they might do, once broke: one plain test each, so that it stays mended."""

import json
import tracemalloc

import coordinator_target
import numpy as np
import pytest
import rig
import targets

from oarlock.client.closed import MAX_SPLIT, SPLIT_WINDOW, ClosedSet
from oarlock.client.router import MAX_SHARDS
from oarlock.cluster.members import MAX_ALIVE, MAX_GONE
from oarlock.proto import coordinator_pb2 as pb
from oarlock.proto.arrays import unpack
from oarlock.proto.common_pb2 import FLOAT32, Array, ClosedSplits, Member
from oarlock.proto.errors import InvalidArgument, LeaseLost, Malformed, PSError, Unavailable, WrongJob
from oarlock.proto.methods import PROTOCOL
from oarlock.proto.shard_pb2 import CloseRequest, PullRequest, PushRequest, ReplicateRequest, TableKeys, WriteRequest


@pytest.fixture
def job():
    return rig.Job(rig.spec_of(), shards=1).place()


@pytest.fixture
def coordinator(seed):
    made = coordinator_target.CoordinatorTarget(seed)
    yield made
    made.close()


def refused(kind, text, call, request):
    with pytest.raises(kind, match=text) as caught:
        call(request)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("split", [SPLIT_WINDOW, 1 << 40, 1 << 63, (1 << 64) - 1])
def test_a_push_far_above_the_closed_splits_leaves_no_mark(job, split, tmp_path):
    """Its marks would stay for ever, and above 2^63 no checkpoint could be written any more."""
    before = rig.state(job)
    refused(Unavailable, "1024 or more above 0", job.services[0].push, rig.request_of(job, split, 0))
    assert rig.state(job) == before
    assert job.shards[0].marks.nbytes == 0
    job.write(0, 1, tmp_path)


def test_marks_are_kept_of_as_many_splits_as_can_be_leased(job):
    service, shard = job.services[0], job.shards[0]
    for split in range(SPLIT_WINDOW):
        service.push(rig.request_of(job, split, 0, tables=("user",), raw=[1], dense=None))
    assert shard.marks.nbytes == SPLIT_WINDOW * job.layout.blocks * 4
    # Word of closed splits makes room for as many later ones.
    service.close(CloseRequest(header=job.header(0), closed=ClosedSet(10).pack()))
    refused(Unavailable, "above 10", service.push, rig.request_of(job, SPLIT_WINDOW + 10, 0))
    assert service.push(rig.request_of(job, SPLIT_WINDOW + 9, 0)).applied == 17


def test_a_malformed_order_does_not_say_who_is_in_charge(job):
    service = job.services[0]
    header = job.header(0, term=(1 << 64) - 1)
    adoption = job.adoption(0)
    adoption.header.CopyFrom(header)
    adoption.placement.owners.dtype = 0
    refused(Malformed, "placement owners: dtype", service.adopt, adoption)
    endless = ClosedSplits(bitmap=b"\xff" * 4096)
    refused(Malformed, "32768 splits above", service.close, CloseRequest(header=header, closed=endless))
    refused(InvalidArgument, "absolute path", service.write, WriteRequest(header=header, root="cuts"))
    service.close(CloseRequest(header=job.header(0, term=1), closed=ClosedSet(1).pack()))
    # One that is well formed does, and is the last word.
    service.close(CloseRequest(header=job.header(0, term=2), closed=ClosedSet(1).pack()))
    refused(LeaseLost, "of term 1", service.close, CloseRequest(header=job.header(0, term=1)))


@pytest.mark.parametrize("path", ["/a\0b", "a/b", "..", "/" + "x" * 5000, "\0"])
def test_a_path_that_is_none(job, path):
    """A NUL was a defect; a relative path was taken from wherever the process happened to be started."""
    service = job.services[0]
    before = rig.state(job)
    adoption = job.adoption(0, restore=path)
    adoption.placement.generation += 1
    refused(InvalidArgument, "give an absolute path", service.adopt, adoption)
    refused(InvalidArgument, "give an absolute path", service.write, WriteRequest(header=job.header(0), root=path))
    assert rig.state(job) == before


def test_a_million_empty_parts_are_not_looked_at(job):
    """Two bytes each in the message, they would be hundreds each in memory."""
    parts = [TableKeys()] * 200_000
    pull = PullRequest(header=job.header(0), tables=parts)
    push = PushRequest(header=job.header(0))
    push.dense.extend([push.dense.add()] * 200_000)
    tracemalloc.start()
    try:
        refused(Malformed, "200000 parts in one message, but the job has 17 blocks", job.services[0].pull, pull)
        refused(Malformed, "200001 parts", job.services[0].push, push)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_a_shape_of_a_million_dimensions_is_counted_only():
    message = Array(data=b"1234", dtype=FLOAT32, shape=[1] * 1_000_000)
    tracemalloc.start()
    try:
        refused(Malformed, "rows: 1000000 dimensions, wanted 1", lambda m: unpack(m, np.float32, "rows"), message)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_a_closed_set_beyond_all_numbers(job):
    """Above 2^64 it could never be sent on, above 2^63 never be written down."""
    for floor in (MAX_SPLIT + 1, (1 << 64) - 1):
        request = CloseRequest(header=job.header(0), closed=ClosedSplits(floor=floor, bitmap=b"\xff"))
        refused(Malformed, "no job has so many splits", job.services[0].close, request)
    assert job.shards[0].closed.floor == 0
    assert ClosedSet.unpack(ClosedSplits(floor=MAX_SPLIT, bitmap=b"\xff")).pack().floor == MAX_SPLIT + 8


def test_a_placement_of_endless_shards(job):
    adoption = job.adoption(0)
    adoption.placement.generation += 1
    adoption.placement.shards.extend([Member()] * MAX_SHARDS)
    refused(Malformed, "names 65537 shards", job.services[0].adopt, adoption)


def test_a_job_of_a_megabyte_is_not_repeated_in_the_error(job, coordinator):
    header = job.header(0, job=b"\xab" * (1 << 20))
    refused(WrongJob, "of job (ab){16}$", job.services[0].pull, PullRequest(header=header))
    refused(WrongJob, "of job (ab){16}$", coordinator.handler.placement, pb.PlacementRequest(header=header))


def test_an_address_of_a_megabyte_is_not_repeated_in_the_error(coordinator):
    request = pb.JoinRequest(protocol=PROTOCOL, role=pb.SHARD, nonce=1, address="x" * (1 << 20))
    refused(InvalidArgument, "is neither host:port nor unix:PATH", coordinator.handler.join, request)


@pytest.mark.parametrize(
    "stats",
    [
        '{"a":' * 900 + "1" + "}" * 900,
        '{"a":' + "[" * 5 + "]" * 5 + "}",
        '{"a": 1e999}',
        '{"a": -1e999}',
        '{"a": "\\ud800"}',
        '{"\\udfff": 1}',
    ],
)
def test_statistics_that_could_not_be_told_on(coordinator, stats):
    """The deep ones ended the coordinator at the next change of the member, the others made its status no JSON."""
    one = coordinator.workers[0]
    request = pb.HeartbeatRequest(header=coordinator.header(one), stats=stats)
    refused(Malformed, "statistics", coordinator.handler.heartbeat, request)
    good = '{"rows": 1, "tables": {"user": {"x": [1, 2.5e10]}}, "name": "🚣"}'
    coordinator.handler.heartbeat(pb.HeartbeatRequest(header=coordinator.header(one), stats=good))
    status = coordinator.handler.status(pb.StatusRequest()).status
    assert json.loads(good) in [m["stats"] for m in json.loads(status)["members"]]
    coordinator.handler.leave(pb.LeaveRequest(header=coordinator.header(one), error="gone"))


def test_losses_that_add_up_to_infinity(coordinator):
    """Two of them made an epoch's loss a number that JSON has not, and a checkpoint keeps as nothing."""
    one = coordinator.workers[0]
    for loss in (1e308, -1e308, 1e101):
        request = pb.CloseSplitRequest(header=coordinator.header(one), work=pb.TRAIN, split=0, samples=1, loss_sum=loss)
        refused(InvalidArgument, "the model diverged", coordinator.handler.close_split, request)
    request.loss_sum = 1e100
    coordinator.handler.close_split(request)


@pytest.mark.parametrize("sums", [[1e308, 1.0], [1.0, -1e308], [1e-300, 1.0], [-4.0, 1.0], [5e-324, 1.0]])
def test_sums_whose_mean_is_no_number(coordinator, sums):
    one = coordinator.workers[0]
    request = pb.CloseSplitRequest(header=coordinator.header(one), work=pb.EVALUATE, split=0, sums=sums)
    refused(InvalidArgument, "finite ones|its weight is", coordinator.handler.close_split, request)


def test_members_are_bounded_alive_and_gone(coordinator):
    """Every Join used to stay for ever, in memory, on disk and in every status."""
    members, store = coordinator.coordinator.members, coordinator.cluster.store
    handler = coordinator.handler

    def join(nonce):
        return handler.join(pb.JoinRequest(protocol=PROTOCOL, role=pb.WORKER, nonce=nonce))

    for life in range(3):
        for i in range(MAX_ALIVE - len(members.alive("worker"))):
            join(1 + life * 10_000 + i)
        refused(Unavailable, "1024 workers and takes in no more", join, 9_999)
        # Who joined already gets the same answer again.
        assert join(1 + life * 10_000).incarnation == members.by_nonce("worker", 1 + life * 10_000).incarnation
        for member in members.alive("worker"):
            coordinator.coordinator.member_gone(member, "dead", "its lease ended")
    join(77)
    # The two shards and the last worker are alive.
    assert len(members.all) == len(store.members()) == MAX_GONE + 3
    # Those remembered are the last that joined.
    assert {m.nonce // 10_000 for m in members.all.values() if m.state == "dead"} == {2}
    assert json.loads(handler.status(pb.StatusRequest()).status)["phase"] == "training"


def test_replayed_messages_change_nothing(job):
    """The same bytes again, at once and after others."""
    service = job.services[0]
    sent = [rig.request_of(job, split, group).SerializeToString() for split, group in ((0, 0), (1, 0), (0, 1), (1, 1))]
    assert [service.push(PushRequest.FromString(data)).applied for data in sent] == [17] * 4
    after = rig.state(job)
    for data in [*sent, *reversed(sent)]:
        reply = service.push(PushRequest.FromString(data))
        assert (reply.applied, reply.skipped) == (0, 17)
    service.close(CloseRequest(header=job.header(0), closed=ClosedSet(2).pack()))
    closed = rig.state(job)
    assert [service.push(PushRequest.FromString(data)).skipped for data in sent] == [17] * 4
    assert rig.state(job) == closed
    # Closing dropped the marks and nothing else.
    assert [(n, seq, k, w, s) for n, seq, _, k, w, s in closed] == [(n, seq, k, w, s) for n, seq, _, k, w, s in after]


@pytest.mark.parametrize(
    ("field", "value"),
    [("job", b"\0" * 16), ("job", b""), ("run", 2), ("run", 0), ("target", 101), ("target", 0), ("protocol", 2)],
)
def test_forged_headers_are_refused_before_anything_is_read(job, field, value):
    """All the rest of the message is garbage, of which the error says nothing."""
    before = rig.state(job)
    for method in ("pull", "push", "marks", "adopt", "close", "write", "stats"):
        call = getattr(job.services[0], method)
        request = targets.METHODS[f"Shard.{method.title()}"].request(header=job.header(0, **{field: value}))
        with pytest.raises(PSError) as caught:
            call(request)
        assert type(caught.value).__name__ in ("WrongJob", "WrongRun", "WrongIncarnation", "VersionMismatch")
    assert rig.state(job) == before


def test_a_sender_that_is_no_member_is_told_to_join(coordinator):
    before = coordinator.fingerprint()
    for method, make in (
        ("heartbeat", pb.HeartbeatRequest),
        ("placement", pb.PlacementRequest),
        ("lease", pb.LeaseRequest),
        ("close_split", pb.CloseSplitRequest),
        ("release", pb.ReleaseRequest),
        ("leave", pb.LeaveRequest),
    ):
        for sender in (0, 12345, (1 << 64) - 1):
            request = make(header=coordinator.header(sender))
            refused(LeaseLost, "is not a member: join anew", getattr(coordinator.handler, method), request)
    assert coordinator.fingerprint() == before


def test_a_heartbeat_whose_clock_is_refused_brings_no_statistics(coordinator):
    before = coordinator.fingerprint()
    clock = pb.Clock(active=True, acknowledged=1, heard=2)
    request = pb.HeartbeatRequest(
        header=coordinator.header(coordinator.workers[0]), stats='{"samples": 7}', clock=clock
    )
    refused(Malformed, "a clock of 1 groups is below the minimum of 2", coordinator.handler.heartbeat, request)
    assert coordinator.fingerprint() == before


def test_a_stream_at_the_last_number_changes_nothing(tmp_path, seed):
    """Its operation was done, and the number behind it could not be told."""
    target = targets.ShardTarget(seed, tmp_path / "shard")
    request = ReplicateRequest.FromString(target.good["Shard.Replicate"][0])
    for first in ((1 << 64) - 1, 1 << 62):
        request.first = first
        refused(Malformed, "stream", target.handler.replicate, request)
    assert target.fingerprint() == target.state
