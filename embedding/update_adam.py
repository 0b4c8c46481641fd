# SPDX-License-Identifier: Apache-2.0
"""Updates by averages of the gradient and of its square: adam and adamw (one function), amsgrad, lamb.

Invariant: pure functions of their arguments, float32 in the written order, powers by repeated squaring in float64; the
arguments are those of ``embedding/callback.py``, the formulas those of ``embedding/optimizers.py``. The caller holds the
rows' lock. The last state column counts a row's updates where the corrections go by it, and stays 0 where they go by step.
"""

from typing import Any

import numpy as np

from oarlock.embedding.callback import callback
from oarlock.embedding.jit import jit
from oarlock.embedding.pointer import Int, load_f32, load_f64, load_i64, store_f32
from oarlock.embedding.update_row import (
    BETA1,
    BETA2,
    BY_STEP,
    DECAY,
    EPSILON,
    PART,
    powers,
    sum_part,
    sum_squares,
)

_ONE = np.float32(1.0)


@jit
def _count(state: Int, column: Int, step: Int, hyper: Int) -> Int:
    """Return t of the corrections: the step, or this row's count, which goes up by one."""
    if load_f64(hyper, BY_STEP) != 0.0:
        return max(step, 1)
    # float32 counts exactly to 2^24 and then stays; both corrections are 1 long before
    count = load_f32(state, column) + _ONE
    store_f32(state, column, count)
    return np.int64(count)


@callback
def update_adam(
    weights: Any, states: Any, n: Any, gradients: Any, stride: Any, width: Any, rate: Any, step: Any, hyper: Any
) -> None:
    """Adam; with decay, AdamW: W (1 - rate decay) instead of W (times 1, which changes no bit, in adam)."""
    beta1 = load_f64(hyper, BETA1)
    beta2 = load_f64(hyper, BETA2)
    keep2 = np.float32(beta2)
    take1 = np.float32(1.0 - beta1)
    take2 = np.float32(1.0 - beta2)
    epsilon = np.float32(load_f64(hyper, EPSILON))
    shrink = np.float32(1.0 - rate * load_f64(hyper, DECAY))
    for i in range(n):
        row = load_i64(weights, i)
        if row == 0:
            continue
        first = load_i64(states, i)
        second = first + 4 * width
        gradient = gradients + i * stride
        t = _count(second, width, step, hyper)
        power1, power2 = powers(beta1, beta2, t)
        size = np.float32(rate / (1.0 - power1))
        root = np.float32(np.sqrt(1.0 - power2))
        for c in range(width):
            g = load_f32(gradient, c)
            m = load_f32(first, c)
            m = m + (g - m) * take1
            v = load_f32(second, c) * keep2 + take2 * g * g
            store_f32(first, c, m)
            store_f32(second, c, v)
            store_f32(row, c, load_f32(row, c) * shrink - size * m / (np.sqrt(v) / root + epsilon))


@callback
def update_amsgrad(
    weights: Any, states: Any, n: Any, gradients: Any, stride: Any, width: Any, rate: Any, step: Any, hyper: Any
) -> None:
    """Adam that divides by the largest v so far; decoupled decay as in AdamW."""
    beta1 = load_f64(hyper, BETA1)
    beta2 = load_f64(hyper, BETA2)
    keep2 = np.float32(beta2)
    take1 = np.float32(1.0 - beta1)
    take2 = np.float32(1.0 - beta2)
    epsilon = np.float32(load_f64(hyper, EPSILON))
    shrink = np.float32(1.0 - rate * load_f64(hyper, DECAY))
    for i in range(n):
        row = load_i64(weights, i)
        if row == 0:
            continue
        first = load_i64(states, i)
        second = first + 4 * width
        largest = second + 4 * width
        gradient = gradients + i * stride
        t = _count(largest, width, step, hyper)
        power1, power2 = powers(beta1, beta2, t)
        size = np.float32(rate / (1.0 - power1))
        root = np.float32(np.sqrt(1.0 - power2))
        for c in range(width):
            g = load_f32(gradient, c)
            m = load_f32(first, c)
            m = m + (g - m) * take1
            v = load_f32(second, c) * keep2 + take2 * g * g
            top = load_f32(largest, c)
            top = v if v > top else top
            store_f32(first, c, m)
            store_f32(second, c, v)
            store_f32(largest, c, top)
            store_f32(row, c, load_f32(row, c) * shrink - size * m / (np.sqrt(top) / root + epsilon))


@callback
def update_lamb(
    weights: Any, states: Any, n: Any, gradients: Any, stride: Any, width: Any, rate: Any, step: Any, hyper: Any
) -> None:
    """u = Adam's direction + decay W; W -= rate |W| / |u| u, norms over the row, the ratio 1 where one of them is 0."""
    beta1 = load_f64(hyper, BETA1)
    beta2 = load_f64(hyper, BETA2)
    keep2 = np.float32(beta2)
    take1 = np.float32(1.0 - beta1)
    take2 = np.float32(1.0 - beta2)
    epsilon = np.float32(load_f64(hyper, EPSILON))
    decay = np.float32(load_f64(hyper, DECAY))
    scratch = np.empty(PART, np.float32)
    run = scratch.ctypes.data
    for i in range(n):
        row = load_i64(weights, i)
        if row == 0:
            continue
        first = load_i64(states, i)
        second = first + 4 * width
        gradient = gradients + i * stride
        t = _count(second, width, step, hyper)
        power1, power2 = powers(beta1, beta2, t)
        unbias = np.float32(1.0 / (1.0 - power1))
        root = np.float32(np.sqrt(1.0 - power2))
        total = 0.0
        # u is computed twice, to the same bits, rather than stored: a row has no room for it
        for start in range(0, width, PART):
            for k in range(min(PART, width - start)):
                c = start + k
                g = load_f32(gradient, c)
                m = load_f32(first, c)
                m = m + (g - m) * take1
                v = load_f32(second, c) * keep2 + take2 * g * g
                store_f32(first, c, m)
                store_f32(second, c, v)
                store_f32(run, k, unbias * m / (np.sqrt(v) / root + epsilon) + decay * load_f32(row, c))
            total += sum_part(run, width - start)
        size = rate
        norm = sum_squares(row, width)
        if norm > 0.0 and total > 0.0:
            size = rate * np.sqrt(norm) / np.sqrt(total)
        scale = np.float32(size)
        for c in range(width):
            w = load_f32(row, c)
            u = unbias * load_f32(first, c) / (np.sqrt(load_f32(second, c)) / root + epsilon) + decay * w
            store_f32(row, c, w - scale * u)
