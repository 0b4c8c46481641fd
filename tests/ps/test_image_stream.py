# SPDX-License-Identifier: Apache-2.0
"""Whole blocks on their way to another shard: in a stream of their own, and nobody waits for them."""

from rig import spec_of
from scenes_rig import IMAGES, OPERATIONS, Copies, done, same

from oarlock.embedding.block import Block
from oarlock.proto.coordinator_pb2 import ADDED
from oarlock.ps import following, image_stream
from oarlock.ps.copying import take_turn


def pair():
    """All blocks are shard 0's, with a copy on shard 1."""
    job = Copies(spec_of(), 2)
    job.begin([(0, 1)] * job.layout.blocks)
    return job


def added(job):
    """Return the blocks of shard 0 that it reports to be on shard 1 now, too."""
    return [block for told, shard, blocks in job.reports(0) if (told, shard) == (ADDED, 1) for block in blocks]


def half():
    """Blocks of even numbers have a copy on shard 1, the others are shard 0's alone."""
    job = Copies(spec_of(), 2)
    job.begin([(0,) if number % 2 else (0, 1) for number in range(job.layout.blocks)])
    return job


def test_a_push_does_not_wait_for_the_image_of_another_block():
    job = half()
    job.give(3, 1)
    take_turn(job.shards[0], 1)
    answer = job.push(0, 0)[0]
    assert not done(answer)
    job.pump(kinds=[OPERATIONS])
    assert done(answer)
    assert not job.shards[1].holdings.here[3]
    job.settle()
    same(job.shards[0], job.shards[1], 3)


def test_what_is_done_while_a_block_travels_comes_behind_it():
    job = half()
    job.give(3, 1)
    take_turn(job.shards[0], 1)
    job.push(0, 0)
    job.push(0, 1)
    job.pump(kinds=[OPERATIONS])
    assert not job.shards[1].holdings.here[3]
    # The image comes, with its answer lost, and once more.
    job.pump(lose_answer=True, kinds=[IMAGES])
    job.pump(times=2, kinds=[IMAGES])
    assert job.shards[1].holdings.here[3]
    assert added(job) == []
    answer = job.push(0, 2)[0]
    job.settle()
    assert done(answer)
    assert added(job) == [3]
    same(job.shards[0], job.shards[1], 3)


def test_images_go_one_at_a_time_as_they_are_when_their_turn_comes():
    job = half()
    for number in (1, 3, 5):
        job.give(number, 1)
        job.give(number, 1)
    images = job.shards[0].leading.images[1]
    take_turn(job.shards[0], 1)
    take_turn(job.shards[0], 1)
    assert (images.next - images.first, list(images.wanted)) == (1, [3, 5])
    job.push(0, 0)
    # A record of one that waits, and of the one under way: they are not wanted any more.
    job.record(1, (0,))
    job.record(5, (0,))
    job.settle()
    assert added(job) == [3]
    assert not job.shards[1].holdings.here[5]
    same(job.shards[0], job.shards[1], 3)


def test_a_copy_for_which_too_much_is_held_is_given_up_and_comes_again(monkeypatch):
    job = half()
    job.give(3, 1)
    take_turn(job.shards[0], 1)
    monkeypatch.setattr(image_stream, "HELD_BYTES", 10)
    job.push(0, 0)
    job.settle()
    assert added(job) == []
    job.give(3, 1)
    job.settle()
    assert added(job) == [3]
    same(job.shards[0], job.shards[1], 3)


def test_a_block_that_was_refused_and_came_whole_is_not_refused_any_more():
    job = pair()
    job.shards[1].holdings.here[4] = False
    job.push(0, 0)
    job.pump(lose_answer=True)
    # The owner has not heard it; the block goes, and comes again by the other stream.
    job.record(4, (0,))
    job.give(4, 1)
    take_turn(job.shards[0], 1)
    job.pump()
    job.settle()
    job.push(0, 1)
    job.settle()
    assert added(job) == [4]
    same(job.shards[0], job.shards[1], 4)


def test_rows_are_made_ready_without_the_lock_and_given_back_if_they_came_in_vain(monkeypatch):
    job = half()
    job.give(3, 1)
    real, freed = following.fill, []

    def fill(shard, image):
        filled = real(shard, image)
        # A record comes meanwhile, and needs the lock.
        job.record(3, (0,), tell=(1,))
        for content in filled:
            monkeypatch.setattr(content, "free", lambda content=content: freed.append(Block.free(content)))
        return filled

    monkeypatch.setattr(following, "fill", fill)
    job.pump(kinds=[IMAGES])
    assert len(freed) == 1
    assert not job.shards[1].holdings.here[3]
    # What is in its place is not given back.
    job.record(3, (0,))
    job.give(3, 1)
    monkeypatch.setattr(following, "fill", lambda shard, image: ready.append(real(shard, image)) or ready[-1])
    ready = []
    job.settle()
    assert len(ready) == 1
    assert not ready[0][0].retired
    same(job.shards[0], job.shards[1], 3)


def test_who_has_no_copies_left_tells_nobody():
    job = Copies(spec_of(), 2)
    job.begin([(0,)] * job.layout.blocks)
    assert job.shards[0].told is None
    job.give(3, 1)
    job.settle()
    job.record(3, (0, 1))
    job.settle()
    assert job.shards[0].told is not None
    job.record(3, (1, 0))
    assert (job.shards[0].told is None, job.shards[1].told is None) == (True, False)
    job.record(3, (1,))
    assert job.shards[1].told is None
