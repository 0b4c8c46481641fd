# SPDX-License-Identifier: Apache-2.0
"""The kernels of the graph: loops over samples, written to outputs that the caller gives.

A two-dimensional argument is a whole buffer float32[batch, W], C-contiguous; the integer after it is the first of the
columns meant. So one signature per kernel serves every width, position and batch. Invariant: sums over samples run in
order of position, in fixed tiles where named, so a result depends on nothing but its arguments. They hold no lock and
allocate nothing; callers check dtypes, shapes and ranges. Row slices are taken before the inner loop because LLVM then
vectorises it (measured: 5 times faster bias). Those between rows and samples are in ``nn.row_kernels``.
"""

import math
from typing import Any

import numpy as np

from oarlock.embedding.jit import jit

Array = np.ndarray[Any, Any]

TILE = 64
ZERO = np.float32(0)
ONE = np.float32(1)


@jit
def count_bad_labels(label: Array) -> int:
    """Return how many values of ``label: float32[n]`` are not in [0, 1]; NaN is not."""
    bad = 0
    for i in range(label.shape[0]):
        bad += not (label[i] >= ZERO and label[i] <= ONE)
    return bad


@jit
def zero(target: Array, t0: int, width: int) -> None:
    """Write zeros."""
    for i in range(target.shape[0]):
        out = target[i, t0 : t0 + width]
        for j in range(width):
            out[j] = ZERO


@jit
def copy(source: Array, s0: int, target: Array, t0: int, width: int) -> None:
    """Write source to target."""
    for i in range(source.shape[0]):
        value = source[i, s0 : s0 + width]
        out = target[i, t0 : t0 + width]
        for j in range(width):
            out[j] = value[j]


@jit
def accumulate(source: Array, s0: int, target: Array, t0: int, width: int) -> None:
    """Add source to target."""
    for i in range(source.shape[0]):
        value = source[i, s0 : s0 + width]
        out = target[i, t0 : t0 + width]
        for j in range(width):
            out[j] += value[j]


@jit
def add(a: Array, a0: int, b: Array, b0: int, target: Array, t0: int, width: int) -> None:
    """Write a + b."""
    for i in range(target.shape[0]):
        left = a[i, a0 : a0 + width]
        right = b[i, b0 : b0 + width]
        out = target[i, t0 : t0 + width]
        for j in range(width):
            out[j] = left[j] + right[j]


@jit
def multiply(a: Array, a0: int, b: Array, b0: int, target: Array, t0: int, width: int) -> None:
    """Write a * b; also its own backward, with the gradient as one factor."""
    for i in range(target.shape[0]):
        left = a[i, a0 : a0 + width]
        right = b[i, b0 : b0 + width]
        out = target[i, t0 : t0 + width]
        for j in range(width):
            out[j] = left[j] * right[j]


@jit
def add_bias(target: Array, t0: int, bias: Array) -> None:
    """Add ``bias: float32[width]`` to every sample, in place."""
    width = bias.shape[0]
    for i in range(target.shape[0]):
        out = target[i, t0 : t0 + width]
        for j in range(width):
            out[j] += bias[j]


@jit
def add_bias_relu(target: Array, t0: int, bias: Array) -> None:
    """Write relu(target + bias), in place; NaN stays NaN."""
    width = bias.shape[0]
    for i in range(target.shape[0]):
        out = target[i, t0 : t0 + width]
        for j in range(width):
            value = out[j] + bias[j]
            out[j] = ZERO if value < ZERO else value


@jit
def bias_gradient(gradient: Array, g0: int, tile: Array, out: Array) -> None:
    """Write the sum over samples to ``out: float32[width]``, tile by tile; ``tile: float32[>= width]`` is scratch."""
    width = out.shape[0]
    batch = gradient.shape[0]
    part = tile[:width]
    for j in range(width):
        out[j] = ZERO
    for begin in range(0, batch, TILE):
        for j in range(width):
            part[j] = ZERO
        for i in range(begin, min(begin + TILE, batch)):
            value = gradient[i, g0 : g0 + width]
            for j in range(width):
                part[j] += value[j]
        for j in range(width):
            out[j] += part[j]


@jit
def relu_bias_gradient(output: Array, o0: int, gradient: Array, g0: int, tile: Array, out: Array) -> None:
    """Clear the gradient where output <= 0, in place, and write its sum over samples, as bias_gradient does."""
    width = out.shape[0]
    batch = gradient.shape[0]
    part = tile[:width]
    for j in range(width):
        out[j] = ZERO
    for begin in range(0, batch, TILE):
        for j in range(width):
            part[j] = ZERO
        for i in range(begin, min(begin + TILE, batch)):
            value = gradient[i, g0 : g0 + width]
            active = output[i, o0 : o0 + width]
            for j in range(width):
                masked = ZERO if active[j] <= ZERO else value[j]
                value[j] = masked
                part[j] += masked
        for j in range(width):
            out[j] += part[j]


@jit
def relu(source: Array, s0: int, target: Array, t0: int, width: int) -> None:
    """Write max(source, 0); NaN stays NaN. Source and target may be the same."""
    for i in range(source.shape[0]):
        value = source[i, s0 : s0 + width]
        out = target[i, t0 : t0 + width]
        for j in range(width):
            out[j] = ZERO if value[j] < ZERO else value[j]


@jit
def relu_gradient(output: Array, o0: int, gradient: Array, g0: int, target: Array, t0: int, width: int) -> None:
    """Write the gradient where output > 0, else 0. Gradient and target may be the same."""
    for i in range(output.shape[0]):
        active = output[i, o0 : o0 + width]
        value = gradient[i, g0 : g0 + width]
        out = target[i, t0 : t0 + width]
        for j in range(width):
            out[j] = ZERO if active[j] <= ZERO else value[j]


@jit
def sigmoid(source: Array, s0: int, target: Array, t0: int, width: int) -> None:
    """Write 1 / (1 + exp(-source)), by exp(-|source|), which never overflows. Source and target may be the same."""
    for i in range(source.shape[0]):
        value = source[i, s0 : s0 + width]
        out = target[i, t0 : t0 + width]
        for j in range(width):
            small = math.exp(-abs(value[j]))
            out[j] = (small if value[j] < ZERO else ONE) / (ONE + small)


@jit
def sigmoid_gradient(output: Array, o0: int, gradient: Array, g0: int, target: Array, t0: int, width: int) -> None:
    """Write gradient * s (1 - s) for the output s. Gradient and target may be the same."""
    for i in range(output.shape[0]):
        s = output[i, o0 : o0 + width]
        value = gradient[i, g0 : g0 + width]
        out = target[i, t0 : t0 + width]
        for j in range(width):
            out[j] = value[j] * (s[j] * (ONE - s[j]))


@jit
def tanh(source: Array, s0: int, target: Array, t0: int, width: int) -> None:
    """Write the hyperbolic tangent. Source and target may be the same."""
    for i in range(source.shape[0]):
        value = source[i, s0 : s0 + width]
        out = target[i, t0 : t0 + width]
        for j in range(width):
            out[j] = math.tanh(value[j])


@jit
def tanh_gradient(output: Array, o0: int, gradient: Array, g0: int, target: Array, t0: int, width: int) -> None:
    """Write gradient * (1 - t^2) for the output t. Gradient and target may be the same."""
    for i in range(output.shape[0]):
        t = output[i, o0 : o0 + width]
        value = gradient[i, g0 : g0 + width]
        out = target[i, t0 : t0 + width]
        for j in range(width):
            out[j] = value[j] * (ONE - t[j] * t[j])


@jit
def outer(gradient: Array, g0: int, weight: Array, target: Array, t0: int) -> None:
    """Write gradient[i] * weight[j]: the input's gradient of a Linear with one unit; ``weight: float32[in, 1]``."""
    width = weight.shape[0]
    factor = weight[:, 0]
    for i in range(gradient.shape[0]):
        value = gradient[i, g0]
        out = target[i, t0 : t0 + width]
        for j in range(width):
            out[j] = value * factor[j]


@jit
def binary_cross_entropy(logit: Array, z0: int, label: Array, total: Array) -> None:
    """Write the sum of losses to ``total: float64[1]``, in order of position."""
    loss = 0.0
    for i in range(logit.shape[0]):
        z = logit[i, z0]
        # Not max(): it would drop a NaN.
        loss += (ZERO if z < ZERO else z) - z * label[i] + math.log1p(math.exp(-abs(z)))
    total[0] = loss


@jit
def binary_cross_entropy_gradient(logit: Array, z0: int, label: Array, target: Array, t0: int) -> None:
    """Write (sigmoid(z) - y) / batch."""
    batch = np.float32(logit.shape[0])
    for i in range(logit.shape[0]):
        z = logit[i, z0]
        small = math.exp(-abs(z))
        target[i, t0] = ((small if z < ZERO else ONE) / (ONE + small) - label[i]) / batch
