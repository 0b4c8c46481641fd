# SPDX-License-Identifier: Apache-2.0
"""Two lives of one block: at its owner, and as a copy made from a live image. Loaded by conftest as ``live_rig``.

What the two tables have in common is the block and what is done to it. Other blocks, the order of rows, the size of the index,
the spill budget, views and what was pulled are different on purpose.
"""

import sys
from collections import Counter
from contextlib import ExitStack
from dataclasses import replace
from unittest import mock

import numpy as np

from oarlock.embedding import cold
from oarlock.embedding.descriptor import SPILLED_ROWS
from oarlock.embedding.digest import Digest
from oarlock.embedding.live import keys_of
from oarlock.embedding.make import make_table
from oarlock.embedding.spill_file import SpillFile

reference, table_reference = sys.modules["embedding_reference"], sys.modules["table_reference"]
SEED = 11
RANGE = 300 if reference.JIT else 60


def small_segments(folder, width, slack):
    return SpillFile(folder, width, limit_bytes=1 << 20, segment_bytes=8 * (-(-width // 8) * 8 + 8), slack=slack)


def sent(live, rng):
    """Return an image as it comes from the wire, its rows in another order."""

    def wire(array):
        return np.frombuffer(array.tobytes(), array.dtype).reshape(array.shape)

    live = live._replace(others=live.others[rng.permutation(len(live.others))])
    live = live._replace(records=live.records[rng.permutation(len(live.records))])
    parts = {name: wire(part) for name, part in live._asdict().items() if isinstance(part, np.ndarray)}
    return live._replace(**parts)


def image(table, block):
    """Return all of a block, in one order."""
    live = table.export_live(block)
    waiting = sorted(zip(live.waiting.tolist(), live.waited.tolist(), strict=True))
    records = [sorted(map(bytes, part)) for part in (live.records, live.others)]
    return {"left": live.left, "version": live.version, "sketch": live.sketch, "waiting": waiting, "records": records}


def digest(table, block):
    found = Digest()
    found.add_rows("m", block, *table.export_block(block))
    return str(found)


class Lives:
    """A block of ``spec`` at its owner, and from ``part`` on as a copy; what is done is drawn from ``seed``."""

    def __init__(self, spec, seed, seen=None):
        self.spec, self.rng = spec, np.random.default_rng(seed)
        self.seen = Counter() if seen is None else seen
        self.block = int(self.rng.integers(spec.blocks))
        self.bits = spec.blocks.bit_length() - 1
        self.step = 1
        self.views = 0
        self.copy = None

    def __enter__(self):
        self.stack = ExitStack()
        self.stack.enter_context(mock.patch.object(cold, "LEAST_ROWS", 12))
        self.stack.enter_context(mock.patch.object(cold, "TIDY_RECORDS", 4))
        self.stack.enter_context(mock.patch.object(cold, "SpillFile", small_segments))
        self.owner = self.table(self.spec)
        for block in range(self.spec.blocks):
            self.owner.adopt(block)
        return self

    def __exit__(self, *details):
        self.stack.close()

    def table(self, spec):
        made = make_table(spec, seed=SEED)
        self.stack.callback(made.close)
        return made

    def run(self, operations):
        for _ in range(int(self.rng.integers(1, operations))):
            self.operate()
        self.part()
        self.same("at once")
        for _ in range(int(self.rng.integers(1, operations))):
            self.operate()
        self.same("at the end")
        self.ask()
        if self.spec.guard.undo:
            self.undo()
            self.same("after an undo")

    def part(self):
        """Make the copy, on a shard that has other blocks, another budget, and perhaps an older copy."""
        spec, rng = self.spec, self.rng
        if not (spec.guard.undo or spec.eviction.max_bytes or spec.expand_score):
            spec = replace(spec, memory_bytes=int(rng.choice([0, 1, 3000])))
        copy = self.table(spec)
        for block in range(spec.blocks):
            if rng.random() < 0.4 or (block == self.block and rng.random() < 0.5):
                copy.adopt(block)
        keys, gradients, more = self.request()
        table_reference.push(copy, keys, gradients, **more)
        for block in range(spec.blocks):
            if block != self.block and rng.random() < 0.3:
                self.owner.drop(block)
        copy.import_live(self.block, sent(self.owner.export_live(self.block), rng))
        self.copy, self.since = copy, self.owner.version(self.block)

    def both(self):
        return [self.owner] if self.copy is None else [self.owner, self.copy]

    def operate(self):
        self.step += int(self.rng.integers(0, 3))
        kinds = (
            [self.push] * 6 + [self.sweep] * 2 + [self.look, self.view] + [self.undo] * 2 * (self.spec.guard.undo > 0)
        )
        kinds[int(self.rng.integers(len(kinds)))]()

    def request(self):
        rng, n = self.rng, int(self.rng.integers(1, RANGE // 2))
        high = int(rng.choice([20, RANGE // 3, RANGE]))
        keys = rng.integers(0, high, n) if rng.random() < 0.3 else rng.permutation(high)[:n]
        n = len(keys)
        gradients = rng.normal(size=(n, self.spec.dim)).astype(np.float32)
        if rng.random() < 0.2:
            gradients[rng.integers(n), rng.integers(self.spec.dim)] = rng.choice([np.nan, np.inf, -1e30, 2.0])
        more = {"step": self.step + int(rng.integers(0, 3))}
        if rng.random() < 0.7:
            more["occurrences"] = rng.integers(0, 4, n).astype(np.uint32)
            more["clicks"] = (rng.random(n) * more["occurrences"]).astype(np.float32)
        return keys, gradients, more

    def push(self):
        keys, gradients, more = self.request()
        before = self.owner.evicted
        for table in self.both():
            table_reference.push(table, keys, gradients, **more)
        if self.copy is not None:
            self.seen["trimmed"] += self.owner.evicted - before
            self.seen["pushed"] += 1

    def sweep(self):
        tick, buckets = self.step + int(self.rng.integers(0, 12)), int(self.rng.choice([1, 3, 2048]))
        for block in self.owner.owned.tolist():
            version = self.owner.version(block)
            done = self.owner.sweep(block, tick=tick, buckets=buckets)
            changed = len(done.gone) + len(done.decayed) > 0
            assert self.owner.version(block) == version + changed
            assert done.left == len(done.gone)
            if block == self.block and self.copy is not None and changed:
                self.copy.replay_sweep(block, done.gone, done.decayed)
                self.seen["gone"] += done.left
                self.seen["decayed"] += len(done.decayed)
        if self.copy is not None:
            for block in set(self.copy.owned.tolist()) - {self.block}:
                self.copy.sweep(block, tick=tick)

    def undo(self):
        keys, steps = self.rng.permutation(RANGE)[: RANGE // 3].astype(np.uint64), int(self.rng.integers(1, 4))
        _, _, _, mine = table_reference.group("m", self.bits, keys.tolist(), {self.block})
        done = [table.undo(keys, steps=steps)[mine].tolist() for table in self.both()]
        assert done[0] == done[-1]
        if self.copy is not None:
            self.seen["undone"] += sum(done[0])

    def look(self):
        """Pull at one of them, which changes what is cold there."""
        table = self.both()[-1 if self.rng.random() < 0.5 else 0]
        looked = self.rng.permutation(RANGE)[:20].tolist()
        keys, blocks, counts, _ = table_reference.group("m", self.bits, looked, set(table.owned.tolist()))
        table.pull(keys, blocks, counts, np.empty((len(keys), self.spec.dim), np.float32))

    def view(self):
        """Begin a view at one of them, which changes stamps there, and lets it save what changes."""
        tables = self.both()
        self.views += 1
        tables[int(self.rng.integers(len(tables)))].begin_view(self.views)

    def same(self, when):
        owner, copy, block = self.owner, self.copy, self.block
        assert image(owner, block) == image(copy, block), when
        assert digest(owner, block) == digest(copy, block)
        assert owner.version(block) == copy.version(block)
        graves = []
        for table in (owner, copy):
            keys, versions = table.tombstones(block, since=self.since)
            graves.append(sorted(zip(versions.tolist(), keys.tolist(), strict=True)))
        assert graves[0] == graves[1]
        live = owner.export_live(block)
        self.seen["rows"] += len(live.records)
        self.seen["others"] += len(live.others)
        self.seen["waiting"] += len(live.waiting)
        self.seen["left"] += live.left > 0
        self.seen["spilled"] += int(copy.descriptors[block, SPILLED_ROWS])

    def ask(self):
        """Compare what anybody may ask of the block."""
        keys, _, _, _ = table_reference.group("m", self.bits, list(range(RANGE)), {self.block})
        asked = [np.array(whole, np.int32) for whole in ([self.block], [len(keys)])]
        rows = [np.empty((len(keys), self.spec.dim), np.float32) for _ in range(2)]
        present = [t.pull(keys, *asked, out) for t, out in zip((self.owner, self.copy), rows, strict=True)]
        assert present[0] == present[1] == len(self.owner.export_live(self.block).records)
        assert rows[0].tobytes() == rows[1].tobytes()
        for key in keys[:: max(1, len(keys) // 8)].tolist():
            told = [table.explain(key, tick=self.step) for table in (self.owner, self.copy)]
            for one in told:
                one.pop("slot", None)
                one.pop("was_in", None)
            assert str(told[0]) == str(told[1])


def keys_in(live):
    """Return the keys: uint64[r] of an image's rows."""
    return keys_of(live.records)
