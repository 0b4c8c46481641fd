# SPDX-License-Identifier: Apache-2.0
"""Ranks on two shards that copy each other's blocks, which change owners in the midst of steps; then one of them dies.

Told so much and no more as SEMANTICS sections 5 and 6 say, what is left is what one shard makes of the same parts, to the bit.
"""

import contextlib

import numpy as np
import pytest
import rig
from copies_rig import Copies, digest, heard, spec_of, spoil, wired

from oarlock.client.push import PushIdentity, cut_push
from oarlock.proto.arrays import unpack, view_of
from oarlock.proto.bulk import Bulk
from oarlock.proto.shard_pb2 import PullRequest
from oarlock.ps.images import image_of, take
from oarlock.ps.operations import Operation, apply, sequences_of

STEPS = 8
EVENTS = 200


class Dead(Exception):
    """The first shard died."""


class Two:
    """Two shards, and one that is left in peace and gets the same."""

    def __init__(self, mode, ranks, seed):
        spec = spec_of(mode=mode, ranks=ranks)
        self.quiet = Copies(spec, seed, members=1)
        self.rng, self.ranks = np.random.default_rng(seed), ranks
        self.job = rig.Job(spec, shards=2).place()
        self.layout = self.job.layout
        self.shards = [heard(self.job.shards[s]) for s in range(2)]
        self.queues = [[], []]
        for number in range(self.layout.blocks):
            owner = int(self.job.owners[number])
            with self.shards[1 - owner].push_lock:
                take(self.shards[1 - owner], image_of(self.shards[owner], number))
        for s, shard in enumerate(self.shards):
            shard.told = lambda numbers, does, s=s: self.told(s, numbers, does)
        self.alive, self.commits = [0, 1], [(0, 0)] * ranks
        self.moved = 0
        # When the first shard dies.
        self.left = int(self.rng.integers(EVENTS))

    def close(self):
        for shard in self.shards:
            shard.close()
        self.quiet.close()

    def told(self, s, numbers, does):
        shard = self.shards[s]
        assert shard.owned[numbers].all()
        self.queues[s].append(Operation(numbers, sequences_of(shard, numbers), does))

    def deliver(self, s, most=None):
        """Let the other shard take some of what was told."""
        queue = self.queues[s]
        for operation in queue[:most]:
            found, came = wired(self.layout, operation, self.rng)
            with self.shards[1 - s].push_lock:
                apply(self.shards[1 - s], found)
            spoil(came)
        del queue[:most]

    def event(self):
        """Let things happen, as far as nobody waits for them."""
        if len(self.alive) < 2:
            return
        self.left -= 1
        if self.left < 0:
            self.die()
            raise Dead
        for s in self.alive:
            if self.rng.random() < 0.3:
                self.deliver(s, int(self.rng.integers(len(self.queues[s]) + 1)))
        if self.rng.random() < 0.15:
            self.hand_over(np.flatnonzero(self.rng.random(self.layout.blocks) < 0.2))

    def hand_over(self, numbers):
        """Swap the owners of blocks, all of whose operations have been taken."""
        for s in self.alive:
            self.deliver(s)
        self.moved += len(numbers)
        for shard in self.shards:
            shard.owned[numbers] ^= True
        self.place()

    def die(self):
        """Lose what the first shard has told and the other has not taken."""
        self.alive = [1]
        self.queues[0].clear()
        self.shards[1].owned[:] = True
        self.shards[1].told = None
        self.place()

    def place(self):
        self.job.place(np.where(self.shards[1].owned, 1, 0), adopt=False)
        for rank in range(self.ranks):
            for s in self.alive:
                self.commit(s, rank)

    def push(self, identity, gradients, dense):
        """Push until each block is where it was acknowledged by all that have to."""
        while True:
            try:
                moved = 0
                for made in cut_push(self.layout, self.job.routes(), identity, gradients, dense, 0.05):
                    made.request.header.CopyFrom(self.job.header(made.shard.id))
                    came = [bytearray(view_of(one)) for one in made.parts]
                    reply = self.shards[made.shard.id].push(Bulk(made.request, came))
                    spoil(came)
                    moved += len(unpack(reply.moved, np.int32, "moved"))
                    self.event()
                for s in self.alive:
                    self.deliver(s)
                if not moved:
                    return
            except Dead:
                continue

    def commit(self, s, rank):
        state, samples = self.commits[rank]
        request = PullRequest(header=self.job.header(s), rank=rank + 1, state=state, samples=samples)
        self.shards[s].pull(request)

    def settled(self, step):
        if any(self.queues[s] for s in self.alive):
            return False
        return all(self.shards[s].staged.range() == (step, step) for s in self.alive if self.shards[s].owned.any())

    def step(self):
        copies, ranks = self.quiet, self.ranks
        for rank in self.rng.permutation(ranks).tolist():
            identity = PushIdentity(rank, copies.step, copies.step, rank=rank + 1)
            gradients, dense = copies.gradients(), copies.dense()
            copies.send(identity, gradients, dense)
            self.push(identity, gradients, dense)
        copies.step += 1
        for rank in self.rng.permutation(ranks).tolist():
            copies.commit(rank, rank + 1)
            self.commits[rank] = copies.step, rank + 1
            for s in self.rng.permutation(self.alive).tolist():
                if s in self.alive:
                    self.commit(s, rank)
                    self.quietly(self.event)
        while not self.settled(copies.step):
            for s in self.alive:
                self.deliver(s)
            self.quietly(self.event)
            for rank in range(ranks):
                for s in self.alive:
                    self.commit(s, rank)

    def quietly(self, what):
        with contextlib.suppress(Dead):
            what()


@pytest.mark.parametrize("mode", ["sync", "hybrid"])
@pytest.mark.parametrize("seed", [*range(3), *(pytest.param(s, marks=pytest.mark.slow) for s in range(3, 40))])
def test_steps_are_the_same_whoever_owns_blocks_and_dies(mode, seed):
    two = Two(mode, 2, seed)
    try:
        for _ in range(STEPS):
            two.step()
        two.quietly(two.event)
        everything = range(two.layout.blocks)
        for s in two.alive:
            assert digest(two.shards[s], everything) == digest(two.quiet.owner, everything)
            steps = two.shards[s].marks.steps[two.shards[s].staged.first :]
            assert set(steps.tolist()) == {STEPS}
        assert two.moved > 10 or seed > 2
    finally:
        two.close()
