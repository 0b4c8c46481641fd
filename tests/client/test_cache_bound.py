# SPDX-License-Identifier: Apache-2.0
"""Workers with caches beside a table that others change: what a batch computes on lacks ``bound`` updates of a row at most.

Every value that a row takes is a number of its own, so a row that a worker uses tells which update it was of. Pulls of one
worker overlap, as prefetched ones do. The bugs planted below are those that the search has to find.
"""

from itertools import count

import numpy as np
import pytest

from oarlock.client.cache import RowCache
from oarlock.embedding import cold
from oarlock.embedding.descriptor import LEFT
from oarlock.embedding.keys import KeySorter
from oarlock.embedding.make import make_table
from oarlock.embedding.spec import CacheSpec, Eviction, Guard, Initializer, OptimizerSpec, Part, TableSpec

DIM, KEYS, WORKERS, TICKS = 2, 60, 3, 6
SGD, ZEROS = OptimizerSpec("sgd"), Initializer("zeros")
KINDS = {
    "plain": {"optimizer": SGD, "initializer": ZEROS},
    "undo": {"optimizer": SGD, "initializer": ZEROS, "guard": Guard(undo=2)},
    "expanding": {"parts": (Part(1, SGD, ZEROS), Part(1, SGD, ZEROS)), "expand_score": 0.05},
    "spilling": {"optimizer": SGD, "initializer": ZEROS, "memory_bytes": 1},
}


class Stale(AssertionError):
    """A row was used that lacks more than it may, or is of a life that is over."""


class World:
    """The table, what every row was before (the values of its life, the latest last), and workers with pulls under way."""

    def __init__(self, seed, *, bound, kind, policy, folder):
        spec = TableSpec(
            "t", DIM, blocks=4, eviction=Eviction(age=TICKS), cache=CacheSpec(12, bound, policy), **KINDS[kind]
        )
        self.table = make_table(spec, seed=1, spill_folder=folder)
        for block in range(4):
            self.table.adopt(block)
        self.rng, self.bound, self.spec = np.random.default_rng(seed), bound, spec
        self.sorter, self.ranks = KeySorter(), np.arange(4, dtype=np.int32)
        self.lives, self.values, self.tick, self.hits = {}, count(1), 0, 0
        self.caches = [RowCache(spec.cache, DIM) for _ in range(WORKERS)]
        self.under_way = [[] for _ in range(WORKERS)]

    def draw(self):
        keys = (self.rng.random(self.rng.integers(1, 15)) ** 2 * KEYS).astype(np.uint64)
        return self.sorter.build(keys, self.table.salt, self.table.bits, self.ranks)

    def push(self):
        """Give each row a value that none had before, and all of its parts the same."""
        self.tick += 1
        found = self.draw()
        old = [self.lives.get(key, [0])[-1] for key in found.keys.tolist()]
        new = [next(self.values) for _ in old]
        gradients = np.repeat(np.array(old, np.float32)[:, None] - np.array(new, np.float32)[:, None], DIM, axis=1)
        self.table.push(found.keys, found.blocks, found.counts, gradients, rate=1.0, step=self.tick)
        for key, value in zip(found.keys.tolist(), new, strict=True):
            self.lives.setdefault(key, []).append(value)

    def undo(self):
        keys = self.draw().keys
        for key, n in zip(keys.tolist(), self.table.undo(keys, steps=1).tolist(), strict=True):
            if n:
                out = np.array(self.table.explain(key)["weights"])
                self.lives[key].append(int(out[0]))

    def sweep(self):
        for block in range(4):
            wrapped = False
            while not wrapped:
                wrapped = self.table.sweep(block, tick=self.tick).wrapped
        there = {key for block in range(4) for key in self.table.export_block(block).keys.tolist()}
        self.lives = {key: life for key, life in self.lives.items() if key in there}

    def ask(self, worker):
        """Begin a pull; its answer is made at once, as it may be, and comes later."""
        found = self.draw()
        out = np.full((len(found.keys), DIM), np.nan, np.float32)
        kept = self.caches[worker].versions_of(found.keys, out)
        sent = self.table.pull_newer(found.keys, found.blocks, found.counts, kept, bound=self.spec.cache.bound)
        allowed = [self.lives.get(key, [0])[-1 - self.bound :] for key in found.keys.tolist()]
        self.under_way[worker].append((found.keys, kept, sent, allowed, out))

    def use(self, worker):
        keys, kept, sent, allowed, out = self.under_way[worker].pop(0)
        self.caches[worker].merge(keys, kept, sent.positions, sent.rows, sent.versions, out)
        self.hits += len(keys) - len(sent.positions)
        for key, values, row in zip(keys.tolist(), allowed, out.tolist(), strict=True):
            if row not in [[value] * DIM for value in values]:
                raise Stale(f"key {key} is used as {row}, allowed are {values}")

    def run(self, steps):
        for _ in range(steps):
            worker, what = int(self.rng.integers(WORKERS)), self.rng.random()
            if what < 0.3:
                self.push()
            elif what < 0.33:
                self.sweep()
            elif what < 0.36 and self.spec.guard.undo:
                self.undo()
            elif what < 0.7 and len(self.under_way[worker]) < 3:
                self.ask(worker)
            elif self.under_way[worker]:
                self.use(worker)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("bound", "policy"), [(0, "lru"), (3, "lfu"), (1, "lru")])
def test_no_batch_computes_on_rows_that_lack_more_than_the_bound(tmp_path, monkeypatch, seed, kind, bound, policy):
    monkeypatch.setattr(cold, "LEAST_ROWS", 4)
    world = World(seed, bound=bound, kind=kind, policy=policy, folder=tmp_path)
    try:
        world.run(1500)
        assert world.hits > 100
        assert min(cache.evictions for cache in world.caches) > 0
        assert world.table.evicted > 0
        assert kind != "spilling" or world.table._cold.file.counts.records_read > 0
    finally:
        world.table.close()


def off_by_one(world):
    """The owner allows one update more than was said."""
    world.bound -= 1


def no_version(world):
    """An update leaves the version as it was."""
    real = world.push

    def push():
        before = [world.table.export_block(block) for block in range(4)]
        real()
        for block, old in enumerate(before):
            now = world.table.export_block(block)
            counters, known = now.counters.copy(), dict(zip(old.keys.tolist(), old.counters[:, -1], strict=True))
            counters[:, -1] = [known.get(key, counters[i, -1]) for i, key in enumerate(now.keys.tolist())]
            world.table.import_block(block, now._replace(counters=counters), version=world.table.version(block))

    world.push = push


def begin_at_one(world):
    """A row that was evicted and is created again has version 1 again."""
    real = world.sweep

    def sweep():
        real()
        world.table.descriptors[:, LEFT] = 0

    world.sweep = sweep


def version_of_later(world):
    """An answer tells a version that its row has not reached."""
    real = world.table.pull_newer

    def pull_newer(*request, **more):
        found = real(*request, **more)
        return found._replace(versions=found.versions + (found.versions > 0).astype(np.uint32))

    world.table.pull_newer = pull_newer


def keeps_the_old(world):
    """A cache takes the version that came, but not the row."""
    for cache in world.caches:

        def merge(keys, kept, positions, rows, versions, out, cache=cache, real=cache.merge):
            before = out.copy()
            real(keys, kept, positions, rows, versions, out)
            old = kept[positions] > 0
            again = np.where(old[:, None], before[positions], rows)
            real(keys, np.ones_like(kept), positions, again, versions, out.copy())

        cache.merge = merge


@pytest.mark.parametrize("plant", [off_by_one, no_version, begin_at_one, version_of_later, keeps_the_old])
def test_a_planted_bug_is_found(tmp_path, plant):
    found = 0
    for seed in range(4):
        world = World(seed, bound=2, kind="plain", policy="lru", folder=tmp_path)
        plant(world)
        try:
            world.run(1500)
        except Stale:
            found += 1
    assert found >= 3
