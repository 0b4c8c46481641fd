# SPDX-License-Identifier: Apache-2.0
"""Rows made smaller after training, which only frozen tables hold: int4 with a scale, product quantisation, mixed dimensions.

    int4   q0 | q1 << 4, q2 | q3 << 4, ... zeros up to a multiple of 4, scale    w = (q - 8) * scale
    pq     c0 c1 ... c(m-1), zeros up to a multiple of 4                         w of part p = its columns of line c(p)
    mixed  z0 z1 ... z(m-1), float32                                             w = z0 * line 0 + z1 * line 1 + ...
           0xFFFFFFFF, n, zeros: as many bytes                                   w = line m + n, a row that is kept whole

A codebook has the lines: of pq 256, float32[256, dim], where part p is the columns starts[p] to starts[p + 1]; of mixed m, and
the rows that are whole behind them. int8: ``embedding/precision.py``.
Invariant: reading is exact, packing rounds to what is nearest: for int4 under the one of some scales that errs least. Codes
go on from those of ``precision``; a number never changes its meaning. Pure functions; kernels without bounds checks, any thread.
"""

import itertools

import numpy as np
from numpy.typing import NDArray

from oarlock.embedding.jit import jit
from oarlock.embedding.pointer import (
    Int,
    address_of,
    kernel_array,
    load_f32,
    load_i64,
    load_u8,
    load_u32,
    store_f32,
    store_u32,
)
from oarlock.embedding.precision import INT8, decode_row, encode_nearest, weight_bytes
from oarlock.proto.errors import InvalidArgument, Malformed

INT4 = 4
PQ = 5
MIXED = 6
# Name of code n; the first four are those of ``precision``.
FORMS = ("float32", "float16", "bfloat16", "int8", "int4", "pq", "mixed")
LINES = 256
# Begins a mixed row that is kept whole; as a float32 it is none that a sum of products has.
WHOLE = np.uint32(0xFFFFFFFF)
# There has to be room for the number of a line.
LEAST_VALUES = 2

_SCALE_MIN = np.float32(2.0**-126)
_SCALE_MAX = np.nextafter(np.float32(3.4028234663852886e38 / 127), np.float32(0))
# Of the scale that keeps the largest weight of an int4 row exactly: smaller ones cut it off and are finer for the others.
_SHRINK = np.linspace(1.0, 0.6, 9, dtype=np.float32)


def row_bytes(code: int, dim: int, parts: int = 0) -> int:
    """Return the bytes of a row; ``parts``: of a product-quantised one, values of a mixed one. They are a multiple of 4."""
    if code == INT4:
        return ((dim + 1) // 2 + 3) // 4 * 4 + 4
    if code == PQ:
        return (parts + 3) // 4 * 4
    if code == MIXED:
        return 4 * parts
    return weight_bytes(code, dim)


@jit
def decode_packed(row: Int, code: int, dim: int, codebook: Int, starts: Int, parts: Int, out: Int) -> None:
    """Write the weights of the row at address ``row`` to float32[dim] at address ``out``."""
    if code == INT4:
        scale = load_f32(row + ((dim + 1) // 2 + 3) // 4 * 4, 0)
        for column in range(dim):
            both = np.int32(load_u8(row, column >> 1))
            q = ((both >> ((column & 1) << 2)) & 15) - 8
            store_f32(out, column, np.float32(q) * scale)
    elif code == PQ:
        for part in range(parts):
            line = codebook + np.int64(load_u8(row, part)) * 4 * dim
            for column in range(load_i64(starts, part), load_i64(starts, part + 1)):
                store_u32(out, column, load_u32(line, column))
    elif code == MIXED:
        if load_u32(row, 0) == WHOLE:
            line = codebook + (parts + np.int64(load_u32(row, 1))) * 4 * dim
            for column in range(dim):
                store_u32(out, column, load_u32(line, column))
            return
        value = load_f32(row, 0)
        for column in range(dim):
            store_f32(out, column, value * load_f32(codebook, column))
        for part in range(1, parts):
            value = load_f32(row, part)
            line = codebook + part * 4 * dim
            for column in range(dim):
                store_f32(out, column, load_f32(out, column) + value * load_f32(line, column))
    else:
        decode_row(row, code, dim, out)


@jit
def encode_rows(weights: Int, scales: Int, n: Int, dim: Int, size: Int, out: Int) -> None:
    """Store float32[n, dim] as int8 rows under scales: float32[n], each value as the nearest."""
    for row in range(n):
        encode_nearest(out + row * size, INT8, dim, weights + row * 4 * dim, load_f32(scales, row))


@jit
def decode_rows(
    rows: Int, n: Int, size: Int, code: int, dim: int, codebook: Int, starts: Int, parts: Int, out: Int
) -> None:
    """Write the weights of ``n`` packed rows of ``size`` bytes to float32[n, dim] at address ``out``."""
    for row in range(n):
        decode_packed(rows + row * size, code, dim, codebook, starts, parts, out + row * 4 * dim)


def pack_int8(weights: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Return weights: float32[n, dim] as int8 rows, the largest magnitude of each as 127."""
    weights = kernel_array("weights", np.ascontiguousarray(weights), np.float32, 2)
    n, dim = weights.shape
    largest = np.abs(weights).max(axis=1)
    scales = np.where(largest == 0, np.float32(0), np.clip(largest / np.float32(127), _SCALE_MIN, _SCALE_MAX))
    scales = np.ascontiguousarray(scales, np.float32)
    out = np.empty((n, row_bytes(INT8, dim)), np.uint8)
    encode_rows(address_of(weights), address_of(scales), n, dim, out.shape[1], address_of(out))
    return out


def pack_int4(weights: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Return weights: float32[n, dim] as int4 rows."""
    n, dim = weights.shape
    full = np.maximum(np.abs(weights).max(axis=1, keepdims=True) / np.float32(7), _SCALE_MIN)
    best = np.full(n, np.inf, np.float32)
    scales, levels = np.zeros((n, 1), np.float32), np.zeros((n, dim), np.int8)
    for shrink in _SHRINK:
        scale = full * shrink
        q = np.clip(np.rint(weights / scale), -7, 7)
        error = np.square(q * scale - weights).sum(axis=1)
        better = error < best
        best[better], scales[better], levels[better] = error[better], scale[better], q[better].astype(np.int8)
    out = np.zeros((n, row_bytes(INT4, dim)), np.uint8)
    shifted = np.full((n, dim + dim % 2), 8, np.uint8)
    shifted[:, :dim] = (levels + 8).astype(np.uint8)
    out[:, : shifted.shape[1] // 2] = shifted[:, 0::2] | shifted[:, 1::2] << np.uint8(4)
    out[:, -4:] = scales.view(np.uint8)
    return out


def part_starts(dim: int, parts: int) -> NDArray[np.int64]:
    """Return where the parts of a product-quantised row begin, and where the last one ends: int64[parts + 1]."""
    if not 1 <= parts <= dim:
        raise InvalidArgument(f"{parts} parts: give 1 to {dim}, the dim of the table")
    return np.linspace(0, dim, parts + 1).astype(np.int64)


def pack_pq(weights: NDArray[np.float32], codebook: NDArray[np.float32], parts: int) -> NDArray[np.uint8]:
    """Return weights: float32[n, dim] as the lines of the codebook that are nearest, part by part."""
    n, dim = weights.shape
    starts = part_starts(dim, parts)
    out = np.zeros((n, row_bytes(PQ, dim, parts)), np.uint8)
    for part, (begin, end) in enumerate(itertools.pairwise(starts.tolist())):
        out[:, part] = nearest_lines(np.ascontiguousarray(weights[:, begin:end]), codebook[:, begin:end])
    return out


def pack_mixed(
    weights: NDArray[np.float32], whole: NDArray[np.bool_], lines: NDArray[np.float32], begin: int
) -> NDArray[np.uint8]:
    """Return weights: float32[n, dim] as mixed rows: the values of lines: float32[m, dim], orthonormal, that come nearest; those
    of ``whole``, bool[n], as lines ``m + begin`` and on."""
    out = np.ascontiguousarray(weights @ lines.T, np.float32)
    words = out.view(np.uint32)
    words[whole] = 0
    words[whole, 0] = WHOLE
    words[whole, 1] = begin + np.arange(int(whole.sum()), dtype=np.uint32)
    return out.view(np.uint8)


def check_mixed(rows: NDArray[np.uint8], lines: int) -> None:
    """Raise Malformed if a mixed row says that it is a line beyond ``lines``, which are kept whole: the kernel believes it."""
    if not len(rows):
        return
    words = rows.view(np.uint32)
    if (words[words[:, 0] == WHOLE, 1] >= lines).any():
        raise Malformed(f"a row is said to be kept whole beyond the {lines} that are")


def mixed_values(values: int, dim: int) -> NDArray[np.int64]:
    """Return what says that mixed rows have so many values, in place of the starts of parts: int64[values + 1]."""
    if not LEAST_VALUES <= values <= dim:
        raise InvalidArgument(f"{values} values of a mixed row: give {LEAST_VALUES} to {dim}, the dim of the table")
    return np.zeros(values + 1, np.int64)


def nearest_lines(points: NDArray[np.float32], lines: NDArray[np.float32]) -> NDArray[np.int64]:
    """Return the line next to each point: int64[n]."""
    out = np.empty(len(points), np.int64)
    square = np.square(lines).sum(axis=1) / 2
    for begin in range(0, len(points), 1 << 14):
        run = slice(begin, begin + (1 << 14))
        out[run] = np.argmin(square - points[run] @ lines.T, axis=1)
    return out


def unpack(
    rows: NDArray[np.uint8], code: int, dim: int, codebook: NDArray[np.float32], starts: NDArray[np.int64]
) -> NDArray[np.float32]:
    """Return the weights of packed rows: float32[n, dim]."""
    rows = np.ascontiguousarray(rows)
    out = np.empty((len(rows), dim), np.float32)
    address = address_of(rows), len(rows), rows.shape[1]
    decode_rows(*address, code, dim, address_of(codebook), address_of(starts), len(starts) - 1, address_of(out))
    return out


NO_CODEBOOK: NDArray[np.float32] = np.zeros((1, 1), np.float32)
NO_STARTS: NDArray[np.int64] = np.zeros(1, np.int64)
