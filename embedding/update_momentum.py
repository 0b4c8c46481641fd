# SPDX-License-Identifier: Apache-2.0
"""Updates that follow the gradient with at most a memory of the last ones: sgd, momentum, nesterov, dcasgd.

Invariant: pure functions of their arguments, float32 in the written order; the arguments are those of
``embedding/callback.py``, the formulas those of ``embedding/optimizers.py``. The caller holds the rows' lock.
"""

from typing import Any

import numpy as np

from oarlock.embedding.callback import callback
from oarlock.embedding.pointer import load_f32, load_f64, load_i64, store_f32
from oarlock.embedding.update_row import DELAY, MOMENTUM


@callback
def update_sgd(
    weights: Any, states: Any, n: Any, gradients: Any, stride: Any, width: Any, rate: Any, step: Any, hyper: Any
) -> None:
    """W -= rate g."""
    size = np.float32(rate)
    for i in range(n):
        row = load_i64(weights, i)
        if row == 0:
            continue
        gradient = gradients + i * stride
        for c in range(width):
            store_f32(row, c, load_f32(row, c) - size * load_f32(gradient, c))


@callback
def update_momentum(
    weights: Any, states: Any, n: Any, gradients: Any, stride: Any, width: Any, rate: Any, step: Any, hyper: Any
) -> None:
    """b = momentum b + g; W -= rate b."""
    size = np.float32(rate)
    keep = np.float32(load_f64(hyper, MOMENTUM))
    for i in range(n):
        row = load_i64(weights, i)
        if row == 0:
            continue
        state = load_i64(states, i)
        gradient = gradients + i * stride
        for c in range(width):
            b = keep * load_f32(state, c) + load_f32(gradient, c)
            store_f32(state, c, b)
            store_f32(row, c, load_f32(row, c) - size * b)


@callback
def update_nesterov(
    weights: Any, states: Any, n: Any, gradients: Any, stride: Any, width: Any, rate: Any, step: Any, hyper: Any
) -> None:
    """b = momentum b + g; W -= rate (g + momentum b)."""
    size = np.float32(rate)
    keep = np.float32(load_f64(hyper, MOMENTUM))
    for i in range(n):
        row = load_i64(weights, i)
        if row == 0:
            continue
        state = load_i64(states, i)
        gradient = gradients + i * stride
        for c in range(width):
            g = load_f32(gradient, c)
            b = keep * load_f32(state, c) + g
            store_f32(state, c, b)
            store_f32(row, c, load_f32(row, c) - size * (g + keep * b))


@callback
def update_dcasgd(
    weights: Any, states: Any, n: Any, gradients: Any, stride: Any, width: Any, rate: Any, step: Any, hyper: Any
) -> None:
    """W -= rate (g + delay g^2 d); d = what this update changed W by."""
    size = np.float32(rate)
    delay = np.float32(load_f64(hyper, DELAY))
    for i in range(n):
        row = load_i64(weights, i)
        if row == 0:
            continue
        state = load_i64(states, i)
        gradient = gradients + i * stride
        for c in range(width):
            g = load_f32(gradient, c)
            w = load_f32(row, c)
            after = w - size * (g + delay * g * g * load_f32(state, c))
            store_f32(state, c, after - w)
            store_f32(row, c, after)
