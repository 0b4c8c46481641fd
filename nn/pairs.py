# SPDX-License-Identifier: Apache-2.0
"""Dot products of all pairs of a sample's vectors, forward and backward (Naumov et al., 2019).

The vectors of a block of samples are put side by side in scratch that stays in the cache, one BLAS product per sample
multiplies them, and a kernel takes the lower triangle out. Invariant: a sample's products depend on its own vectors
alone, whatever block it is in. ``nn.operations`` calls these with the buffers of a step; the rules of ``nn.kernels`` hold.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from oarlock.embedding.jit import jit
from oarlock.nn.kernels import copy
from oarlock.nn.layout import Strip

Array = np.ndarray[Any, Any]

BLOCK = 64
ZERO = np.float32(0)


@jit
def lower_triangle(square: Array, size: int, target: Array, t0: int) -> None:
    """Write the products on and below the diagonal of ``square: float32[batch, size * size]``, row by row."""
    for s in range(target.shape[0]):
        at = t0
        for i in range(size):
            value = square[s, i * size : i * size + i + 1]
            out = target[s, at : at + i + 1]
            for j in range(i + 1):
                out[j] = value[j]
            at += i + 1


@jit
def symmetric(gradient: Array, g0: int, vectors: int, square: Array) -> None:
    """Write the gradient of the pairs (i, j), i > j, at (i, j) and (j, i) of ``float32[batch, V * V]``; else zeros."""
    for s in range(gradient.shape[0]):
        line = square[s]
        at = g0
        for i in range(vectors):
            value = gradient[s, at : at + i]
            out = line[i * vectors : i * vectors + i]
            for j in range(i):
                out[j] = value[j]
            for j in range(i):
                line[j * vectors + i] = value[j]
            line[i * vectors + i] = ZERO
            at += i


def scratch_size(width: int, vectors: int) -> int:
    """Return how many floats of scratch a block needs, for ``vectors`` vectors of ``width`` columns in all."""
    return BLOCK * (2 * width + vectors * vectors)


def _take(scratch: Array, begin: int, width: int) -> Array:
    return scratch[begin : begin + BLOCK * width].reshape(BLOCK, width)


def _collect(inputs: Sequence[Strip], begin: int, end: int, flat: Array) -> None:
    """Put the columns of all inputs side by side, for the samples begin..end."""
    at = 0
    for strip in inputs:
        copy(strip.rows[begin:end], strip.start, flat, at, strip.width)
        at += strip.width


def forward(dense: Sequence[Strip], rows: Strip, fields: int, out: Strip, scratch: Array) -> None:
    """Write the products of all pairs of ``dense``, of which there is at most one, and the ``fields`` parts of ``rows``."""
    dim, vectors = rows.width // fields, fields + len(dense)
    inputs = (*dense, rows)
    flat = _take(scratch, 0, vectors * dim)
    each = flat.reshape(BLOCK, vectors, dim)
    # All but the first times all but the last: every pair once, and BLAS does not take it for the product of a matrix
    # with itself, for which numpy would call a routine that takes three times as long at these sizes.
    left, right = each[:, 1:], each[:, :-1].transpose(0, 2, 1)
    products = _take(scratch, flat.size, (vectors - 1) ** 2)
    square = products.reshape(BLOCK, vectors - 1, vectors - 1)
    batch = len(out.rows)
    for begin in range(0, batch, BLOCK):
        end = min(begin + BLOCK, batch)
        n = end - begin
        _collect(inputs, begin, end, flat)
        np.matmul(left[:n], right[:n], out=square[:n])
        lower_triangle(products, vectors - 1, out.rows[begin:end], out.start)


def backward(
    dense: Sequence[Strip],
    rows: Strip,
    fields: int,
    gradient: Strip,
    scratch: Array,
    targets: Sequence[Strip | None],
) -> None:
    """Write the gradient of each input that has a target: for vector i, the sum over j of g(i, j) * vector j."""
    dim, vectors = rows.width // fields, fields + len(dense)
    inputs = (*dense, rows)
    flat = _take(scratch, 0, vectors * dim)
    sums = _take(scratch, flat.size, vectors * dim)
    weights = _take(scratch, 2 * flat.size, vectors * vectors)
    each, out = flat.reshape(BLOCK, vectors, dim), sums.reshape(BLOCK, vectors, dim)
    square = weights.reshape(BLOCK, vectors, vectors)
    batch = len(gradient.rows)
    for begin in range(0, batch, BLOCK):
        end = min(begin + BLOCK, batch)
        n = end - begin
        _collect(inputs, begin, end, flat)
        symmetric(gradient.rows[begin:end], gradient.start, vectors, weights)
        np.matmul(square[:n], each[:n], out=out[:n])
        at = 0
        for strip, target in zip(inputs, targets, strict=True):
            if target is not None:
                copy(sums[:n], at, target.rows[begin:end], target.start, strip.width)
            at += strip.width
