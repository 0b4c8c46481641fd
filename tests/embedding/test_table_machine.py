# SPDX-License-Identifier: Apache-2.0
"""A table against a dict, under random sequences of everything that can be done to it."""

import embedding_reference as reference
import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from oarlock.embedding.content import BlockRows
from oarlock.embedding.refusal import GRADIENT_LIMIT
from oarlock.embedding.spec import Initializer, OptimizerSpec, TableSpec
from oarlock.embedding.table import PushCounts, Table

BITS, DIM, SEED = 2, 2, 11
POOL = [0, reference.WORD, 1 << 63, *range(1, 60)]
KEYS = st.lists(st.sampled_from(POOL), max_size=40, unique=True)
NUMBERS = st.floats(-4, 4, width=32) | st.sampled_from([float("nan"), float("inf"), 1e30])


class TableMachine(RuleBasedStateMachine):
    @initialize(
        name=st.sampled_from(["sgd", "adagrad", "adam"]), kind=st.sampled_from(["normal", "uniform", "constant"])
    )
    def start(self, name, kind):
        self.spec = TableSpec("m", DIM, OptimizerSpec(name), Initializer(kind, 0.5, 0.1), 1 << BITS)
        self.table = Table(self.spec, seed=SEED)
        self.model = {}
        for block in range(1 << BITS):
            self.table.adopt(block)

    def grouped(self, keys):
        owned = set(self.table.owned.tolist())
        keys = [key for key in keys if reference.block("m", BITS, key) in owned]
        return reference.group("m", BITS, keys)

    def row(self, key):
        return self.model.get(key) or (
            reference.first_row(self.spec, SEED, key),
            reference.first_state(self.spec.optimizer, DIM),
        )

    @rule(keys=KEYS, data=st.data())
    def push(self, keys, data):
        keys, _, blocks, counts = self.grouped(keys)
        flat = data.draw(st.lists(NUMBERS, min_size=len(keys) * DIM, max_size=len(keys) * DIM))
        gradients = np.array(flat, np.float32).reshape(len(keys), DIM)
        self.table.check(keys, blocks, counts, unique=True)
        found = self.table.push(keys, blocks, counts, gradients, rate=0.125)
        applied = created = 0
        for key, gradient in zip(keys.tolist(), gradients, strict=True):
            if (np.abs(gradient) < np.float32(GRADIENT_LIMIT)).all():
                applied += 1
                created += key not in self.model
                weights, state = self.row(key)
                with np.errstate(over="ignore"):
                    reference.update(self.spec.optimizer, weights, state, gradient, 0.125)
                self.model[key] = weights, state
        assert found == PushCounts(applied, created, len(keys) - applied)

    @rule(keys=KEYS)
    def pull(self, keys):
        keys, _, blocks, counts = self.grouped(keys)
        out = np.full((len(keys), DIM), np.nan, np.float32)
        assert self.table.pull(keys, blocks, counts, out) == sum(key in self.model for key in keys.tolist())
        assert out.tobytes() == b"".join(self.row(key)[0].tobytes() for key in keys.tolist())

    @rule(block=st.integers(0, (1 << BITS) - 1))
    def drop_or_adopt(self, block):
        if block in self.table.owned:
            self.table.drop(block)
            self.model = {key: row for key, row in self.model.items() if reference.block("m", BITS, key) != block}
        else:
            self.table.adopt(block)

    @rule(block=st.integers(0, (1 << BITS) - 1), keys=KEYS, value=st.floats(-2, 2, width=32))
    def replace(self, block, keys, value):
        keys = np.array([key for key in keys if reference.block("m", BITS, key) == block], np.uint64)
        weights = np.full((len(keys), DIM), value, np.float32)
        state = np.full((len(keys), self.table.state_columns), 1, np.float32)
        self.table.import_block(block, BlockRows(keys, weights, state))
        self.model = {key: row for key, row in self.model.items() if reference.block("m", BITS, key) != block}
        self.model |= {key: (w.copy(), s.copy()) for key, w, s in zip(keys.tolist(), weights, state, strict=True)}

    @rule(block=st.integers(0, (1 << BITS) - 1))
    def export_and_import(self, block):
        if block in self.table.owned:
            self.table.import_block(block, self.table.export_block(block))

    @invariant()
    def same_content(self):
        found = {}
        for block in self.table.owned.tolist():
            rows = self.table.export_block(block)
            assert len(set(rows.keys.tolist())) == len(rows.keys)
            for i, key in enumerate(rows.keys.tolist()):
                assert reference.block("m", BITS, key) == block
                found[key] = rows.weights[i].tobytes() + rows.state[i].tobytes()
        assert found == {key: weights.tobytes() + state.tobytes() for key, (weights, state) in self.model.items()}
        assert self.table.rows == len(found)


TestTable = TableMachine.TestCase
TestTable.settings = settings(
    max_examples=40 if reference.JIT else 8, stateful_step_count=20, deadline=None, derandomize=True
)
