# SPDX-License-Identifier: Apache-2.0
"""The coordinator's service under messages that no good member sends: clear errors, and nothing changed."""

import copy
from collections.abc import Callable
from typing import Any

import pytest

from oarlock.proto import coordinator_pb2 as pb
from oarlock.proto.common_pb2 import Header
from oarlock.proto.errors import (
    InvalidArgument,
    LeaseLost,
    Malformed,
    NotFound,
    PSError,
    VersionMismatch,
    WrongJob,
    WrongRun,
)
from oarlock.proto.methods import METHODS, PROTOCOL
from oarlock.proto.transport import dispatch

NAN, INF = float("nan"), float("inf")


@pytest.fixture
def training(cluster: Any) -> Any:
    """A cluster whose worker `one` holds training split 0."""
    cluster.shard, _ = cluster.shards()
    cluster.one, cluster.two = cluster.workers()
    cluster.lease(cluster.one)
    return cluster


def state_of(cluster: Any) -> Any:
    c = cluster.coordinator
    return copy.deepcopy((cluster.status(), c.work, [m.state for m in c.members.all.values()]))


def refused(cluster: Any, kind: type[PSError], match: str, call: Callable[[], Any]) -> None:
    before = state_of(cluster)
    with pytest.raises(kind, match=match):
        call()
    assert state_of(cluster) == before


def test_headers_that_do_not_belong(training: Any) -> None:
    t = training
    cases: list[tuple[type[PSError], str, Header]] = [
        (VersionMismatch, "protocol", Header()),
        (VersionMismatch, "protocol", t.header(t.one, protocol=PROTOCOL + 1)),
        (WrongJob, "is of job none", t.header(t.one, job=b"")),
        (WrongJob, "is of job 6666", t.header(t.one, job=b"f" * 16)),
        (WrongRun, "of run 7: join anew", t.header(t.one, run=7)),
        (LeaseLost, "not a member", t.header(0)),
        (LeaseLost, "not a member", t.header((1 << 64) - 1)),
    ]
    requests = [
        ("Coordinator.Heartbeat", pb.HeartbeatRequest),
        ("Coordinator.Placement", pb.PlacementRequest),
        ("Coordinator.Lease", pb.LeaseRequest),
        ("Coordinator.CloseSplit", pb.CloseSplitRequest),
        ("Coordinator.Release", pb.ReleaseRequest),
        ("Coordinator.Leave", pb.LeaveRequest),
    ]
    for method, make in requests:
        refused(t, VersionMismatch, "protocol", lambda m=method, k=make: dispatch(t.service, m, k()))
        for kind, match, header in cases:
            refused(t, kind, match, lambda m=method, k=make, h=header: dispatch(t.service, m, k(header=h)))


def test_every_method_survives_an_empty_message(training: Any) -> None:
    for name, method in METHODS.items():
        if name.startswith("Coordinator.") and name not in (
            "Coordinator.Status",
            "Coordinator.Describe",
            "Coordinator.Checkpoint",
            "Coordinator.LiveDigest",
            "Coordinator.Scale",
            "Coordinator.Stop",
        ):
            with pytest.raises(PSError) as caught:
                dispatch(training.service, name, method.request())
            assert caught.value.code != PSError.code, name


def test_what_only_workers_may_ask(training: Any) -> None:
    t = training
    for call in (lambda: t.lease(t.shard), lambda: t.close(t.shard, 0), lambda: t.evaluated(t.shard, 0, [1.0, 1.0])):
        refused(t, InvalidArgument, "only a worker may ask this", call)


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"role": 0, "nonce": 1}, "needs a role"),
        ({"role": 9, "nonce": 1}, "needs a role"),
        ({"role": pb.WORKER, "nonce": 0}, "a nonce"),
        ({"role": pb.SHARD, "nonce": 1, "address": ""}, "neither host:port nor unix:PATH"),
        ({"role": pb.SHARD, "nonce": 1, "address": "a b:1"}, "neither host:port nor unix:PATH"),
        ({"role": pb.SHARD, "nonce": 1, "address": "h:1\nevil"}, "neither host:port nor unix:PATH"),
        ({"role": pb.SHARD, "nonce": 1, "address": "h" * 100_000 + ":1"}, "neither host:port nor unix:PATH"),
    ],
)
def test_joins_that_make_no_sense(cluster: Any, fields: dict[str, Any], match: str) -> None:
    refused(
        cluster,
        InvalidArgument,
        match,
        lambda: cluster.service.join(pb.JoinRequest(protocol=PROTOCOL, **fields)),
    )


def test_a_join_with_endless_words_is_cut(cluster: Any) -> None:
    long = "x" * 1_000_000
    cluster.service.join(
        pb.JoinRequest(protocol=PROTOCOL, role=pb.WORKER, nonce=1, host=long, reader=long, address=long)
    )
    assert len(str(cluster.status())) < 10_000


@pytest.mark.parametrize(
    ("stats", "match"),
    [
        ("x" * 70_000, "at most 65536"),
        ("{", "no JSON"),
        ("[" * 60_000, "no JSON"),
        ('{"loss": NaN}', "NaN is no number"),
        ('{"loss": -Infinity}', "no number"),
        ("[1]", "no JSON object"),
    ],
)
def test_statistics_that_are_none(training: Any, stats: str, match: str) -> None:
    refused(training, InvalidArgument, match, lambda: training.heartbeat(training.one, stats))


def test_statistics_come_through(training: Any) -> None:
    training.heartbeat(training.one, '{"samples": 5}')
    assert [m["stats"] for m in training.status()["members"] if m["role"] == "worker"] == [{"samples": 5}, {}]


@pytest.mark.parametrize("wanted", [0, 65, (1 << 32) - 1])
def test_leases_of_too_many_or_none(training: Any, wanted: int) -> None:
    refused(training, InvalidArgument, "ask for 1 to 64", lambda: training.lease(training.two, wanted))


@pytest.mark.parametrize("loss", [NAN, INF, -INF])
def test_a_loss_that_is_no_number(training: Any, loss: float) -> None:
    t = training
    refused(t, InvalidArgument, "diverged, lower its learning rates", lambda: t.close(t.one, 0, loss_sum=loss))


def test_reports_of_splits_that_are_not_the_senders(training: Any) -> None:
    t = training
    refused(t, LeaseLost, "leased to", lambda: t.close(t.two, 0))
    refused(t, LeaseLost, "nobody", lambda: t.close(t.one, 1))
    refused(t, NotFound, "no training split", lambda: t.close(t.one, (1 << 64) - 1))
    refused(t, NotFound, "no evaluation split", lambda: t.evaluated(t.one, (1 << 64) - 1, [1.0, 1.0]))
    refused(t, LeaseLost, "not due", lambda: t.evaluated(t.one, 0, [1.0, 1.0]))
    refused(t, InvalidArgument, "no count", lambda: t.close(t.one, 0, samples=(1 << 64) - 1))
    header = t.header(t.one)
    refused(
        t,
        Malformed,
        "one of TRAIN or EVALUATE",
        lambda: t.service.close_split(pb.CloseSplitRequest(header=header, work=pb.WAIT, split=0)),
    )


@pytest.mark.parametrize("sums", [[], [1.0], [1.0, 2.0, 3.0], [NAN, 1.0], [1.0, INF], [1.0] * 10_000])
def test_sums_that_are_no_sums(training: Any, sums: list[float]) -> None:
    t = training
    for split in (0, 1, 2):
        if split:
            t.lease(t.one)
        t.close(t.one, split)
    assert t.lease(t.one).work == pb.EVALUATE
    refused(t, InvalidArgument, "wanted 2 finite ones", lambda: t.evaluated(t.one, 0, sums))


def test_releases_of_what_one_does_not_hold_change_nothing(training: Any) -> None:
    t = training
    header = t.header(t.two)
    before = state_of(t)
    for _ in range(5):
        splits = [0, 1, 1 << 63]
        t.service.release(pb.ReleaseRequest(header=header, splits=splits, evaluations=splits, reason="bad"))
    assert state_of(t) == before
    refused(
        t,
        InvalidArgument,
        "more than 64",
        lambda: t.service.release(pb.ReleaseRequest(header=header, splits=range(65))),
    )


def test_a_member_that_left_is_none_any_more(training: Any) -> None:
    t = training
    t.leave(t.one)
    refused(t, LeaseLost, "left", lambda: t.close(t.one, 0))
    refused(t, LeaseLost, "left", lambda: t.leave(t.one))
    assert list(t.lease(t.two).splits) == [0]


def test_after_the_end_stop_changes_nothing(training: Any) -> None:
    t = training
    t.coordinator.fail("it ended")
    before = state_of(t)
    t.service.stop(pb.StopRequest(checkpoint=True, reason="x" * 100_000))
    assert state_of(t) == before


@pytest.mark.parametrize("ask", ["lease", "heartbeat"])
def test_who_is_struck_off_between_its_header_and_the_lock_is_given_nothing(
    training: Any, monkeypatch: pytest.MonkeyPatch, ask: str
) -> None:
    """Handlers run in many threads: a Leave, or the judging of leases, may come between the two."""
    t = training
    passed = t.service._member

    def member(header: Header, role: str | None = None) -> Any:
        found = passed(header, role)
        monkeypatch.undo()
        t.leave(t.one)
        return found

    monkeypatch.setattr(t.service, "_member", member)
    told = {"header": t.header(t.one), "clock": pb.Clock(active=True, acknowledged=3)}
    request = pb.LeaseRequest(wanted=2, number=99, **told) if ask == "lease" else pb.HeartbeatRequest(**told)
    with pytest.raises(LeaseLost, match="left"):
        getattr(t.service, ask)(request)
    assert t.coordinator.work.leases == {}
    assert t.coordinator.clocks.of_workers() == {}
