# SPDX-License-Identifier: Apache-2.0
"""Hybrid on one shard: rows are applied as they come, dense parts once all ranks have committed; cuts of one step; restores."""

import json
from pathlib import Path

import numpy as np
import pytest
import rig

from oarlock.checkpoint.block_file import BlockImage
from oarlock.client.closed import ClosedSet
from oarlock.proto.arrays import pack, unpack
from oarlock.proto.errors import InvalidArgument, OutOfMemory, SpecMismatch, Unavailable
from oarlock.proto.shard_pb2 import AbortRequest, CloseRequest, CutRequest, PullRequest, RanksRequest, WriteRequest
from oarlock.ps.rank_marks import STEP_MARK, HybridMarks

RAW = tuple(range(40))
DENSE = np.arange(12, 17, dtype=np.int32)


@pytest.fixture
def job():
    return rig.Job(rig.spec_of(mode="hybrid", ranks=2), shards=1).place()


def push(job, rank, step, group=0, value=1.0, split=None, **more):
    """Push what a group adds: ``value`` for all rows, at its rank's step the same for dense values."""
    split = rank if split is None else split
    request = rig.request_of(job, split, group, value=value, dense=more.pop("dense", value), **more)
    request.rank, request.step = rank + 1, step - 1
    return job.services[0].push(request)


def pull(job, rank, state, samples=1, cut=0):
    """Commit a step; return the answer."""
    request = PullRequest(header=job.header(0), rank=rank + 1, state=state, samples=samples)
    request.header.cut = cut
    request.dense.CopyFrom(pack(DENSE))
    return job.services[0].pull(request)


def rows(job):
    return job.rows("user", RAW)


def test_rows_are_applied_at_once_and_dense_parts_once_all_ranks_have_committed(job):
    assert push(job, 0, 1, value=6.0).applied == 17
    assert np.array_equal(rows(job), np.full((40, 2), -6))
    assert np.array_equal(job.dense(), np.zeros(14))
    assert pull(job, 0, 1, 2).waits
    push(job, 1, 1, value=3.0)
    assert np.array_equal(rows(job), np.full((40, 2), -9))
    assert np.array_equal(job.dense(), np.zeros(14))
    reply = pull(job, 1, 1, 1)
    assert (reply.waits, reply.lowest, reply.highest) == (False, 1, 1)
    # Both parts, over the samples of both; rows are divided by nothing.
    assert np.array_equal(unpack(reply.dense, np.float32, "d"), np.full(14, -3))
    assert np.array_equal(rows(job), np.full((40, 2), -9))
    shard = job.shards[0]
    assert shard.marks.steps.tolist() == [0] * 12 + [1] * 5
    assert shard.marks.of_split(0)[:12].tolist() == [0] * 12
    assert shard.staged.nbytes == 0


def test_a_repeated_group_fills_what_lacks_it_and_keeps_the_first_dense_bytes(job):
    push(job, 0, 1, value=2.0, tables=("item",), raw=(1,))
    reply = push(job, 0, 1, value=100.0)
    # The one block of items, and all dense ones, have it already.
    assert (reply.applied, reply.skipped) == (11, 6)
    push(job, 0, 1, value=50.0)
    assert np.array_equal(job.rows("user", RAW), np.full((40, 2), -100))
    pull(job, 0, 1)
    pull(job, 1, 1, 0)
    assert np.array_equal(job.dense(), np.full(14, -2))
    assert push(job, 0, 1, value=100.0).skipped == 17


def test_a_rank_without_data_takes_part_with_nothing(job):
    push(job, 0, 1, value=4.0)
    pull(job, 0, 1, 4)
    assert not pull(job, 1, 1, 0).waits
    assert np.array_equal(job.dense(), np.full(14, -1))


def test_an_error_in_the_middle_of_its_rows_leaves_a_group_that_can_be_repeated(job):
    table = job.shards[0].tables[1]

    def fails(*arguments, **named):
        del table.push
        raise OutOfMemory("no memory left", groups=0)

    table.push = fails
    with pytest.raises(OutOfMemory):
        push(job, 0, 1, value=2.0)
    push(job, 0, 1, value=2.0)
    pull(job, 1, 1, 0)
    pull(job, 0, 1)
    for name, dim in (("user", 2), ("item", 3)):
        assert np.array_equal(job.rows(name, RAW), np.full((40, dim), -2))
    assert np.array_equal(job.dense(), np.full(14, -2))


def test_what_comes_before_its_step_or_of_no_rank_is_refused_and_changes_nothing(job):
    with pytest.raises(Unavailable, match="a part of step 2 came before every block here is at step 1"):
        push(job, 0, 2)
    with pytest.raises(Unavailable, match="a part of step 2 came before"):
        push(job, 0, 2, dense=None)
    for rank in (-1, 2):
        with pytest.raises(InvalidArgument, match="this job is hybrid and has 2 ranks"):
            push(job, rank, 1, split=0)
    assert np.array_equal(rows(job), np.zeros((40, 2)))
    assert job.shards[0].marks.splits == 0
    push(job, 0, 1, tables=("user",), dense=None)
    job.services[0].close(CloseRequest(header=job.header(0), closed=ClosedSet(1).pack()))
    assert push(job, 0, 1, tables=("user",), dense=None).skipped == 8
    with pytest.raises(Unavailable, match="split 1025 is 1024 or more above 1"):
        push(job, 0, 1, split=1025)


def test_splits_of_an_epoch_end_in_any_order():
    made = rig.Job(rig.spec_of(mode="hybrid", ranks=2, splits=5000), shards=1).place()
    closed = ClosedSet(1, [4000, 4999])
    made.services[0].close(CloseRequest(header=made.header(0), closed=closed.pack()))
    assert made.shards[0].closed == closed
    assert push(made, 0, 1, split=4999).skipped == 12
    assert push(made, 1, 1, split=4998).applied == 17


# Cuts


def hold(job, cut):
    return job.services[0].ranks(RanksRequest(header=job.header(0), hold=cut)).commits


def begin(job, cut, at, commits):
    job.services[0].cut(CutRequest(header=job.header(0), cut=cut, at=at, commits=commits))


def test_a_view_begins_after_the_step_of_the_cut_and_nobody_goes_on_before_it_is_written(job, tmp_path):
    push(job, 0, 1, value=2.0)
    pull(job, 0, 1)
    commits = hold(job, 4)
    push(job, 1, 1, value=2.0)
    # It holds still until it is told the step.
    assert pull(job, 1, 1).waits
    assert np.array_equal(job.dense(), np.zeros(14))
    with pytest.raises(Unavailable, match="the blocks here are at step 0, the cut is of step 1") as early:
        begin(job, 4, 1, commits)
    assert early.value.details["not_yet"], "no failure of the order"
    reply = pull(job, 1, 1)
    assert (reply.waits, reply.lowest, reply.highest) == (True, 1, 1)
    begin(job, 4, 1, commits)
    begin(job, 4, 1, commits)
    assert pull(job, 0, 1).waits
    reply = job.services[0].write(WriteRequest(header=job.header(0), cut=4, root=str(tmp_path)))
    assert not reply.torn
    assert not pull(job, 0, 1).waits
    push(job, 0, 2, group=1)
    assert {e["seq"] for e in json.loads(reply.entries) if e["kind"] == "dense"} == {1}


def test_a_cut_that_is_given_up_keeps_nobody_back(job):
    push(job, 0, 1)
    push(job, 1, 1)
    commits = hold(job, 4)
    with pytest.raises(Unavailable):
        begin(job, 4, 1, commits)
    pull(job, 0, 1)
    assert pull(job, 1, 1).waits
    job.services[0].abort(AbortRequest(header=job.header(0), cut=4))
    assert not pull(job, 1, 1).waits
    with pytest.raises(InvalidArgument, match="cut 4 was given up"):
        begin(job, 4, 1, commits)
    # Who has heard that it is over says so to a shard that has not.
    hold(job, 6)
    push(job, 0, 2, group=1)
    push(job, 1, 2, group=1)
    assert pull(job, 0, 2).waits
    assert pull(job, 1, 2, cut=5).waits
    pull(job, 1, 2, cut=6)
    assert not pull(job, 0, 2).waits


def test_a_shard_without_dense_blocks_is_at_the_step_that_all_ranks_have_committed():
    made = rig.Job(rig.spec_of(mode="hybrid", ranks=2), shards=2).place([0] * 12 + [1] * 5)
    assert made.shards[0].staged.range() == (0, 0)
    pull_rows = PullRequest(header=made.header(0), rank=1, state=1, samples=3)
    # It keeps nobody: those that have the dense blocks do.
    assert not made.services[0].pull(pull_rows).waits
    commits = hold(made, 2)
    with pytest.raises(Unavailable):
        begin(made, 2, 1, commits)
    pull_rows.rank = 2
    reply = made.services[0].pull(pull_rows)
    assert (reply.waits, reply.lowest) == (True, 1)
    begin(made, 2, 1, commits)
    made.services[0].abort(AbortRequest(header=made.header(0), cut=2))
    assert not made.services[0].pull(pull_rows).waits


# Restores


def test_a_block_comes_back_with_its_marks_of_rows_or_its_step():
    marks = HybridMarks(4, 2)
    marks.restore(0, {7: 3, 9: 0})
    marks.restore(2, {STEP_MARK: 5})
    assert [marks.of_block(b) for b in range(4)] == [{7: 3, 9: 0}, {}, {STEP_MARK: 5}, {STEP_MARK: 0}]
    assert {split: of.tolist() for split, of in marks.copy().items()} == {
        7: [3, -1, -1, -1],
        9: [0, -1, -1, -1],
        STEP_MARK: [-1, -1, 5, 0],
    }
    with pytest.raises(SpecMismatch, match="written in another mode"):
        marks.restore(3, {7: 1})
    with pytest.raises(SpecMismatch, match="written in mode sync"):
        marks.restore(1, {STEP_MARK: 5})
    marks.drop_closed(ClosedSet(8))
    marks.drop_block(2)
    assert [marks.of_block(b) for b in range(3)] == [{9: 0}, {}, {STEP_MARK: 0}]


def test_what_a_cut_holds_goes_on_after_it(job, tmp_path: Path):
    push(job, 0, 1, value=2.0)
    push(job, 1, 1, value=2.0)
    pull(job, 0, 1)
    pull(job, 1, 1)
    commits = hold(job, 1)
    begin(job, 1, 1, commits)
    images: list[BlockImage] = [rig.view.image_of(job.shards[0], n) for n in range(job.layout.blocks)]
    again = rig.Job(rig.spec_of(mode="hybrid", ranks=2), shards=1).place()
    for number, image in enumerate(images):
        rig.blocks._fill(again.shards[0], number, image)
        again.shards[0].marks.restore(number, dict(image.marks))
    assert rig.state(again) == rig.state(job)
    # A successor repeats nothing of step 1, and all of step 2.
    assert push(again, 0, 1, value=9.0).applied == 0
    assert not pull(again, 0, 1).waits
    assert push(again, 0, 2, group=1, value=2.0).applied == 17
