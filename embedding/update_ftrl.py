# SPDX-License-Identifier: Apache-2.0
"""Updates whose weights are a closed form of sums over all gradients: ftrl, group_ftrl.

Invariant: pure functions of their arguments, float32 in the written order; the arguments are those of
``embedding/callback.py``, the formulas those of ``embedding/optimizers.py``. The caller holds the rows' lock. z starts,
at the first gradient that is not 0, where the closed form gives the first weights, so that no weight jumps to 0; what has
seen no such gradient is left alone. The closed form divides by the rate: below TINY nothing changes.
"""

from typing import Any

import numpy as np

from oarlock.embedding.callback import callback
from oarlock.embedding.jit import jit
from oarlock.embedding.pointer import Int, load_f32, load_f64, load_i64, load_u32, store_f32
from oarlock.embedding.update_row import BETA, L1, L2, L21, PART, sum_part

TINY = np.float32(1e-15)
_ZERO = np.float32(0.0)
_ONE = np.float32(1.0)


@jit
def _soft(x: Any, bound: Any) -> Any:
    """Return x moved towards 0 by ``bound``, and 0 where it would cross."""
    low = x + bound
    high = x - bound
    return high if x > bound else (low if x < -bound else _ZERO)


@jit
def _away(x: Any, bound: Any) -> Any:
    """Return x moved away from 0 by ``bound``; 0 stays."""
    low = x - bound
    high = x + bound
    return high if x > _ZERO else (low if x < _ZERO else _ZERO)


@callback
def update_ftrl(
    weights: Any, states: Any, n: Any, gradients: Any, stride: Any, width: Any, rate: Any, step: Any, hyper: Any
) -> None:
    """z += g - (sqrt(n + g^2) - sqrt(n)) / rate W; n += g^2; W = -soft(z, l1) / ((beta + sqrt(n)) / rate + l2)."""
    alpha = np.float32(rate)
    if not alpha >= TINY:
        return
    beta = np.float32(load_f64(hyper, BETA))
    l1 = np.float32(load_f64(hyper, L1))
    l2 = np.float32(load_f64(hyper, L2))
    start = beta / alpha + l2
    for i in range(n):
        row = load_i64(weights, i)
        if row == 0:
            continue
        sums = load_i64(states, i)
        squares = sums + 4 * width
        gradient = gradients + i * stride
        for c in range(width):
            g = load_f32(gradient, c)
            w = load_f32(row, c)
            before = load_f32(squares, c)
            after = before + g * g
            root = np.sqrt(after)
            # the difference of the roots, without cancellation; where both are 0 nothing of this is used
            both = root + np.sqrt(before)
            grown = g * g / (both if both > _ZERO else _ONE)
            z = load_f32(sums, c)
            z = z if before > _ZERO else _away(-w * start, l1)
            z = z + (g - grown / alpha * w)
            moved = -_soft(z, l1) / ((beta + root) / alpha + l2)
            seen = after > _ZERO
            store_f32(sums, c, z if seen else load_f32(sums, c))
            store_f32(squares, c, after)
            store_f32(row, c, moved if seen else w)


@jit
def _untouched(squares: Int, gradient: Int, width: Int) -> Int:
    """Return 0 if a row has seen a gradient before, 1 if this is its first, 2 if it still has seen none."""
    old = np.uint32(0)
    new = np.uint32(0)
    for c in range(width):
        old |= load_u32(squares, c)
    if old:
        return 0
    for c in range(width):
        g = load_f32(gradient, c)
        new |= np.uint32(g * g > _ZERO)
    return 1 if new else 2


@jit
def _begin(row: Int, sums: Int, width: Int, start: Any, l1: Any, group: float, run: Int) -> None:
    """Set z to where the closed form gives the row's present weights."""
    total = 0.0
    for c in range(0, width, PART):
        for k in range(min(PART, width - c)):
            store_f32(run, k, load_f32(row, c + k) * start)
        total += sum_part(run, width - c)
    scale = _ONE
    if total > 0.0:
        scale = np.float32(1.0 + group / np.sqrt(total))
    for c in range(width):
        store_f32(sums, c, _away(-load_f32(row, c) * start * scale, l1))


@callback
def update_group_ftrl(
    weights: Any, states: Any, n: Any, gradients: Any, stride: Any, width: Any, rate: Any, step: Any, hyper: Any
) -> None:
    """FTRL whose whole row is 0 while |soft(z, l1)| <= l21 sqrt(width), and shrinks by that otherwise."""
    alpha = np.float32(rate)
    if not alpha >= TINY:
        return
    beta = np.float32(load_f64(hyper, BETA))
    l1 = np.float32(load_f64(hyper, L1))
    l2 = np.float32(load_f64(hyper, L2))
    group = load_f64(hyper, L21) * np.sqrt(np.float64(width))
    start = beta / alpha + l2
    scratch = np.empty(PART, np.float32)
    run = scratch.ctypes.data
    for i in range(n):
        row = load_i64(weights, i)
        if row == 0:
            continue
        sums = load_i64(states, i)
        squares = sums + 4 * width
        gradient = gradients + i * stride
        fresh = _untouched(squares, gradient, width)
        if fresh == 2:
            continue
        if fresh == 1:
            _begin(row, sums, width, start, l1, group, run)
        total = 0.0
        for first in range(0, width, PART):
            for k in range(min(PART, width - first)):
                c = first + k
                g = load_f32(gradient, c)
                before = load_f32(squares, c)
                after = before + g * g
                both = np.sqrt(after) + np.sqrt(before)
                grown = g * g / (both if both > _ZERO else _ONE)
                z = load_f32(sums, c) + (g - grown / alpha * load_f32(row, c))
                store_f32(sums, c, z)
                store_f32(squares, c, after)
                store_f32(run, k, _soft(z, l1))
            total += sum_part(run, width - first)
        norm = np.sqrt(total)
        scale = _ZERO
        if norm > group:
            scale = np.float32(1.0 - group / norm)
        for c in range(width):
            z = _soft(load_f32(sums, c), l1)
            store_f32(row, c, -z * scale / ((beta + np.sqrt(load_f32(squares, c))) / alpha + l2))
