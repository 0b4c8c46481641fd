# SPDX-License-Identifier: Apache-2.0
"""Copies of blocks: what a live image makes goes on with its owner, bit for bit, whatever happens to both."""

from collections import Counter
from dataclasses import replace
from unittest import mock

import embedding_reference as reference
import numpy as np
import pytest
import table_machine
from expanding_rig import SPEC as EXPANDING
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from live_rig import Lives

from oarlock.embedding import upkeep
from oarlock.embedding.descriptor import ROWS
from oarlock.embedding.evict import evict_entries, list_counter
from oarlock.embedding.live import Live
from oarlock.embedding.optimizers import OPTIMIZERS
from oarlock.embedding.policy import DTYPES
from oarlock.embedding.spec import CacheSpec, Eviction, Guard, OptimizerSpec, TableSpec
from oarlock.embedding.table import Table
from oarlock.proto.errors import Malformed

ADAM = OptimizerSpec("adam")


@st.composite
def specs(draw):
    """Draw a table of any kind; one in four begins its rows narrow."""
    if draw(st.integers(0, 3)) == 0:
        return replace(
            EXPANDING,
            name="m",
            blocks=4,
            dtype=draw(st.sampled_from(DTYPES)),
            absent=draw(st.sampled_from(["first", "zeros"])),
            usage=draw(st.booleans()),
            admission=draw(st.sampled_from(table_machine.ADMISSIONS)),
            eviction=draw(st.sampled_from([rules for rules in table_machine.RULES if not rules.norm])),
            cache=draw(st.sampled_from([None, CacheSpec(1), CacheSpec(1, 2)])),
        )
    spec = draw(table_machine.specs())
    if not spec.parts and draw(st.booleans()):
        spec = replace(spec, optimizer=OptimizerSpec(draw(st.sampled_from(sorted(OPTIMIZERS)))))
    return spec


@settings(
    max_examples=250 if reference.JIT else 6, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
@given(spec=specs(), seed=st.integers(0, 1 << 32))
def test_a_copy_goes_on_with_its_owner(spec, seed):
    with Lives(spec, seed) as lives:
        lives.run(8)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_many_copies_go_on_with_their_owners_for_long():
    seen = Counter()

    @settings(
        max_examples=2500 if reference.JIT else 60,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(spec=specs(), seed=st.integers(0, 1 << 32))
    def live(spec, seed):
        with Lives(spec, seed, seen) as lives:
            lives.run(24)

    live()
    happened = "pushed", "trimmed", "gone", "decayed", "undone", "rows", "others", "waiting", "left", "spilled"
    assert all(seen[what] > 100 for what in happened), seen


BUDGET = TableSpec("m", 2, ADAM, blocks=4, eviction=Eviction(max_bytes=5000))
VERSIONED = TableSpec("m", 2, ADAM, blocks=4, eviction=Eviction(age=3), cache=CacheSpec(1, 2))


def differ(spec):
    """Tell whether any of many lives of ``spec`` ends with a copy that is none."""
    for seed in range(60):
        with Lives(spec, seed) as lives:
            try:
                lives.run(12)
            except (AssertionError, Malformed):
                return True
    return False


def forget_left(self, block, real=Live.export_live):
    return real(self, block)._replace(left=0)


def forget_old_values(self, block, real=Live.export_live):
    live = real(self, block)
    live.records[:, -self.layout.undo_pitch :] = 0
    return live


def budget_of_a_shard(self, block, live, real=Live.import_live):
    real(self, block, live)
    most = max(16, self.spec.eviction.max_bytes // len(self.blocks) // self.row_bytes)
    self._rules, self._most_rows = self._rules._replace(most=most), lambda: most


def trim_when_memory_is_short(self, spec, *, seed, spill_folder=None, real=Table.__init__):
    real(self, spec, seed=seed, spill_folder=spill_folder)
    self._rules, reserve = self._rules._replace(most=0), self._make_room

    def make_room(block, rows):
        have, most = int(self.descriptors[block, ROWS]), self._most_rows()
        if have + rows > most:
            self._make_way(block, rows, rows)
        reserve(block, rows)

    self._make_room = make_room


def oldest_by_place(descriptor, entries, shape, column, rows):
    keys, values, places = np.empty(entries, np.uint64), np.empty(entries, np.uint32), np.empty(entries, np.int64)
    found = int(list_counter(descriptor, shape, column, keys, values, places))
    chosen = np.argsort(values[:found], kind="stable")[:rows]
    evict_entries(descriptor, shape, places[chosen])
    return keys[chosen]


def sweep_by_place(self, block, gone, decayed):
    self.sweep(block, tick=5, buckets=3)


FAULTS = {
    "what versions evicted rows had is forgotten": (VERSIONED, (Live, "export_live", forget_left)),
    "old values are forgotten": (
        replace(BUDGET, eviction=Eviction(), guard=Guard(undo=2)),
        (Live, "export_live", forget_old_values),
    ),
    "the budget is that of the blocks stored here": (BUDGET, (Live, "import_live", budget_of_a_shard)),
    "rows go where there is no memory for more": (BUDGET, (Table, "__init__", trim_when_memory_is_short)),
    "which of equally old rows go depends on their places": (BUDGET, (upkeep, "oldest", oldest_by_place)),
    "a copy sweeps by itself": (VERSIONED, (upkeep.Upkeep, "replay_sweep", sweep_by_place)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_lives_of_a_block_and_its_copy_show_what_differs(fault):
    spec, (owner, name, broken) = FAULTS[fault]
    if spec.eviction.max_bytes and not reference.JIT:
        pytest.skip("no block gets so many rows while kernels are interpreted")
    with mock.patch.object(owner, name, broken):
        assert differ(spec)
