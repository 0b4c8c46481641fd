# SPDX-License-Identifier: Apache-2.0
"""How weights are stored: exact reading, rounding that is unbiased or lossless, nothing infinite."""

import math
import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import embedding_reference as reference
import numpy as np
import pytest

from oarlock.embedding import precision
from oarlock.embedding.jit import jit
from oarlock.embedding.pointer import address_of
from oarlock.embedding.precision import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    INT8,
    PRECISIONS,
    decode_row,
    encode_nearest,
    encode_row,
    precision_code,
    row_scale,
    seed_of,
    weight_bytes,
)
from oarlock.proto.errors import InvalidArgument

CODES = [FLOAT32, FLOAT16, BFLOAT16, INT8]
SMALL = [FLOAT16, BFLOAT16, INT8]
LARGEST = {FLOAT16: np.float32(65504), BFLOAT16: np.uint32(0x7F7F0000).view(np.float32)}
DIMS = range(1, 34)
FILL = 0xA5


@jit
def encode_all(rows, stride, code, dim, source, seeds):
    for i in range(seeds.shape[0]):
        encode_row(rows + i * stride, code, dim, source, seeds[i])


def stored(weights, code, seed):
    """Return a row's bytes, checking that encode_row writes no byte beyond it."""
    size = weight_bytes(code, len(weights))
    row = np.full(size + 4, FILL, np.uint8)
    encode_row(address_of(row), code, len(weights), address_of(weights), np.uint64(seed))
    assert (row[size:] == FILL).all()
    return row[:size]


def nearest(weights, code, scale):
    size = weight_bytes(code, len(weights))
    row = np.full(size + 4, FILL, np.uint8)
    encode_nearest(address_of(row), code, len(weights), address_of(weights), np.float32(scale))
    assert (row[size:] == FILL).all()
    return row[:size]


def decoded(row, code, dim):
    out = np.full(dim + 1, np.float32(7))
    decode_row(address_of(row), code, dim, address_of(out))
    assert out[dim] == 7
    return out[:dim]


def scale_of(row, code, dim):
    return np.float32(row_scale(address_of(row), code, dim))


def twin(row, code, dim):
    """Return the weights of a row's bytes, by numpy alone."""
    if code == FLOAT32:
        return row.view(np.float32)[:dim]
    if code == FLOAT16:
        return row.view(np.float16)[:dim].astype(np.float32)
    if code == BFLOAT16:
        return (row.view(np.uint16)[:dim].astype(np.uint32) << 16).view(np.float32)
    return row[:dim].view(np.int8).astype(np.float32) * row[-4:].view(np.float32)[0]


def draw(seed, column):
    both = reference.mix64((seed + reference.GOLDEN * (column // 2 + 1)) & reference.WORD)
    return both >> 32 * (column % 2) & 0xFFFFFFFF


def step_at(size, code):
    """Return the distance of the two stored values around ``size`` >= 0, as an exact fraction."""
    digits, bottom = (10, -14) if code == FLOAT16 else (7, -126)
    exponent = math.frexp(size)[1] - 1 if size else bottom
    return Fraction(2) ** (max(exponent, bottom) - digits)


def stochastic_twin(value, code, seed, column):
    """Return the weight that a row holds instead of ``value``, from the written definition in exact fractions."""
    size = abs(float(value))
    step = step_at(size, code)
    kept = math.floor(Fraction(size) / step + Fraction(draw(seed, column), 1 << 32)) * step
    return np.copysign(min(np.float32(float(kept)), LARGEST[code]), value)


def sample(dim, seed=0, spread=12):
    """Return weights of many magnitudes and both signs, zeros among them."""
    rng = np.random.default_rng(seed)
    weights = (rng.normal(size=dim) * np.exp2(rng.uniform(-spread, spread, dim))).astype(np.float32)
    weights[rng.random(dim) < 0.1] = -0.0
    return weights


def test_codes_never_change():
    assert [precision_code(name) for name in ("float32", "float16", "bfloat16", "int8")] == [0, 1, 2, 3]
    assert len(PRECISIONS) == 4
    assert [weight_bytes(code, 5) for code in CODES] == [20, 12, 12, 12]
    assert [weight_bytes(code, 4) for code in CODES] == [16, 8, 8, 8]


def test_what_does_not_exist_is_refused():
    for call in (lambda: precision_code("float64"), lambda: weight_bytes(4, 1), lambda: weight_bytes(INT8, 0)):
        with pytest.raises(InvalidArgument, match=r"give|there are"):
            call()


@pytest.mark.parametrize("code", SMALL)
def test_every_stored_value_is_read_exactly_and_made_again(code):
    if code == INT8:
        rows = [np.arange(-127, 128, dtype=np.int8).view(np.uint8), np.zeros(1, np.uint8)]
        scales = [np.float32(s) for s in (1, 1e-3, 0.1, 2.0**-126, 1e-45, 3.3e37 / 127, precision._SCALE_MAX)]
        rows = [np.concatenate([*rows, np.array([s]).view(np.uint8)]) for s in scales]
        dim = 255
    else:
        halves = np.arange(1 << 16, dtype=np.uint16)[:: 1 if reference.JIT else 97]
        top = 0x7C00 if code == FLOAT16 else 0x7F80
        halves = halves[halves & 0x7FFF < top]  # finite ones
        dim = len(halves) // 2 * 2
        rows = [halves[:dim].view(np.uint8)]
    for row in rows:
        weights = decoded(row, code, dim)
        assert np.isfinite(weights).all()
        assert weights.tobytes() == twin(row, code, dim).tobytes()
        assert nearest(weights, code, scale_of(row, code, dim)).tobytes() == row.tobytes()


@pytest.mark.parametrize("code", CODES)
def test_rows_of_any_width_survive_export_and_import(code):
    for dim in DIMS:
        weights = sample(dim, seed=dim, spread=3)
        row = stored(weights, code, seed=dim)
        out = decoded(row, code, dim)
        assert out.tobytes() == twin(row, code, dim).tobytes()
        assert nearest(out, code, scale_of(row, code, dim)).tobytes() == row.tobytes()
        used = {FLOAT32: 4 * dim, FLOAT16: 2 * dim, BFLOAT16: 2 * dim, INT8: dim}[code]
        assert not row[used : len(row) - (4 if code == INT8 else 0)].any()  # padding


def test_float32_rows_are_the_weights_themselves():
    weights = sample(33)
    assert stored(weights, FLOAT32, 1).tobytes() == nearest(weights, FLOAT32, 0).tobytes() == weights.tobytes()
    assert scale_of(weights.view(np.uint8), FLOAT32, 33) == 0


@pytest.mark.parametrize("code", [FLOAT16, BFLOAT16])
@pytest.mark.parametrize("spread", [4, 12, 60])  # 12 reaches float16's subnormals and its largest value, 60 goes beyond
def test_stochastic_rounding_follows_its_definition_to_the_bit(code, spread):
    dim = reference.MANY if reference.JIT else 33
    weights = sample(dim, seed=3, spread=spread)
    for seed in (0, 1, reference.WORD):
        expected = [stochastic_twin(w, code, seed, c) for c, w in enumerate(weights)]
        assert decoded(stored(weights, code, seed), code, dim).tobytes() == np.array(expected, np.float32).tobytes()


def test_int8_follows_its_definition_to_the_bit():
    for dim in DIMS:
        weights = sample(dim, seed=dim, spread=5)
        weights[0] += np.float32(0.5)
        scale = np.abs(weights).max() / np.float32(127)
        x = np.abs(weights) / scale
        fixed = (x * np.float32(1 << 23)).astype(np.int64) + [draw(9, c) >> 9 for c in range(dim)]
        q = np.copysign(np.minimum(fixed >> 23, 127), weights).astype(np.int8)
        row = stored(weights, INT8, 9)
        assert row[:dim].tobytes() == q.tobytes()
        assert scale_of(row, INT8, dim) == scale


@pytest.mark.parametrize("code", SMALL)
@pytest.mark.parametrize("size", [1.0, 2.0**-13, 2.0**-20, 2.0**-26])  # the last two: float16 subnormals, and below
def test_the_expectation_is_the_weight(code, size):
    """Hoeffding: n independent errors within an interval of one step have a mean beyond t with P <= 2 exp(-2 n t^2)."""
    dim, times = (32, 20000) if reference.JIT else (8, 200)
    weights = (size * np.random.default_rng(5).uniform(-1, 1, dim)).astype(np.float32)
    stride = weight_bytes(code, dim)
    rows = np.zeros((times, stride), np.uint8)
    seeds = np.array([seed_of(np.uint64(7), step) for step in range(times)], np.uint64)
    encode_all(address_of(rows), stride, code, dim, address_of(weights), seeds)
    out = np.array([twin(row, code, dim) for row in rows], np.float64)
    if code == INT8:
        steps = np.full(dim, np.abs(weights).max() / 127.0)
    else:
        steps = np.array([float(step_at(abs(float(w)), code)) for w in weights])
    errors = (out - weights) / steps
    assert np.abs(errors).max() < 1 + 1e-6
    false_alarm = 1e-9  # of one assertion below; int8 is off by up to 2^-16 of a step by definition
    bound = math.sqrt(math.log(2 * dim / false_alarm) / (2 * times))
    assert np.abs(errors.mean(axis=0)).max() < bound + 2.0**-16
    bound = math.sqrt(math.log(2 / false_alarm) / (2 * times * dim))
    assert abs(errors.mean()) < bound + 2.0**-16
    assert abs((errors * np.sign(weights)).mean()) < bound + 2.0**-16  # neither grows nor shrinks


@pytest.mark.parametrize("code", SMALL)
def test_bits_depend_on_seed_and_column_alone(code):
    weights = sample(33, seed=1, spread=1)
    seed = seed_of(np.uint64(3), 10)
    row = stored(weights, code, seed)
    assert stored(weights, code, seed_of(np.uint64(3), 10)).tobytes() == row.tobytes()
    assert stored(weights, code, seed_of(np.uint64(3), 11)).tobytes() != row.tobytes()
    assert stored(weights, code, seed_of(np.uint64(4), 10)).tobytes() != row.tobytes()
    if code != INT8:  # whose scale depends on all columns
        changed = weights.copy()
        changed[5:] += np.float32(0.3)
        assert stored(changed, code, seed)[:10].tobytes() == row[:10].tobytes()


def test_columns_and_seeds_are_rounded_independently():
    dim, times = 32, 2000 if reference.JIT else 100
    weights = np.full(dim, np.float32(1 + 2.0**-8))  # half-way between two bfloat16
    rows = np.zeros((times, 2 * dim), np.uint8)
    seeds = np.array([seed_of(np.uint64(key), step) for key in range(times // 10) for step in range(10)], np.uint64)
    assert len(set(seeds.tolist())) == times
    encode_all(address_of(rows), 2 * dim, BFLOAT16, dim, address_of(weights), seeds)
    up = 2.0 * (rows.view(np.uint16) & 1) - 1
    both = up.T @ up / times  # of +1 and -1: products of two columns average 0 if these are independent
    np.fill_diagonal(both, 0)
    assert np.abs(both).max() < math.sqrt(2 * math.log(2 * dim**2 / 1e-9) / times)  # Hoeffding, interval of length 2
    rest = (up[1:] * up[:-1]).mean(axis=0)
    assert np.abs(rest).max() < math.sqrt(2 * math.log(2 * dim / 1e-9) / (times - 1))


def test_seeds_are_these_for_ever():
    assert [int(seed_of(np.uint64(k), np.int64(s))) for k, s in ((0, 0), (1, 0), (reference.WORD, 5), (0, -1))] == [
        reference.mix64(reference.mix64((k + reference.GOLDEN) & reference.WORD) ^ s & reference.WORD)
        for k, s in ((0, 0), (1, 0), (reference.WORD, 5), (0, -1))
    ]


@pytest.mark.parametrize("code", SMALL)
def test_nothing_finite_becomes_infinite(code):
    top = np.finfo(np.float32).max
    beyond = np.nextafter(LARGEST.get(code, np.float32(1)), top)
    for weights in ([top, -top, 1.0], [beyond, -top / 3, top / 7]):
        weights = np.array(weights, np.float32)
        for seed in range(20):
            out = decoded(stored(weights, code, seed), code, 3)
            assert np.isfinite(out).all()
            if code != INT8:
                assert np.abs(out).max() == LARGEST[code]
            else:
                assert np.abs(out - weights.astype(np.float64)).max() <= float(top) / 127
        assert np.isfinite(decoded(nearest(weights, code, 1e30), code, 3)).all()


def test_the_largest_scale_is_the_last_that_is_finite_times_127():
    with np.errstate(over="ignore"):
        assert np.isfinite(precision._SCALE_MAX * np.float32(127))
        assert not np.isfinite(np.nextafter(precision._SCALE_MAX, np.float32(1e39)) * np.float32(127))


@pytest.mark.parametrize("code", [FLOAT16, BFLOAT16])
def test_nearest_is_numpys(code):
    dim = reference.MANY
    weights = sample(dim, seed=8, spread=16)
    weights[:3] = np.array([0x3F808000, 0x3F818000, 0xBF808000], np.uint32).view(np.float32)  # ties of bfloat16
    weights[3:8] = [1 + 2.0**-11, 1 + 3 * 2.0**-11, 2.0**-25, 3 * 2.0**-25, -(2.0**-15) - 2.0**-25]  # and of float16
    out = decoded(nearest(weights, code, 0), code, dim)
    if code == FLOAT16:
        expected = np.clip(weights, -65504, 65504).astype(np.float16).astype(np.float32)
    else:
        bits = weights.view(np.uint32)
        expected = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16 << 16).view(np.float32)
    assert out.tobytes() == expected.tobytes()


def test_nearest_int8_takes_the_scale_that_it_is_given():
    weights = np.array([0.5, 1.5, -2.5, 126.6, 127.4, 1000, -1000, -0.0, 0.49], np.float32)
    row = nearest(weights, INT8, 1)
    assert row[:9].view(np.int8).tolist() == [0, 2, -2, 127, 127, 127, -127, 0, 0]
    assert scale_of(row, INT8, 9) == 1
    assert not nearest(weights, INT8, 0).any()


def test_zeros_and_rows_too_small_for_a_scale():
    for dim in (1, 2, 7):
        assert not stored(np.full(dim, -0.0, np.float32), INT8, 3).any()
    tiny = np.array([130, -1, 70], np.float32) * np.float32(2.0**-149)
    rows = [decoded(stored(tiny, INT8, seed), INT8, 3) for seed in range(3)]
    assert scale_of(stored(tiny, INT8, 0), INT8, 3) == np.float32(2.0**-126)
    assert np.abs(rows).max() <= 2.0**-126


@pytest.mark.parametrize("code", [FLOAT32, FLOAT16, BFLOAT16])
def test_zero_keeps_its_sign(code):
    weights = np.array([-0.0, 0.0, -1e-45, 1e-45], np.float32)
    for row in (stored(weights, code, 1), nearest(weights, code, 0)):
        assert np.signbit(decoded(row, code, 4)).tolist() == [True, False, True, False]


@pytest.mark.skipif(not reference.JIT, reason="is what that runs")
def test_all_this_holds_without_compiling():
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__],
        env=os.environ | {"NUMBA_DISABLE_JIT": "1"},
        cwd=Path(__file__).resolve().parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
