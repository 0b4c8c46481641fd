# SPDX-License-Identifier: Apache-2.0
"""Every kernel against its numpy twin, inside a wider buffer whose other columns must stay as they were."""

import numpy as np
import pytest

from oarlock.nn import kernels, pairs, row_kernels
from oarlock.nn.layout import Strip

SIZES = [(1, 1), (1, 17), (3, 8), (64, 5), (65, 32), (257, 33)]
GUARD = np.float32(123.5)


def buffer(rng, batch, width, begin=3, tail=2):
    out = np.full((batch, begin + width + tail), GUARD, np.float32)
    out[:, begin : begin + width] = rng.standard_normal((batch, width), dtype=np.float32)
    return out, begin, slice(begin, begin + width)


def check(array, part, expected, exact=True, rtol=2e-6):
    if exact:
        np.testing.assert_array_equal(array[:, part], expected)
    else:
        np.testing.assert_allclose(array[:, part], expected, rtol=rtol, atol=1e-7)
    outside = np.delete(array, np.arange(array.shape[1])[part], axis=1)
    assert (outside == GUARD).all()


@pytest.fixture(params=SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
def size(request):
    return request.param


def test_moves_and_products(size):
    rng = np.random.default_rng(1)
    batch, width = size
    a, a0, in_a = buffer(rng, batch, width)
    b, b0, in_b = buffer(rng, batch, width, begin=0)
    left, right = a[:, in_a].copy(), b[:, in_b].copy()
    for call, expected in (
        (lambda t, t0: kernels.zero(t, t0, width), np.zeros_like(left)),
        (lambda t, t0: kernels.copy(a, a0, t, t0, width), left),
        (lambda t, t0: kernels.add(a, a0, b, b0, t, t0, width), left + right),
        (lambda t, t0: kernels.multiply(a, a0, b, b0, t, t0, width), left * right),
    ):
        out, t0, part = buffer(rng, batch, width, begin=5)
        call(out, t0)
        check(out, part, expected)
    out, t0, part = buffer(rng, batch, width, begin=1)
    before = out[:, part].copy()
    kernels.accumulate(a, a0, out, t0, width)
    check(out, part, before + left)


@pytest.mark.parametrize("name", ["relu", "sigmoid", "tanh"])
def test_activations(size, name, reference):
    rng = np.random.default_rng(2)
    batch, width = size
    a, a0, part = buffer(rng, batch, width)
    a[:, part] *= 4
    x = a[:, part].copy()
    expected = {"relu": np.maximum(x, 0), "sigmoid": reference.logistic(x), "tanh": np.tanh(x.astype(np.float64))}[name]
    out, t0, inside = buffer(rng, batch, width, begin=0)
    getattr(kernels, name)(a, a0, out, t0, width)
    check(out, inside, expected, exact=name == "relu")
    getattr(kernels, name)(a, a0, a, a0, width)
    np.testing.assert_array_equal(a[:, part], out[:, inside])

    y = out[:, inside].astype(np.float64)
    slope = {"relu": (y > 0).astype(np.float64), "sigmoid": y * (1 - y), "tanh": 1 - y * y}[name]
    g, g0, in_g = buffer(rng, batch, width, begin=2)
    expected_gradient = g[:, in_g] * slope
    target, target0, in_target = buffer(rng, batch, width, begin=4)
    getattr(kernels, f"{name}_gradient")(out, t0, g, g0, target, target0, width)
    check(target, in_target, expected_gradient, exact=False, rtol=1e-4)
    getattr(kernels, f"{name}_gradient")(out, t0, g, g0, g, g0, width)
    np.testing.assert_array_equal(g[:, in_g], target[:, in_target])


def test_activations_at_the_edges():
    x = np.array([[-np.inf, -1e4, -104.0, -0.0, 0.0, 104.0, 1e4, np.inf, np.nan]], np.float32)
    out = np.empty_like(x)
    n = x.shape[1]
    kernels.sigmoid(x, 0, out, 0, n)
    np.testing.assert_allclose(out[0], [0, 0, np.exp(-104.0), 0.5, 0.5, 1, 1, 1, np.nan], atol=1e-44)
    kernels.tanh(x, 0, out, 0, n)
    np.testing.assert_array_equal(out[0], np.array([-1, -1, -1, 0, 0, 1, 1, 1, np.nan], np.float32))
    kernels.relu(x, 0, out, 0, n)
    np.testing.assert_array_equal(out[0], np.array([0, 0, 0, 0, 0, 104, 1e4, np.inf, np.nan], np.float32))
    gradient = np.ones_like(x)
    target = np.empty_like(x)
    kernels.relu_gradient(out, 0, gradient, 0, target, 0, n)
    np.testing.assert_array_equal(target[0], np.array([0, 0, 0, 0, 0, 1, 1, 1, 1], np.float32))


def test_bias(size, reference):
    rng = np.random.default_rng(3)
    batch, width = size
    bias = rng.standard_normal(width, dtype=np.float32)
    for kernel, activation in ((kernels.add_bias, lambda v: v), (kernels.add_bias_relu, lambda v: np.maximum(v, 0))):
        a, a0, part = buffer(rng, batch, width)
        expected = activation(a[:, part] + bias)
        kernel(a, a0, bias)
        check(a, part, expected)
    tile, out = np.full(width + 3, np.nan, np.float32), np.full(width, np.nan, np.float32)
    g, g0, in_g = buffer(rng, batch, width, begin=1)
    values = g[:, in_g].copy()
    kernels.bias_gradient(g, g0, tile, out)
    np.testing.assert_array_equal(out, reference.tiled_sum(values, kernels.TILE))
    check(g, in_g, values)
    masked = np.where(a[:, part] <= 0, np.float32(0), values)
    kernels.relu_bias_gradient(a, a0, g, g0, tile, out)
    check(g, in_g, masked)
    np.testing.assert_array_equal(out, reference.tiled_sum(masked, kernels.TILE))


def test_outer(size):
    rng = np.random.default_rng(4)
    batch, width = size
    g, g0, in_g = buffer(rng, batch, 1)
    weight = rng.standard_normal((width, 1), dtype=np.float32)
    out, t0, part = buffer(rng, batch, width)
    kernels.outer(g, g0, weight, out, t0)
    check(out, part, g[:, in_g] * weight[:, 0])


@pytest.mark.parametrize("dim", [1, 6, 40])
@pytest.mark.parametrize("fields", [1, 3])
@pytest.mark.parametrize("unique", [1, 50])
def test_gather_and_segment_sum(dim, fields, unique, reference):
    rng = np.random.default_rng(5)
    total = dim * fields
    ranges = {(0, total), (total - 1, 1), (total // 3, total - 2 * (total // 3)), (0, 1)}
    for batch in (1, 2, 131):
        rows = rng.standard_normal((unique, dim), dtype=np.float32)
        inverse = rng.integers(0, unique, (batch, fields)).astype(np.int32)
        for start, width in sorted(ranges):
            out, t0, part = buffer(rng, batch, width)
            values = out[:, part].copy()
            summed = rng.standard_normal((unique, dim), dtype=np.float32)
            expected = reference.segment_sum(values, inverse, start, summed)
            row_kernels.segment_sum(out, t0, width, inverse, start, summed)
            np.testing.assert_array_equal(summed, expected)
            row_kernels.gather(rows, inverse, start, out, t0, width)
            check(out, part, reference.gather(rows, inverse, start, width))


@pytest.mark.parametrize("dim", [1, 6, 17, 40])
@pytest.mark.parametrize("fields", [1, 3])
@pytest.mark.parametrize("unique", [1, 50])
def test_gather_and_segment_sum_of_parts_of_fields(dim, fields, unique, reference):
    rng = np.random.default_rng(7)
    for start, stop in sorted({(0, dim), (dim - 1, dim), (dim // 3, dim - dim // 3), (0, 1)}):
        kept = np.concatenate([np.arange(f * dim + start, f * dim + stop) for f in range(fields)])
        for batch in (1, 2, 131):
            rows = rng.standard_normal((unique, dim), dtype=np.float32)
            inverse = rng.integers(0, unique, (batch, fields)).astype(np.int32)
            out, t0, part = buffer(rng, batch, len(kept))
            values = np.zeros((batch, dim * fields), np.float32)
            values[:, kept] = out[:, part]
            summed = rng.standard_normal((unique, dim), dtype=np.float32)
            expected = reference.segment_sum(values, inverse, 0, summed)
            row_kernels.segment_sum_fields(out, t0, inverse, start, stop, summed)
            np.testing.assert_array_equal(summed, expected)
            row_kernels.gather_fields(rows, inverse, start, stop, out, t0)
            check(out, part, reference.gather(rows, inverse, 0, dim * fields)[:, kept])


@pytest.mark.parametrize("batch", [1, 40])
def test_gather_of_rows_that_are_asked_for_ahead(batch):
    rng = np.random.default_rng(10)
    rows = rng.standard_normal((row_kernels.NEAR // 17 + 1, 17), dtype=np.float32)
    inverse = rng.integers(0, len(rows), (batch, 3)).astype(np.int32)
    inverse[-1] = len(rows) - 1
    for start, stop in ((0, 17), (16, 17), (1, 17)):
        out, t0, part = buffer(rng, batch, 3 * (stop - start))
        row_kernels.gather_fields(rows, inverse, start, stop, out, t0)
        check(out, part, rows[inverse][:, :, start:stop].reshape(batch, -1))


@pytest.mark.parametrize("dim", [1, 2, 17])
@pytest.mark.parametrize("fields", [1, 5])
def test_pool(dim, fields):
    rng = np.random.default_rng(8)
    for batch in (1, 67):
        source, s0, inside = buffer(rng, batch, dim * fields)
        parts = source[:, inside].reshape(batch, fields, dim)
        expected = np.zeros((batch, dim), np.float32)
        for f in range(fields):
            expected += parts[:, f]
        out, t0, part = buffer(rng, batch, dim, begin=1)
        row_kernels.pool(source, s0, fields, out, t0, dim)
        check(out, part, expected)
        row_kernels.pool_gradient(out, t0, fields, source, s0, dim)
        check(source, inside, np.tile(expected, (1, fields)))


@pytest.mark.parametrize("dim", [1, 3, 16])
@pytest.mark.parametrize("fields", [1, 2, 9])
@pytest.mark.parametrize("batch", [1, pairs.BLOCK, 2 * pairs.BLOCK + 1])
def test_pairs(dim, fields, batch, reference):
    rng = np.random.default_rng(9)

    def strip(width):
        array, begin, part = buffer(rng, batch, width)
        return Strip(array, begin, width), part

    count = fields * (fields + 1) // 2
    (dense, in_dense), (rows, in_rows), (out, part) = strip(dim), strip(fields * dim), strip(count)
    vectors = np.concatenate([dense.matrix, rows.matrix], axis=1).reshape(batch, fields + 1, dim)
    scratch = np.full(pairs.scratch_size(vectors.shape[1] * dim, fields + 1), np.nan, np.float32)
    pairs.forward([dense], rows, fields, out, scratch)
    products = reference.lower_pairs(vectors.astype(np.float64))
    np.testing.assert_allclose(out.matrix, products, rtol=2e-5, atol=1e-5)
    check(out.buffer, part, out.matrix)

    expected = np.zeros(vectors.shape)
    places = [(i, j) for i in range(fields + 1) for j in range(i)]
    for column, (i, j) in enumerate(places):
        g = out.matrix[:, column : column + 1].astype(np.float64)
        expected[:, i] += g * vectors[:, j]
        expected[:, j] += g * vectors[:, i]
    expected = expected.reshape(batch, -1)
    (to_dense, _), (to_rows, _) = strip(dim), strip(fields * dim)
    scratch[:] = np.nan
    pairs.backward([dense], rows, fields, out, scratch, [to_dense, to_rows])
    np.testing.assert_allclose(to_dense.matrix, expected[:, :dim], rtol=2e-5, atol=1e-4)
    np.testing.assert_allclose(to_rows.matrix, expected[:, dim:], rtol=2e-5, atol=1e-4)
    check(to_dense.buffer, in_dense, to_dense.matrix)
    check(to_rows.buffer, in_rows, to_rows.matrix)
    kept = to_rows.matrix.copy()
    pairs.backward([dense], rows, fields, out, scratch, [None, to_rows])
    np.testing.assert_array_equal(to_rows.matrix, kept)


def test_range_checks():
    inverse = np.array([[0, 5], [4, 1], [2, 3]], np.int32)
    assert row_kernels.count_outside(inverse, 6) == 0
    assert row_kernels.count_outside(inverse, 5) == 1
    assert row_kernels.count_outside(inverse, 0) == 6
    inverse[1, 1] = -1
    inverse[2, 0] = np.iinfo(np.int32).min
    assert row_kernels.count_outside(inverse, 6) == 2
    labels = np.array([0, 1, 0.5, -0.0, np.nan, 1.0001, -1e-9, np.inf, -np.inf], np.float32)
    assert kernels.count_bad_labels(labels[:4]) == 0
    assert kernels.count_bad_labels(labels) == 5


def test_cross_entropy(reference):
    rng = np.random.default_rng(6)
    extreme = np.array([-1e30, -1000, -88.8, -20, -1e-8, 0, 1e-8, 20, 88.8, 1000, 1e30], np.float32)
    z = np.concatenate([extreme, 5 * rng.standard_normal(500, dtype=np.float32)])
    for labels in (np.zeros_like(z), np.ones_like(z), rng.random(len(z), dtype=np.float32)):
        buffer_z = np.full((len(z), 3), GUARD, np.float32)
        buffer_z[:, 1] = z
        each = np.zeros(1)
        for i in range(len(z)):
            kernels.binary_cross_entropy(buffer_z[i : i + 1], 1, labels[i : i + 1], each)
            expected = float(reference.cross_entropy(z[i], labels[i]))
            assert each[0] == pytest.approx(expected, rel=2e-6, abs=2e-6 * min(1.0, abs(float(z[i])))), z[i]
        out = np.full((len(z), 2), GUARD, np.float32)
        kernels.binary_cross_entropy_gradient(buffer_z, 1, labels, out, 1)
        np.testing.assert_allclose(out[:, 1], (reference.logistic(z) - labels) / len(z), rtol=1e-4, atol=2e-7 / len(z))
        assert (out[:, 0] == GUARD).all()


def test_cross_entropy_shows_nan():
    total, out = np.zeros(1), np.zeros((1, 1), np.float32)
    z, y = np.array([[np.nan]], np.float32), np.zeros(1, np.float32)
    kernels.binary_cross_entropy(z, 0, y, total)
    kernels.binary_cross_entropy_gradient(z, 0, y, out, 0)
    assert np.isnan(total[0])
    assert np.isnan(out[0, 0])
