# SPDX-License-Identifier: Apache-2.0
"""Copies of blocks, scene by scene: what SEMANTICS section 6 says of acknowledging, adding, handing over, removing, promoting."""

import random

import numpy as np
import pytest
from rig import spec_of
from scenes_rig import Copies, done, moved, pair, pull_of, result, same

from oarlock.proto.arrays import unpack
from oarlock.proto.coordinator_pb2 import ADDED, CONFIRMED, HANDED, LACKING, SLOW
from oarlock.proto.errors import StalePlacement


def equal(job, one=0, other=1):
    for number in range(job.layout.blocks):
        same(job.shards[one], job.shards[other], number)


def test_a_push_waits_for_the_copies_and_is_the_same_there():
    job = pair()
    answer = job.push(0, 0)[0]
    assert not done(answer)
    job.pump()
    assert result(answer).applied == job.layout.blocks
    equal(job)


def test_what_is_lost_or_comes_twice_is_done_once():
    job = pair()
    first = job.push(0, 0)[0]
    job.pump(lose_answer=True)
    assert not done(first)
    second = job.push(0, 1)[0]
    job.pump(times=3)
    job.settle()
    assert done(first)
    assert done(second)
    equal(job)
    assert job.rows("user", range(40)).tolist() == np.full((40, 2), -2.0).tolist()


def test_a_repetition_is_acknowledged_no_earlier_than_what_it_repeats():
    job = pair()
    job.push(0, 0)
    again = job.push(0, 0)[0]
    assert not done(again)
    job.pump()
    assert result(again).skipped == job.layout.blocks


def test_a_member_is_added_while_pushes_go_on():
    job = Copies(spec_of(), 2)
    job.begin([(0,)] * job.layout.blocks)
    number = 3
    assert done(job.push(0, 0)[0])
    job.give(number, 1)
    # Not required yet: the copy is on its way.
    assert done(job.push(0, 1)[0])
    assert job.reports(0) == []
    job.pump()
    # Required from here on; what it lacks is on its way, and then it is reported.
    waiting = job.push(0, 2)[0]
    assert not done(waiting)
    job.settle()
    assert done(waiting)
    assert job.reports(0) == [(ADDED, 1, [number])]
    same(job.shards[0], job.shards[1], number)
    job.record(number, (0, 1))
    job.settle()
    assert job.reports(0) == [(CONFIRMED, 0, [number])]
    last = job.push(0, 3)[0]
    assert not done(last)
    job.settle()
    same(job.shards[0], job.shards[1], number)


def test_an_added_member_is_let_go_by_a_record_without_it():
    job = Copies(spec_of(), 3)
    job.begin([(0,)] * job.layout.blocks)
    job.give(3, 1)
    job.settle()
    waiting = job.push(0, 0)[0]
    assert not done(waiting)
    # Another member was recorded meanwhile: what was reported is of no record any more.
    job.record(3, (0,))
    assert done(waiting)
    assert job.reports(0) == []
    assert not job.shards[1].holdings.here[3]
    assert done(job.push(0, 1)[0])


def test_a_hand_over_closes_waits_reports_and_moves():
    job = pair()
    number = 5
    before = job.push(0, 0)[0]
    job.hand_over(number, 1)
    late = job.push(0, 1)[0]
    job.settle()
    assert moved(before) == []
    assert (HANDED, 1, [number]) in job.reports(0)
    pulled = job.services[0].pull(pull_of(job, number))
    assert not done(late), "where the block goes is not known yet"
    assert not done(pulled)
    job.record(number, (1, 0))
    assert moved(late) == [number]
    with pytest.raises(StalePlacement):
        pulled.result()
    with pytest.raises(StalePlacement):
        job.services[0].pull(pull_of(job, number))
    again = result_of(job, job.push(0, 1))
    assert sorted(again) == [0, 1]
    assert again[1].applied == 1
    assert again[0].skipped == job.layout.blocks - 1
    job.settle()
    equal(job)


def result_of(job, answers):
    job.settle()
    return {s: result(a) for s, a in answers.items()}


def test_who_moved_says_where():
    job = pair(3)
    job.record(5, (0, 2, 1), tell=())
    job.record(5, (2,))
    answer = job.push_to(0, 0, 0)
    job.settle()
    reply = result(answer)
    assert moved(reply) == [5]
    assert unpack(reply.where.blocks, np.int32, "blocks").tolist() == [5]
    assert unpack(reply.where.owners, np.int32, "owners").tolist() == [2]
    assert [s.id for s in reply.where.shards] == [2]


def test_a_hand_over_is_undone_by_its_own_order_alone():
    job = pair()
    job.hand_over(5, 1)
    first = job.order
    job.hand_over(5, 1)
    job.reopen(5, order=first)
    answer = job.push(0, 0)[0]
    job.settle()
    assert not done(answer)
    job.reopen(5)
    assert moved(answer) == [5], "it may be sent again, to the same shard"
    assert not [r for r in job.reports(0) if r[0] == HANDED]
    answer = job.push(0, 1)[0]
    job.settle()
    assert moved(answer) == []
    # One that comes late, of before, closes nothing again.
    job.order = 0
    job.hand_over(5, 1)
    assert job.shards[0].owned[5]


def handed(job):
    return [each for each in job.reports(0) if each[0] == HANDED]


@pytest.mark.parametrize("answered", ["before", "after"])
def test_a_hand_over_that_was_heard_is_told_to_the_next_coordinator(answered):
    """It stays closed until somebody records it or opens it again, and who was to do so may have died."""
    job = pair()
    job.hand_over(5, 1)
    job.settle()
    reports = job.shards[0].reports
    told, term = [each for each in reports.waiting() if each[0].told == HANDED], reports.term
    if answered == "before":
        job.heard(0)
        job.adopt(0, [5])
        assert handed(job) == [], "nothing to say to the same one"
    job.term += 1
    job.adopt(0, [5])
    for each in told if answered == "after" else ():
        reports.answered(*each, term)
    assert handed(job) == [(HANDED, 1, [5])]
    assert not job.shards[0].owned[5]
    job.heard(0)
    job.reopen(5)
    assert job.shards[0].owned[5]
    job.term += 1
    job.adopt(0, [5])
    assert handed(job) == []


def test_a_hand_over_that_was_recorded_is_told_no_more():
    job = pair()
    job.hand_over(5, 1)
    job.settle()
    job.heard(0)
    job.record(5, (1, 0))
    job.term += 1
    job.adopt(0, [5])
    assert handed(job) == []


def test_a_record_that_goes_on_with_the_owner_opens_what_was_closed():
    job = pair()
    job.hand_over(5, 1)
    job.record(5, (0, 1))
    answer = job.push(0, 0)[0]
    job.settle()
    assert moved(answer) == []


def test_an_owner_that_was_replaced_acknowledges_only_what_the_new_one_has():
    job = pair()
    has = job.push(0, 0)[0]
    job.pump(lose_answer=True)
    lacks = job.push(0, 1)[0]
    # Nobody can tell shard 0.
    for number in range(job.layout.blocks):
        job.record(number, (1,), tell=(1,))
    job.settle()
    assert not done(has)
    assert not done(lacks)
    for number in range(job.layout.blocks):
        job.adopt(0, [number])
    assert moved(has) == moved(lacks) == list(range(job.layout.blocks))
    again = result_of(job, job.push(0, 0)), result_of(job, job.push(0, 1))
    assert again[0][1].skipped == again[1][1].applied == job.layout.blocks
    assert job.rows("user", range(40)).tolist() == np.full((40, 2), -2.0).tolist()
    assert not job.shards[0].holdings.here.any()


def test_a_dead_member_is_waited_for_until_the_record_says_that_it_left():
    job = pair()
    job.kill(1)
    answer = job.push(0, 0)[0]
    job.settle()
    assert not done(answer)
    for number in range(job.layout.blocks):
        assert not done(answer)
        job.record(number, (0,))
    assert result(answer).applied == job.layout.blocks
    assert done(job.push(0, 1)[0])


def test_a_copy_that_cannot_be_reached_is_reported_and_waited_for_until_the_record_says_that_it_left():
    job = pair()
    leading, stream = job.shards[0].leading, job.shards[0].leading.streams[1]
    answer = job.push(0, 0)[0]
    leading.silent(stream)
    assert (SLOW, 1, list(range(job.layout.blocks))) in job.reports(0)
    for number in range(job.layout.blocks):
        assert not done(answer)
        job.record(number, (0,))
    assert result(answer).applied == job.layout.blocks
    assert job.reports(0) == []
    # Of blocks that nobody waits for there is nothing to say.
    leading.silent(stream)
    assert job.reports(0) == []


def test_a_copy_that_refuses_is_reported_and_never_passed_over():
    job = pair()
    job.shards[1].holdings.here[4] = False
    answer = job.push(0, 0)[0]
    job.settle()
    assert not done(answer)
    assert (SLOW, 1, [4]) in job.reports(0)
    again = job.push(0, 0)[0]
    job.settle()
    assert not done(again)
    job.record(4, (0,))
    job.settle()
    assert done(answer)
    assert done(again)


def test_a_refusal_whose_answer_was_lost_is_told_again():
    job = pair()
    job.shards[1].holdings.here[4] = False
    answer = job.push(0, 0)[0]
    job.pump(0, lose_answer=True)
    job.settle()
    assert not done(answer)
    assert (SLOW, 1, [4]) in job.reports(0)


def test_operations_wait_for_the_record_that_the_other_side_lacks():
    job = pair()
    job.record(2, (0, 1), tell=(0,))
    answer = job.push(0, 0)[0]
    job.settle()
    assert not done(answer)
    job.adopt(1, [2])
    job.settle()
    assert done(answer)
    equal(job)
    # And the other way round.
    job.record(2, (0, 1), tell=(1,))
    answer = job.push(0, 1)[0]
    job.settle()
    assert not done(answer)
    job.adopt(0, [2])
    job.settle()
    assert done(answer)
    equal(job)


def test_what_is_not_here_is_told_and_not_owned():
    job = Copies(spec_of(), 2)
    job.begin([(0,)] * job.layout.blocks)
    job.record(6, (1, 0))
    assert job.reports(1) == [(LACKING, 0, [6])]
    assert not job.shards[1].owned[6]
    assert job.held(1, 6) == (0, 0)
    assert job.held(0, 6) == (2, 0)


def test_a_full_copy_replaces_only_an_older_one():
    job = pair()
    job.push(0, 0)
    job.settle()
    have = job.held(1, 3)
    # Given again by the owner, who does not know that there is one.
    job.record(3, (0,), tell=(0,))
    job.give(3, 1)
    job.push(0, 1)
    job.settle()
    generation, sequence = job.held(1, 3)
    assert (generation, sequence) > have
    # The record that lets the old copy go comes late, and finds a newer one.
    job.adopt(1, [3])
    assert job.shards[1].holdings.here[3]
    same(job.shards[0], job.shards[1], 3)


@pytest.mark.parametrize("seed", range(20))
def test_whatever_happens_each_group_is_in_each_block_once(seed):
    """Pushes, copies, hand-overs, removals and promotions in any order; every group is sent until it is acknowledged."""
    rng = random.Random(seed)
    job = Copies(spec_of(), 3)
    job.begin([rng.choice([(0,), (0, 1), (1, 2), (2, 0)]) for _ in range(job.layout.blocks)])
    group, waiting = 0, {}
    while group < 12:
        if not waiting:
            waiting = job.push(0, group)
        for _ in range(rng.randrange(4)):
            happen(rng, job)
        if all(done(a) for a in waiting.values()) and not any(moved(a) for a in waiting.values()):
            waiting, group = {}, group + 1
        elif rng.random() < 0.3 or all(done(a) for a in waiting.values()):
            waiting = job.push(0, group)
    job.settle()
    # By the records of now, which may have changed since the last push.
    job.owners = np.array([members[0] for members in job.sets], np.int32)
    assert job.rows("user", range(40)).tolist() == np.full((40, 2), -12.0).tolist()
    assert np.array_equal(job.dense(), np.full(job.layout.dense_size, -12.0, np.float32))
    for number, members in enumerate(job.sets):
        for other in members[1:]:
            same(job.shards[members[0]], job.shards[other], number)


def happen(rng, job):
    number = rng.randrange(job.layout.blocks)
    members = job.sets[number]
    what = rng.randrange(7)
    if what == 0:
        job.pump(rng.randrange(3), times=rng.choice((1, 1, 2)), lose_answer=rng.random() < 0.3)
    elif what == 1 and len(members) < 3:
        job.give(number, rng.choice([s for s in range(3) if s not in members]))
    elif what == 2 and len(members) > 1:
        job.hand_over(number, rng.choice(members[1:]))
    elif what == 3 and len(members) > 1:
        # A member is removed, or becomes owner alone, as if the others were dead; they hear of it later, or now.
        job.record(number, (rng.choice(members),))
    elif what == 4:
        job.settle()
    elif what == 5:
        job.reopen(number)
    take_reports(job)


def take_reports(job):
    """Record what owners report, as a coordinator does: only of the recorded generation."""
    for s, shard in job.shards.items():
        for matter, numbers, generations in shard.reports.waiting():
            shard.reports.answered(matter, numbers, generations, shard.reports.term)
            for number, generation in zip(numbers.tolist(), generations.tolist(), strict=True):
                members = job.sets[number]
                if generation != job.of[number] or members[0] != s:
                    continue
                if matter.told == ADDED and matter.shard not in members:
                    job.record(number, (*members, matter.shard))
                elif matter.told == HANDED and matter.order.number == job.order:
                    rest = [m for m in members if m != matter.shard]
                    job.record(number, (matter.shard, *rest))
                elif matter.told == SLOW:
                    job.record(number, tuple(m for m in members if m != matter.shard))
