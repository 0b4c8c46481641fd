# SPDX-License-Identifier: Apache-2.0
"""The update kernels: one optimizer step on each row at a list of addresses.

Invariant: an update is a pure function of (row, gradient, rate, hyper): no clock, no counter outside the row. float32
arithmetic in the written order, + - * / sqrt only, powers by repeated squaring in float64. A dense block is one row as
wide as the block. Address 0 = skip. The caller holds the lock of the memory behind the addresses; formulas are in
``embedding/optimizer.py``.

addresses: int64[n], gradients: float32[n, dim], hyper: float64[4] = beta1, beta2, epsilon, initial.
"""

import numpy as np
from numpy.typing import NDArray

from oarlock.embedding.jit import jit
from oarlock.embedding.pointer import Int, load_f32, store_f32
from oarlock.embedding.slab import AHEAD, prefetch_row, state_address

# Gradients of this size and above are refused with NaN and infinities, which lie above it as integers: their squares would
# soon make an accumulator infinite, and a row with an infinity in it can be neither moved nor restored.
GRADIENT_LIMIT = 1e15
_LIMIT_BITS = np.uint32(np.float32(GRADIENT_LIMIT).view(np.uint32))
_MAGNITUDE = np.uint32(0x7FFFFFFF)
_ONE = np.float32(1.0)


@jit
def refuse(bits: NDArray[np.uint32], refused: NDArray[np.uint8]) -> int:
    """Mark in refused: uint8[n] the rows of bits: uint32[n, dim] (float32 seen as integers) with a value beyond the limit."""
    found = 0
    for i in range(bits.shape[0]):
        bad = 0
        for column in range(bits.shape[1]):
            bad |= (bits[i, column] & _MAGNITUDE) >= _LIMIT_BITS
        refused[i] = bad
        found += bad
    return found


@jit
def power(base: float, exponent: Int) -> float:
    """Return base^exponent for an integer exponent >= 0 by repeated squaring, the same bits on every CPU."""
    result = 1.0
    while exponent > 0:
        if exponent & 1:
            result *= base
        base *= base
        exponent >>= 1
    return result


@jit
def update_sgd(
    addresses: NDArray[np.int64], dim: int, gradients: NDArray[np.float32], rate: float, hyper: NDArray[np.float64]
) -> None:
    """W -= rate * g."""
    n = addresses.shape[0]
    step = np.float32(rate)
    for i in range(n):
        if i + AHEAD < n:
            prefetch_row(addresses[i + AHEAD], dim)
        row = addresses[i]
        if row == 0:
            continue
        for c in range(dim):
            store_f32(row, c, load_f32(row, c) - step * gradients[i, c])


@jit
def update_adagrad(
    addresses: NDArray[np.int64], dim: int, gradients: NDArray[np.float32], rate: float, hyper: NDArray[np.float64]
) -> None:
    """acc += g^2; W -= rate * g / (sqrt(acc) + epsilon)."""
    n = addresses.shape[0]
    step = np.float32(rate)
    epsilon = np.float32(hyper[2])
    for i in range(n):
        if i + AHEAD < n:
            prefetch_row(addresses[i + AHEAD], 2 * dim)
        row = addresses[i]
        if row == 0:
            continue
        state = state_address(row, dim)
        for c in range(dim):
            g = gradients[i, c]
            total = load_f32(state, c) + g * g
            store_f32(state, c, total)
            store_f32(row, c, load_f32(row, c) - step * g / (np.sqrt(total) + epsilon))


@jit
def update_adam(
    addresses: NDArray[np.int64], dim: int, gradients: NDArray[np.float32], rate: float, hyper: NDArray[np.float64]
) -> None:
    """Adam with bias correction by the row's own count t, which is the last state column."""
    n = addresses.shape[0]
    beta1 = hyper[0]
    beta2 = hyper[1]
    keep2 = np.float32(beta2)
    take1 = np.float32(1.0 - beta1)
    take2 = np.float32(1.0 - beta2)
    epsilon = np.float32(hyper[2])
    for i in range(n):
        if i + AHEAD < n:
            prefetch_row(addresses[i + AHEAD], 3 * dim + 1)
        row = addresses[i]
        if row == 0:
            continue
        first = state_address(row, dim)
        second = first + 4 * dim
        # float32 counts exactly to 2^24 and then stays; both corrections are 1 long before
        count = load_f32(second, dim) + _ONE
        store_f32(second, dim, count)
        t = np.int64(count)
        step = np.float32(rate / (1.0 - power(beta1, t)))
        root = np.float32(np.sqrt(1.0 - power(beta2, t)))
        for c in range(dim):
            g = gradients[i, c]
            m = load_f32(first, c)
            m = m + (g - m) * take1
            v = load_f32(second, c) * keep2 + take2 * g * g
            store_f32(first, c, m)
            store_f32(second, c, v)
            store_f32(row, c, load_f32(row, c) - step * m / (np.sqrt(v) / root + epsilon))
