# SPDX-License-Identifier: Apache-2.0
"""What a worker says of pushes that a dead shard took along: all since the cut and before the new owner, and no other."""

import numpy as np
import pytest

from oarlock.client.acknowledged import Acknowledged
from oarlock.proto.arrays import pack
from oarlock.proto.coordinator_pb2 import LossCount, LossQuestion
from oarlock.proto.errors import Malformed

NONE = np.empty(0, np.int32)


def numbers(*blocks):
    return np.array(blocks, np.int32)


def question(generation=5, cut=1, blocks=(2, 3)):
    return LossQuestion(generation=generation, cut=cut, blocks=pack(numbers(*blocks)))


def test_pushes_between_the_cut_and_the_new_owner_count():
    seen = Acknowledged(8)
    seen.note(numbers(0, 2, 3), NONE)
    seen.opened(1)
    for _ in range(3):
        seen.note(numbers(1, 2), NONE)
    seen.note(numbers(2, 3, 4), numbers(4))
    seen.moved(numbers(2, 3), np.array([5, 5]))
    seen.note(numbers(2, 3), NONE)
    assert seen.since(1, numbers(2, 3), 5) == (5, True)
    # Of no cut that is known here: all since it joined.
    assert seen.since(0, numbers(2, 3), 5) == (7, True)
    # What moved away was not acknowledged.
    assert seen.since(0, numbers(4), -1) == (0, True)


def test_nothing_is_said_before_the_new_owner_is_known_and_the_same_afterwards():
    seen = Acknowledged(8)
    seen.note(numbers(2, 3), NONE)
    seen.asked([question(cut=0)])
    assert not seen.answers
    seen.moved(numbers(2), np.array([5]))
    seen.asked([question(cut=0)])
    assert not seen.answers
    seen.moved(numbers(3), np.array([5]))
    for _ in range(2):
        seen.asked([question(cut=0)])
        assert list(seen.answers.values()) == [LossCount(generation=5, pushes=2)]
        seen.note(numbers(2, 3), NONE)
        seen.moved(numbers(2, 3), np.array([6, 6]))
    seen.asked([])
    assert not seen.answers


def test_of_a_block_that_went_on_already_nothing_is_told():
    seen = Acknowledged(8)
    seen.note(numbers(2, 3), NONE)
    seen.moved(numbers(2, 3), np.array([5, 7]))
    seen.asked([question(cut=0)])
    assert list(seen.answers.values()) == [LossCount(generation=5, pushes=1, more=True)]


def test_cuts_before_the_committed_one_are_forgotten():
    seen = Acknowledged(4)
    for cut in (1, 2, 3):
        seen.note(numbers(0), NONE)
        seen.opened(cut)
    seen.committed(2)
    assert sorted(seen._at) == [2, 3]
    seen.note(numbers(0), NONE)
    seen.moved(numbers(0), np.array([9]))
    assert seen.since(2, numbers(0), 9) == (2, True)


def test_cuts_that_came_to_nothing_take_no_memory():
    seen = Acknowledged(4)
    seen.opened(1)
    seen.committed(1)
    for cut in range(2, 50):
        seen.note(numbers(0), NONE)
        seen.opened(cut)
    assert sorted(seen._at) == [1, 48, 49]
    seen.moved(numbers(0), np.array([9]))
    assert seen.since(1, numbers(0), 9) == (48, True)


@pytest.mark.parametrize("blocks", [(-1,), (8,)])
def test_blocks_that_are_not_the_jobs(blocks):
    with pytest.raises(Malformed, match="a loss of blocks"):
        Acknowledged(8).asked([question(blocks=blocks)])
