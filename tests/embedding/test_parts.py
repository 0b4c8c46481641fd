# SPDX-License-Identifier: Apache-2.0
"""Rows of two parts with an optimizer each, against two tables that hold a part each.

The two tables have the name of the whole one, so blocks and streams of first values are the same. float32 is compared bit for
bit. A coded dtype is not stored part by part: an int8 row has one scale for all its columns, and under float16 and
bfloat16 a column's draw for rounding goes by its number in the whole row; so there only the first part has the same bits.
"""

from dataclasses import replace

import embedding_reference as reference
import numpy as np
import pytest

from oarlock.embedding.content import BlockRows
from oarlock.embedding.optimizers import optimizer_of
from oarlock.embedding.schedule import Schedule
from oarlock.embedding.spec import Initializer, OptimizerSpec, Part, TableSpec
from oarlock.embedding.table import PushCounts, Table
from oarlock.proto.errors import InvalidArgument

MANY = 400 if reference.JIT else 30
ADAGRAD = OptimizerSpec("adagrad")
PAIRS = [
    (OptimizerSpec("ftrl", l1=0.05, l2=0.1), 1, ADAGRAD, 16),
    (OptimizerSpec("sgd"), 1, OptimizerSpec("adam"), 8),
    (OptimizerSpec("adamw", decay=0.1), 5, OptimizerSpec("rowwise_adagrad"), 3),
    (OptimizerSpec("group_ftrl", l21=0.01), 4, OptimizerSpec("lamb", decay=0.01), 4),
    (OptimizerSpec("amsgrad", bias="step"), 2, OptimizerSpec("adam", bias="step"), 70),
    (OptimizerSpec("momentum"), 3, OptimizerSpec("nesterov"), 1),
    (OptimizerSpec("dcasgd"), 1, OptimizerSpec("adadelta"), 2),
    # Norms are those of the part, not of the row.
    (OptimizerSpec("sgd", clip_norm=0.5), 4, OptimizerSpec("adagrad", clip_norm=0.1, clip_value=0.3), 4),
    (OptimizerSpec("rmsprop", clip_norm=1.0), 2, OptimizerSpec("sgd"), 6),
    (OptimizerSpec("sgd", l1=0.01, lower=-0.2), 2, OptimizerSpec("adagrad", l2=0.1, decay=0.01, upper=0.1), 3),
    (
        OptimizerSpec("sgd", schedule=Schedule("exponential", gamma=0.5)),
        1,
        OptimizerSpec("adam", schedule=Schedule("step", gamma=0.1, every=2)),
        4,
    ),
    (ADAGRAD, 3, OptimizerSpec("adagrad", schedule=Schedule("constant", warm_up=3)), 3),
]


BY_NAME = {f"{a.name}-{m}-{b.name}-{n}": ((a, m), (b, n)) for a, m, b, n in PAIRS}
RANDOM = (Initializer("normal", 0.0, 0.5), Initializer("uniform", 0.1, 0.3))
CONSTANT = (Initializer("constant", 0.25), Initializer("constant", -0.125))


def spec_of(pair, initializers, dtype="float32"):
    parts = tuple(Part(width, optimizer, i) for (optimizer, width), i in zip(pair, initializers, strict=True))
    return TableSpec("t", parts[0].width + parts[1].width, parts=parts, blocks=4, dtype=dtype)


def make(spec):
    table = Table(spec, seed=7)
    for block in range(spec.blocks):
        table.adopt(block)
    return table


def separate(spec):
    """Return a table for each part of ``spec``."""
    return [make(TableSpec("t", p.width, p.optimizer, p.initializer, spec.blocks, spec.dtype)) for p in spec.parts]


def cut(spec, rows):
    """Return a block's content for each part."""
    first = spec.parts[0]
    state = optimizer_of(first.optimizer).state_columns(first.width)
    return [
        BlockRows(rows.keys, rows.weights[:, : first.width].copy(), rows.state[:, :state].copy()),
        BlockRows(rows.keys, rows.weights[:, first.width :].copy(), rows.state[:, state:].copy()),
    ]


def in_order(rows):
    """Return keys, weights and state as bytes, in ascending order of keys."""
    order = np.argsort(rows.keys)
    return [array[order].tobytes() for array in rows[:3]]


def assert_same(whole, parts):
    for block in range(whole.spec.blocks):
        for rows, part in zip(cut(whole.spec, whole.export_block(block)), parts, strict=False):
            assert in_order(rows) == in_order(part.export_block(block))


def train(whole, parts, steps, seed=1, rate=0.3, keys=range(MANY)):
    """Push the same gradients for half of keys to the whole table and to those of its first parts."""
    pool = np.array(sorted(keys), np.uint64)
    rng = np.random.default_rng(seed)
    for step in steps:
        keys, _, blocks, counts = reference.group("t", 2, rng.choice(pool, len(pool) // 2, replace=False))
        gradients = rng.normal(size=(len(keys), whole.spec.dim)).astype(np.float32)
        done = whole.push(keys, blocks, counts, gradients, rate=rate, step=step)
        assert done.applied == len(keys)
        column = 0
        for part in parts:
            own = gradients[:, column : column + part.spec.dim].copy()
            assert part.push(keys, blocks, counts, own, rate=rate, step=step) == done
            column += part.spec.dim


@pytest.mark.parametrize("pair", BY_NAME.values(), ids=BY_NAME.keys())
def test_a_row_of_two_parts_is_two_rows(pair):
    spec = spec_of(pair, CONSTANT)
    whole, parts = make(spec), separate(spec)
    train(whole, parts, range(1, 6))
    assert_same(whole, parts)
    keys, _, blocks, counts = reference.group("t", 2, range(MANY + 10))
    out = np.empty((len(keys), spec.dim), np.float32)
    present = whole.pull(keys, blocks, counts, out)
    column = 0
    for part in parts:
        own = np.empty((len(keys), part.spec.dim), np.float32)
        assert part.pull(keys, blocks, counts, own) == present == whole.rows
        assert out[:, column : column + part.spec.dim].tobytes() == own.tobytes()
        column += part.spec.dim


@pytest.mark.parametrize("pair", BY_NAME.values(), ids=BY_NAME.keys())
def test_rows_that_come_from_a_block_train_on_alike(pair):
    """With random first values: a table of the second part alone would draw others, but takes them from a block."""
    spec = spec_of(pair, RANDOM)
    source = make(spec)
    train(source, [], range(1, 3))
    whole, parts, known = make(spec), separate(spec), set()
    for block in range(4):
        rows = source.export_block(block)
        known |= set(rows.keys.tolist())
        whole.import_block(block, rows)
        for part, own in zip(parts, cut(spec, rows), strict=True):
            part.import_block(block, own)
    train(whole, parts, range(3, 8), keys=known)
    assert_same(whole, parts)


@pytest.mark.parametrize("absent", ["first", "zeros"])
def test_first_values_are_those_of_each_parts_initializer_at_the_columns_of_the_row(absent):
    parts = (
        Part(2, OptimizerSpec("sgd"), Initializer("normal", 0.0, 0.5)),
        Part(1, ADAGRAD, Initializer("zeros")),
        Part(3, ADAGRAD, Initializer("uniform", 0.1, 0.3)),
        Part(1, OptimizerSpec("adam"), Initializer("constant", 2.0)),
    )
    table = make(TableSpec("t", 7, parts=parts, blocks=4, absent=absent))
    keys, _, blocks, counts = reference.group("t", 2, [0, reference.WORD, *range(5, 25)])
    expected = np.empty((len(keys), 7), np.float32)
    kinds = [part.initializer for part in parts for _ in range(part.width)]
    for line, key in zip(expected, keys.tolist(), strict=True):
        line[:] = [reference.first_value(7, "t", key, c, i.kind, i.mean, i.scale) for c, i in enumerate(kinds)]
    out = np.full_like(expected, np.nan)
    assert table.pull(keys, blocks, counts, out) == 0
    assert out.tobytes() == (expected.tobytes() if absent == "first" else bytes(expected.nbytes))
    table.push(keys, blocks, counts, np.zeros_like(expected), rate=0.1)
    assert table.pull(keys, blocks, counts, out) == len(keys)
    assert out.tobytes() == expected.tobytes()
    state = table.export_block(int(blocks[0])).state
    assert (state[:, :4] == np.float32(ADAGRAD.initial)).all()  # of the two parts under adagrad
    assert (state[:, 4:] == [0, 0, 1]).all()  # m, v and the number of updates


@pytest.mark.parametrize("column", [0, 1, 16])
def test_a_refused_gradient_refuses_all_parts(column):
    spec = spec_of(BY_NAME["ftrl-1-adagrad-16"], RANDOM)
    table = make(spec)
    keys, _, blocks, counts = reference.group("t", 2, range(6))
    gradients = np.ones((6, 17), np.float32)
    table.push(keys, blocks, counts, gradients, rate=0.1)
    before = {block: table.export_block(block) for block in range(4)}
    gradients[:, column] = np.nan
    assert table.push(keys, blocks, counts, gradients, rate=0.1) == PushCounts(0, 0, 6)
    for block, rows in before.items():
        assert in_order(table.export_block(block)) == in_order(rows)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_coded_rows_share_the_first_parts_bits_and_are_near_in_the_second(dtype):
    spec = spec_of(BY_NAME["ftrl-1-adagrad-16"], CONSTANT, dtype)
    whole, parts = make(spec), separate(spec)
    train(whole, parts, [1])
    assert_same(whole, parts[:1])
    ulp = {"float16": 2.0**-10, "bfloat16": 2.0**-7}[dtype]
    differ = 0
    for block in range(4):
        ours, theirs = cut(spec, whole.export_block(block))[1], parts[1].export_block(block)
        # Both are one of the two neighbours of the same number.
        assert (np.abs(ours.weights - theirs.weights) <= ulp * np.abs(ours.weights) + 2.0**-24).all()
        assert ours.state.tobytes() == theirs.state.tobytes()
        differ += int((ours.weights != theirs.weights).sum())
    assert differ > 0
    train(whole, parts, range(2, 5))
    assert_same(whole, parts[:1])


def test_an_int8_row_has_one_scale_for_all_its_parts():
    parts = (
        Part(1, OptimizerSpec("sgd"), Initializer("constant", 1.0)),
        Part(2, OptimizerSpec("sgd"), Initializer("constant", 0.001)),
    )
    spec = TableSpec("t", 3, parts=parts, blocks=4, dtype="int8")
    whole, second = make(spec), separate(spec)[1]
    keys, _, blocks, counts = reference.group("t", 2, range(MANY))
    for table in (whole, second):
        table.push(keys, blocks, counts, np.zeros((MANY, table.spec.dim), np.float32), rate=0.1)
    rows = np.concatenate([whole.export_block(block).weights for block in range(4)])
    alone = np.concatenate([second.export_block(block).weights for block in range(4)])
    assert (alone == np.float32(0.001)).all()
    assert set(np.unique(rows[:, 1:] * 127).round(4)) <= {0.0, 1.0}
    assert 0 < rows[:, 1:].mean() < 1 / 127


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8"])
def test_a_block_of_parts_moves_and_trains_on_as_if_it_had_stayed(dtype):
    spec = spec_of(BY_NAME["sgd-1-adam-8"], RANDOM, dtype)
    quiet, source, target = make(spec), make(spec), make(spec)
    train(quiet, [], range(1, 7))
    train(source, [], range(1, 7))
    for block in range(4):
        target.import_block(block, source.export_block(block))
    train(quiet, [], range(7, 10), seed=2)
    train(target, [], range(7, 10), seed=2)
    for block in range(4):
        assert in_order(target.export_block(block)) == in_order(quiet.export_block(block))


def test_parts_that_do_not_make_a_row_are_refused():
    parts = (Part(1, OptimizerSpec("sgd")), Part(2, ADAGRAD))
    for change, message in (
        ({"dim": 4}, "the parts are 3 wide in all, dim = 4"),
        ({"optimizer": OptimizerSpec("sgd")}, "each part has its own"),
        ({"initializer": Initializer("zeros")}, "each part has its own"),
    ):
        with pytest.raises(InvalidArgument, match=message):
            replace(TableSpec("t", 3, parts=parts), **change)
