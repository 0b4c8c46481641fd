# SPDX-License-Identifier: Apache-2.0
"""Products by tiles: every edge against float64 in wider buffers, what NaN reaches, and whole programs beside BLAS."""

import numpy as np
import pytest

from oarlock.embedding.tile import ROWS, suits_cpu
from oarlock.nn import (
    Linear,
    Model,
    binary_cross_entropy,
    concat,
    dense_input,
    dropout,
    lookup,
    program,
    tiled,
)

pytestmark = pytest.mark.skipif(
    not suits_cpu(), reason="no AVX-512, or kernels are not compiled: BLAS takes all products"
)

GUARD = np.float32(123.5)
# Whole tiles, one more or less than them, and several parts of samples.
BATCHES = [14, 15, 28, 41, 2 * tiled.PART + 1]
WIDTHS = [(16, 16), (17, 33), (31, 48), (64, 45), (45, 64), (50, 16)]


@pytest.fixture(params=BATCHES)
def batch(request):
    return request.param


@pytest.fixture(params=WIDTHS, ids=lambda widths: f"{widths[0]}x{widths[1]}")
def widths(request):
    return request.param


@pytest.fixture
def rng():
    return np.random.default_rng(3)


def strip(rng, batch, width, begin=3, tail=2):
    """Return a buffer with guards, where its columns begin, and them."""
    buffer = np.full((batch, begin + width + tail), GUARD, np.float32)
    part = buffer[:, begin : begin + width]
    part[:] = rng.standard_normal(part.shape, dtype=np.float32)
    return buffer, begin, part


def scratch_of(inputs, units):
    return np.full(tiled.scratch_size(inputs, units), np.nan, np.float32)


def check_product(found, left, right, added=0.0):
    """Check against float64, within what a float32 sum of so many terms in any order may be off."""
    left, right = left.astype(np.float64), right.astype(np.float64)
    terms = left.shape[1] + 2
    bound = terms * 2.0**-24 / (1 - terms * 2.0**-24) * (np.abs(left) @ np.abs(right) + np.abs(added))
    assert (np.abs(found - (left @ right + added)) <= bound).all()


def check_guards(buffer, begin, width):
    assert (np.delete(buffer, np.s_[begin : begin + width], axis=1) == GUARD).all()


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("widths", [*WIDTHS, (1, 16), (13, 50)])
def test_forward(batch, widths, relu, with_bias, rng):
    inputs, units = widths
    source, s0, x = strip(rng, batch, inputs)
    target, t0, y = strip(rng, batch, units, begin=1)
    weight = rng.standard_normal(widths, dtype=np.float32)
    bias = rng.standard_normal(units if with_bias else 0, dtype=np.float32)
    added = bias.astype(np.float64) if with_bias else np.zeros(units)
    tiled.forward(source, s0, weight, bias, False, scratch_of(*widths), target, t0)
    check_product(y, x, weight, added)
    if relu:
        plain = y.copy()
        tiled.forward(source, s0, weight, bias, True, scratch_of(*widths), target, t0)
        np.testing.assert_array_equal(y, np.maximum(plain, 0))
        assert (y == 0).any()
    check_guards(target, t0, units)


def test_backward(batch, widths, rng):
    inputs, units = widths
    gradient, g0, g = strip(rng, batch, units)
    target, t0, found = strip(rng, batch, inputs, begin=1)
    weight = rng.standard_normal(widths, dtype=np.float32)
    tiled.backward(gradient, g0, weight, scratch_of(*widths), target, t0)
    check_product(found, g, weight.T)
    check_guards(target, t0, inputs)


def test_backward_through_a_relu_adds_every_sample_to_the_bias_once(batch, widths, rng):
    inputs, units = widths
    gradient, g0, _ = strip(rng, batch, units)
    output, o0, active = strip(rng, batch, inputs, begin=5)
    np.maximum(active, 0, out=active)
    target, t0, found = strip(rng, batch, inputs, begin=1)
    weight = rng.standard_normal(widths, dtype=np.float32)
    plain, p0, all_of_it = strip(rng, batch, inputs)
    tiled.backward(gradient, g0, weight, scratch_of(*widths), plain, p0)
    bias_gradient = np.full(inputs, np.nan, np.float32)
    tiled.backward_relu(gradient, g0, weight, scratch_of(*widths), output, o0, target, t0, bias_gradient)
    np.testing.assert_array_equal(found, np.where(active > 0, all_of_it, 0))
    check_product(bias_gradient[None], np.ones((1, batch), np.float32), found)
    check_guards(target, t0, inputs)
    check_guards(output, o0, inputs)


def test_weight_gradient(batch, widths, rng):
    inputs, units = widths
    source, s0, x = strip(rng, batch, inputs)
    gradient, g0, g = strip(rng, batch, units)
    # What was there before does not count, whatever it is.
    out = np.full(widths, np.nan, np.float32)
    tiled.weight_gradient(source, s0, gradient, g0, out)
    check_product(out, x.T, g)


def test_a_sample_does_not_depend_on_the_others(rng):
    """Not even on how many there are, and a NaN stays in its own row."""
    weight = rng.standard_normal((33, 50), dtype=np.float32)
    bias = rng.standard_normal(50, dtype=np.float32)
    x = rng.standard_normal((41, 33), dtype=np.float32)
    x[40, 7] = np.nan
    whole, some = np.empty((41, 50), np.float32), np.empty((20, 50), np.float32)
    tiled.forward(x, 0, weight, bias, True, scratch_of(33, 50), whole, 0)
    tiled.forward(x[:20].copy(), 0, weight, bias, True, scratch_of(33, 50), some, 0)
    np.testing.assert_array_equal(whole[:20], some)
    assert np.isnan(whole[40]).all()
    assert np.isfinite(whole[:40]).all()


def test_nan_passes_the_mask_of_a_relu(rng):
    weight = rng.standard_normal((16, 16), dtype=np.float32)
    gradient = rng.standard_normal((ROWS, 16), dtype=np.float32)
    active = np.zeros((ROWS, 16), np.float32)
    active[2, 3] = np.nan
    found, bias_gradient = np.empty((ROWS, 16), np.float32), np.empty(16, np.float32)
    tiled.backward_relu(gradient, 0, weight, scratch_of(16, 16), active, 0, found, 0, bias_gradient)
    assert np.flatnonzero(found).tolist() == [2 * 16 + 3]
    assert bias_gradient[3] == found[2, 3] != 0


def deep_model():
    """Return a model where a relu's gradient is masked by the next Linear, in the midst of some where it must not be."""
    rows, x = lookup("rows", table="t", dim=6, fields=4), dense_input("x", width=3)
    first = Linear(40, activation="relu", name="first")(concat([x, rows]))
    second = Linear(33, activation="relu", name="second")(first)
    dropped = dropout(Linear(20, activation="relu", name="third")(second), 0.25)
    twice = concat([Linear(17, activation="tanh", name="fourth")(dropped), Linear(16, name="fifth", bias=False)(first)])
    shared = Linear(33, activation="relu", name="shared")
    logit = Linear(1, name="out")(shared(shared(twice)))
    return Model(score=logit, loss=binary_cross_entropy(logit, label="label"))


@pytest.fixture
def bound(monkeypatch):
    def bind(by_tiles, most=300):
        monkeypatch.setattr(program, "by_tiles", lambda: by_tiles)
        return deep_model().bind(most)

    return bind


@pytest.mark.parametrize("batch", [13, 14, 300])
def test_a_program_by_tiles_computes_what_it_does_by_blas(bound, batch, reference):
    tiles, blas = bound(True), bound(False)
    feeds = reference.make_feeds(tiles.model, batch, 1)
    for one in (tiles, blas):
        reference.fill(one, 5)
        one.train(feeds, batch, step=3)
    assert tiles.train(feeds, batch, step=3) == pytest.approx(blas.train(feeds, batch, step=3), rel=1e-5)
    for name, expected in blas.gradients.items():
        assert np.abs(expected).max() > 0
        np.testing.assert_allclose(
            tiles.gradients[name], expected, rtol=1e-4, atol=4e-6 * np.abs(expected).max(), err_msg=name
        )
    np.testing.assert_allclose(
        tiles.row_gradients["rows"], blas.row_gradients["rows"], rtol=1e-4, atol=4e-6 * np.abs(expected).max()
    )
    scores = blas.predict(feeds, batch)
    # What cancels out in a sum is rounded as what was summed.
    np.testing.assert_allclose(tiles.predict(feeds, batch), scores, rtol=1e-5, atol=4e-6 * np.abs(scores).max())


def test_bits_do_not_depend_on_the_bound_or_on_earlier_batches(bound, reference):
    small, large = bound(True, 100), bound(True, 300)
    feeds = reference.make_feeds(small.model, 100, 1)
    few = reference.make_feeds(small.model, 5, 2)
    found = []
    for one in (small, large):
        reference.fill(one, 5)
        # So few are BLAS's, which leaves the relu's gradient to the Linear before.
        one.train(few, 5, step=0)
        loss = one.train(feeds, 100, step=1)
        found.append((loss, one.flat_gradients.tobytes(), one.row_gradients["rows"].tobytes()))
    assert found[0] == found[1]


def test_a_prepared_weight_gives_the_same_bits(batch, widths, rng):
    inputs, units = widths
    source, weight = rng.standard_normal((batch, inputs), np.float32), rng.standard_normal(widths, np.float32)
    prepared = np.full(tiled.prepared_size(*widths), np.nan, np.float32)
    tiled.prepare(weight, prepared)
    for bias in (np.empty(0, np.float32), rng.standard_normal(units, np.float32)):
        expected, found = np.empty((batch, units), np.float32), np.empty((batch, units), np.float32)
        tiled.forward(source, 0, weight, bias, True, scratch_of(*widths), expected, 0)
        for _ in range(2):
            found[:] = np.nan
            tiled.forward_prepared(source, 0, weight, bias, True, prepared, found, 0)
            np.testing.assert_array_equal(found, expected)


def test_a_prepared_program_predicts_the_same_until_it_is_prepared_again_or_trains(bound, reference):
    plain, prepared = bound(True), bound(True)
    feeds = reference.make_feeds(plain.model, 100, 1)

    def expected(seed):
        reference.fill(plain, seed)
        return plain.predict(feeds, 100).copy()

    def found(seed, prepare):
        reference.fill(prepared, seed)
        if prepare:
            prepared.prepare()
        return prepared.predict(feeds, 100).copy()

    np.testing.assert_array_equal(found(5, True), expected(5))
    # As it is documented: who changes parameters and does not say so gets no scores of either.
    assert not np.array_equal(found(6, False), expected(6))
    np.testing.assert_array_equal(found(6, True), expected(6))
    prepared.train(feeds, 100, step=0)
    np.testing.assert_array_equal(found(7, False), expected(7))


@pytest.mark.parametrize(("threads", "kernels", "chosen"), [(1, "", True), (2, "", False), (1, "Haswell", False)])
def test_blas_takes_the_products_where_it_was_told_how(monkeypatch, threads, kernels, chosen):
    monkeypatch.setattr(program, "blas_threads", lambda: threads)
    monkeypatch.setenv("OPENBLAS_CORETYPE", kernels)
    assert program.by_tiles() is chosen
