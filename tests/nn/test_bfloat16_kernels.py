# SPDX-License-Identifier: Apache-2.0
"""Rounding to bfloat16 for all exponents and ties, and every kernel around a product against its numpy twin, to the bit."""

import numpy as np
import pytest

from oarlock.nn import bfloat16_kernels as kernels

SIZES = [(1, 1), (1, 17), (3, 8), (64, 5), (65, 32), (257, 33)]
GUARD = np.float32(123.5)
# Of every 2^16 float32 with one upper half: the exact one, those next to it, around the middle, and at the end.
LOWER = np.array([0, 1, 2, 0x7FFE, 0x7FFF, 0x8000, 0x8001, 0x8002, 0xFFFE, 0xFFFF], np.uint32)


def every_case():
    """All upper halves with each of LOWER, as float32[2^16, 10]."""
    upper = np.arange(1 << 16, dtype=np.uint32) << np.uint32(16)
    return (upper[:, None] | LOWER).view(np.float32)


def values_of(half):
    """The numbers that bfloat16s are, in float64; infinity counts as 2^128, as it does when IEEE rounds to nearest."""
    sign = np.where(half >> 15, -1.0, 1.0)
    exponent = (half >> 7 & 0xFF).astype(np.int64)
    fraction = (half & 0x7F).astype(np.float64) / 128
    return sign * np.where(exponent == 0, np.ldexp(fraction, -126), np.ldexp(1 + fraction, exponent - 127))


def rounded(value):
    """The bfloat16 next to each finite float32, ties to the even one, found by comparing distances in float64."""
    below = (value.view(np.uint32) >> 16).astype(np.int64)
    above = below + 1  # in magnitude: after the largest finite comes infinity
    exact = value.astype(np.float64)
    left, right = abs(exact - values_of(below)), abs(exact - values_of(above))
    even = np.where(below % 2 == 0, below, above)
    return np.where(left < right, below, np.where(right < left, above, even)).astype(np.uint16)


def wide(half):
    return (half.astype(np.uint32) << np.uint32(16)).view(np.float32)


def packed(value):
    out = np.zeros(value.shape, np.uint16)
    kernels.pack(value, 0, value.shape[1], out)
    return out


def test_rounding_of_every_exponent_and_tie():
    value = every_case()
    found = packed(value)
    finite = np.isfinite(value)
    np.testing.assert_array_equal(found[finite], rounded(value[finite]))
    infinite = np.isinf(value)
    np.testing.assert_array_equal(wide(found)[infinite], value[infinite])
    nothing = np.isnan(value)
    assert np.isnan(wide(found)[nothing]).all()
    assert (found[nothing] >> 15 == value.view(np.uint32)[nothing] >> 31).all()
    assert finite.sum() + infinite.sum() + nothing.sum() == value.size


def test_widening_of_every_bfloat16():
    half = np.arange(1 << 16, dtype=np.uint16).reshape(256, 256)
    out = np.zeros((256, 256), np.float32)
    kernels.unpack(half, out, 0)
    np.testing.assert_array_equal(out.view(np.uint32), half.astype(np.uint32) << 16)
    real = np.isfinite(out)
    np.testing.assert_array_equal(out[real], values_of(half[real]))
    np.testing.assert_array_equal(packed(out)[real], half[real])


@pytest.fixture(autouse=True)
def infinities_may_cancel():
    """Which numpy warns of, here and in interpreted kernels."""
    with np.errstate(invalid="ignore"):
        yield


@pytest.fixture(params=SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
def size(request):
    return request.param


def halves(rng, size):
    """Seeded bfloat16, zeros of both signs among them, and where there is room NaN and infinities."""
    value = rng.standard_normal(size, dtype=np.float32)
    value[rng.random(size) < 0.2] = 0.0
    value[rng.random(size) < 0.1] = -0.0
    if value.size > 100:
        value.flat[[7, 20, 50]] = np.nan, np.inf, -np.inf
    return packed(value)


def frame(values):
    """Put columns between guards; return the buffer and where they begin."""
    out = np.full((len(values), values.shape[1] + 5), GUARD, np.float32)
    out[:, 3:-2] = values
    return out, 3


def untouched(array):
    assert (array[:, :3] == GUARD).all()
    assert (array[:, -2:] == GUARD).all()


def sums(values):
    """Sums over samples in float32, 64 samples at a time, one after the other."""
    total = np.zeros(values.shape[1], np.float32)
    for begin in range(0, len(values), 64):
        tile = np.zeros_like(total)
        for row in values[begin : begin + 64]:
            tile += row
        total += tile
    return total


def test_pack_and_unpack_touch_only_their_columns(size, rng):
    value = rng.standard_normal(size, dtype=np.float32)
    source, s0 = frame(value)
    half = np.zeros(size, np.uint16)
    kernels.pack(source, s0, size[1], half)
    np.testing.assert_array_equal(half, rounded(value))
    target, t0 = frame(np.zeros(size, np.float32))
    kernels.unpack(half, target, t0)
    np.testing.assert_array_equal(target[:, 3:-2], wide(half))
    untouched(target)


@pytest.mark.parametrize("relu", [False, True])
def test_bias_and_activation(size, relu, rng):
    product = halves(rng, size)
    bias = rng.standard_normal(size[1], dtype=np.float32)
    expected = wide(product) + bias
    if relu:
        expected = np.where(expected < 0, np.float32(0), expected)
    target, t0 = frame(np.zeros(size, np.float32))
    kernels.finish_wide(product, bias, relu, target, t0)
    np.testing.assert_array_equal(target[:, 3:-2], expected)
    untouched(target)
    kernels.finish(product, bias, relu)
    np.testing.assert_array_equal(wide(product), wide(packed(expected)))


@pytest.mark.parametrize("relu", [False, True])
def test_gradient_of_bias_and_activation(size, relu, rng):
    output, gradient = halves(rng, size), halves(rng, size)
    tile, out = np.full(size[1] + 2, GUARD), np.full(size[1], GUARD)
    kept = np.where(wide(output) <= 0, np.uint16(0), gradient) if relu else gradient.copy()
    kernels.bias_gradient(output, relu, gradient, tile, out)
    np.testing.assert_array_equal(wide(gradient), wide(kept))
    np.testing.assert_array_equal(out, sums(wide(kept)))


def test_gradient_of_bias_and_relu_from_float32(size, rng):
    output = wide(halves(rng, size))
    value = rng.standard_normal(size, dtype=np.float32)
    if value.size > 100:
        value.flat[[8, 9]] = np.nan, np.inf
    (active, o0), (gradient, g0) = frame(output), frame(value)
    tile, out, target = np.full(size[1] + 2, GUARD), np.full(size[1], GUARD), np.zeros(size, np.uint16)
    kernels.relu_bias_gradient_wide(active, o0, gradient, g0, tile, out, target)
    kept = np.where(output <= 0, np.float32(0), value)
    np.testing.assert_array_equal(wide(target), wide(packed(kept)))
    np.testing.assert_array_equal(out, sums(kept))
    np.testing.assert_array_equal(gradient[:, 3:-2], value)
