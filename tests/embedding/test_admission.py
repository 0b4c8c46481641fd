# SPDX-License-Identifier: Apache-2.0
"""Results do not depend on how keys come: in one request or many, repeated, colliding, or none at all."""

import embedding_reference as reference
import numpy as np
import pytest
import table_reference

from oarlock.embedding.policy import DTYPES
from oarlock.embedding.spec import Admission, Guard, OptimizerSpec, TableSpec
from oarlock.embedding.table import PushCounts

ADMISSIONS = {
    "always": Admission(),
    "count": Admission("count", 3),
    "sketch": Admission("sketch", 3, capacity=200, windows=2),
    "probability": Admission("probability", probability=0.3),
    "score": Admission("score", nonclick=0.2, click=0.5),
}
ADAM = OptimizerSpec("adam")
PASSES = OptimizerSpec("momentum", l1=0.01, l2=0.1, decay=0.1, clip_norm=1.0, lower=-1.0, upper=1.0)


def batches(keys, rounds=3, dim=3):
    """Yield keys in an order, gradients, occurrences and clicks."""
    rng = np.random.default_rng(5)
    for step in range(1, rounds + 1):
        drawn = rng.permutation(np.array(keys, np.uint64))[: 2 * len(keys) // 3]
        amounts = rng.integers(0, 4, len(drawn)).astype(np.uint32)
        clicks = (rng.random(len(drawn)) * amounts).astype(np.float32)
        yield step, drawn, rng.normal(size=(len(drawn), dim)).astype(np.float32), amounts, clicks


@pytest.mark.parametrize("kind", ADMISSIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_split_into_requests_does_not_matter_and_all_is_as_the_twin_says(kind, dtype):
    spec = TableSpec("t", 3, ADAM, blocks=4, dtype=dtype, admission=ADMISSIONS[kind], usage=True)
    whole, parts, model = table_reference.stored(spec), table_reference.stored(spec), table_reference.Model(spec, 7)
    for block in range(4):
        model.adopt(block)
    for step, keys, gradients, amounts, clicks in batches(range(min(reference.MANY // 4, 400))):
        aside = {"occurrences": amounts, "clicks": clicks}
        found = table_reference.push(whole, keys, gradients, step=step, **aside)
        totals = np.zeros(4, np.int64)
        for piece in np.array_split(np.arange(len(keys)), [1, 2, 50, 51, 200]):
            some = {name: values[piece] for name, values in aside.items()}
            totals += table_reference.push(parts, keys[piece], gradients[piece], step=step, **some)
        assert PushCounts(*totals.tolist()) == found
        for key, gradient, amount, click in zip(keys.tolist(), gradients, amounts.tolist(), clicks, strict=True):
            model.push(key, gradient, 0.125, step, amount, click)
        assert table_reference.content(whole) == table_reference.content(parts)
        assert table_reference.content(whole)[0] == model.content()
        assert table_reference.content(whole)[1] == model.waiting
    assert kind == "always" or 0 < len(model.rows) < len(set(range(min(reference.MANY // 4, 400))))


@pytest.mark.parametrize("optimizer", [ADAM, PASSES], ids=["adam", "passes"])
@pytest.mark.parametrize("undo", [0, 3])
@pytest.mark.parametrize("dtype", ["float32", "int8"])
@pytest.mark.parametrize("kind", ["always", "count", "score"])
def test_a_key_that_comes_again_in_a_push_is_pushed_again(optimizer, undo, dtype, kind):
    spec = TableSpec(
        "t", 3, optimizer, blocks=1, dtype=dtype, admission=ADMISSIONS[kind], usage=True, guard=Guard(undo=undo)
    )
    table, model = table_reference.stored(spec), table_reference.Model(spec, 7)
    model.adopt(0)
    keys = [1, 0, 1, reference.WORD, 1, 2, 2, 0, 5, 1]
    gradients = np.random.default_rng(0).normal(size=(len(keys), 3)).astype(np.float32)
    for step in (1, 2, 3):
        table_reference.push(table, keys, gradients, step=step)
        for key, gradient in zip(keys, gradients, strict=True):
            model.push(key, gradient, 0.125, step)
    assert table_reference.content(table)[0] == model.content()
    if undo:
        assert table.undo(np.array([1, 2], np.uint64), steps=1).tolist() == [model.undo(1, 1), model.undo(2, 1)]
        assert table_reference.content(table)[0] == model.content()


@pytest.mark.parametrize("kind", ["always", "count"])
def test_keys_whose_mixes_are_all_alike_in_the_low_bits_are_ordinary_keys(kind):
    many = 2000 if reference.JIT else 60
    spec = TableSpec("t", 1, OptimizerSpec("adagrad"), blocks=2, admission=ADMISSIONS[kind])
    salt = reference.salt("t")
    keys = [reference.unmix64(high << 40 | 0xFFFFFFF0) ^ salt for high in range(many)]
    table, model = table_reference.stored(spec), table_reference.Model(spec, 7)
    for start in (0, 0, many // 2, 0):
        found = keys[start : start + many // 2]
        table_reference.push(table, found)
        for key in found:
            model.push(key, np.ones(1, np.float32), 0.125, 1)
    assert table_reference.content(table)[:2] == (model.content(), model.waiting)
    rows, present = table_reference.pull(table, keys)
    assert present == len(model.rows)
    assert rows.tobytes() == b"".join(model.pull(key).tobytes() for key in keys)


def test_a_request_of_nothing_and_one_larger_than_all_before_it():
    table = table_reference.stored(TableSpec("t", 1, OptimizerSpec("sgd"), blocks=1))
    assert table_reference.push(table, []) == PushCounts(0, 0, 0, 0)
    assert table_reference.pull(table, [])[1] == 0
    for many in (1, 40 * reference.MANY):
        assert table_reference.push(table, range(many)).applied == many
        assert table_reference.pull(table, range(many))[1] == many
    assert table.rows == 40 * reference.MANY
