# SPDX-License-Identifier: Apache-2.0
"""A fresh table is a dict of rows that changes, and whoever looks while it changes sees whole rows that were there."""

import threading

import embedding_reference as reference
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oarlock.embedding.fresh import NO_KEYS, Change, FreshTable
from oarlock.embedding.hashing import blocks_of, table_salt
from oarlock.embedding.spec import Initializer, TableSpec
from oarlock.proto.errors import InvalidArgument, Malformed

KEY = st.one_of(st.integers(0, (1 << 64) - 1), st.integers(0, 60))
DEEDS = st.lists(
    st.tuples(st.lists(KEY, max_size=30, unique=True), st.lists(KEY, max_size=30, unique=True)), max_size=8
)


def spec_of(dim=3, blocks=4, **more):
    return TableSpec("t", dim, initializer=Initializer("uniform", 0.5, 0.25), blocks=blocks, **more)


def grouped(spec, keys):
    """Return keys by block, and how many are of each."""
    keys = np.array(keys, np.uint64)
    found = np.empty(len(keys), np.int32)
    blocks_of(keys, table_salt(spec.name), spec.blocks.bit_length() - 1, found)
    return keys[np.argsort(found, kind="stable")], np.bincount(found, minlength=spec.blocks).astype(np.int32)


def change_of(spec, rows, gone):
    """Return the change that writes rows: {key: weights} of a float32 table once gone have left."""
    keys, counts = grouped(spec, list(rows))
    left, gone_counts = grouped(spec, gone)
    weights = np.array([rows[int(key)] for key in keys], np.float32).reshape(len(keys), spec.dim)
    blocks = np.arange(spec.blocks, dtype=np.int32)
    return Change(blocks, keys, weights.view(np.uint8).reshape(len(keys), 4 * spec.dim), counts, left, gone_counts)


def lookup(table, keys):
    out = np.full((len(keys), table.spec.dim), np.nan, np.float32)
    return out, table.lookup(np.array(keys, np.uint64), out)


@pytest.mark.parametrize(("dim", "blocks"), [(1, 1), (3, 4), (16, 2), (32, 1)])
@given(DEEDS, st.lists(KEY, max_size=80))
@settings(deadline=None)
def test_it_is_a_dict_that_changes(dim, blocks, deeds, wanted):
    spec = spec_of(dim, blocks)
    table, model = FreshTable(spec, seed=7), {}
    rng = np.random.default_rng(len(deeds))
    for put, gone in deeds:
        rows = {key: rng.random(dim, np.float32) for key in put}
        table.change(change_of(spec, rows, gone))
        model = {key: row for key, row in model.items() if key not in gone} | rows
        assert table.rows == len(model)
    wanted = [*wanted, *model, *(key for put, gone in deeds for key in (*put, *gone))]
    found, missing = lookup(table, wanted)
    assert missing == sum(key not in model for key in wanted)
    for key, row in zip(wanted, found, strict=True):
        first = [reference.first_value(7, "t", key, c, "uniform", 0.5, 0.25) for c in range(dim)]
        assert row.tobytes() == np.array(model.get(key, first), np.float32).tobytes()


def test_who_has_a_row_is_told_beside_it():
    spec = spec_of(blocks=4)
    table = FreshTable(spec, seed=7)
    rng = np.random.default_rng(0)
    rows = {int(key): rng.random(3, np.float32) for key in rng.permutation(1000)[:300]}
    gone = list(rows)[:100]
    table.change(change_of(spec, rows, []))
    table.change(change_of(spec, {}, gone))
    keys = np.arange(1000, dtype=np.uint64)
    out = np.empty((1000, 3), np.float32)
    present = table.find(keys, out)
    assert set(keys[present].tolist()) == set(rows) - set(gone)
    assert out.tobytes() == lookup(table, keys)[0].tobytes()
    held = [table.keys_of(block) for block in range(4)]
    assert sorted(np.concatenate(held).tolist()) == keys[present].tolist()
    assert len(table.find(keys[:0], out[:0])) == 0
    with pytest.raises(Malformed, match="for 2 rows"):
        table.find(keys[:2], out)


def test_a_block_is_replaced_whole_with_what_changed_meanwhile():
    spec = spec_of(blocks=1)
    table = FreshTable(spec, seed=7)
    old = change_of(spec, {key: [1, 1, 1] for key in range(50)}, [])
    table.change(old)
    whole = change_of(spec, {key: [2, 2, 2] for key in range(40)}, [])
    then = [change_of(spec, {key: [n, n, n] for key in range(n, n + 30)}, range(n)) for n in (3, 4)]
    table.replace(0, whole.keys, whole.rows, then)
    found, missing = lookup(table, range(60))
    assert missing == 4 + 60 - 40
    assert found[[4, 33, 34, 39]].tolist() == [[4] * 3, [4] * 3, [2] * 3, [2] * 3]


def test_what_is_wrong_changes_nothing():
    spec = spec_of()
    table = FreshTable(spec, seed=7)
    good = change_of(spec, {key: [1, 1, 1] for key in range(20)}, [])
    table.change(good)
    other = np.roll(good.counts, 1)
    wrong = [
        good._replace(rows=good.rows[:, :8]),
        good._replace(rows=good.rows[1:]),
        good._replace(counts=good.counts + 1),
        good._replace(counts=-good.counts),
        good._replace(blocks=good.blocks + 1),
        good._replace(blocks=good.blocks - 1),
        good._replace(blocks=good.blocks[::-1].copy()),
        good._replace(counts=other) if (other != good.counts).any() else good._replace(counts=good.counts[:1]),
        good._replace(gone=good.keys),
        good._replace(gone=good.keys, gone_counts=good.counts[::-1] + 0),
        good._replace(keys=good.keys.astype(np.int64)),
    ]
    for each in wrong:
        with pytest.raises(Malformed):
            table.change(each)
    keys = good.keys[: good.counts[0]]
    with pytest.raises(Malformed, match="twice"):
        table.replace(0, np.repeat(keys[:1], 2), np.zeros((2, 12), np.uint8))
    with pytest.raises(Malformed, match="another block"):
        table.replace(1, keys, np.zeros((len(keys), 12), np.uint8))
    with pytest.raises(InvalidArgument):
        table.lookup(good.keys, np.empty((20, 6), np.float32)[:, ::2])
    assert lookup(table, good.keys)[0].tolist() == [[1, 1, 1]] * 20
    assert table.rows == 20


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_whoever_looks_meanwhile_sees_whole_rows_that_were_there(dtype):
    """Rows whose columns are all one number, which only grows; keys come, go, and make the block grow."""
    dim, keys = 16, np.arange(300, dtype=np.uint64)
    table = FreshTable(spec_of(dim, 1, absent="first", dtype=dtype), seed=7)
    over, wrong, looks = threading.Event(), [], []

    def rows_of(number, n):
        if dtype == "float32":
            return np.full((n, dim), number, np.float32).view(np.uint8).reshape(n, 4 * dim)
        out = np.ones((n, table.row_bytes), np.uint8)
        out[:, dim:] = np.frombuffer(np.float32(number).tobytes(), np.uint8)
        return out

    def look():
        seen = np.zeros(len(keys), np.float32)
        out = np.empty((len(keys), dim), np.float32)
        while not over.is_set():
            missing = table.lookup(keys, out)
            there = out[:, 0] >= 1
            if missing != (~there).sum() or (out[there] != out[there, :1]).any():
                wrong.append("torn")
            if (out[there, 0] < seen[there]).any():
                wrong.append("back")
            seen[there] = out[there, 0]
            looks.append(missing)

    threads = [threading.Thread(target=look) for _ in range(2)]
    for thread in threads:
        thread.start()
    rng = np.random.default_rng(1)
    none = np.zeros(1, np.int32)
    for number in range(1, 3000):
        some = np.unique(rng.integers(0, 300, 100)).astype(np.uint64)
        gone = np.unique(rng.integers(0, 300, 60)).astype(np.uint64)
        table.change(Change.of(none, some, rows_of(number, len(some)), gone))
        if number % 500 == 0:
            table.replace(0, some, rows_of(number, len(some)))
    over.set()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert len(set(looks)) > 10
    table.change(Change.of(none, NO_KEYS, rows_of(1, 0), keys))
    assert table.rows == 0
