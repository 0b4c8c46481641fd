# SPDX-License-Identifier: Apache-2.0
"""The minimum of ssp: it never falls, waits for whoever has splits, and after a restart for whoever may have some."""

from typing import Any

import pytest

from oarlock.cluster.clocks import Clocks
from oarlock.proto import coordinator_pb2 as pb
from oarlock.proto.errors import Malformed, Unavailable


def tell(clocks: Clocks, worker: int, acknowledged: int, minimum: int = 0) -> int:
    clocks.heard(worker, active=True, acknowledged=acknowledged, minimum=minimum)
    return clocks.minimum


def test_the_minimum_is_that_of_the_slowest() -> None:
    clocks = Clocks()
    assert [clocks.activate(w) for w in (1, 2, 3)] == [0, 0, 0]
    assert tell(clocks, 1, 5) == tell(clocks, 2, 3) == 0
    assert tell(clocks, 3, 4) == 3
    # A report that comes late takes nothing back.
    assert tell(clocks, 2, 1) == 3
    assert clocks.of_workers() == {1: 5, 2: 3, 3: 4}


def test_who_joins_begins_at_the_minimum_and_is_waited_for() -> None:
    clocks = Clocks()
    clocks.activate(1)
    tell(clocks, 1, 7)
    assert clocks.activate(2) == 7
    assert tell(clocks, 1, 9) == 7
    assert tell(clocks, 2, 8) == 8


@pytest.mark.parametrize("end", ["idle", "gone"])
def test_who_has_no_splits_holds_nobody_back(end: str) -> None:
    clocks = Clocks()
    clocks.activate(1)
    clocks.activate(2)
    tell(clocks, 1, 7)
    assert tell(clocks, 2, 2) == 2
    getattr(clocks, end)(2)
    assert clocks.minimum == 7
    getattr(clocks, end)(1)
    assert clocks.minimum == 7, "without anybody it stays"
    assert clocks.activate(2) == 7


def test_an_inactive_report_ends_nothing() -> None:
    clocks = Clocks()
    clocks.activate(1)
    clocks.activate(2)
    clocks.heard(2, active=False, acknowledged=0, minimum=0)
    assert tell(clocks, 1, 5) == 0


def test_after_a_restart_nothing_rises_before_all_are_heard() -> None:
    clocks = Clocks()
    clocks.begin([1, 2, 3])
    assert tell(clocks, 1, 20, minimum=12) == 12
    # Only those of an earlier life know an earlier minimum.
    assert tell(clocks, 1, 21, minimum=1000) == 12
    clocks.gone(3)
    assert tell(clocks, 2, 15, minimum=11) == 15


def test_nothing_is_leased_before_all_are_heard(make_cluster: Any) -> None:
    cluster = make_cluster(mode="ssp", staleness=2)
    cluster.shards()
    one, two = cluster.workers()
    (split,) = cluster.lease(one).splits
    cluster.restart()
    # The one who asks may be given what the other holds; a question of the time before is refused.
    assert cluster.lease(two).work == pb.WAIT
    header = cluster.header(one, term=cluster.coordinator.term - 1)
    with pytest.raises(Unavailable, match="is of term"):
        cluster.service.lease(pb.LeaseRequest(header=header, wanted=1, number=90))
    clock = pb.Clock(active=True, acknowledged=4, heard=3)
    asking = pb.HeartbeatRequest(header=cluster.header(one), held=[split], clock=clock, asking=True)
    cluster.service.heartbeat(asking)
    assert cluster.lease(two).work == pb.WAIT, "an answer to the question may be on its way"
    asking.asking = False
    assert cluster.service.heartbeat(asking).minimum == 4
    reply = cluster.lease(two)
    assert reply.work == pb.TRAIN
    assert split not in reply.splits
    assert reply.minimum == 4
    assert ("train", split) in cluster.coordinator.work.leased_to(one)


def test_the_same_question_gets_the_same_answer(make_cluster: Any) -> None:
    cluster = make_cluster()
    cluster.shards()
    one, _ = cluster.workers()
    first = cluster.lease(one, 2, held=[], number=5)
    assert len(first.splits) == 2
    assert cluster.lease(one, 2, held=[], number=5) == first
    assert len(cluster.coordinator.work.leased_to(one)) == 2


def test_a_clock_below_what_it_was_told_is_refused(cluster: Any) -> None:
    cluster.shards()
    one, _ = cluster.workers()
    clock = pb.Clock(active=True, acknowledged=1, heard=3)
    with pytest.raises(Malformed, match="below the minimum"):
        cluster.service.heartbeat(pb.HeartbeatRequest(header=cluster.header(one), clock=clock))


def test_a_coordinator_that_was_replaced_is_told_so(cluster: Any) -> None:
    cluster.shards()
    one, _ = cluster.workers()
    header = cluster.header(one, term=cluster.coordinator.term + 1)
    with pytest.raises(Unavailable, match="has taken its place"):
        cluster.service.heartbeat(pb.HeartbeatRequest(header=header))


def test_steps_are_the_groups_of_closed_splits(cluster: Any) -> None:
    cluster.shards()
    one, _ = cluster.workers()
    for split in cluster.lease(one, 2).splits:
        request = pb.CloseSplitRequest(header=cluster.header(one), work=pb.TRAIN, split=split, samples=10, groups=3)
        cluster.service.close_split(request)
        cluster.service.close_split(request)
    assert cluster.heartbeat(one).step == 6
    cluster.restart()
    assert cluster.heartbeat(one).step == 6


def test_a_late_heartbeat_of_earlier_splits_claims_no_more_than_is_done(make_cluster: Any) -> None:
    """Who was ahead, closed its splits and was given others, counts on: a number below its own would be overtaken."""
    cluster = make_cluster(mode="ssp", staleness=4)
    cluster.shards()
    slow, fast = cluster.workers()

    def ask(sender: int, number: int, acknowledged: int) -> Any:
        clock = pb.Clock(acknowledged=acknowledged)
        return cluster.service.lease(
            pb.LeaseRequest(header=cluster.header(sender), wanted=1, number=number, clock=clock)
        )

    def beat(sender: int, acknowledged: int, heard: int = 0) -> int:
        clock = pb.Clock(active=True, acknowledged=acknowledged, heard=heard)
        reply = cluster.service.heartbeat(pb.HeartbeatRequest(header=cluster.header(sender), clock=clock))
        return int(reply.minimum)

    ask(slow, 1, 0)
    (split,) = ask(fast, 1, 0).splits
    cluster.close(fast, split)
    reply = ask(fast, 2, 4)
    assert (reply.work, reply.minimum) == (pb.TRAIN, 0)
    begins = cluster.coordinator.clocks.of_workers()[fast]
    beat(fast, 4)
    minimum = beat(slow, 6)
    assert minimum <= begins == 4
    # It has done nothing since, and may say so.
    assert beat(fast, begins, heard=minimum) == minimum


def test_a_minimum_told_while_a_question_waits_is_taken_up_by_the_next_life(make_cluster: Any) -> None:
    cluster = make_cluster(mode="ssp", staleness=1)
    cluster.shards()
    (worker, other), question = cluster.workers(), pb.LeaseRequest(wanted=1, number=1)
    cluster.restart()
    cluster.adopt()
    cluster.heartbeat(other)
    # Put together while it knew no minimum; an earlier life told it one since.
    clock = pb.Clock(heard=20)
    cluster.service.heartbeat(pb.HeartbeatRequest(header=cluster.header(worker), asking=True, clock=clock))
    question.header.CopyFrom(cluster.header(worker))
    assert cluster.service.lease(question).minimum == 20
