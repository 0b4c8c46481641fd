# SPDX-License-Identifier: Apache-2.0
"""A table against a dict, under random sequences of everything that can be done to it.

The model (``table_reference.py``) knows rows by key and nothing of blocks' memory; after every step the whole content of
the table, what is counted, versions and tombstones are compared with it, bit for bit.
"""

import tempfile
from collections import Counter
from pathlib import Path
from typing import ClassVar
from unittest import mock

import embedding_reference as reference
import numpy as np
import pytest
import table_reference
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from oarlock.embedding import cold
from oarlock.embedding.content import BlockRows
from oarlock.embedding.descriptor import ENTRIES, PENDING_KEYS, SPILLED_ROWS
from oarlock.embedding.policy import DTYPES
from oarlock.embedding.spec import Admission, CacheSpec, Eviction, Guard, Initializer, OptimizerSpec, Part, TableSpec
from oarlock.embedding.spill_file import SpillFile
from oarlock.embedding.table import PushCounts, Table

SEED = 11
RANGE = 400 if reference.JIT else 60
POOL = [0, reference.WORD, 1 << 63, *range(1, 60)]
KEYS = st.lists(st.sampled_from(POOL), max_size=30) | st.builds(
    lambda start, n, stride: [(start + i * stride) % RANGE for i in range(n)],
    st.integers(0, RANGE - 1),
    st.integers(0, RANGE // 2),
    st.sampled_from([1, 7]),
)
OPTIMIZERS = [
    OptimizerSpec("sgd"),
    OptimizerSpec("adagrad", initial=0.2),
    OptimizerSpec("adam"),
    OptimizerSpec("adamw", decay=0.1, bias="step"),
    OptimizerSpec("rowwise_adagrad", clip_value=0.5),
    OptimizerSpec("momentum", l2=0.1, l1=0.01, lower=-1.0, upper=1.0),
    OptimizerSpec("ftrl", l1=0.1, l2=0.1),
]
ADMISSIONS = [
    Admission(),
    Admission("count", 3),
    Admission("sketch", 3, capacity=60, windows=2),
    Admission("probability", probability=0.4),
    Admission("score", nonclick=0.2, click=0.7),
]
RULES = [
    Eviction(),
    Eviction(age=5),
    Eviction(occurrences=2),
    Eviction(norm=0.3),
    Eviction(score=0.9, decay=0.5),
    Eviction(age=9, occurrences=2, score=0.2, norm=0.1),
]
BUDGETS = [Eviction(max_bytes=2500), Eviction(max_bytes=4000, order="frequent"), Eviction(max_bytes=1, age=7)]


@st.composite
def specs(draw):
    """Draw a table that uses some of everything; what does not go together is never drawn together."""
    bound = draw(st.sampled_from(TableMachine.bounds))
    optimizer = draw(st.sampled_from(OPTIMIZERS))
    initializer = Initializer(draw(st.sampled_from(["normal", "uniform", "constant", "zeros"])), 0.5, 0.1)
    parts, dim = (), draw(st.sampled_from([1, 2, 3, 6]))
    if dim == 3 and draw(st.booleans()):
        parts = (Part(1, OptimizerSpec("ftrl"), Initializer("zeros")), Part(2, optimizer, initializer))
        optimizer, initializer = OptimizerSpec(), Initializer()
    return TableSpec(
        "m",
        dim,
        optimizer,
        initializer,
        draw(st.sampled_from([1, 4])),
        dtype=draw(st.sampled_from(DTYPES)),
        parts=parts,
        absent=draw(st.sampled_from(["first", "zeros"])),
        usage=draw(st.booleans()),
        admission=draw(st.sampled_from(ADMISSIONS)),
        eviction=draw(st.sampled_from(BUDGETS if bound == "budget" else RULES)),
        guard=Guard(draw(st.sampled_from([1e15, 2.0])), 4, draw(st.integers(1, 3)) if bound == "undo" else 0),
        memory_bytes=1 if bound == "spill" else 0,
        cache=draw(st.sampled_from([None, CacheSpec(1), CacheSpec(1, 2)])),
    )


def small_segments(folder, width, slack):
    return SpillFile(folder, width, limit_bytes=1 << 20, segment_bytes=8 * (-(-width // 8) * 8 + 8), slack=slack)


class TableMachine(RuleBasedStateMachine):
    seen: ClassVar[Counter] = Counter()
    bounds: ClassVar = ["none", "spill", "undo", "budget", "spill"]

    @initialize(spec=specs())
    def start(self, spec):
        self.patches = [
            mock.patch.object(cold, "LEAST_ROWS", 12),
            mock.patch.object(cold, "TIDY_RECORDS", 4),
            mock.patch.object(cold, "SpillFile", small_segments),
        ]
        for patch in self.patches:
            patch.start()
        self.folder = tempfile.TemporaryDirectory()
        self.spec, self.dim = spec, spec.dim
        self.table = Table(spec, seed=SEED, spill_folder=Path(self.folder.name))
        self.model = table_reference.Model(spec, SEED)
        for block in range(spec.blocks):
            self.table.adopt(block)
            self.model.adopt(block)

    def teardown(self):
        if hasattr(self, "table"):
            self.table.close()
            for patch in self.patches:
                patch.stop()
            assert list(Path(self.folder.name).iterdir()) == []
            self.folder.cleanup()

    def grouped(self, keys):
        return table_reference.group("m", self.model.bits, keys, self.model.versions)

    def count(self, what, n=1):
        self.seen[what] += n

    @rule(
        keys=KEYS,
        seed=st.integers(0, 99),
        step=st.integers(1, 20),
        bad=st.sampled_from([0, 0, np.nan, np.inf, -1e30, 2.0]),
        many=st.booleans(),
    )
    def push(self, keys, seed, step, bad, many):
        keys, blocks, counts, _ = self.grouped(keys)
        rng = np.random.default_rng(seed)
        gradients = rng.integers(-7, 8, (len(keys), self.dim)).astype(np.float32) / 4
        if bad and len(keys):
            gradients[rng.integers(len(keys)), rng.integers(self.dim)] = bad
        amounts = rng.integers(0, 4, len(keys)).astype(np.uint32) if many else np.ones(len(keys), np.uint32)
        clicks = (rng.random(len(keys)) * amounts).astype(np.float32) if many else np.zeros(len(keys), np.float32)
        aside = {"occurrences": amounts, "clicks": clicks} if many else {}
        if len(set(keys.tolist())) == len(keys):
            self.table.check(keys, blocks, counts, unique=True)
        else:
            self.count("repeated keys")
        refused = self.table.refused
        found = self.table.push(keys, blocks, counts, gradients, rate=0.125, step=step, **aside)
        total = Counter()
        at = 0
        for block, n in zip(blocks.tolist(), counts.tolist(), strict=True):
            self.trim(block, keys[at : at + n], gradients[at : at + n])
            for i in range(at, at + n):
                result = self.model.push(int(keys[i]), gradients[i], 0.125, step, int(amounts[i]), clicks[i])
                total[result] += 1
            self.model.versions[block] += 1
            at += n
        total["applied"] += total["created"]
        assert found == PushCounts(*(total[name] for name in PushCounts._fields))
        assert self.table.refused == refused + found.refused
        self.seen.update(total)

    def trim(self, block, keys, gradients):
        """Let the model evict for the byte budget, by how many rows there are and may be; the table must have done the same."""
        budget = self.spec.eviction.max_bytes
        gone, versions = self.table.tombstones(block, since=self.model.versions[block])
        most = max(16, budget // self.spec.blocks // self.table.row_bytes)
        wanted = [k for k, g in zip(keys.tolist(), gradients, strict=True) if not self.model.refuses(g)]
        while budget:
            rows = len(self.model.of(block))
            absent = sum(key not in self.model.rows for key in wanted)
            if absent == 0 or rows == 0 or rows + absent <= most:
                break
            self.model.versions[block] += 1
            version = self.model.versions[block]
            expected = self.model.oldest(block, rows + absent - most + most // 10)
            assert sorted(gone[versions == version].tolist()) == sorted(expected)
            self.model.graves[block] += [(key, version) for key in expected]
            self.count("trimmed", len(expected))
        assert not len(versions) or versions.max() <= self.model.versions[block]

    @rule(keys=KEYS)
    def pull(self, keys):
        keys, blocks, counts, _ = self.grouped(keys)
        out = np.full((len(keys), self.dim), np.nan, np.float32)
        assert self.table.pull(keys, blocks, counts, out) == sum(key in self.model.rows for key in keys.tolist())
        assert out.tobytes() == b"".join(self.model.pull(key).tobytes() for key in keys.tolist())
        self.newer(keys, blocks, counts)

    def newer(self, keys, blocks, counts):
        """Ask for what somebody lacks who keeps versions near those that rows have, by every bound."""
        for bound in range(self.spec.cache.bound + 1 if self.spec.cache else 0):
            self.newer_by(keys, blocks, counts, bound)

    def newer_by(self, keys, blocks, counts, bound):
        rng = np.random.default_rng(len(keys) + bound)
        now = [self.model.rows[key].version if key in self.model.rows else 0 for key in keys.tolist()]
        kept = np.maximum(np.array(now, np.int64) - rng.integers(-2, 4, len(keys)), 0).astype(np.uint32)
        found = self.table.pull_newer(keys, blocks, counts, kept, bound=bound)
        pairs = zip(now, kept.tolist(), strict=True)
        wanted = {i for i, (new, old) in enumerate(pairs) if old == 0 or new < old or new - old > bound}
        positions = found.positions.tolist()
        assert wanted <= set(positions)
        assert positions == sorted(set(positions))
        for i, row, version in zip(positions, found.rows, found.versions.tolist(), strict=True):
            assert row.tobytes() == self.model.pull(int(keys[i])).tobytes()
            unknown = self.spec.memory_bytes and version == 0  # in the file, and went there again at once
            assert unknown or (version == now[i] and i in wanted)
        self.count("kept", len(keys) - len(positions))
        self.count("newer", len(positions))

    @rule(block=st.integers(0, 3), tick=st.integers(0, 30), buckets=st.sampled_from([1, 3, 2048]))
    def sweep(self, block, tick, buckets):
        if block not in self.model.versions:
            return
        since, left, wrapped = self.model.versions[block], 0, False
        while not wrapped:
            gone, wrapped, *_ = self.table.sweep(block, tick=tick, buckets=buckets)
            left += gone
        expected = self.model.sweep(block, tick)
        gone, versions = self.table.tombstones(block, since=since)
        assert sorted(gone.tolist()) == sorted(expected)
        assert left == len(expected)
        self.model.graves[block] += zip(gone.tolist(), versions.tolist(), strict=True)
        self.model.versions[block] = self.table.version(block)
        assert versions.tolist() == sorted(versions.tolist())
        assert not len(gone) or since < versions[0] <= versions[-1] <= self.model.versions[block]
        self.count("swept", left)

    @precondition(lambda self: self.spec.guard.undo)
    @rule(keys=KEYS, trained=st.integers(0, 9), steps=st.integers(1, 3))
    def undo(self, keys, trained, steps):
        # Few of any keys have steps to undo.
        keys = [*keys, *sorted(key for key, row in self.model.rows.items() if row.ring)[:trained]]
        done = self.table.undo(np.array(keys, np.uint64), steps=steps).tolist()
        assert done == [self.model.undo(key, steps) for key in keys]
        for block in {self.model.block(key) for key, n in zip(keys, done, strict=True) if n}:
            self.model.versions[block] += 1
        self.count("undone", sum(done))

    @rule(block=st.integers(0, 3), version=st.integers(0, 9))
    def drop_or_adopt(self, block, version):
        if block in self.model.versions:
            self.table.drop(block)
            self.model.drop(block)
        elif block < self.spec.blocks:
            self.table.adopt(block)
            self.model.adopt(block)

    @rule(block=st.integers(0, 3), keys=KEYS, seed=st.integers(0, 9), version=st.integers(0, 9))
    def replace(self, block, keys, seed, version):
        if block >= self.spec.blocks:
            return
        keys = np.array(self.model.of(block, dict.fromkeys(keys)), np.uint64)
        rng = np.random.default_rng(seed)
        cut = len(keys) // 2 if self.spec.admission.kind == "count" else len(keys)
        weights = rng.normal(size=(cut, self.dim)).astype(np.float32)
        state = rng.random((cut, self.table.state_columns)).astype(np.float32)
        counters = rng.integers(0, 5, (cut if seed % 2 else 0, self.table.counters)).astype(np.uint32)
        if self.table.layout.shows >= 0 and len(counters):
            shows = slice(self.table.layout.shows, self.table.layout.shows + 2)
            counters[:, shows] = counters[:, shows].astype(np.float32).view(np.uint32)
        waited = rng.integers(1, 3, len(keys) - cut).astype(np.uint32)
        content = BlockRows(keys[:cut], weights, state, counters, keys[cut:], waited)
        self.table.import_block(block, content, version=version)
        self.model.import_rows(block, content, version)
        self.count("imported", cut)

    @rule(block=st.integers(0, 3), version=st.integers(0, 9))
    def export_and_import(self, block, version):
        if block in self.model.versions:
            content = self.table.export_block(block)
            self.table.import_block(block, content, version=version)
            before = self.model.content()
            self.model.import_rows(block, content, version)
            assert self.model.content() == before

    @rule(key=st.sampled_from(POOL) | st.integers(0, RANGE), tick=st.none() | st.integers(0, 30))
    def explain(self, key, tick):
        block, row = self.model.block(key), self.model.rows.get(key)
        if block not in self.model.versions:
            return
        found = self.table.explain(key, tick=tick)
        assert (found["key"], found["block"], found["present"]) == (key, block, row is not None)
        assert np.array(found["weights"], np.float32).tobytes() == self.model.pull(key).tobytes()
        if row is None:
            admission = self.spec.admission
            waited = self.model.waiting.get(key, 0)
            if admission.kind == "sketch":
                mix = np.array([reference.mix64(key ^ self.model.salt)], np.uint64)
                waited = int(self.model.sketches[block].estimate(mix)[0])
            needed = admission.occurrences if admission.kind in ("count", "sketch") else None
            assert found["admission"] == {"kind": admission.kind, "occurrences": waited, "needed": needed}
            return
        names = self.model.counter_names()
        assert found["occurrences"] == (row.occurrences if "occurrences" in names else None)
        assert found["last_update"] == (row.updated if "updated" in names else None)
        age = None if tick is None or "updated" not in names else max(0, tick - row.updated)
        assert found["age"] == age
        assert found["undo_kept"] == len(row.ring)
        assert found["row_version"] == (row.version if self.spec.cache else None)
        assert ("shows" in found) == ("shows" in names)
        if "shows" in names:
            assert (found["shows"], found["clicks"]) == (float(row.shows), float(row.clicks))

    @rule(block=st.integers(0, 3), back=st.integers(0, 5))
    def forget(self, block, back):
        if block in self.model.versions:
            until = self.model.versions[block] - back
            self.table.forget_tombstones(block, until=until)
            self.model.graves[block] = [grave for grave in self.model.graves[block] if grave[1] > until]
            assert back == 0 or until <= 0 or self.table.tombstones(block, since=until - 1) is None

    @invariant()
    def same_content(self):
        if not hasattr(self, "table"):
            return
        self.count("steps")
        found, waiting = {}, {}
        assert self.table.owned.tolist() == sorted(self.model.versions)
        for block, version in self.model.versions.items():
            assert self.table.version(block) == version
            rows = self.table.export_block(block)
            for i, key in enumerate(rows.keys.tolist()):
                assert self.model.block(key) == block
                assert key not in found
                found[key] = rows.weights[i].tobytes() + rows.state[i].tobytes() + rows.counters[i].tobytes()
            waiting |= zip(rows.waiting.tolist(), rows.waited.tolist(), strict=True)
            sketch = self.model.sketches.get(block)
            assert rows.sketch == (sketch.export() if sketch is not None else b"")
            keys, versions = self.table.tombstones(block, since=self.table.blocks[block].tombstones.floor)
            graves = sorted(zip(keys.tolist(), versions.tolist(), strict=True))
            assert graves == sorted(self.model.graves[block])
            words = self.table.descriptors[block]
            assert words[ENTRIES] == len(rows.keys) + len(rows.waiting)
            assert words[PENDING_KEYS] == len(rows.waiting)
            self.count("spilled", int(words[SPILLED_ROWS]))
        assert found == self.model.content()
        assert waiting == self.model.waiting
        assert self.table.rows == len(found)


TestTable = TableMachine.TestCase
TestTable.settings = settings(
    max_examples=60 if reference.JIT else 8, stateful_step_count=20, deadline=None, derandomize=True
)


def run_long(machine, examples):
    """Take ``examples`` times 100 steps with a machine, the same ones each time."""
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=100,
            deadline=None,
            derandomize=True,
            phases=[Phase.generate],  # making a failure shorter takes minutes: do it by hand
            suppress_health_check=list(HealthCheck),
        ),
    )


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_ten_thousand_steps_of_a_table_are_those_of_a_dict(monkeypatch):
    TableMachine.seen.clear()
    # Each has its share of the steps, whatever would be drawn.
    for bound in sorted({*TableMachine.bounds}):
        monkeypatch.setattr(TableMachine, "bounds", [bound])
        run_long(TableMachine, 50 if reference.JIT else 30)
    seen = TableMachine.seen
    assert seen["steps"] >= 10_000
    happened = ("created", "refused", "waiting", "repeated keys", "trimmed", "swept", "undone", "imported", "spilled")
    happened += ("kept", "newer")
    assert all(seen[what] > 50 for what in happened), seen
