# SPDX-License-Identifier: Apache-2.0
"""Rows of which the k largest columns by size are kept: how they are found, written and read.

    v0 v1 ... c0 c1 ... padding     k float32 values as they are, then their columns, ascending: one byte each where dim is
                                    at most 256, two above; zeros up to a multiple of 4 bytes

Invariant: of columns of the same size the lower one is kept; NaN and infinities are larger than all numbers, so they are
kept first. Which columns a row names is checked before anything is written there. Kernels, any thread.
"""

import numpy as np

from oarlock.embedding.jit import jit
from oarlock.embedding.pointer import Int, load_u8, load_u16, load_u32, store_u8, store_u16, store_u32, trailing_zeros

NARROW = 256  # columns that one byte tells apart

_MAGNITUDE = np.uint32(0x7FFFFFFF)
_OCTAVE = 1 << 23  # from a magnitude's bits to those of its half


@jit
def topk_bytes(dim: Int, k: Int) -> Int:
    """Return how many bytes a row takes."""
    return 4 * k + (k * (1 if dim <= NARROW else 2) + 3) // 4 * 4


@jit
def _at_least(source: Int, dim: Int, bits: np.uint32) -> Int:
    """Return how many of float32[dim] have magnitudes of at least these bits."""
    total = np.uint32(0)  # as wide as what is compared, so that vectors of one width do
    for column in range(dim):
        total = np.uint32(total + np.uint32((load_u32(source, column) & _MAGNITUDE) >= bits))
    return np.int64(total)


@jit
def encode_topk(row: Int, dim: Int, k: Int, source: Int, largest: np.uint32) -> None:
    """Write the row of float32[dim] at address ``source``; ``largest`` = the bits of its largest magnitude, 1 <= k <= dim.

    The least kept magnitude is found by halving an interval of bits: a fixed number of passes at most, each in vector
    instructions, whatever k is.
    """
    high = np.int64(largest) + 1  # fewer than k columns reach it: ``above``
    above = np.int64(0)
    low = high
    reached = np.int64(0)  # columns that reach ``low``, in the end k or more
    octave = np.int64(_OCTAVE)
    while reached < k:  # values of a row are mostly within a few powers of two: down from the largest, ever faster
        high = low
        above = reached
        low = max(low - octave, np.int64(0))
        octave += octave
        reached = _at_least(source, dim, np.uint32(low))
    while high - low > 1 and reached != k:
        middle = (low + high) >> 1
        found = _at_least(source, dim, np.uint32(middle))
        if found >= k:
            low = middle
            reached = found
        else:
            high = middle
            above = found
    surplus = reached - k  # columns of one size, from low to below high, that are too many: the last ones are left out
    equal = k - above
    columns = row + 4 * k
    at = np.int64(0)
    begin = np.int64(0)
    while at < k:  # k are taken, so this ends before the last column
        end = min(begin + 64, dim)
        kept = np.uint64(0)
        for column in range(begin, end):
            kept |= np.uint64((load_u32(source, column) & _MAGNITUDE) >= np.uint32(low)) << np.uint64(column - begin)
        while kept != 0 and at < k:
            column = begin + trailing_zeros(kept)
            kept &= kept - np.uint64(1)
            bits = load_u32(source, column)
            if surplus > 0 and np.int64(bits & _MAGNITUDE) < high:
                equal -= 1
                if equal < 0:
                    continue
            store_u32(row, at, bits)
            if dim <= NARROW:
                store_u8(columns, at, np.uint8(column))
            else:
                store_u16(columns, at, np.uint16(column))
            at += 1
        begin += 64
    width = 1 if dim <= NARROW else 2
    for byte in range(k * width, (k * width + 3) // 4 * 4):
        store_u8(columns, byte, np.uint8(0))


@jit
def decode_topk(row: Int, dim: Int, k: Int, out: Int) -> bool:
    """Write float32[dim] to address ``out``, 0 where the row says nothing; False = its columns are none of a row."""
    for zero in range(dim):
        store_u32(out, zero, np.uint32(0))
    columns = row + 4 * k
    last: Int = -1
    for at in range(k):
        column: Int = np.int64(load_u8(columns, at)) if dim <= NARROW else np.int64(load_u16(columns, at))
        if column <= last or column >= dim:
            return False
        store_u32(out, column, load_u32(row, at))
        last = column
    return True
