# SPDX-License-Identifier: Apache-2.0
"""What an owner keeps for other shards, and until when."""

from rig import spec_of
from scenes_rig import Copies, done, same


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
