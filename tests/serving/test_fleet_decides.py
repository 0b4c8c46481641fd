# SPDX-License-Identifier: Apache-2.0
"""What a client of many servers decides, without any: who is asked, when a second one is, who is left out and for how long."""

import math
import random
import time

import pytest

from oarlock.proto.errors import DeadlineExceeded, InvalidArgument, Malformed, NotFound, Unavailable, WrongJob
from oarlock.proto.serving_pb2 import ModelReply, ServedTable
from oarlock.serving.asking import Asking, Question
from oarlock.serving.fleet import MOST_PAUSE_SECONDS, PAUSE_SECONDS, Fleet
from oarlock.serving.hedged import CONNECT_SECONDS, Hedged
from oarlock.serving.hedging import BURST, FIRST_SECONDS, LEAST_SECONDS, Hedging

TABLE = {"name": "user", "dim": 4, "blocks": 8, "salt": 7}


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def reply(part=0, parts=1, job="a", **changes):
    return ModelReply(job=job, part=part, parts=parts, tables=[ServedTable(**{**TABLE, **changes})])


@pytest.fixture
def clock():
    return Clock()


def fleet_of(clock, parts, share=0.1):
    """Return a fleet whose servers have these parts, by place: the first of a part is the favourite."""
    fleet = Fleet([f"h:{n + 1}" for n in range(len(parts))], hedge_share=share, clock=clock, rng=random.Random(0))
    for place, (replica, part) in enumerate(zip(fleet.due(), parts, strict=True)):
        replica.place = place
        fleet.learn(replica, reply(part, max(parts) + 1))
    fleet.model()
    return fleet


def asking_of(fleet, clock, seconds=4.0, elsewhere=()):
    return Asking(fleet, 0, Question("Serving.Lookup", None, 10, elsewhere), clock.now + seconds, clock)


@pytest.mark.parametrize(
    "hostile",
    [
        reply(part=0, parts=1 << 31),
        reply(part=2, parts=2),
        reply(parts=2, blocks=0),
        reply(blocks=3),
        reply(blocks=(1 << 32) - 1),
        reply(dim=0),
    ],
)
def test_a_server_that_says_what_cannot_be_is_left_out(clock, hostile):
    fleet = Fleet(["h:1"], hedge_share=0.0, clock=clock)
    [replica] = fleet.due()
    fleet.learn(replica, hostile)
    assert not replica.ready
    with pytest.raises(Unavailable, match="h:1: it says that"):
        fleet.model()


def test_a_server_of_before_there_were_parts_is_whole(clock):
    fleet = Fleet(["h:1"], hedge_share=0.0, clock=clock)
    [replica] = fleet.due()
    fleet.learn(replica, ModelReply(job="a", tables=[ServedTable(name="user", dim=4)]))
    assert fleet.model().parts == 1


def test_nothing_is_known_before_all_were_asked(clock):
    fleet = Fleet(["h:1", "h:2", "h:1"], hedge_share=0.0, clock=clock)
    first, second = fleet.due()
    assert fleet.due() == []
    assert fleet.seconds_to_due() is None
    fleet.learn(first, reply(0, 2))
    with pytest.raises(Unavailable, match="h:2 has not said yet"):
        fleet.model()
    fleet.silent(second, Unavailable("nobody there"))
    with pytest.raises(Unavailable, match="nobody who answers has part 1 of 2: h:2: nobody there"):
        fleet.model()
    clock.now += 1
    assert fleet.due() == [second]
    fleet.learn(second, reply(1, 2))
    assert fleet.model().parts == 2
    assert not fleet.unsettled


def test_pauses_grow_and_end_with_an_answer(clock):
    fleet = fleet_of(clock, [0, 0])
    replica = fleet.replicas[0]
    for turn in range(10):
        replica.in_flight += 1
        fleet.failed(replica, Unavailable("broke"), aside=True)
        most = min(PAUSE_SECONDS * 2**turn, MOST_PAUSE_SECONDS)
        assert most / 2 <= fleet.seconds_to_due() <= most + 1e-9
        assert fleet.choose(0, []) is not replica
        assert "h:1: broke" in str(fleet.nobody(0))
        clock.now += most
        assert fleet.due() == [replica]
        fleet.learn(replica, reply())
    replica.in_flight += 1
    fleet.answered(replica, 10, 0.1, hedge=False)
    assert replica.pause == PAUSE_SECONDS


def test_a_part_without_servers_is_looked_for_soon(clock):
    fleet = fleet_of(clock, [0, 0, 1])
    for replica in fleet.replicas[:2]:
        for _ in range(8):
            replica.in_flight += 1
            replica.ready = True
            fleet.failed(replica, Unavailable("broke"), aside=True)
    assert fleet.choose(0, []) is None
    assert fleet.seconds_to_due() > PAUSE_SECONDS
    fleet.nobody(0)
    assert fleet.seconds_to_due() == pytest.approx(PAUSE_SECONDS)


def test_only_the_last_server_may_take_its_time_to_let_somebody_in():
    """Others' answers are not heard while one connects."""
    given = []

    class Transport:
        def begin(self, address, method, request, *, timeout_seconds, connect_seconds):
            given.append(connect_seconds)
            raise Unavailable("nobody is let in")

    fleet = Fleet(["h:1", "h:2", "h:3"], hedge_share=0.1)
    for replica in fleet.due():
        fleet.learn(replica, reply())
    with pytest.raises(Unavailable, match="nobody is let in"):
        Hedged(fleet, Transport()).ask({0: Question("Serving.Lookup", None, 1)}, time.monotonic() + 60.0)
    assert given == [CONNECT_SECONDS, CONNECT_SECONDS, math.inf]


def test_servers_that_exchanged_their_parts_are_found(clock):
    fleet = fleet_of(clock, [0, 1])
    first, second = fleet.replicas
    clock.now += 1.0
    first.in_flight += 1
    # It says that the keys are of another part than its own, and then which one that is.
    fleet.failed(first, InvalidArgument("another part", part=1), aside=True)
    clock.now += 1.0
    assert fleet.due() == [first]
    fleet.learn(first, reply(1, 2))
    assert fleet.choose(0, []) is None
    fleet.nobody(0)
    assert fleet.due() == [second]
    assert fleet.choose(1, []) is first
    fleet.learn(second, reply(0, 2))
    assert fleet.choose(0, []) is second


def test_who_has_fewest_requests_is_asked_and_who_was_late_is_spared(clock):
    fleet = fleet_of(clock, [0, 0])
    first, second = fleet.replicas
    assert [fleet.choose(0, []) for _ in range(4)] == [first, second, first, second]
    for each in (first, second, second):
        fleet.answered(each, 10, 0.1, hedge=False)
    fleet.dropped(first, 10, 0.2, late=True)
    assert (first.in_flight, first.late) == (0, 1)
    assert [fleet.choose(0, []) for _ in range(3)] == [second, second, first]
    fleet.answered(first, 10, 0.1, hedge=False)
    assert fleet.choose(0, []) is first
    assert fleet.choose(0, [first, second]) is None
    assert fleet.choose(7, []) is None


def test_a_second_one_is_asked_once_most_would_have_answered(clock):
    fleet = fleet_of(clock, [0, 0, 0])
    for _ in range(40):
        asking = asking_of(fleet, clock)
        attempt = asking.begin()
        clock.now += 0.010
        assert asking.answered(attempt) == []
    asking = asking_of(fleet, clock)
    attempt = asking.begin()
    assert asking.hedge() is None
    assert asking.wake == pytest.approx(clock.now + 0.010)
    clock.now += 0.011
    hedge = asking.hedge()
    assert hedge.replica is not attempt.replica
    assert asking.hedge() is None, "there is one hedge"
    clock.now += 0.005
    assert asking.answered(hedge) == [attempt]
    assert (fleet.counts.hedges, fleet.counts.hedges_won, attempt.replica.late) == (1, 1, 1)
    assert [each.in_flight for each in fleet.replicas] == [0, 0, 0]


def test_each_server_is_asked_once_where_one_after_the_other_fails(clock):
    fleet = fleet_of(clock, [0, 0, 0])
    asking = asking_of(fleet, clock)
    attempt = asking.begin()
    assert attempt.until == clock.now + 2.0, "half of the time, since there are others"
    asked = [attempt.replica]
    for _ in range(2):
        attempt = asking.failed(attempt, Unavailable("broke"))
        asked.append(attempt.replica)
    assert len(set(asked)) == 3
    assert attempt.until == clock.now + 4.0
    with pytest.raises(Unavailable, match="broke"):
        asking.failed(attempt, Unavailable("broke"))
    assert (fleet.counts.failovers, fleet.counts.hedges) == (2, 0)
    with pytest.raises(Unavailable, match="no server of part 0 can be asked now: h:1: broke"):
        asking_of(fleet, clock).begin()


def test_a_failure_beside_a_hedge_waits_for_that(clock):
    fleet = fleet_of(clock, [0, 0, 0])
    asking = asking_of(fleet, clock)
    first = asking.begin()
    clock.now += FIRST_SECONDS
    hedge = asking.hedge()
    assert asking.failed(first, Unavailable("broke")) is None
    assert asking.failed(hedge, Unavailable("broke")).replica not in (first.replica, hedge.replica)


def test_errors_that_no_other_server_mends_are_the_callers(clock):
    fleet = fleet_of(clock, [0, 0])
    for error in (InvalidArgument("too many keys"), Malformed("no rows"), NotFound("no cut")):
        asking = asking_of(fleet, clock)
        with pytest.raises(type(error)):
            asking.failed(asking.begin(), error)
    assert all(each.ready for each in fleet.replicas)
    for error, elsewhere, aside in (
        (NotFound("no such cut"), (NotFound,), 0),
        (DeadlineExceeded("at once"), (), 0),
        (WrongJob("another one"), (), 1),
        (InvalidArgument("of another part", part=1, parts=2), (), 1),
    ):
        fleet = fleet_of(clock, [0, 0])
        asking = asking_of(fleet, clock, elsewhere=elsewhere)
        assert asking.failed(asking.begin(), error) is not None
        assert sum(not each.ready for each in fleet.replicas) == aside


def test_what_is_given_up_is_under_way_no_more(clock):
    fleet = fleet_of(clock, [0, 0])
    asking = asking_of(fleet, clock)
    attempt = asking.begin()
    clock.now += 2.0
    assert asking.late() == [attempt]
    assert asking.give_up() == [attempt]
    assert [each.in_flight for each in fleet.replicas] == [0, 0]


def test_hedges_have_a_budget():
    hedging = Hedging(0.1)
    assert sum(hedging.spend() for _ in range(100)) == BURST
    for _ in range(55):
        hedging.began()
    assert sum(hedging.spend() for _ in range(100)) == 5
    none = Hedging(0.0)
    none.began()
    assert not none.spend()


def test_the_time_of_a_hedge_is_that_of_requests_of_its_size():
    hedging = Hedging()
    assert hedging.seconds(10) == FIRST_SECONDS
    for n in range(1, 257):
        hedging.answered(10, n / 1000)
        hedging.answered(100_000, 1e-6)
    assert hedging.seconds(10) == pytest.approx(0.243, abs=0.001)
    assert hedging.seconds(100_000) == LEAST_SECONDS
    assert hedging.seconds(1000) == FIRST_SECONDS
