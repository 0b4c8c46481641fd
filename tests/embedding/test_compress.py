# SPDX-License-Identifier: Apache-2.0
"""Codecs: the bytes that the document says, what is read back, and nothing that was to be refused let through."""

import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import compress_reference as twin
import embedding_reference as reference
import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis.extra import numpy as arrays

from oarlock.embedding import compress_rows
from oarlock.embedding.compress import CODECS, Compression, Draw, RowCodec, draw_start
from oarlock.embedding.pointer import address_of
from oarlock.embedding.precision import encode_nearest
from oarlock.embedding.refusal import GRADIENT_LIMIT
from oarlock.proto.errors import InvalidArgument, Malformed, OutOfMemory

INFINITE = float("inf")
LIMITS = [INFINITE, GRADIENT_LIMIT, 100.0]
FILL = 0xA5
EXAMPLES = settings(max_examples=80 if reference.JIT else 15)
ODD = [0, -0.0, np.nan, -np.nan, np.inf, -np.inf, 1e15, 9.9e14, -1e15, 65504, 65519, 65520, -7e4, 3.4028235e38, 1e-45]
TIES = [2.0**-24, 2.0**-25, 3 * 2.0**-25, 1 + 2.0**-8, 1 + 3 * 2.0**-8, 1 + 2.0**-11, 99.99, 100, 1e-38, -1e-40, 0.5]
SPECIAL = np.array([*ODD, *TIES], np.float32)


def codecs(dim):
    """Return every codec with every rounding that it has, for rows of ``dim`` columns."""
    rounding = [Compression(c, rounding=r) for c in CODECS[1:4] for r in ("nearest", "stochastic")]
    return [Compression(), *rounding, *(Compression("topk", k) for k in sorted({1, (dim + 1) // 2, dim}))]


def name_of(compression):
    return f"{compression.codec}{compression.k or ''}-{compression.rounding}"


def sample(n, dim, seed=0):
    rng = np.random.default_rng(seed)
    values = (rng.normal(size=(n, dim)) * np.exp2(rng.uniform(-40, 20, (n, 1)))).astype(np.float32)
    values[rng.random((n, dim)) < 0.1] = -0.0
    special = rng.random((n, dim)) < 0.05
    values[special] = rng.choice(SPECIAL, special.sum())
    if dim > 2:  # ties
        values[:, 2] = -values[:, 0]
    return values


def draw_of(n, seed=0, step=7):
    keys = np.random.default_rng(seed).integers(0, 1 << 64, n, np.uint64)
    return Draw(keys, draw_start(seed, "user", "push"), step)


def encoded(codec, values, draw=None):
    """Return a payload, having seen that nothing beside it was written."""
    n = len(values)
    out = np.full(codec.size(n) + 8, FILL, np.uint8)
    size = codec.encode(values, out[: codec.size(n)], draw)
    assert (out[codec.size(n) :] == FILL).all()
    return out[:size].tobytes()


def decoded(codec, data, n):
    out = np.full((n + 1, codec.dim), np.float32(7))
    codec.decode(data, out[:n])
    assert (out[n] == 7).all()
    return out[:n]


def same(a, b):
    """Tell whether two arrays of float32 are the same to the bit, any NaN for any NaN."""
    return ((a.view(np.uint32) == b.view(np.uint32)) | (np.isnan(a) & np.isnan(b))).all()


def test_codes_and_sizes_never_change():
    assert CODECS == ("none", "float16", "bfloat16", "int8", "topk")
    for dim in (1, 3, 4, 16, 64, 256, 257, 1000):
        for compression in codecs(dim):
            codec = RowCodec(compression, dim)
            assert codec.code == CODECS.index(compression.codec)
            assert codec.row_bytes == twin.row_bytes(compression.codec, dim, compression.k)
            assert codec.size(3) == 3 * codec.row_bytes
            assert codec.row_bytes % 4 == 0


@pytest.mark.parametrize("dim", [1, 2, 3, 4, 5, 7, 16, 33, 65])
@pytest.mark.parametrize("limit", LIMITS)
def test_bytes_are_those_of_the_twin_and_are_read_alike(dim, limit):
    n = 60 if reference.JIT else 4
    values = sample(n, dim, seed=dim)
    draw = draw_of(n, seed=dim)
    for compression in codecs(dim):
        codec = RowCodec(compression, dim, limit)
        data = encoded(codec, values, draw)
        expected = twin.encode(compression, limit, values, draw.keys, draw.start, draw.step)
        assert data == expected, name_of(compression)
        assert same(decoded(codec, data, n), twin.decode(compression, data, n, dim)), name_of(compression)


@pytest.mark.parametrize("dim", [256, 257, 1000])
def test_wide_rows(dim):
    values = sample(3, dim, seed=dim)
    for compression in (Compression("topk", 1), Compression("topk", 37), Compression("topk", dim), Compression("int8")):
        codec = RowCodec(compression, dim)
        data = encoded(codec, values)
        assert data == twin.encode(compression, INFINITE, values)
        assert same(decoded(codec, data, 3), twin.decode(compression, data, 3, dim))


ROWS = arrays.arrays(np.float32, st.tuples(st.integers(0, 4), st.integers(1, 12)), elements=st.floats(width=32))


@EXAMPLES
@given(values=ROWS, data=st.data())
def test_any_floats_are_written_as_the_twin_writes_them(values, data):
    n, dim = values.shape
    compression = data.draw(st.sampled_from(codecs(dim)))
    limit = data.draw(st.sampled_from(LIMITS))
    draw = draw_of(n)
    codec = RowCodec(compression, dim, limit)
    payload = encoded(codec, values, draw)
    assert payload == twin.encode(compression, limit, values, draw.keys, draw.start, draw.step)
    out = decoded(codec, payload, n)
    # What is refused is refused where it arrives as well, and nothing else becomes infinite or NaN.
    before = twin.refused(values, limit).any(axis=1)
    assert twin.refused(out, limit)[before].any(axis=1).all()
    assert np.isfinite(out[~before]).all()


@EXAMPLES
@given(values=ROWS, data=st.data())
def test_how_far_off_a_value_is_read(values, data):
    n, dim = values.shape
    values = np.where(np.isfinite(values), values, np.float32(1))
    compression = data.draw(st.sampled_from(codecs(dim)))
    codec = RowCodec(compression, dim)
    out = decoded(codec, encoded(codec, values, draw_of(n)), n)
    steps = 1 if compression.rounding == "stochastic" else Fraction(1, 2)
    for row, got in zip(values, out, strict=True):
        if compression.codec == "topk":
            kept = got != 0
            assert same(got[kept], row[kept])
            assert np.abs(row[~kept]).max(initial=0) <= np.abs(row[kept]).min(initial=np.inf)
            assert kept.sum() <= compression.k
            assert kept.sum() == min(compression.k, np.count_nonzero(row))
            continue
        largest = max(abs(Fraction(float(value))) for value in row)
        for value, read in zip(row.tolist(), got.tolist(), strict=True):
            error, size = abs(Fraction(value) - Fraction(read)), abs(Fraction(value))
            if compression.codec == "none":
                assert error == 0
            elif compression.codec == "float16":
                assert error <= max(size * Fraction(2) ** -10, Fraction(2) ** -24) * steps or size > 65504
                assert size <= 65504 or abs(read) == 65504
            elif compression.codec == "bfloat16":
                top = Fraction(twin.LARGEST["bfloat16"])
                assert error <= max(size * Fraction(2) ** -7, Fraction(2) ** -133) * steps or size > top
            else:
                scale = max(largest / 127, Fraction(2) ** -126)
                assert error <= scale * steps * (1 + Fraction(2) ** -14)


@pytest.mark.parametrize("compression", [c for c in codecs(5) if c.rounding == "nearest"], ids=name_of)
def test_what_is_read_from_a_payload_makes_it_again(compression):
    values = sample(50, 5, seed=1)
    values[~np.isfinite(values)] = 1
    codec = RowCodec(compression, 5)
    out = decoded(codec, encoded(codec, values), 50)
    again = decoded(codec, encoded(codec, out), 50)
    if compression.codec == "int8":  # the largest value is read as 127 * scale, rounded
        assert (np.abs(again - out) <= np.abs(out) * np.float32(2.0**-22)).all()
    else:
        assert same(again, out)


def test_rows_are_those_that_a_table_stores():
    """So a shard whose rows have the codec's precision can send them as they are."""
    row = np.array([1, -2, 0.5, 3, 100], np.float32)
    for code, name in ((1, "float16"), (2, "bfloat16")):
        stored = np.zeros(12, np.uint8)
        encode_nearest(address_of(stored), code, 5, address_of(row), np.float32(0))
        assert encoded(RowCodec(Compression(name), 5), row[None]) == stored.tobytes()


def test_overflow_and_what_is_not_finite():
    values = np.array([[70000, -1e14, 1e15, -1e15, np.nan, -np.inf, 1]], np.float32)
    half = decoded(RowCodec(Compression("float16"), 7, GRADIENT_LIMIT), encoded_as("float16", values), 1)[0]
    assert half[:4].tolist() == [65504, -65504, np.inf, -np.inf]
    assert np.isnan(half[4])
    assert half[5:].tolist() == [-np.inf, 1]
    brain = decoded(RowCodec(Compression("bfloat16"), 7, GRADIENT_LIMIT), encoded_as("bfloat16", values), 1)[0]
    assert np.isfinite(brain).tolist() == [True, True, False, False, False, False, True]
    assert np.isnan(decoded(RowCodec(Compression("int8"), 7, GRADIENT_LIMIT), encoded_as("int8", values), 1)).all()
    kept = decoded(RowCodec(Compression("topk", 2), 7, GRADIENT_LIMIT), encoded_as("topk", values, 2), 1)[0]
    assert np.isnan(kept[4])
    assert kept[5] == -np.inf
    # As weights, which nobody refuses, they stay finite as long as they are.
    weights = RowCodec(Compression("float16"), 7)
    assert decoded(weights, encoded(weights, values), 1)[0, :4].tolist() == [65504, -65504, 65504, -65504]


def encoded_as(name, values, k=0):
    return encoded(RowCodec(Compression(name, k), values.shape[1], GRADIENT_LIMIT), values)


@pytest.mark.parametrize("name", CODECS[1:4])
def test_stochastic_rounding_is_of_seed_step_and_key(name):
    values = np.tile(np.random.default_rng(0).normal(size=32).astype(np.float32), (4, 1))
    codec = RowCodec(Compression(name, rounding="stochastic"), 32)
    draw = Draw(np.array([1, 2, 1, 3], np.uint64), draw_start(5, "user", "push"), 9)

    def rows(**changed):
        return [row.tobytes() for row in codec.rows(encoded(codec, values, draw._replace(**changed)), 4)]

    first = rows()
    assert first == rows()
    assert first[0] == first[2]
    assert len(set(first)) == 3
    others = [rows(step=10), *(rows(start=draw_start(*a)) for a in ((6, "user", "push"), (5, "item", "push")))]
    others.append(rows(start=draw_start(5, "user", "pull")))
    for other in others:
        assert not set(other) & set(first)


def test_kernels_are_compiled_once_whatever_comes():
    kernels = (compress_rows.encode_rows, compress_rows.decode_rows)
    if not hasattr(kernels[0], "signatures"):
        pytest.skip("nothing is compiled")
    values = sample(4, 6)
    frozen = values.copy()
    frozen.flags.writeable = False
    for compression in codecs(6):
        for given_values in (values, frozen, np.asfortranarray(values)):
            codec = RowCodec(compression, 6, 1e15)
            data = encoded(codec, given_values, draw_of(4, step=np.int64(3)))
            assert data == encoded(codec, values, draw_of(4, step=3))
            decoded(codec, data, 4)
    assert [len(kernel.signatures) for kernel in kernels] == [1, 1]


def test_what_cannot_be_is_refused():
    calls = [
        lambda: Compression("gzip"),
        lambda: Compression("topk"),
        lambda: Compression("topk", True),
        lambda: Compression("int8", k=3),
        lambda: Compression("int8", rounding="up"),
        lambda: Compression("topk", 1, rounding="stochastic"),
        lambda: Compression(rounding="stochastic"),
        lambda: Compression(zstd=20),
        lambda: Compression(zstd=-1),
        lambda: RowCodec(Compression(), 0),
        lambda: RowCodec(Compression(), 65537),
        lambda: RowCodec(Compression("topk", 5), 4),
        lambda: RowCodec(Compression(), 4, limit=float("nan")),
        lambda: RowCodec(Compression(), 4, limit=0),
        lambda: RowCodec(Compression(), 4).size(-1),
    ]
    for call in calls:
        with pytest.raises(InvalidArgument, match=r"give|choose|leave"):
            call()
    with pytest.raises(OutOfMemory):
        RowCodec(Compression(), 4).size(1 << 62)


def test_what_does_not_fit_is_refused():
    codec = RowCodec(Compression("int8", rounding="stochastic"), 4)
    values, draw = np.zeros((2, 4), np.float32), draw_of(2)
    out = np.empty(codec.size(2), np.uint8)
    for call in (
        lambda: codec.encode(values, out),
        lambda: codec.encode(values, out, draw_of(3)),
        lambda: codec.encode(values, out, draw._replace(step=-1)),
        lambda: codec.encode(values, out, draw._replace(step=1 << 63)),
        lambda: codec.encode(values, out[:-1], draw),
        lambda: codec.encode(values, out.view(np.int8), draw),
        lambda: codec.encode(values, np.empty(32, np.uint8)[::2], draw),
        lambda: codec.encode(values, bytearray(16), draw),
        lambda: codec.seal(np.empty((2, 7), np.uint8), out),
        lambda: codec.decode(bytes(16), np.empty((4, 2), np.float32).T),
    ):
        with pytest.raises(InvalidArgument):
            call()
    for call in (
        lambda: codec.encode(np.zeros((2, 5), np.float32), out, draw),
        lambda: codec.encode(values.astype(np.float64), out, draw),
        lambda: codec.encode(values[0], out, draw),
        lambda: codec.decode(bytes(16), np.empty((2, 5), np.float32)),
    ):
        with pytest.raises(Malformed):
            call()


@pytest.mark.skipif(not reference.JIT, reason="is what that runs")
def test_all_this_holds_without_compiling():
    folder = Path(__file__).parent
    files = [str(folder / f"test_compress{part}.py") for part in ("", "_bytes", "_residuals")]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files],
        env=os.environ | {"NUMBA_DISABLE_JIT": "1"},
        cwd=folder.parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
