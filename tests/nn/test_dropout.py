# SPDX-License-Identifier: Apache-2.0
"""Dropout: the same for the same (seed, step), another for another, the rate that was asked for, nothing in predict."""

import numpy as np
import pytest

from oarlock.nn import Linear, Model, binary_cross_entropy, columns, concat, dropout, lookup, mask_kernels
from oarlock.proto.errors import InvalidArgument

WIDTH = 7


def make(rate, layers=1):
    a = lookup("a", table="t", dim=WIDTH)
    logit = Linear(1, name="out")(concat([dropout(a, rate) for _ in range(layers)]))
    model = Model(score=logit, loss=binary_cross_entropy(logit, label="label"))
    program = model.bind(300)
    program.flat_parameters[:] = 1
    return program


def feeds_of(reference, program, batch):
    """With a row of its own for each sample, so that a row's gradient shows what was dropped of it."""
    feeds = reference.make_feeds(program.model, batch, 1, rows=batch)
    feeds["a"] = (feeds["a"][0], np.arange(batch, dtype=np.int32))
    feeds["label"][:] = 0
    return feeds


def dropped(program, feeds, batch, **draw):
    program.train(feeds, batch, **draw)
    return program.row_gradients["a"] == 0


def test_kernel_equals_its_twin(reference):
    rng = np.random.default_rng(1)
    for batch, width in ((1, 1), (3, 8), (65, 33)):
        source = rng.standard_normal((batch, width + 2), dtype=np.float32)
        source[0, 1] = np.nan
        target = np.full((batch, width + 3), np.float32(9))
        key = np.uint64(mask_kernels.mask_key(np.uint64(5), np.uint64(2**64 - 1), np.uint64(3)))
        mask_kernels.dropout(source, 1, target, 2, width, key, np.uint64(round(0.3 * 2**32)), np.float32(1 / 0.7))
        factors = reference.dropout_factors((batch, width), 0.3, 5, 2**64 - 1, 3).astype(np.float32)
        np.testing.assert_array_equal(target[:, 2:-1], source[:, 1:-1] * factors)
        assert (target[:, [0, 1, -1]] == 9).all()


def test_same_step_same_draw_whatever_was_before(reference):
    first, second = make(0.4), make(0.4)
    feeds = feeds_of(reference, first, 200)
    expected = dropped(first, feeds, 200, seed=3, step=8)
    for draw in ({"seed": 3, "step": 9}, {"seed": 4, "step": 8}, {"step": 8}):
        other = dropped(second, feeds, 200, **draw)
        # Two draws of one rate agree on 0.4^2 + 0.6^2 of the values; 1,400 of them vary by 0.013.
        assert 0.44 < (other == expected).mean() < 0.6
    second.predict(feeds, 200)
    np.testing.assert_array_equal(dropped(second, feeds, 200, seed=3, step=8), expected)
    fewer = feeds_of(reference, first, 50)
    np.testing.assert_array_equal(dropped(second, fewer, 50, seed=3, step=8), expected[:50])


@pytest.mark.parametrize("rate", [0, 0.1, 0.5, 0.9])
def test_rate(rate, reference):
    program = make(rate)
    feeds = feeds_of(reference, program, 300)
    shares = [dropped(program, feeds, 300, seed=1, step=step) for step in range(20)]
    # 42,000 values: a standard deviation is at most 0.0025.
    assert np.mean(shares) == pytest.approx(rate, abs=0.01)
    # Neither a column nor a sample is dropped more often than another.
    assert np.abs(np.mean(shares, axis=(0, 1)) - rate).max() < 0.03
    assert np.abs(np.mean(shares, axis=0) - rate).max() < 0.6


def test_layers_drop_independently(reference):
    program = make(0.5, layers=2)
    feeds = feeds_of(reference, program, 300)
    # Both layers read the same columns: a row's gradient is 0 where both have dropped.
    assert dropped(program, feeds, 300, step=1).mean() == pytest.approx(0.25, abs=0.04)


def test_predict_drops_nothing(reference):
    program = make(0.5)
    feeds = feeds_of(reference, program, 100)
    program.train(feeds, 100, step=1)
    np.testing.assert_allclose(program.predict(feeds, 100), feeds["a"][0].sum(axis=1) + 1, rtol=1e-5, atol=1e-5)
    del feeds["label"]
    program.predict(feeds, 100)


def test_of_a_slice_and_in_a_concat(reference):
    a = lookup("a", table="t", dim=WIDTH)
    logit = Linear(1, name="out")(concat([columns(a, 0, 2), dropout(columns(a, 2, WIDTH), 0.5)]))
    program = Model(score=logit, loss=binary_cross_entropy(logit, label="label")).bind(300)
    program.flat_parameters[:] = 1
    found = dropped(program, feeds_of(reference, program, 300), 300, step=1)
    assert not found[:, :2].any()
    assert found[:, 2:].mean() == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        ({}, "this model has dropout: give step="),
        ({"step": -1}, "step = -1"),
        ({"step": 2**64}, "step = 18446744073709551616"),
        ({"step": True}, "step = True"),
        ({"step": 1.0}, "step = 1.0"),
        ({"step": 1, "seed": "2"}, "seed = '2'"),
    ],
)
def test_bad_draws(draw, message, reference):
    program = make(0.5)
    with pytest.raises(InvalidArgument, match=message):
        program.train(feeds_of(reference, program, 5), 5, **draw)
