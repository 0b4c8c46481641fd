# SPDX-License-Identifier: Apache-2.0
"""Dot products of all pairs of a sample's vectors, forward and backward (Naumov et al., 2019).

The vectors of a block of samples are put side by side in scratch that stays in the cache, one BLAS product per sample
multiplies them, and a kernel takes the lower triangle out. Invariant: a sample's products depend on its own vectors
alone, whatever block it is in. ``nn.operations`` calls these with the buffers of a step; the rules of ``nn.kernels`` hold.
"""

from typing import Any

import numpy as np

from oarlock.embedding.jit import jit
from oarlock.nn.kernels import copy
from oarlock.nn.layout import Strip

Array = np.ndarray[Any, Any]

BLOCK = 64
ZERO = np.float32(0)


@jit
def lower_triangle(square: Array, fields: int, target: Array, t0: int) -> None:
    """Write the products on and below the diagonal of ``square: float32[batch, F * F]``, row by row."""
    for s in range(target.shape[0]):
        at = t0
        for i in range(fields):
            value = square[s, i * fields : i * fields + i + 1]
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


def scratch_size(dim: int, fields: int) -> int:
    """Return how many floats of scratch a block needs."""
    vectors = fields + 1
    return BLOCK * vectors * (2 * dim + vectors)


def _parts(scratch: Array, dim: int, fields: int) -> tuple[Array, Array, Array]:
    """Return from scratch: vectors and their gradients float32[BLOCK, (F + 1) * dim], squares float32[BLOCK, (F + 1)^2]."""
    vectors = fields + 1
    size, square = BLOCK * vectors * dim, BLOCK * vectors * vectors
    return (
        scratch[:size].reshape(BLOCK, vectors * dim),
        scratch[size : 2 * size].reshape(BLOCK, vectors * dim),
        scratch[2 * size : 2 * size + square].reshape(BLOCK, vectors * vectors),
    )


def forward(dense: Strip, rows: Strip, out: Strip, scratch: Array) -> None:
    """Write the products of all pairs of ``dense`` and the parts of ``rows``."""
    dim, fields = dense.width, rows.width // dense.width
    flat, _, squares = _parts(scratch, dim, fields)
    vectors = flat.reshape(BLOCK, fields + 1, dim)
    # All but the first times all but the last: every pair once, and BLAS does not take it for the product of a matrix
    # with itself, for which numpy would call a routine that is three times slower at these sizes.
    left, right = vectors[:, 1:], vectors[:, :-1].transpose(0, 2, 1)
    products = squares.reshape(-1)[: BLOCK * fields * fields].reshape(BLOCK, fields * fields)
    square = products.reshape(BLOCK, fields, fields)
    for begin in range(0, len(out.rows), BLOCK):
        target = out.rows[begin : begin + BLOCK]
        n = len(target)
        copy(dense.rows[begin : begin + n], dense.start, flat, 0, dim)
        copy(rows.rows[begin : begin + n], rows.start, flat, dim, rows.width)
        np.matmul(left[:n], right[:n], out=square[:n])
        lower_triangle(products, fields, target, out.start)


def backward(
    dense: Strip, rows: Strip, gradient: Strip, scratch: Array, to_dense: Strip | None, to_rows: Strip | None
) -> None:
    """Write the gradient of each input that has somewhere to write it: for vector i, the sum of g(i, j) * vector j."""
    dim, fields = dense.width, rows.width // dense.width
    flat, out, squares = _parts(scratch, dim, fields)
    shape = (BLOCK, fields + 1, dim)
    square = squares.reshape(BLOCK, fields + 1, fields + 1)
    for begin in range(0, len(gradient.rows), BLOCK):
        source = gradient.rows[begin : begin + BLOCK]
        n = len(source)
        copy(dense.rows[begin : begin + n], dense.start, flat, 0, dim)
        copy(rows.rows[begin : begin + n], rows.start, flat, dim, rows.width)
        symmetric(source, gradient.start, fields + 1, squares)
        np.matmul(square[:n], flat.reshape(shape)[:n], out=out.reshape(shape)[:n])
        if to_dense is not None:
            copy(out[:n], 0, to_dense.rows[begin : begin + n], to_dense.start, dim)
        if to_rows is not None:
            copy(out[:n], dim, to_rows.rows[begin : begin + n], to_rows.start, rows.width)
