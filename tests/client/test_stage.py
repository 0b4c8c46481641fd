# SPDX-License-Identifier: Apache-2.0
"""A rank's commit while blocks change hands, in virtual time: who is asked, and that every block was reported in the end."""

import asyncio
import random

import numpy as np
import pytest
import rig

from oarlock.client.client import Client
from oarlock.client.pull import pull
from oarlock.client.router import Changes, ShardAddress, make_routes, pack_changes
from oarlock.client.stage import Behind, Commit, News
from oarlock.proto.arrays import pack
from oarlock.proto.bulk import opened
from oarlock.proto.errors import Malformed, Unavailable, WrongIncarnation
from oarlock.proto.shard_pb2 import PullReply, RankCommits, RanksReply

STEP = 7


class World:
    """Records at a coordinator, and shards that adopt them when they are told to. A block is at the step from ``ready`` on."""

    def __init__(self, shards=3, *, seed=0, latency=0.0):
        self.job = rig.Job(rig.spec_of(), shards=1)
        self.rng = random.Random(seed)
        self.latency = latency
        self.blocks = self.job.layout.blocks
        self.shards = {s: ShardAddress(s, f"shard-{s}", 100 + s) for s in range(shards)}
        self.owners = np.arange(self.blocks, dtype=np.int32) % shards
        self.generations = np.ones(self.blocks, np.int64)
        # (owners, generation) of each placement, by generation.
        self.history = [self.owners.copy(), self.owners.copy()]
        self.adopted = dict.fromkeys(self.shards, 1)
        self.ready = np.zeros(self.blocks)
        self.highest = STEP
        self.dead = set()
        self.asked = []
        self.member = self.job.member(self)
        self.member.routes = make_routes(self.job.layout, 1, self.owners.copy(), dict(self.shards))

    @property
    def generation(self):
        return len(self.history) - 1

    def record(self, block, owner):
        """A record is written, which nobody was told of yet."""
        self.owners[block] = owner
        self.generations[block] = len(self.history)
        self.history.append(self.owners.copy())

    def move(self, block, owner, *, tell=True):
        self.record(block, owner)
        for shard in self.adopted if tell else ():
            self.adopted[shard] = self.generation

    async def call(self, address, method, request, *, timeout_seconds):
        await asyncio.sleep(self.rng.random() * self.latency)
        try:
            return self._answer(address, method, opened(request)[0])
        finally:
            await asyncio.sleep(self.rng.random() * self.latency)

    def _answer(self, address, method, request):
        if address == "coordinator":
            known = request.header.generation
            blocks = np.flatnonzero(self.generations > known).astype(np.int32)
            owners, told = self.owners[blocks], self.generations[blocks]
            return pack_changes(
                Changes(self.generation, known, False, blocks, owners, told, owners[:, None], dict(self.shards))
            )
        shard = int(address.removeprefix("shard-"))
        self.asked.append((shard, method))
        if shard in self.dead:
            raise Unavailable("dead")
        if request.header.target != 100 + shard:
            raise WrongIncarnation("another life")
        if method == "Shard.Ranks":
            return RanksReply(commits=RankCommits(steps=pack(np.array([shard, 0], np.uint64))), highest=shard // 2)
        mine = self.history[self.adopted[shard]] == shard
        waits = bool((self.ready[mine] > asyncio.get_running_loop().time()).any())
        return PullReply(waits=waits, lowest=STEP, highest=self.highest, generation=self.adopted[shard])

    async def close(self):
        pass

    def commit(self):
        commit = Commit(0, STEP, 10, News())
        return pull(self.member, self.member.routes, {}, {}, None, commit=commit)

    def times(self, method="Shard.Pull"):
        return [self.asked.count((shard, method)) for shard in sorted(self.shards)]


def test_every_shard_is_told_once():
    world = World()
    rig.run(world.commit())
    assert world.times() == [1, 1, 1]


def test_who_has_blocks_past_the_step_is_further():
    world = World()
    world.highest = STEP + 1
    with pytest.raises(Behind):
        rig.run(world.commit())


def test_a_shard_that_has_not_adopted_what_gave_it_blocks_is_asked_again():
    world = World()
    world.record(0, 1)

    async def body():
        await world.member.refresh()
        committing = asyncio.ensure_future(world.commit())
        await asyncio.sleep(0.2)
        assert not committing.done()
        # It got nothing by that record.
        assert world.times()[2] == 1
        world.adopted[1] = 2
        begun = asyncio.get_running_loop().time()
        await committing
        return asyncio.get_running_loop().time() - begun

    late, _ = rig.run(body())
    assert late <= 0.05
    assert 5 <= world.times()[1] <= 20


def test_a_block_that_was_reported_stays_reported():
    """By the one that had it, to whom it belonged then; the one that gets it afterwards need not be asked again."""
    world = World()
    real = world._answer

    def answer(address, method, request):
        reply = real(address, method, request)
        if address == "shard-2":
            world.move(0, 1)
            return real(address, method, request)
        return reply

    world._answer = answer
    rig.run(world.commit())
    assert world.member.routes.generation == 2
    assert [world.times()[0], world.times()[1]] == [1, 1]


def test_a_block_that_nobody_spoke_of_is_not_forgotten():
    """It went from a shard that answers afterwards to one that has answered before."""
    world = World()
    real = world._answer
    at_step = []

    def answer(address, method, request):
        if address == "shard-0" and not at_step:
            assert world.times()[1] == 1
            world.move(0, 1)
            world.ready[0] = asyncio.get_running_loop().time() + 3.0
            at_step.append(world.ready[0])
        return real(address, method, request)

    async def call(address, method, request, *, timeout_seconds):
        await asyncio.sleep(0.01 if address == "shard-0" else 0.0)
        return world._answer(address, method, opened(request)[0])

    world._answer, world.call = answer, call

    async def body():
        await world.commit()
        return asyncio.get_running_loop().time()

    ended, _ = rig.run(body())
    assert ended >= at_step[0]
    assert world.times()[1] > 1


def test_a_new_shard_is_told_too():
    world = World()
    world.shards[3] = ShardAddress(3, "shard-3", 103)
    world.adopted[3] = 1
    world.move(0, 3)
    rig.run(world.commit())
    assert world.times()[3] == 1
    assert set(world.member.routes.shards) == {0, 1, 2, 3}


def test_a_shard_that_is_gone_is_not_waited_for():
    world = World()
    world.dead = {2}

    async def body():
        committing = asyncio.ensure_future(world.commit())
        await asyncio.sleep(3)
        assert not committing.done()
        for block in np.flatnonzero(world.owners == 2).tolist():
            world.move(block, 0)
        del world.shards[2], world.adopted[2]
        await asyncio.sleep(1.1)
        assert committing.done()
        await committing

    rig.run(body())
    assert set(world.member.routes.shards) == {0, 1}


def test_a_shard_without_blocks_that_is_gone_is_not_waited_for_though_no_record_changed():
    world = World()
    world.shards[3] = ShardAddress(3, "shard-3", 103)
    world.member.routes = make_routes(world.job.layout, 1, world.owners.copy(), dict(world.shards))
    world.dead = {3}

    async def body():
        committing = asyncio.ensure_future(world.commit())
        await asyncio.sleep(3)
        assert not committing.done()
        del world.shards[3]
        await asyncio.wait_for(committing, 1.1)

    rig.run(body())


def test_blocks_without_an_owner_are_waited_for():
    world = World()
    world.move(0, -1)

    async def body():
        committing = asyncio.ensure_future(world.commit())
        await asyncio.sleep(3)
        assert not committing.done()
        world.move(0, 1)
        await committing

    rig.run(body())
    assert max(world.times()) < 30


class Ranks(World):
    """Shards at the step once both of two ranks have told them of it. ``first``: what (rank, shard) is told the first time."""

    def __init__(self, first):
        super().__init__(2)
        self.first = first
        self.told = {shard: set() for shard in self.shards}

    def _answer(self, address, method, request):
        shard = int(address.removeprefix("shard-")) if address != "coordinator" else -1
        if error := self.first.pop((request.rank - 1, shard), None) if shard >= 0 else None:
            raise error
        if shard >= 0:
            self.told[shard].add(request.rank)
            self.ready[:] = [0 if len(self.told[owner]) == 2 else 1e18 for owner in self.owners]
        return super()._answer(address, method, request)

    def committing(self, *ranks):
        news, routes = News(), self.member.routes
        commits = [Commit(rank, STEP, 10, news) for rank in ranks]
        return asyncio.gather(*(pull(self.member, routes, {}, {}, None, commit=each) for each in commits))


def test_ranks_whose_words_to_different_shards_were_lost_do_not_wait_for_each_other():
    world = Ranks({(0, 0): Unavailable("lost"), (1, 1): Unavailable("lost")})

    async def body():
        await asyncio.wait_for(world.committing(0, 1), 5)

    rig.run(body())
    assert world.told == {0: {1, 2}, 1: {1, 2}}
    assert sum(world.times()) < 60


def test_ranks_that_waited_at_different_shards_when_others_came_do_not_wait_for_each_other():
    """Each was told a placement without the shard at which the other one waits, and both hear of the newest meanwhile."""
    world = Ranks({})
    layout, news = world.job.layout, News()
    world.move(0, int(world.owners[0]))
    world.member.routes = make_routes(layout, 2, world.owners.copy(), dict(world.shards))

    def alone(shard):
        owners = np.full(world.blocks, shard, np.int32)
        return make_routes(layout, 1, owners, {shard: world.shards[shard]})

    async def body():
        commits = [pull(world.member, alone(n), {}, {}, None, commit=Commit(n, STEP, 10, news)) for n in (0, 1)]
        await asyncio.wait_for(asyncio.gather(*commits), 5)

    rig.run(body())
    assert world.told == {0: {1, 2}, 1: {1, 2}}
    assert sum(world.times()) < 60


def test_what_nothing_can_mend_is_raised_though_another_shard_waits():
    world = Ranks({(0, 0): Malformed("other samples than before")})

    async def body():
        with pytest.raises(Malformed, match="other samples"):
            await asyncio.wait_for(world.committing(0), 5)

    rig.run(body())


def test_an_id_in_another_life_has_reported_nothing():
    routes = World().member.routes
    commit = Commit(0, STEP, 10, News())
    assert commit.missing(routes) == list(routes.shards.values())
    for shard in routes.shards.values():
        commit._reported[shard] = 1
    assert commit.missing(routes) == []
    other = ShardAddress(2, "elsewhere", 999)
    shards = {**routes.shards, 2: other}
    assert commit.missing(make_routes(routes.layout, 1, routes.owners, shards)) == [other]


@pytest.mark.parametrize("seed", range(60))
def test_whatever_moves_every_block_was_reported(seed):
    """Shards adopt in their own time: who gets a block before who gives it. A block is at the step at some time of its own."""
    world = World(4, seed=seed, latency=0.01)
    rng = random.Random(seed)

    async def tell(shard, generation, seconds):
        await asyncio.sleep(seconds)
        world.adopted[shard] = max(world.adopted[shard], generation)

    async def moving():
        telling = []
        for _ in range(rng.randrange(1, 30)):
            await asyncio.sleep(rng.random() * 0.02)
            block = rng.randrange(world.blocks)
            giver, taker = int(world.owners[block]), rng.randrange(4)
            world.record(block, taker)
            first = rng.random() * 0.01
            for shard in world.shards:
                later = rng.random() * 0.02
                seconds = {taker: first, giver: first + later}.get(shard, later)
                telling.append(asyncio.ensure_future(tell(shard, world.generation, seconds)))
        await asyncio.gather(*telling)

    async def body():
        now = asyncio.get_running_loop().time
        world.ready = now() + np.array([rng.random() ** 4 * 0.4 for _ in range(world.blocks)])
        stop = asyncio.ensure_future(moving())
        await world.commit()
        assert (world.ready <= now()).all(), "a block was not at the step, and nobody had said so"
        late = now() - world.ready.max()
        await stop
        return late

    rig.run(body())


def test_a_successor_asks_all_that_are_there_and_nobody_who_left():
    world = World()
    world.dead = {2}
    world.shards[5] = ShardAddress(5, "shard-5", 105)
    world.adopted[5] = 1

    async def body():
        asking = asyncio.ensure_future(Client(world.member).latest_step(0))
        await asyncio.sleep(3)
        assert not asking.done()
        for block in np.flatnonzero(world.owners == 2).tolist():
            world.move(block, 0)
        del world.shards[2], world.adopted[2]
        return await asking

    assert rig.run(body())[0] == 5
    # Who got blocks of the dead one is asked again: it may know more now.
    assert world.times("Shard.Ranks")[0] == 2
    assert world.times("Shard.Ranks")[1] == 1


def test_a_rank_that_a_shard_does_not_know_is_malformed():
    world = World()
    with pytest.raises(Malformed, match="answered commits of 2 ranks, asked for rank 2"):
        rig.run(Client(world.member).latest_step(2))


def test_a_placement_that_no_shard_has_spoken_of_is_not_asked_for():
    world = World()
    world.record(0, 1)
    rig.run(world.commit())
    # Nobody knows of the newer record, so by all that was said the block is with its old owner.
    assert world.member.routes.generation == 1
