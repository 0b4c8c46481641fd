# SPDX-License-Identifier: Apache-2.0
"""Pooling of multi-valued fields: the rows of each sample's keys become one, and its gradient goes back to the keys.

Invariant: a segment's rows are added in order of position, float32, and divided once; backward, each position adds its
segment's gradient divided by the same number, in order of position. An empty segment is zeros and gives nothing back.
Free functions, any thread.
"""

import numpy as np
from numpy.typing import NDArray

from oarlock.embedding.jit import jit
from oarlock.embedding.keys import check_inverse
from oarlock.embedding.pointer import check_output, kernel_array
from oarlock.proto.errors import InvalidArgument, Malformed

# What a segment's sum is divided by: 1, its number of positions, the square root of that number.
POOLINGS = ("sum", "mean", "sqrtn")

_ONE = np.float32(1)


@jit
def divisor(kind: int, count: int) -> np.float32:
    """Return what the sum of ``count`` > 0 rows is divided by under POOLINGS[kind]."""
    if kind == 1:
        return np.float32(count)
    if kind == 2:
        return np.float32(np.sqrt(np.float32(count)))
    return _ONE


@jit
def pool_rows(
    rows: NDArray[np.float32],
    inverse: NDArray[np.int32],
    offsets: NDArray[np.int64],
    kind: int,
    out: NDArray[np.float32],
) -> None:
    """out[s] = the sum of rows[inverse[i]] over the positions i of segment s, divided."""
    dim = out.shape[1]
    for s in range(out.shape[0]):
        for c in range(dim):
            out[s, c] = 0
        first, end = offsets[s], offsets[s + 1]
        # Four rows between a load of the sum and its store, still added one after the other: a sum that waits for its
        # own store takes twice as long.
        fours = end - (end - first) % 4
        for i in range(first, fours, 4):
            at = np.uint64(inverse[i])
            at_1, at_2, at_3 = np.uint64(inverse[i + 1]), np.uint64(inverse[i + 2]), np.uint64(inverse[i + 3])
            for c in range(dim):
                out[s, c] = out[s, c] + rows[at, c] + rows[at_1, c] + rows[at_2, c] + rows[at_3, c]
        for i in range(fours, end):
            at = np.uint64(inverse[i])
            for c in range(dim):
                out[s, c] += rows[at, c]
        if end > first:
            by = divisor(kind, end - first)
            for c in range(dim):
                out[s, c] /= by


@jit
def spread_rows(
    gradients: NDArray[np.float32],
    inverse: NDArray[np.int32],
    offsets: NDArray[np.int64],
    kind: int,
    share: NDArray[np.float32],
    out: NDArray[np.float32],
) -> None:
    """out[inverse[i]] += gradients[s] divided, for the positions i of each segment s; share: float32[dim] is scratch."""
    dim = out.shape[1]
    for k in range(out.shape[0]):
        for c in range(dim):
            out[k, c] = 0
    for s in range(gradients.shape[0]):
        first, end = offsets[s], offsets[s + 1]
        if end > first:
            by = divisor(kind, end - first)
            for c in range(dim):
                share[c] = gradients[s, c] / by
        for i in range(first, end):
            at = np.uint64(inverse[i])
            for c in range(dim):
                out[at, c] += share[c]


def pool(
    rows: NDArray[np.float32],
    inverse: NDArray[np.int32],
    offsets: NDArray[np.int64] | NDArray[np.int32],
    kind: str,
    out: NDArray[np.float32],
) -> None:
    """Write to out: float32[s, dim] the pooled rows: float32[u, dim] of each segment's positions.

    inverse: int32[n] as in a KeySet; segment s is the positions offsets[s] to offsets[s + 1], so offsets: int64[s + 1]
    (or int32) begins with 0, never falls and ends with n. ``kind`` is one of POOLINGS.
    """
    check_output("out", out)
    rows = kernel_array("rows", rows, np.float32, 2)
    out = kernel_array("out", out, np.float32, 2)
    inverse, offsets, number = _checked(rows, inverse, offsets, kind, out)
    pool_rows(rows, inverse, offsets, number, out)


def pool_gradients(
    gradients: NDArray[np.float32],
    inverse: NDArray[np.int32],
    offsets: NDArray[np.int64] | NDArray[np.int32],
    kind: str,
    out: NDArray[np.float32],
) -> None:
    """Write to out: float32[u, dim] the gradient of each distinct key's row, of gradients: float32[s, dim] of pool()'s out.

    The other arguments are those of pool().
    """
    check_output("out", out)
    gradients = kernel_array("gradients", gradients, np.float32, 2)
    out = kernel_array("out", out, np.float32, 2)
    inverse, offsets, number = _checked(out, inverse, offsets, kind, gradients)
    spread_rows(gradients, inverse, offsets, number, np.empty(out.shape[1], np.float32), out)


def _checked(
    rows: NDArray[np.float32],
    inverse: NDArray[np.int32],
    offsets: NDArray[np.int64] | NDArray[np.int32],
    kind: str,
    pooled: NDArray[np.float32],
) -> tuple[NDArray[np.int32], NDArray[np.int64], int]:
    """Return inverse, offsets and the number of ``kind`` for kernels, if they fit rows and pooled values."""
    if kind not in POOLINGS:
        raise InvalidArgument(f"pooling {kind!r} is not known: give one of {', '.join(POOLINGS)}")
    inverse = check_inverse(inverse, rows.shape[0])
    if isinstance(offsets, np.ndarray) and offsets.dtype == np.int32:
        offsets = offsets.astype(np.int64)
    bounds: NDArray[np.int64] = kernel_array("offsets", offsets, np.int64)
    if bounds.shape[0] != pooled.shape[0] + 1 or rows.shape[1] != pooled.shape[1]:
        raise Malformed(
            f"{bounds.shape[0]} offsets do not fit rows of shape {rows.shape} and pooled rows of shape {pooled.shape}: "
            "give one more than there are segments, and one dim"
        )
    n = inverse.shape[0]
    if bounds[0] != 0 or bounds[-1] != n or bool((bounds[1:] < bounds[:-1]).any()):
        raise Malformed(f"offsets must begin with 0, never fall and end with the number of positions, {n}")
    return inverse, bounds, POOLINGS.index(kind)
