# SPDX-License-Identifier: Apache-2.0
"""What an owner keeps for other shards, and until when."""

from rig import spec_of
from scenes_rig import Copies, done, same

from oarlock.proto.coordinator_pb2 import CONFIRMED, SLOW


def test_nothing_is_kept_for_a_shard_that_left():
    job = Copies(spec_of(), 3)
    job.begin([(0, 1, 2)] * job.layout.blocks)
    leading = job.shards[0].leading
    job.settle()
    job.kill(1)
    answer = job.push(0, 0)[0]
    assert set(leading.streams) == {1, 2}
    assert leading.streams[1].nbytes
    for number in range(job.layout.blocks):
        assert set(leading.streams) == {1, 2}, "it is waited for, for the sake of the blocks that are left"
        job.record(number, (0, 2))
    assert set(leading.streams) == {2}
    assert not done(answer), "the other copy has not answered"
    job.settle()
    assert done(answer)
    job.give(3, 1)
    assert set(leading.images) == {1}
    for number in range(job.layout.blocks):
        job.record(number, (0,))
    assert leading.streams == leading.images == {}
    # Who comes again is told from the beginning.
    job.alive.add(1)
    job.give(3, 1)
    job.settle()
    assert done(job.push(0, 1)[0]) is False
    job.settle()
    same(job.shards[0], job.shards[1], 3)


def test_what_a_copy_refused_it_lacks_under_every_record_that_names_it():
    job = Copies(spec_of(), 3)
    job.begin([(0, 1, 2)] * job.layout.blocks)
    job.settle()
    job.shards[1].holdings.here[4] = False
    answer = job.push(0, 0)[0]
    job.settle()
    assert not done(answer)
    assert (SLOW, 1, [4]) in job.reports(0)
    # The other one leaves: of the first nothing is known that was not known before.
    job.record(4, (0, 1))
    assert not done(answer)
    assert (SLOW, 1, [4]) in job.reports(0), "what was reported is of the record before"
    job.settle()
    assert not done(answer)
    assert not [numbers for told, _, numbers in job.reports(0) if told == CONFIRMED and 4 in numbers]
    job.record(4, (0,))
    assert done(answer)
    # Once it has the block again it is waited for as before.
    job.give(4, 1)
    job.settle()
    job.record(4, (0, 1))
    again = job.push(0, 1)[0]
    assert not done(again)
    job.settle()
    assert done(again)
