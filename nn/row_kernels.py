# SPDX-License-Identifier: Apache-2.0
"""The kernels between rows and samples, and between the fields of a sample. The rules of ``nn.kernels`` hold here too.

``inverse: int32[batch, F]`` says which row each field of each sample is. Invariant: gradients are added to a row in order
of (sample, field), so a sum depends on nothing but its terms.
"""

from typing import Any

import numpy as np

from oarlock.embedding.jit import jit
from oarlock.embedding.pointer import address_in
from oarlock.embedding.slab import prefetch_bytes

Array = np.ndarray[Any, Any]

ZERO = np.float32(0)
# Up to so many floats, rows are near enough to be read without asking for the next sample's: that would take longer.
NEAR = 1 << 16


@jit
def count_outside(inverse: Array, rows: int) -> int:
    """Return how many values of ``inverse: int32[n, F]`` are not in 0..rows-1."""
    bad = 0
    for i in range(inverse.shape[0]):
        line = inverse[i]
        for f in range(line.shape[0]):
            bad += (line[f] < 0) | (line[f] >= rows)
    return bad


@jit
def gather(rows: Array, inverse: Array, start: int, target: Array, t0: int, width: int) -> None:
    """Write columns start..start+width of the rows of each sample, side by side by field."""
    dim = rows.shape[1]
    first = start // dim
    last = (start + width - 1) // dim + 1
    for i in range(target.shape[0]):
        for f in range(first, last):
            begin = max(start - f * dim, 0)
            end = min(start + width - f * dim, dim)
            shift = t0 + f * dim - start
            source = rows[inverse[i, f], begin:end]
            out = target[i, shift + begin : shift + end]
            for c in range(end - begin):
                out[c] = source[c]


@jit
def segment_sum(gradient: Array, g0: int, width: int, inverse: Array, start: int, out: Array) -> None:
    """Add the gradient of columns start..start+width to ``out: float32[u, dim]``, in order of (sample, field)."""
    dim = out.shape[1]
    first = start // dim
    last = (start + width - 1) // dim + 1
    for i in range(gradient.shape[0]):
        for f in range(first, last):
            begin = max(start - f * dim, 0)
            end = min(start + width - f * dim, dim)
            shift = g0 + f * dim - start
            source = gradient[i, shift + begin : shift + end]
            row = out[inverse[i, f], begin:end]
            for c in range(end - begin):
                row[c] += source[c]


@jit
def gather_fields(rows: Array, inverse: Array, start: int, stop: int, target: Array, t0: int) -> None:
    """Write columns start..stop of every field's row, side by side by field."""
    width = stop - start
    pitch = 4 * rows.shape[1]
    first = address_in(rows, 0) + 4 * start
    ahead = rows.size > NEAR
    for i in range(target.shape[0]):
        if ahead and i + 1 < target.shape[0]:
            following = inverse[i + 1]
            for f in range(following.shape[0]):
                prefetch_bytes(first + pitch * following[f], 4 * width)
        line = inverse[i]
        at = t0
        for f in range(line.shape[0]):
            source = rows[line[f], start:stop]
            out = target[i, at : at + width]
            for c in range(width):
                out[c] = source[c]
            at += width


@jit
def segment_sum_fields(gradient: Array, g0: int, inverse: Array, start: int, stop: int, out: Array) -> None:
    """Add the gradient of columns start..stop of every field to ``out: float32[u, dim]``, in order of (sample, field)."""
    width = stop - start
    for i in range(gradient.shape[0]):
        line = inverse[i]
        at = g0
        for f in range(line.shape[0]):
            source = gradient[i, at : at + width]
            row = out[line[f], start:stop]
            for c in range(width):
                row[c] += source[c]
            at += width


@jit
def pool(source: Array, s0: int, fields: int, target: Array, t0: int, dim: int) -> None:
    """Write the sum over fields, in order of field, of ``fields * dim`` columns of the source."""
    for i in range(target.shape[0]):
        if dim == 1:
            # A loop over one column would start anew for every field.
            single = ZERO
            values = source[i, s0 : s0 + fields]
            for f in range(fields):
                single += values[f]
            target[i, t0] = single
            continue
        out = target[i, t0 : t0 + dim]
        for c in range(dim):
            out[c] = ZERO
        for f in range(fields):
            value = source[i, s0 + f * dim : s0 + (f + 1) * dim]
            for c in range(dim):
                out[c] += value[c]


@jit
def pool_gradient(gradient: Array, g0: int, fields: int, target: Array, t0: int, dim: int) -> None:
    """Write the gradient of a sum over fields to each of them."""
    for i in range(gradient.shape[0]):
        if dim == 1:
            single = gradient[i, g0]
            values = target[i, t0 : t0 + fields]
            for f in range(fields):
                values[f] = single
            continue
        value = gradient[i, g0 : g0 + dim]
        for f in range(fields):
            out = target[i, t0 + f * dim : t0 + (f + 1) * dim]
            for c in range(dim):
                out[c] = value[c]
