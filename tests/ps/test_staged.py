# SPDX-License-Identifier: Apache-2.0
"""Sync on one shard: what is staged, when it is applied, what is refused, and what holds still for a cut."""

import numpy as np
import pytest
import rig

from oarlock.embedding.policy import Eviction
from oarlock.embedding.spec import TableSpec
from oarlock.proto.arrays import pack, unpack
from oarlock.proto.errors import InvalidArgument, Malformed, OutOfMemory, SpecMismatch, Unavailable
from oarlock.proto.shard_pb2 import PullRequest, RanksRequest
from oarlock.ps.rank_marks import STEP_MARK, RankMarks

RAW = tuple(range(40))


@pytest.fixture
def job():
    return rig.Job(rig.spec_of(mode="sync", ranks=2), shards=1).place()


def push(job, rank, step, value=1.0, **more):
    """Push a rank's part of a step: ``value`` for all rows and dense values."""
    request = rig.request_of(job, 0, 0, value=value, dense=more.pop("dense", value), **more)
    request.rank, request.step = rank + 1, step - 1
    return job.services[0].push(request)


def pull(job, rank, state, samples, cut=0):
    """Commit a step; return the answer."""
    request = PullRequest(header=job.header(0), rank=rank + 1, state=state, samples=samples)
    request.header.cut = cut
    request.dense.CopyFrom(pack(np.arange(12, 17, dtype=np.int32)))
    return job.services[0].pull(request)


def step_of(job):
    (step,) = set(job.shards[0].marks.steps.tolist())
    return step


def test_a_step_is_applied_once_all_ranks_have_committed_it(job):
    assert push(job, 0, 1, 6.0).applied == 17
    reply = pull(job, 0, 1, 2)
    assert (reply.waits, reply.lowest, reply.dense.data) == (True, 0, b"")
    push(job, 1, 1, 3.0)
    assert np.array_equal(job.dense(), np.zeros(14))
    reply = pull(job, 1, 1, 1)
    assert (reply.waits, reply.lowest, reply.highest) == (False, 1, 1)
    # Both parts, over the samples of both.
    assert np.array_equal(unpack(reply.dense, np.float32, "d"), np.full(14, -3))
    assert np.array_equal(job.rows("user", RAW), np.full((40, 2), -3))
    assert np.array_equal(unpack(pull(job, 0, 1, 2).dense, np.float32, "d"), np.full(14, -3))
    assert job.shards[0].staged.nbytes == 0
    assert job.shards[0].counters["pushes"] == 1


def test_the_first_bytes_stay_and_late_ones_are_skipped(job):
    push(job, 0, 1, 2.0)
    reply = push(job, 0, 1, 100.0)
    assert (reply.applied, reply.skipped) == (0, 17)
    # The rank has nothing for some tables, and another one for none.
    assert push(job, 1, 1, 4.0, tables=("item",), dense=None).applied == 4
    pull(job, 0, 1, 1)
    pull(job, 1, 1, 1)
    assert np.array_equal(job.rows("user", RAW), np.full((40, 2), -1))
    assert np.array_equal(job.rows("item", RAW), np.full((40, 3), -3))
    assert step_of(job) == 1
    assert push(job, 0, 1, 100.0).skipped == 17
    assert np.array_equal(job.dense(), np.full(14, -1))


def test_parts_are_added_by_rank_and_not_as_they_came(job):
    big, small = np.float32(1 << 24), np.float32(1)
    results = []
    for order in ((0, 1, 2), (2, 1, 0), (1, 0, 2)):
        made = rig.Job(rig.spec_of(mode="sync", ranks=3), shards=1).place()
        for rank in order:
            push(made, rank, 1, (big, small, -big)[rank])
        for rank in order:
            pull(made, rank, 1, 1)
        results.append(made.rows("user", RAW).tobytes() + made.dense().tobytes())
    assert len(set(results)) == 1
    # (2^24 + 1) - 2^24 in float32, from left to right.
    assert np.array_equal(made.rows("user", RAW), np.zeros((40, 2)))


def test_a_part_of_a_later_step_and_messages_of_no_rank_are_refused(job):
    with pytest.raises(Unavailable, match="a part of step 2 came before every block here is at step 1"):
        push(job, 0, 2)
    for rank in (-1, 2):
        with pytest.raises(InvalidArgument, match="this job is sync and has 2 ranks"):
            push(job, rank, 1)
    with pytest.raises(InvalidArgument, match="rank 2: this job is sync"):
        pull(job, 2, 0, 0)
    with pytest.raises(InvalidArgument, match="give at most 16777216 of them"):
        pull(job, 0, 1, (1 << 24) + 1)
    pull(job, 0, 1, 5)
    with pytest.raises(Malformed, match="committed step 1 with 5 samples, and again with 4"):
        pull(job, 0, 1, 4)
    other = rig.Job(rig.spec_of(), shards=1).place()
    for ask in (push, pull):
        with pytest.raises(InvalidArgument, match="the job's mode has no ranks"):
            ask(other, 0, 1, 1)


def test_an_update_that_fails_in_the_middle_is_finished_later(job):
    push(job, 0, 1, 2.0)
    push(job, 1, 1, 2.0)
    pull(job, 0, 1, 2)
    table = job.shards[0].tables[1]

    def fails(*arguments, **named):
        del table.push
        raise OutOfMemory("no memory left", groups=0)

    table.push = fails
    with pytest.raises(OutOfMemory):
        pull(job, 1, 1, 2)
    assert set(job.shards[0].marks.steps.tolist()) == {0, 1}
    # Nobody is answered between two steps; the next question finishes the step.
    assert not pull(job, 0, 1, 2).waits
    assert step_of(job) == 1
    for name, dim in (("user", 2), ("item", 3)):
        assert np.array_equal(job.rows(name, RAW), np.full((40, dim), -1))
    assert np.array_equal(job.dense(), np.full(14, -1))


def test_a_shard_that_holds_still_takes_in_no_commit_until_it_is_told_all(job):
    shard = job.shards[0]
    push(job, 0, 1)
    push(job, 1, 1)
    pull(job, 0, 1, 1)
    reply = job.services[0].ranks(RanksRequest(header=job.header(0), hold=4))
    assert unpack(reply.commits.steps, np.uint64, "c").tolist() == [1, 0]
    assert pull(job, 1, 1, 1).waits
    assert step_of(job) == 0
    # What another shard knows of rank 1 makes the step.
    others = reply.commits
    others.steps.CopyFrom(pack(np.array([1, 1], np.uint64)))
    others.samples.CopyFrom(pack(np.array([1, 1], np.uint64)))
    with pytest.raises(InvalidArgument, match="does not hold still for cut 5"):
        shard.staged.level(5, others)
    shard.staged.level(4, others)
    assert step_of(job) == 1
    assert not pull(job, 1, 1, 1).waits


def test_who_has_passed_a_later_gate_ends_the_holding(job):
    push(job, 0, 1)
    push(job, 1, 1)
    pull(job, 0, 1, 1)
    job.services[0].ranks(RanksRequest(header=job.header(0), hold=4))
    assert pull(job, 1, 1, 1, cut=3).waits
    assert not pull(job, 1, 1, 1, cut=4).waits


def test_blocks_are_swept_at_the_same_steps_wherever_it_began():
    tables = (TableSpec("user", 2, rig.SGD, rig.ZEROS, 8, eviction=Eviction(age=24)),)
    found = []
    for begin in (0, 5, 21):
        spec = rig.spec_of(tables=tables, dense=(), mode="sync", ranks=1, splits=20, rows_per_split=10, batch_rows=1)
        made = rig.Job(spec, shards=1).place()
        made.shards[0].marks.steps[:] = begin
        made.shards[0].staged.commits[:] = begin
        table, swept = made.shards[0].tables[0], []
        sweep = table.sweep

        def noted(block, *, tick, sweep=sweep, swept=swept, **named):
            swept.append((tick, block))
            return sweep(block, tick=tick, **named)

        table.sweep = noted
        for step in range(begin + 1, 40):
            push(made, 0, step, tables=("user",), raw=(1, 2, 3), dense=None)
            made.services[0].pull(PullRequest(header=made.header(0), rank=1, state=step, samples=1))
        found.append([one for one in swept if one[0] > 21])
    assert found[0] == found[1] == found[2]
    # Six steps a round, and not all blocks at one of them.
    assert {block for _, block in found[0]} == set(range(8))
    assert len({tick for tick, _ in found[0]}) > 12


def test_a_checkpoint_of_another_mode_is_no_step():
    marks = RankMarks(3)
    marks.restore(1, {STEP_MARK: 7})
    assert [marks.of_block(b) for b in range(3)] == [{STEP_MARK: 0}, {STEP_MARK: 7}, {STEP_MARK: 0}]
    for wrong in ({}, {3: 1}, {STEP_MARK: 1, 2: 0}):
        with pytest.raises(SpecMismatch, match="written in another mode"):
            marks.restore(0, wrong)
