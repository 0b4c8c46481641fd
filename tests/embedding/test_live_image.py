# SPDX-License-Identifier: Apache-2.0
"""Live images and replayed sweeps, one thing at a time: what they hold, and what is refused."""

from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
import table_reference
from expanding_rig import SPEC as EXPANDING
from live_rig import SEED, image, keys_in

from oarlock.embedding.dense import DenseParameter
from oarlock.embedding.dense_block import DenseBlock
from oarlock.embedding.descriptor import ROWS, SPILLED_ROWS
from oarlock.embedding.live import NO_RECORDS, LiveBlock
from oarlock.embedding.make import make_table
from oarlock.embedding.policy import DTYPES
from oarlock.embedding.spec import Admission, CacheSpec, DenseSpec, Eviction, Guard, OptimizerSpec, TableSpec
from oarlock.proto.errors import Malformed, StalePlacement

ADAM = OptimizerSpec("adam")


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


@pytest.mark.parametrize("spec", [ONE, replace(EXPANDING, name="m", blocks=1)], ids=["ordinary", "expanding"])
def test_what_is_made_ready_changes_nothing_until_it_is_placed(spec):
    owner, copy = filled(spec, steps=4), filled(spec, steps=1)
    before = image(copy, 0)
    for content in copy.fill_live(0, owner.export_live(0)):
        content.free()
    ready = copy.fill_live(0, owner.export_live(0))
    assert image(copy, 0) == before != image(owner, 0)
    copy.place_live(0, ready)
    assert image(copy, 0) == image(owner, 0)


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


@pytest.mark.parametrize("how", ["block", "live"])
def test_a_block_that_comes_keeps_to_the_memory_budget(tmp_path, how):
    spec = TableSpec("m", 3, ADAM, blocks=4, memory_bytes=1)
    source = filled(replace(spec, memory_bytes=0), keys=2000, steps=1)
    table = make_table(spec, seed=SEED, spill_folder=tmp_path)
    for block in range(4):
        getattr(table, f"import_{how}")(block, getattr(source, f"export_{how}")(block))
        assert 0 < table.descriptors[block, ROWS] <= 64
        assert image(table, block) | {"version": 1} == image(source, block)
    assert table.rows == 2000
    table.close()


def test_a_block_comes_also_where_no_file_can_be_written():
    spec = TableSpec("m", 3, ADAM, blocks=1, memory_bytes=1)
    source = filled(replace(spec, memory_bytes=0), keys=500, steps=1)
    table = make_table(spec, seed=SEED)
    with mock.patch.object(table._cold, "_append", side_effect=OSError("disk full")):
        table.import_live(0, source.export_live(0))
    assert table.descriptors[0, ROWS] == 500
    table.close()
