# SPDX-License-Identifier: Apache-2.0
"""Rows of float32 as fewer bytes, for the way between a worker and a shard: one kernel each way for all codecs.

Rows of float32, float16, bfloat16 and int8 look as a table stores them (``embedding/precision.py``), those of topk as in
``embedding/compress_topk.py``. Invariant: what is refused stays refused. A value whose magnitude is not below the limit
(or is NaN) reads as one that is not finite, at the least; no other value does. Kernels, any thread; memory of rows is
aligned to 4 bytes and does not overlap float32 memory.
"""

import numpy as np

from oarlock.embedding.compress_topk import decode_topk, encode_topk, topk_bytes
from oarlock.embedding.jit import jit
from oarlock.embedding.pointer import Int, load_u16, load_u32, load_u64, store_u8, store_u16, store_u32
from oarlock.embedding.precision import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    INT8,
    decode_row,
    encode_nearest,
    encode_row,
    scale_for,
    scale_offset,
    seed_of,
    weight_bytes,
)

# Codes 0 to 3 are those of embedding/precision.py, whose rows these are.
TOPK = 4

_SIGN = np.uint32(0x80000000)
_MAGNITUDE = np.uint32(0x7FFFFFFF)
_INFINITE = np.uint32(0x7F800000)
_NAN = np.uint32(0x7FC00000)
_NONE = np.uint64(0)
_HALF_TOP = np.uint16(0x7C00)  # float16's exponent of what is not finite


def row_bytes(code: int, dim: int, k: int) -> int:
    """Return how many bytes a row takes, a multiple of 4."""
    return int(topk_bytes(dim, k)) if code == TOPK else weight_bytes(code, dim)


@jit
def rounding_seed(start: np.uint64, key: np.uint64, step: Int) -> np.uint64:
    """Return the seed under which a key's row is rounded at a step; ``start`` tells tables and directions apart."""
    return seed_of(key ^ start, step)


@jit
def _poison(row: Int, code: Int, dim: Int, source: Int, limit: np.uint32) -> None:
    """Write, over a row of 1 or 2 bytes a weight, what is not below the limit as what is not finite."""
    if code == INT8:  # has no such value, but a scale that makes all of them such
        end = scale_offset(dim)
        for column in range(end):
            store_u8(row, column, np.uint8(0))
        store_u32(row + end, 0, _NAN)
    else:
        infinite = np.uint32(0x7F80 if code == BFLOAT16 else 0x7C00)
        quiet = np.uint32(0x7FC0 if code == BFLOAT16 else 0x7E00)
        for column in range(dim):
            bits = load_u32(source, column)
            size = bits & _MAGNITUDE
            if size >= limit:
                sign = (bits & _SIGN) >> np.uint32(16)
                store_u16(row, column, np.uint16(sign | (quiet if size > _INFINITE else infinite)))


@jit
def encode_one(
    row: Int, code: Int, dim: Int, k: Int, source: Int, limit: np.uint32, random: bool, seed: np.uint64
) -> None:
    """Write float32[dim] at address ``source`` as the row at address ``row``.

    Rounded to nearest even, or stochastically under ``seed``; float32 and topk do not round. ``limit`` as by limit_bits.
    """
    if code == FLOAT32:
        for column in range(dim):
            store_u32(row, column, load_u32(source, column))
        return
    largest = np.uint32(0)
    for column in range(dim):
        largest = max(largest, load_u32(source, column) & _MAGNITUDE)
    if code == TOPK:
        encode_topk(row, dim, k, source, largest)
    elif code == INT8 and largest >= limit:
        _poison(row, code, dim, source, limit)
    else:
        if random:
            encode_row(row, code, dim, source, seed)
        elif code == INT8:
            encode_nearest(row, code, dim, source, scale_for(row + scale_offset(dim), largest))
        else:
            encode_nearest(row, code, dim, source, np.float32(0))
        if largest >= limit:
            _poison(row, code, dim, source, limit)


@jit
def _decode_poison(row: Int, dim: Int, out: Int) -> None:
    """Write what is not finite in a float16 row over what was read."""
    for column in range(dim):
        bits = np.uint32(load_u16(row, column))
        if bits & np.uint32(_HALF_TOP) == np.uint32(_HALF_TOP):
            sign = (bits >> np.uint32(15)) << np.uint32(31)
            store_u32(out, column, sign | (_NAN if bits & np.uint32(0x3FF) else _INFINITE))


@jit
def decode_one(row: Int, code: Int, dim: Int, k: Int, out: Int) -> bool:
    """Write the row at address ``row`` to float32[dim] at address ``out``; False = it is no row of this codec."""
    if code == TOPK:
        return decode_topk(row, dim, k, out)
    decode_row(row, code, dim, out)
    if code == FLOAT16:  # stored rows have nothing that is not finite, so decode_row reads that as numbers
        found = np.uint16(0)
        for column in range(dim):
            found |= np.uint16((load_u16(row, column) & _HALF_TOP) == _HALF_TOP)
        if found != 0:
            _decode_poison(row, dim, out)
    return True


@jit
def encode_rows(
    rows: Int,
    stride: Int,
    code: Int,
    dim: Int,
    k: Int,
    source: Int,
    n: Int,
    limit: np.uint32,
    keys: Int,
    start: np.uint64,
    step: Int,
) -> None:
    """Write float32[n, dim] as n rows; stochastically by keys: uint64[n], or to nearest where that address is 0."""
    for i in range(n):
        seed = _NONE
        if keys != 0:
            seed = rounding_seed(start, load_u64(keys, i), step)
        encode_one(rows + i * stride, code, dim, k, source + i * 4 * dim, limit, keys != 0, seed)


@jit
def decode_rows(rows: Int, stride: Int, code: Int, dim: Int, k: Int, out: Int, n: Int) -> Int:
    """Write n rows to float32[n, dim]; return n, or the number of the first that is no row of this codec."""
    for i in range(n):
        if not decode_one(rows + i * stride, code, dim, k, out + i * 4 * dim):
            return i
    return n
