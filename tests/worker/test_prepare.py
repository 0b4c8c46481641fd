# SPDX-License-Identifier: Apache-2.0
"""Batches: cut from splits by rule, with keys made distinct in the order in which the routes group blocks."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from oarlock.client.layout import Layout
from oarlock.client.router import Routes, ShardAddress, make_routes
from oarlock.data.columns import ColumnSpec, offsets_of
from oarlock.data.files import DataFile
from oarlock.data.order import row_order
from oarlock.data.splits import SplitPlan
from oarlock.embedding.hashing import block_of_mix, key_mix, table_salt
from oarlock.embedding.spec import TableSpec
from oarlock.nn import Linear, Model, binary_cross_entropy, concat, lookup
from oarlock.proto.errors import InvalidArgument, SpecMismatch
from oarlock.worker.prepare import Preparer
from oarlock.worker.recipe import Example
from oarlock.worker.splits import OpenSplit, read_split


def graph(dim: int = 3) -> Model:
    towers = [lookup("u", table="user", dim=2), lookup("i", table="item", dim=dim), lookup("j", table="item", dim=dim)]
    logit = Linear(1, name="s")(concat(towers))
    return Model(score=logit, loss=binary_cross_entropy(logit, label="y"))


def layout_of(model: Model, item_dim: int = 3) -> Layout:
    return Layout((TableSpec("user", 2, blocks=8), TableSpec("item", item_dim, blocks=16)), model.parameters)


def routes_of(layout: Layout, rng: np.random.Generator) -> Routes:
    owners = rng.integers(0, 3, layout.blocks).astype(np.int32)
    return make_routes(layout, 1, owners, {s: ShardAddress(s, f"s{s}", 1 + s) for s in range(3)})


def test_keys_are_distinct_shared_and_in_the_routes_order(rng: np.random.Generator) -> None:
    model = graph()
    layout = layout_of(model)
    preparer = Preparer(model, layout)
    for n in (1, 7, 200):
        routes = routes_of(layout, rng)
        raw = {"u": rng.integers(0, 50, n), "i": rng.integers(0, 60, n), "j": rng.integers(30, 90, n)}
        example = Example(n, {k: v.astype(np.uint64) for k, v in raw.items()}, {"y": np.ones(n, np.float32)})
        made = preparer.prepare([example], routes)
        assert set(made.keys) == {"user", "item"}
        assert made.samples == n
        assert made.feeds is example.feeds
        assert made.dense.shape == (layout.dense_size,)
        for name, table in (("u", "user"), ("i", "item"), ("j", "item")):
            np.testing.assert_array_equal(made.keys[table].keys[made.inverse[name]], raw[name])
        for number, (table, wanted) in enumerate([("user", raw["u"]), ("item", np.append(raw["i"], raw["j"]))]):
            found = made.keys[table]
            np.testing.assert_array_equal(np.sort(found.keys), np.unique(wanted))
            assert made.rows[table].shape == (len(found.keys), layout.tables[number].dim)
            bits = layout.tables[number].blocks.bit_length() - 1
            salt = np.uint64(table_salt(table))
            block = [block_of_mix(np.uint64(key_mix(salt, k)), bits) for k in found.keys]
            np.testing.assert_array_equal(np.repeat(found.blocks, found.counts), block)
            owners = routes.owners[layout.table_base[number] + found.blocks]
            assert sorted(zip(owners, found.blocks, strict=True)) == list(zip(owners, found.blocks, strict=True))


def test_a_batch_is_not_changed_by_the_next_one(rng: np.random.Generator) -> None:
    model = graph()
    layout = layout_of(model)
    preparer, routes = Preparer(model, layout), routes_of(layout, rng)

    def example(seed: int) -> Example:
        draw = np.random.default_rng(seed)
        return Example(50, {n: draw.integers(0, 40, 50).astype(np.uint64) for n in "uij"}, {})

    first = preparer.prepare([example(1)], routes)
    kept = {t: tuple(a.copy() for a in k) for t, k in first.keys.items()}
    preparer.prepare([example(2)], routes)
    for table, arrays in kept.items():
        for was, now in zip(arrays, first.keys[table], strict=True):
            np.testing.assert_array_equal(was, now)


def test_fields_keep_their_shape(rng: np.random.Generator) -> None:
    logit = Linear(1, name="s")(lookup("f", table="item", dim=3, fields=4))
    model = Model(score=logit, loss=binary_cross_entropy(logit, label="y"))
    layout = layout_of(model)
    keys = rng.integers(0, 9, (6, 4)).astype(np.uint64)
    made = Preparer(model, layout).prepare([Example(6, {"f": keys}, {})], routes_of(layout, rng))
    np.testing.assert_array_equal(made.keys["item"].keys[made.inverse["f"]], keys)


def test_a_recipe_that_does_not_fit_its_job_is_refused(rng: np.random.Generator) -> None:
    model = graph()
    with pytest.raises(SpecMismatch, match=r"'item' with dim 3, the job has it with dim 5"):
        Preparer(model, layout_of(model, item_dim=5))
    with pytest.raises(SpecMismatch, match=r"'user' with dim 2, the job has no such table"):
        Preparer(model, Layout((TableSpec("item", 3, blocks=2),), model.parameters))
    with pytest.raises(SpecMismatch, match="dense parameters"):
        Preparer(model, Layout(layout_of(model).tables, model.parameters[:1]))
    with pytest.raises(InvalidArgument, match="no keys for lookup 'i'"):
        Preparer(model, layout_of(model)).prepare(
            [Example(1, {"u": np.ones(1, np.uint64)}, {})], routes_of(layout_of(model), rng)
        )


def test_batches_of_a_group_are_joined_sample_by_sample(rng: np.random.Generator) -> None:
    model = graph()
    preparer, routes = Preparer(model, layout_of(model)), routes_of(layout_of(model), rng)

    def example(n: int, label: int, **more: int) -> Example:
        keys = {name: rng.integers(0, 40, n).astype(np.uint64) for name in "uij"}
        return Example(
            n, keys, {"y": np.ones(label, np.float32), **{k: np.ones(v, np.float32) for k, v in more.items()}}
        )

    three = [example(4, 4), example(3, 3), example(4, 4)]
    made = preparer.prepare(three, routes)
    assert (made.sizes, made.samples, made.feeds["y"].shape) == ((4, 3, 4), 11, (11,))
    for name, table in (("u", "user"), ("i", "item"), ("j", "item")):
        whole = np.concatenate([one.keys[name] for one in three])
        np.testing.assert_array_equal(made.keys[table].keys[made.inverse[name]], whole)
    # What has no row for each sample cannot be given to the batch that it belongs to.
    preparer.prepare([example(4, 1)], routes)
    with pytest.raises(InvalidArgument, match="gave 1 rows of 'y' for 4 samples: with accumulate > 1"):
        preparer.prepare([example(3, 3), example(4, 1)], routes)
    with pytest.raises(InvalidArgument, match="other inputs for one batch"):
        preparer.prepare([example(3, 3), example(3, 3, z=3)], routes)


@given(st.integers(1, 3000), st.integers(1, 400), st.integers(1, 9))
def test_batches_partition_a_split_evenly(size: int, batch_rows: int, accumulate: int) -> None:
    split = OpenSplit(0, 0, {"x": np.arange(size)}, size, batch_rows, accumulate)
    parts = [split.batch(n)["x"] for n in range(split.batches)]
    assert [n for group in range(split.groups) for n in split.batches_of(group)] == list(range(split.batches))
    assert all(len(split.batches_of(group)) == accumulate for group in range(split.groups - 1))
    np.testing.assert_array_equal(np.concatenate(parts), np.arange(size))
    lengths = {len(part) for part in parts}
    assert max(lengths) <= batch_rows
    assert max(lengths) - min(lengths) <= 1
    # No more batches than it takes.
    assert split.batches == -(-size // batch_rows)


class Memory:
    name = "memory"

    def read(self, plan: SplitPlan, columns: Any) -> Any:
        rows = np.arange(plan.first_row, plan.first_row + plan.rows)
        return {"x": rows, "y": rows * 2, "list": np.arange(99), offsets_of("list"): np.arange(plan.rows + 1)}


def test_a_splits_rows_stand_in_the_order_of_seed_epoch_and_split() -> None:
    plan = SplitPlan(1, DataFile("/f", 1, (10, 40)), 1, 2, 40)
    columns = [ColumnSpec("x", "key"), ColumnSpec("y", "key"), ColumnSpec("list", "key_list")]
    given = {"seed": 3, "epoch": 2, "split": 11}
    rows = read_split(Memory(), plan, columns, **given)
    assert set(rows) == {"x", "y"}
    np.testing.assert_array_equal(rows["x"], 10 + row_order(3, 2, 11, 40))
    np.testing.assert_array_equal(rows["y"], 2 * rows["x"])
    for name in given:
        other = read_split(Memory(), plan, columns, **{**given, name: 4})
        assert (other["x"] != rows["x"]).any()
        np.testing.assert_array_equal(np.sort(other["x"]), np.sort(rows["x"]))
