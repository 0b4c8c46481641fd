# SPDX-License-Identifier: Apache-2.0
"""Dot products of all pairs by tiles of registers, forward: a sample's vectors stay in the first cache.

Faster than a BLAS product per sample where the CPU has AVX-512, since no call is made for each, what lies above the diagonal is
mostly left out, and nothing is collected before. Invariant: a product is one chain of fused multiply-adds in order of the
vectors' columns, so it depends on its two vectors alone. The rules of ``nn.kernels`` hold here too; ``scratch`` holds
``scratch_size`` floats of anything.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from oarlock.embedding.jit import jit
from oarlock.embedding.pointer import Int, address_in, copy, load_f32, store_f32
from oarlock.embedding.tile import LANES, ROWS, biased_half_tile, biased_tile, suits_cpu, transposed_tile
from oarlock.nn.layout import Strip

Array = np.ndarray[Any, Any]

ZERO: np.float32 = np.float32(0)
LOWEST: np.float32 = np.float32(-np.inf)
WIDE = 2 * LANES


def fits(fields: int, dim: int) -> bool:
    """Return whether the pairs of that many vectors of ``dim`` columns, and one more or none, have room for tiles."""
    return fields > LANES and dim % LANES == 0


def scratch_size(dim: int, vectors: int) -> int:
    """Return how many floats of scratch the pairs of that many vectors need."""
    return WIDE + _across(vectors - 1) * (dim + vectors - 1)


@jit
def _across(size: int) -> int:
    """Return how many columns whole tiles have over ``size`` ones."""
    return (size + WIDE - 1) // WIDE * WIDE


@jit
def _put_across(rows: Int, count: Int, dim: int, panel: Int, pitch: Int) -> None:
    """Write ``count`` >= 16 vectors of ``dim`` columns at ``rows`` as columns that lie ``pitch`` bytes apart."""
    v = 0
    while v < count:
        v = min(v, count - LANES)
        for k in range(0, dim, LANES):
            transposed_tile(rows + 4 * (v * dim + k), 4 * dim, panel + k * pitch + 4 * v, pitch)
        v += LANES


@jit
def _multiply(rows: Int, dim: int, panel: Int, bias: Int, size: int, pitch: Int, square: Int) -> None:
    """Write the products of ``size`` vectors at ``rows`` with the columns of ``panel``, of those above the diagonal not all."""
    i = 0
    while i < size:
        i = min(i, size - ROWS)
        a, out = rows + i * 4 * dim, square + i * pitch
        for j in range(0, i + ROWS, WIDE):
            if i + ROWS - j > LANES:
                biased_tile(a, 4 * dim, panel + 4 * j, pitch, dim, out + 4 * j, pitch, bias, LOWEST)
            else:
                biased_half_tile(a, 4 * dim, panel + 4 * j, pitch, dim, out + 4 * j, pitch, bias, LOWEST)
        i += ROWS


@jit
def _lay_down(square: Int, pitch: Int, size: int, out: Int) -> None:
    """Write what lies on and below the diagonal of ``size`` rows that are ``pitch`` bytes apart, row by row."""
    end = out + 4 * (size * (size + 1) // 2)
    for i in range(size):
        j = 0
        # Whole vectors as long as what they write too much is written again, by the rows to come.
        while j <= i and out + 4 * (j + LANES) <= end:
            copy(out + 4 * j, square + 4 * j, 4 * LANES)
            j += LANES
        while j <= i:
            store_f32(out, j, load_f32(square, j))
            j += 1
        square += pitch
        out += 4 * (i + 1)


@jit
def _forward(
    dense: Array,
    d0: int,
    first: int,
    rows: Array,
    r0: int,
    fields: int,
    scratch: Array,
    target: Array,
    t0: int,
    dim: int,
) -> None:
    """Write the products of each sample's vectors of ``dim`` columns, ``first`` (0 or 1) of ``dense`` and ``fields`` of ``rows``.

    Those of a vector with all before it go to ``target`` from column t0 on, ascending by both.
    """
    size = first + fields - 1
    across = _across(size)
    # Of no vector are the last columns: nothing reads what becomes of them.
    scratch[: WIDE + across * dim] = ZERO
    bias = address_in(scratch, 0)
    panel, square, pitch = bias + 4 * WIDE, bias + 4 * (WIDE + across * dim), 4 * across
    line, out = address_in(rows, 4 * r0), address_in(target, 4 * t0)
    for s in range(target.shape[0]):
        if first:
            for k in range(dim):
                store_f32(panel, k * across, dense[s, d0 + k])
        _put_across(line, fields - 1, dim, panel + 4 * first, pitch)
        _multiply(line + 4 * (1 - first) * dim, dim, panel, bias, size, pitch, square)
        _lay_down(square, pitch, size, out)
        line += rows.strides[0]
        out += target.strides[0]


def forward(dense: Sequence[Strip], rows: Strip, fields: int, out: Strip, scratch: Array) -> None:
    """Write the products of all pairs of ``dense``, of which there is at most one, and the ``fields`` parts of ``rows``."""
    one = dense[0] if dense else rows
    _forward(
        one.rows,
        one.start,
        len(dense),
        rows.rows,
        rows.start,
        fields,
        scratch,
        out.rows,
        out.start,
        rows.width // fields,
    )


def warm_up() -> None:
    """Compile the kernel, where it would be chosen at all."""
    if suits_cpu():
        fields = LANES + 1
        rows = Strip(np.zeros((1, fields * LANES), np.float32), 0, fields * LANES)
        out = Strip(np.zeros((1, fields * (fields - 1) // 2), np.float32), 0, fields * (fields - 1) // 2)
        forward([], rows, fields, out, np.zeros(scratch_size(LANES, fields), np.float32))
