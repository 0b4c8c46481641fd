# SPDX-License-Identifier: Apache-2.0
"""Copies of blocks: what a live image makes goes on with its owner, bit for bit, whatever happens to both."""

from collections import Counter
from dataclasses import replace
from unittest import mock

import embedding_reference as reference
import numpy as np
import pytest
import table_machine
import table_reference
from expanding_rig import SPEC as EXPANDING
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from live_rig import SEED, Lives, image, keys_in

from oarlock.embedding import upkeep
from oarlock.embedding.dense import DenseParameter
from oarlock.embedding.dense_block import DenseBlock
from oarlock.embedding.descriptor import ROWS, SPILLED_ROWS
from oarlock.embedding.evict import evict_entries, list_counter
from oarlock.embedding.live import NO_RECORDS, Live, LiveBlock
from oarlock.embedding.make import make_table
from oarlock.embedding.optimizers import OPTIMIZERS
from oarlock.embedding.policy import DTYPES
from oarlock.embedding.spec import Admission, CacheSpec, DenseSpec, Eviction, Guard, OptimizerSpec, TableSpec
from oarlock.embedding.table import Table
from oarlock.proto.errors import Malformed, StalePlacement

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


# What the table says, one thing at a time


def filled(spec, *, steps=3, keys=60, folder=None):
    table = make_table(spec, seed=SEED, spill_folder=folder)
    for block in range(spec.blocks):
        table.adopt(block)
    rng = np.random.default_rng(4)
    for step in range(1, steps + 1):
        gradients = rng.normal(size=(keys, spec.dim)).astype(np.float32)
        amounts = rng.integers(1, 4, keys).astype(np.uint32)
        table_reference.push(table, range(keys), gradients, step=step, occurrences=amounts)
    return table


ONE = TableSpec(
    "m", 3, ADAM, blocks=1, eviction=Eviction(score=0.4, decay=0.5), guard=Guard(undo=2), cache=CacheSpec(1)
)


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_image_has_the_shape_that_it_is_said_to_have(dtype):
    spec = replace(ONE, dtype=dtype)
    table = filled(spec)
    live = table.export_live(0)
    assert live.records.shape == (60, table.live_bytes[0])
    assert live.records.dtype == np.uint8
    assert sorted(keys_in(live).tolist()) == list(range(60))
    assert (live.version, live.left, live.sketch, live.others.size, table.live_bytes[1]) == (3, 0, b"", 0, 0)
    other = make_table(spec, seed=SEED)
    other.import_live(0, live, version=41)
    assert other.version(0) == 41
    assert image(other, 0) | {"version": 3} == image(table, 0)
    assert other.tombstones(0, since=40) is None
    assert [len(part) for part in other.tombstones(0, since=41)] == [0, 0]


def test_narrow_rows_and_the_parts_of_their_own_come_apart():
    spec = replace(EXPANDING, name="m", blocks=1)
    table = filled(spec, steps=1)
    assert 0 < table.expanded < table.rows
    live = table.export_live(0)
    assert (len(live.records), len(live.others)) == (table.rows, table.expanded)
    assert (live.records.shape[1], live.others.shape[1]) == table.live_bytes
    other = make_table(spec, seed=SEED)
    other.import_live(0, live)
    assert (other.rows, other.expanded) == (table.rows, table.expanded)
    before = image(other, 0)
    wrong = {
        "no first one": live._replace(records=live.records[:1]),
        "comes twice": live._replace(others=live.others[[0, 0]]),
        "bytes where": live._replace(others=live.others[:, 4:]),
    }
    for message, bad in wrong.items():
        with pytest.raises(Malformed, match=message):
            other.import_live(0, bad)
    assert image(other, 0) == before


def test_an_image_that_is_none_is_refused_and_changes_nothing():
    table = filled(ONE)
    live = table.export_live(0)
    before = image(table, 0)
    ring = live.records.copy()
    at = 8 + table.layout.weight_bytes + 4 * (table.layout.state_columns + table.layout.recorded)
    ring[7, at : at + 4] = np.array([3 << 16], np.uint32).view(np.uint8)
    place = live.records.copy()
    place[7, at : at + 4] = np.array([1 << 16 | 2], np.uint32).view(np.uint8)
    one = np.ones(1, np.uint64)
    wrong = {
        "records of": live._replace(records=live.records[:, :-4]),
        "2 dimensions": live._replace(records=live.records[0]),
        "uint8": live._replace(records=live.records.view(np.uint32)),
        "comes twice": live._replace(records=live.records[[0, 1, 0]]),
        "undo ring": live._replace(records=ring),
        "old values": live._replace(records=place),
        "one part": live._replace(others=live.records),
        "left = -1": live._replace(left=-1),
        "is no version": live._replace(left=1 << 32),
        "waiting keys": live._replace(waiting=one, waited=np.ones(1, np.uint32)),
        "counts of them": live._replace(waiting=one),
        "sketch": live._replace(sketch=b"x"),
    }
    for message, bad in wrong.items():
        with pytest.raises(Malformed, match=message):
            table.import_live(0, bad)
    assert image(table, 0) == before
    four = filled(replace(ONE, blocks=4))
    with pytest.raises(Malformed, match="belongs to another block"):
        four.import_live(0, four.export_live(1))
    unversioned = filled(replace(ONE, cache=None))
    with pytest.raises(Malformed, match="left = 1"):
        unversioned.import_live(0, unversioned.export_live(0)._replace(left=1))
    table.drop(0)
    with pytest.raises(StalePlacement):
        table.export_live(0)


def test_a_block_without_rows_has_an_image_too():
    table = filled(ONE, steps=0)
    live = table.export_live(0)
    assert live.records.shape == (0, table.live_bytes[0])
    table.import_live(0, LiveBlock(NO_RECORDS, version=5))
    assert (table.version(0), table.rows) == (5, 0)


def test_rows_that_are_infinite_can_still_be_copied():
    table = filled(replace(ONE, optimizer=OptimizerSpec("sgd", l2=1.0)))
    with np.errstate(over="ignore", invalid="ignore"):  # where kernels are not compiled
        for _ in range(4):
            table_reference.push(table, [3], rate=9e14)
    assert not np.isfinite(table.export_block(0).weights).all()
    other = make_table(table.spec, seed=SEED)
    other.import_live(0, table.export_live(0))
    assert image(other, 0) == image(table, 0)


def test_a_sweep_is_replayed_whole_or_not_at_all():
    table = filled(ONE, steps=1)
    before = image(table, 0)
    keys = np.arange(4, dtype=np.uint64)
    none = keys[:0]
    wrong = [
        ("no row here", keys[:1], np.array([99], np.uint64)),
        ("no row here", np.array([99], np.uint64), keys[:1]),
        ("comes twice", keys[[1, 1]], none),
        ("comes twice", none, keys[[1, 1]]),
        ("comes twice", keys[:2], keys[1:]),
        ("uint64", keys.astype(np.int64), none),
    ]
    for message, gone, decayed in wrong:
        with pytest.raises(Malformed, match=message):
            table.replay_sweep(0, gone, decayed)
    table.replay_sweep(0, none, none)
    assert image(table, 0) == before
    table.replay_sweep(0, keys[:1], keys[1:])
    assert table.version(0) == before["version"] + 1
    assert table.tombstones(0, since=before["version"])[0].tolist() == [0]
    plain = filled(replace(ONE, eviction=Eviction(age=1)))
    with pytest.raises(Malformed, match="no score"):
        plain.replay_sweep(0, none, keys)
    with pytest.raises(StalePlacement):
        make_table(ONE, seed=SEED).replay_sweep(0, keys, none)


def test_a_slice_that_changes_nothing_is_no_operation():
    table = filled(replace(ONE, eviction=Eviction(score=1e-9, decay=1.0)))
    version = table.version(0)
    done = table.sweep(0, tick=1)
    assert (done.left, done.wrapped, len(done.gone), len(done.decayed)) == (0, True, 0, 0)
    assert table.version(0) == version


def test_a_sweep_that_is_done_stays_done_when_the_file_is_full(tmp_path):
    spec = TableSpec("m", 3, ADAM, blocks=1, memory_bytes=1, eviction=Eviction(age=1))
    table = filled(spec, keys=600, folder=tmp_path)
    table_reference.push(table, range(300), step=9)
    with mock.patch.object(table._cold, "spill_for", side_effect=OSError("disk full")):
        done = table.sweep(0, tick=9, buckets=10_000)
    assert (done.left, table.rows) == (300, 300)
    table.close()


@pytest.mark.parametrize("admission", [Admission(), Admission("count", 2)])
def test_rows_go_by_how_many_there_are_and_not_by_memory(admission):
    """A block with room for more rows than its budget lets as many go as one that has none."""
    spec = TableSpec("m", 2, ADAM, blocks=1, admission=admission, eviction=Eviction(max_bytes=8000))
    tables = [make_table(spec, seed=SEED) for _ in range(2)]
    for table in tables:
        table.adopt(0)
    tables[1].blocks[0].reserve(5000, 5000)
    for step in range(30):
        keys = np.random.default_rng(step).integers(0, 3000, 60)
        for table in tables:
            table_reference.push(table, keys, step=step, occurrences=np.full(60, 2, np.uint32))
            assert table.rows * table.row_bytes <= 8000
    assert tables[0].evicted == tables[1].evicted > 0
    assert image(tables[0], 0) == image(tables[1], 0)


def test_a_push_of_more_rows_than_the_budget_has_them_all():
    table = filled(TableSpec("m", 2, ADAM, blocks=1, eviction=Eviction(max_bytes=1)), keys=10, steps=1)
    table_reference.push(table, range(100), step=2)
    assert (table.rows, table.evicted) == (100, 10)


def test_a_dense_block_is_copied_with_all_that_it_holds():
    spec = DenseSpec("w", (7,), ADAM, slice=4)
    owner, copy = (DenseParameter(spec, seed=1) for _ in range(2))
    owner.adopt(1)
    owner.push_block(1, np.ones(3, np.float32), rate=0.1)
    live = owner.export_live(1)
    live.weights[0] = np.inf
    owner.import_live(1, live)
    copy.import_live(1, owner.export_live(1))
    for one in (owner, copy):
        one.push_block(1, np.full(3, 2, np.float32), rate=0.1, step=2)
    assert [part.tobytes() for part in owner.export_live(1)] == [part.tobytes() for part in copy.export_live(1)]
    with pytest.raises(Malformed, match="expected float32"):
        copy.import_live(1, DenseBlock(live.weights[:2], live.state))
    with pytest.raises(StalePlacement):
        copy.export_live(0)


def test_an_image_of_spilled_rows_is_that_of_rows_in_memory(tmp_path):
    spec = TableSpec("m", 3, ADAM, blocks=1, usage=True)
    memory, spilling = (filled(replace(spec, memory_bytes=n), keys=500, folder=tmp_path) for n in (0, 1))
    for table in (memory, spilling):
        for _ in range(6):
            table_reference.push(table, range(20), step=4)
    assert spilling.descriptors[0, SPILLED_ROWS] > 100
    assert image(memory, 0) == image(spilling, 0)
    spilling.close()
