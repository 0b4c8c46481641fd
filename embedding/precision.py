# SPDX-License-Identifier: Apache-2.0
"""How the weights of a stored row are kept: float32, float16, bfloat16, or int8 with one scale a row.

    float32     w0 w1 w2 ...                 4 bytes each
    float16     w0 w1 w2 ... padding         2 bytes each, then zeros up to a multiple of 4 bytes
    bfloat16    the same                     the upper half of a float32
    int8        q0 q1 q2 ... padding scale   w = float32(q) * scale, q from -127 to 127; scale is a float32 >= 0

Invariant: reading is exact, and what is stored is finite: larger values become the largest finite one. Stochastic
rounding gives one of the two stored values next to w with that chance that makes w the expectation. Its 32 random bits
are a pure function of (seed, column): half of one mix64 for two columns, so a row is rounded alike in any request.
Kernels without bounds checks, any thread; source and destination must not overlap, input must be finite.
"""

import numpy as np

from oarlock.embedding.hashing import GOLDEN, mix64
from oarlock.embedding.jit import jit
from oarlock.embedding.pointer import (
    Int,
    load_f32,
    load_u8,
    load_u16,
    load_u32,
    store_f32,
    store_u8,
    store_u16,
    store_u32,
)
from oarlock.proto.errors import InvalidArgument

# Ids of files and messages: a number never changes its meaning.
FLOAT32 = 0
FLOAT16 = 1
BFLOAT16 = 2
INT8 = 3
PRECISIONS = ("float32", "float16", "bfloat16", "int8")  # name of code n

_ONE = np.uint64(1)
_16 = np.uint64(16)
_23 = np.uint64(23)
_32 = np.uint64(32)
_42 = np.uint64(42)
_63 = np.uint64(63)
_126 = np.uint64(126)
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(0x7FFFFFFF)  # just below half of 2^32; plus the last kept bit, it rounds to nearest even
_SIGN = np.uint64(0x8000)
_MAGNITUDE = np.uint64(0x7FFFFFFF)
_MANTISSA = np.uint64(0x7FFFFF)
_HIDDEN = np.uint64(0x800000)
_BOTTOM_EXPONENT = np.uint64(113)  # float32's biased exponent of 2^-14, the smallest normal float16
_FLOAT16_MAX = np.uint64(0x7BFF)
_BFLOAT16_MAX = np.uint64(0x7F7F)
_FLOAT16_STEP = np.float32(2.0**-24)  # between float16 subnormals

_Q_MAX = np.float32(127)
_FIXED = np.float32(1 << 23)  # int8 is rounded in fixed point with 23 bits after the point
_ROUND = np.float32(3 << 22)  # added and taken off again, it rounds 0 <= x < 2^22 to the nearest even integer
# Both ends of the scale are kept away: below, its own rounding would count; above, 127 of it would be infinite.
_SCALE_MIN = np.float32(2.0**-126)
_SCALE_MAX = np.nextafter(np.float32(3.4028234663852886e38 / 127), np.float32(0))


def precision_code(name: str) -> int:
    """Return the code of a precision's name."""
    if name not in PRECISIONS:
        raise InvalidArgument(f"precision {name!r}: give one of {', '.join(PRECISIONS)}")
    return PRECISIONS.index(name)


def weight_bytes(code: int, dim: int) -> int:
    """Return how many bytes the weights of a row take, always a multiple of 4."""
    if code not in (FLOAT32, FLOAT16, BFLOAT16, INT8):
        raise InvalidArgument(f"precision code {code}: there are {FLOAT32} to {INT8}")
    if dim < 1:
        raise InvalidArgument(f"dim = {dim}: give at least 1")
    if code == FLOAT32:
        return 4 * dim
    if code == INT8:
        return scale_offset(dim) + 4
    return (2 * dim + 3) // 4 * 4


@jit
def seed_of(key: np.uint64, step: Int) -> np.uint64:
    """Return the seed of one change of one row; ``key`` = anything that tells it from all rows, not only the table's."""
    return mix64(mix64(key + GOLDEN) ^ np.uint64(step))


@jit
def scale_offset(dim: int) -> int:
    """Return where in an int8 row its scale lies."""
    return (dim + 3) // 4 * 4


@jit
def row_scale(row: Int, code: int, dim: int) -> np.float32:
    """Return the scale of an int8 row, 0 under the other codes."""
    if code == INT8:
        scale: np.float32 = load_f32(row + scale_offset(dim), 0)
        return scale
    return np.float32(0)


@jit
def decode_row(row: Int, code: int, dim: int, out: Int) -> None:
    """Write the weights of the row at address ``row`` to float32[dim] at address ``out``, exactly."""
    if code == FLOAT32:
        for column in range(dim):
            store_u32(out, column, load_u32(row, column))
    elif code == BFLOAT16:
        for column in range(dim):
            store_u32(out, column, np.uint32(load_u16(row, column)) << np.uint32(16))
    elif code == INT8:
        scale = load_f32(row + scale_offset(dim), 0)
        for column in range(dim):
            # flipping the top bit and taking 128 off reads the byte as signed
            q = np.int32(load_u8(row, column) ^ np.uint8(128)) - np.int32(128)
            store_f32(out, column, np.float32(q) * scale)
    else:
        for column in range(dim):
            half = np.uint32(load_u16(row, column))
            magnitude = half & np.uint32(0x7FFF)
            sign = (half >> np.uint32(15)) << np.uint32(31)
            # in two ways, as subnormal float32 would depend on the thread's rounding mode: rebias the exponent, or scale
            store_u32(out, column, sign | ((magnitude << np.uint32(13)) + np.uint32(112 << 23)))
            value = load_f32(out, column)
            step = -_FLOAT16_STEP if sign != 0 else _FLOAT16_STEP
            store_f32(out, column, np.float32(np.int32(magnitude)) * step if magnitude < 0x400 else value)


@jit
def _bfloat16_fixed(bits: np.uint64) -> np.uint64:
    """Return a float32's bits as its bfloat16 without sign, with 32 bits after the point."""
    return (bits & _MAGNITUDE) << _16


@jit
def _float16_fixed(bits: np.uint64) -> np.uint64:
    """Return a float32's bits as its float16 without sign, with 32 bits after the point; smaller parts are cut off."""
    exponent = (bits >> _23) & np.uint64(0xFF)
    cut = min(_126 - min(exponent, _BOTTOM_EXPONENT), _63)
    fixed = (((bits & _MANTISSA) | _HIDDEN) << _32) >> cut
    return fixed + ((max(exponent, _BOTTOM_EXPONENT) - _BOTTOM_EXPONENT) << _42)


@jit
def _round16(bits: np.uint64, code: int, nearest: bool, draw: np.uint64) -> np.uint64:
    """Return the 16 stored bits of a float32's bits; ``draw`` < 2^32 decides unless to nearest."""
    if code == BFLOAT16:
        fixed = _bfloat16_fixed(bits)
        largest = _BFLOAT16_MAX
    else:
        fixed = _float16_fixed(bits)
        largest = _FLOAT16_MAX
    if nearest:
        draw = _HALF + ((fixed >> _32) & _ONE)
    return min((fixed + draw) >> _32, largest) | ((bits >> _16) & _SIGN)


@jit
def _draw(seed: np.uint64, column: int) -> np.uint64:
    """Return the 32 random bits of a column."""
    # computed anew in each column: without a carried state the loops take vector instructions, and are twice as fast
    both = mix64(seed + GOLDEN * (np.uint64(column >> 1) + _ONE))
    return (both >> np.uint64((column & 1) << 5)) & _LOW


@jit
def _encode16(row: Int, code: int, dim: int, source: Int, nearest: bool, seed: np.uint64) -> None:
    """Write a row of two bytes a weight."""
    for column in range(dim):
        bits = np.uint64(load_u32(source, column))
        store_u16(row, column, np.uint16(_round16(bits, code, nearest, _draw(seed, column))))
    if dim & 1:
        store_u16(row, dim, np.uint16(0))


@jit
def _round8(value: np.float32, scale: np.float32, nearest: bool, draw: np.uint64) -> np.uint8:
    """Return the stored byte of a weight; ``draw`` < 2^32 decides unless to nearest."""
    size = min(abs(value) / scale, _Q_MAX)
    if nearest:
        q = np.int32((size + _ROUND) - _ROUND)
    else:
        q = (np.int32(size * _FIXED) + np.int32(draw >> np.uint64(9))) >> 23  # never more than 127
    return np.uint8((-q if value < 0 else q) & 255)


@jit
def _encode8(row: Int, dim: int, source: Int, scale: np.float32, nearest: bool, seed: np.uint64) -> None:
    """Write a row of one byte a weight."""
    end = scale_offset(dim)
    if scale == np.float32(0):
        for column in range(end):
            store_u8(row, column, np.uint8(0))
    else:
        for column in range(dim):
            store_u8(row, column, _round8(load_f32(source, column), scale, nearest, _draw(seed, column)))
        for column in range(dim, end):
            store_u8(row, column, np.uint8(0))
    store_f32(row + end, 0, scale)


@jit
def scale_for(scratch: Int, largest: np.uint32) -> np.float32:
    """Return the scale of an int8 row from the bits of its largest magnitude; 4 bytes at ``scratch`` are overwritten."""
    store_u32(scratch, 0, largest)
    scale: np.float32 = load_f32(scratch, 0)
    if scale != np.float32(0):
        scale = min(max(scale / _Q_MAX, _SCALE_MIN), _SCALE_MAX)
    return scale


@jit
def encode_row(row: Int, code: int, dim: int, source: Int, seed: np.uint64) -> None:
    """Store float32[dim] at address ``source`` as the row at address ``row``, rounded stochastically under ``seed``.

    The scale of an int8 row is its largest magnitude / 127, but at least 2^-126 unless all weights are zero. The
    expectation is the value: exactly under bfloat16, down to 2^-56 under float16, and under int8 to within 2^-23 of the
    value and of the scale.
    """
    if code == FLOAT32:
        for column in range(dim):
            store_u32(row, column, load_u32(source, column))
    elif code == INT8:
        largest = np.uint32(0)
        for column in range(dim):  # as integers, whose maximum takes vector instructions
            largest = max(largest, load_u32(source, column) & np.uint32(_MAGNITUDE))
        _encode8(row, dim, source, scale_for(row + scale_offset(dim), largest), False, seed)
    else:
        _encode16(row, code, dim, source, False, seed)


@jit
def encode_nearest(row: Int, code: int, dim: int, source: Int, scale: np.float32) -> None:
    """As encode_row, but rounded to nearest even and, for int8, with the ``scale`` given (finite, 0 = all zeros).

    What decode_row and row_scale gave of a row makes the same bytes again.
    """
    if code == FLOAT32:
        for column in range(dim):
            store_u32(row, column, load_u32(source, column))
    elif code == INT8:
        _encode8(row, dim, source, scale, True, np.uint64(0))
    else:
        _encode16(row, code, dim, source, True, np.uint64(0))
