# SPDX-License-Identifier: Apache-2.0
"""A table whose rows begin narrow against a dict, under random sequences of everything that can be done to it."""

import embedding_reference as reference
import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from oarlock.embedding.expanding import ExpandingTable
from oarlock.embedding.refusal import GRADIENT_LIMIT
from oarlock.embedding.spec import Admission, Eviction, Initializer, OptimizerSpec, Part, TableSpec
from oarlock.embedding.table import PushCounts

BITS, SEED = 2, 11
F = np.float32
POOL = [0, reference.WORD, 1 << 63, *range(1, 25)]
KEYS = st.lists(st.sampled_from(POOL), max_size=20, unique=True)
NUMBERS = st.floats(-4, 4, width=32) | st.sampled_from([float("nan"), float("inf"), 1e30])
BLOCKS = st.integers(0, (1 << BITS) - 1)
OPTIMIZERS = st.sampled_from(["sgd", "adagrad", "adam"])


class Row:
    """A row of the model: weights and state of each part that it has, by part's number, and its counters."""

    def __init__(self, machine, key):
        self.parts = {}
        self.shows, self.clicks, self.updated = F(0), F(0), 0
        self.expand(machine, key, 0)

    def expand(self, machine, key, part):
        spec = machine.spec
        begin = sum(p.width for p in spec.parts[:part])
        i = spec.parts[part].initializer
        weights = [
            reference.first_value(SEED, "m", key, begin + c, i.kind, i.mean, i.scale)
            for c in range(spec.parts[part].width)
        ]
        state = reference.first_state(spec.parts[part].optimizer, len(weights))
        self.parts[part] = np.array(weights, F), state

    def score(self, nonclick, click):
        return float(F(self.shows - self.clicks)) * nonclick + float(self.clicks) * click


class ExpandingMachine(RuleBasedStateMachine):
    @initialize(
        names=st.tuples(OPTIMIZERS, OPTIMIZERS, OPTIMIZERS),
        kind=st.sampled_from(["normal", "uniform", "constant"]),
        admission=st.sampled_from(
            [Admission(nonclick=0.25), Admission("count", occurrences=3, nonclick=0.25, click=2.0)]
        ),
        absent=st.sampled_from(["first", "zeros"]),
        eviction=st.sampled_from([Eviction(), Eviction(score=0.6, decay=0.5), Eviction(age=2)]),
    )
    def start(self, names, kind, admission, absent, eviction):
        parts = tuple(
            Part(w, OptimizerSpec(n), Initializer(kind, 0.5, 0.1)) for w, n in zip((1, 2, 1), names, strict=True)
        )
        self.spec = TableSpec(
            "m", 4, parts=parts, blocks=4, admission=admission, absent=absent, eviction=eviction, expand_score=1.0
        )
        self.table = ExpandingTable(self.spec, seed=SEED)
        self.model, self.waiting, self.step = {}, {}, 1
        for block in range(1 << BITS):
            self.table.adopt(block)

    def grouped(self, keys):
        owned = set(self.table.owned.tolist())
        keys = [key for key in keys if reference.block("m", BITS, key) in owned]
        return reference.group("m", BITS, keys)

    def clear(self, block):
        for held in (self.model, self.waiting):
            for key in [key for key in held if reference.block("m", BITS, key) == block]:
                del held[key]

    @rule(keys=KEYS, data=st.data(), counted=st.booleans())
    def push(self, keys, data, counted):
        keys, _, blocks, counts = self.grouped(keys)
        n = len(keys)
        flat = data.draw(st.lists(NUMBERS, min_size=n * 4, max_size=n * 4))
        gradients = np.array(flat, F).reshape(n, 4)
        occurrences, clicks, more = np.ones(n, np.uint32), np.zeros(n, F), {}
        if counted:
            occurrences[:] = data.draw(st.lists(st.integers(0, 6), min_size=n, max_size=n))
            clicks[:] = data.draw(st.lists(st.sampled_from([0, 0.5, 1]), min_size=n, max_size=n))
            more = {"occurrences": occurrences, "clicks": clicks}
        self.table.check(keys, blocks, counts, unique=True)
        found = self.table.push(keys, blocks, counts, gradients, rate=0.125, step=self.step, **more)
        expected = [0, 0, 0, 0]
        for key, gradient, shows, click in zip(keys.tolist(), gradients, occurrences.tolist(), clicks, strict=True):
            expected[self.push_one(key, gradient, shows, click, expected)] += 1
        assert found == PushCounts(*expected)
        self.step += 1

    def push_one(self, key, gradient, shows, click, expected):
        """Apply one key's gradient; return which count of PushCounts it belongs to."""
        admission = self.spec.admission
        if not (np.abs(gradient) < F(GRADIENT_LIMIT)).all():
            return 2
        if key not in self.model:
            total = self.waiting.pop(key, 0) + shows
            if admission.kind == "count" and total < admission.occurrences:
                self.waiting[key] = total
                return 3
            self.model[key] = Row(self, key)
            expected[1] += 1
        row = self.model[key]
        row.shows, row.clicks, row.updated = F(row.shows + F(shows)), F(row.clicks + click), self.step
        if row.score(admission.nonclick, admission.click) >= self.spec.expand_score and len(row.parts) == 1:
            for part in (1, 2):
                row.expand(self, key, part)
        begin = 0
        for number, part in enumerate(self.spec.parts):
            if number in row.parts:
                with np.errstate(over="ignore"):
                    reference.update(part.optimizer, *row.parts[number], gradient[begin : begin + part.width], 0.125)
            begin += part.width
        return 0

    @rule(keys=KEYS)
    def pull(self, keys):
        keys, _, blocks, counts = self.grouped(keys)
        out = np.full((len(keys), 4), np.nan, F)
        assert self.table.pull(keys, blocks, counts, out) == sum(key in self.model for key in keys.tolist())
        for key, line in zip(keys.tolist(), out, strict=True):
            row = self.model.get(key) or Row(self, key)
            expected = np.zeros(4, F)
            if key in self.model or self.spec.absent == "first":
                expected[0] = row.parts[0][0][0]
            if len(row.parts) > 1:
                expected[1:] = np.concatenate([row.parts[1][0], row.parts[2][0]])
            assert line.tobytes() == expected.tobytes()

    @rule(block=BLOCKS)
    def sweep(self, block):
        if block not in self.table.owned:
            return
        eviction, admission, gone = self.spec.eviction, self.spec.admission, []
        before = self.table.version(block)
        for key, row in list(self.model.items()):
            if reference.block("m", BITS, key) != block:
                continue
            leaves = bool(eviction.age) and self.step - row.updated > eviction.age
            if eviction.score and not leaves:
                row.shows, row.clicks = F(row.shows * F(eviction.decay)), F(row.clicks * F(eviction.decay))
                leaves = row.score(admission.nonclick, admission.click) < eviction.score
            if leaves:
                gone.append(key)
                del self.model[key]
        assert self.table.sweep(block, tick=self.step)[:2] == (len(gone), True)
        assert sorted(self.table.tombstones(block, since=before)[0].tolist()) == sorted(gone)

    @rule(block=BLOCKS)
    def drop_or_adopt(self, block):
        if block in self.table.owned:
            self.table.drop(block)
            self.clear(block)
        else:
            self.table.adopt(block)

    @rule(block=BLOCKS)
    def export_and_import(self, block):
        if block in self.table.owned:
            version = self.table.version(block)
            self.table.import_block(block, self.table.export_block(block), version=version)
            assert self.table.version(block) == version

    @invariant()
    def same_content(self):
        found, waiting = {}, {}
        for block in self.table.owned.tolist():
            rows = self.table.export_block(block)
            assert len(set(rows.keys.tolist())) == len(rows.keys)
            waiting |= dict(zip(rows.waiting.tolist(), rows.waited.tolist(), strict=True))
            for i, key in enumerate(rows.keys.tolist()):
                assert reference.block("m", BITS, key) == block
                score = rows.counters[i, -3:-1].copy().view(F)
                found[key] = rows.weights[i].tobytes(), rows.state[i].tobytes(), *score, rows.counters[i, -1]
        assert waiting == self.waiting
        expected = {}
        for key, row in self.model.items():
            weights, states = [], []
            for number, part in enumerate(self.spec.parts):
                empty = np.zeros(part.width, F), reference.first_state(part.optimizer, part.width)
                w, s = row.parts.get(number, empty)
                weights.append(w)
                states.append(s)
            whole = np.concatenate(weights).tobytes(), np.concatenate(states).tobytes()
            expected[key] = *whole, row.shows, row.clicks, len(row.parts) > 1
        assert found == expected
        assert (self.table.rows, self.table.expanded) == (
            len(expected),
            sum(len(row.parts) > 1 for row in self.model.values()),
        )


TestExpandingTable = ExpandingMachine.TestCase
TestExpandingTable.settings = settings(
    max_examples=40 if reference.JIT else 8, stateful_step_count=20, deadline=None, derandomize=True
)
