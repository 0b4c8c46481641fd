# SPDX-License-Identifier: Apache-2.0
"""Answers about blocks that are being handed over: kept until that has ended, and given once."""

import numpy as np
import pytest
from scenes_rig import done, moved, pair, pull_of, result

from oarlock.proto.arrays import unpack
from oarlock.proto.errors import StalePlacement, Unavailable
from oarlock.ps.closing import MOST_KEPT


def test_who_is_told_at_the_end_of_a_hand_over_is_told_where():
    job = pair(3)
    job.record(5, (0, 2))
    job.hand_over(5, 2)
    late = job.push(0, 0)[0]
    job.settle()
    job.record(5, (2,))
    reply = result(late)
    assert moved(late) == [5]
    assert unpack(reply.where.blocks, np.int32, "blocks").tolist() == [5]
    assert unpack(reply.where.owners, np.int32, "owners").tolist() == [2]


def test_an_answer_waits_for_the_hand_over_and_for_the_copies_of_other_blocks():
    job = pair()
    job.hand_over(5, 1)
    job.settle()
    late = job.push(0, 0)[0]
    job.record(5, (1, 0))
    assert not done(late), "the other blocks' copies have nothing of it yet"
    job.settle()
    assert moved(late) == [5]
    assert result(late).applied == job.layout.blocks - 1


def test_so_many_answers_are_kept_and_who_comes_then_asks_again():
    job = pair()
    job.hand_over(5, 1)
    job.settle()
    kept = [job.services[0].pull(pull_of(job, 5)) for _ in range(MOST_KEPT)]
    with pytest.raises(StalePlacement):
        job.services[0].pull(pull_of(job, 5))
    assert moved_at_once(job) == [5]
    assert not any(map(done, kept))
    job.shards[0].closing.fail(Unavailable("the end"))
    with pytest.raises(Unavailable):
        kept[0].result()
    assert moved_at_once(job) == [5], "nothing is kept after the end"


def moved_at_once(job):
    answer = job.push(0, 0)[0]
    job.settle()
    return moved(answer)
