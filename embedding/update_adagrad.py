# SPDX-License-Identifier: Apache-2.0
"""Updates scaled by a sum or average of squared gradients: adagrad, rowwise_adagrad, rmsprop, adadelta.

Invariant: pure functions of their arguments, float32 in the written order; the arguments are those of
``embedding/callback.py``, the formulas those of ``embedding/optimizers.py``. The caller holds the rows' lock.
"""

from typing import Any

import numpy as np

from oarlock.embedding.callback import callback
from oarlock.embedding.pointer import load_f32, load_f64, load_i64, store_f32
from oarlock.embedding.update_row import (
    EPSILON,
    PART,
    RHO,
    RUN,
    part_squares,
    run_squares,
    sum_squares,
)


@callback
def update_adagrad(
    weights: Any, states: Any, n: Any, gradients: Any, stride: Any, width: Any, rate: Any, step: Any, hyper: Any
) -> None:
    """acc += g^2; W -= rate g / (sqrt(acc) + epsilon)."""
    size = np.float32(rate)
    epsilon = np.float32(load_f64(hyper, EPSILON))
    for i in range(n):
        row = load_i64(weights, i)
        if row == 0:
            continue
        state = load_i64(states, i)
        gradient = gradients + i * stride
        for c in range(width):
            g = load_f32(gradient, c)
            total = load_f32(state, c) + g * g
            store_f32(state, c, total)
            store_f32(row, c, load_f32(row, c) - size * g / (np.sqrt(total) + epsilon))


@callback
def update_rowwise_adagrad(
    weights: Any, states: Any, n: Any, gradients: Any, stride: Any, width: Any, rate: Any, step: Any, hyper: Any
) -> None:
    """acc += mean(g^2) over the row; W -= rate / (sqrt(acc) + epsilon) g."""
    size = np.float32(rate)
    epsilon = np.float32(load_f64(hyper, EPSILON))
    share = 1.0 / np.float64(width)
    for i in range(n):
        row = load_i64(weights, i)
        if row == 0:
            continue
        state = load_i64(states, i)
        gradient = gradients + i * stride
        # a call costs as much as the sum of a short row
        if width <= RUN:
            squares = np.float64(run_squares(gradient, width))
        elif width <= PART:
            squares = np.float64(part_squares(gradient, width))
        else:
            squares = sum_squares(gradient, width)
        total = load_f32(state, 0) + np.float32(squares * share)
        store_f32(state, 0, total)
        scaled = size / (np.sqrt(total) + epsilon)
        for c in range(width):
            store_f32(row, c, load_f32(row, c) - scaled * load_f32(gradient, c))


@callback
def update_rmsprop(
    weights: Any, states: Any, n: Any, gradients: Any, stride: Any, width: Any, rate: Any, step: Any, hyper: Any
) -> None:
    """acc = rho acc + (1 - rho) g^2; W -= rate g / (sqrt(acc) + epsilon)."""
    size = np.float32(rate)
    epsilon = np.float32(load_f64(hyper, EPSILON))
    keep = np.float32(load_f64(hyper, RHO))
    take = np.float32(1.0 - load_f64(hyper, RHO))
    for i in range(n):
        row = load_i64(weights, i)
        if row == 0:
            continue
        state = load_i64(states, i)
        gradient = gradients + i * stride
        for c in range(width):
            g = load_f32(gradient, c)
            mean = keep * load_f32(state, c) + take * g * g
            store_f32(state, c, mean)
            store_f32(row, c, load_f32(row, c) - size * g / (np.sqrt(mean) + epsilon))


@callback
def update_adadelta(
    weights: Any, states: Any, n: Any, gradients: Any, stride: Any, width: Any, rate: Any, step: Any, hyper: Any
) -> None:
    """a = rho a + (1 - rho) g^2; d = sqrt(b + epsilon) / sqrt(a + epsilon) g; b = rho b + (1 - rho) d^2; W -= rate d."""
    size = np.float32(rate)
    epsilon = np.float32(load_f64(hyper, EPSILON))
    keep = np.float32(load_f64(hyper, RHO))
    take = np.float32(1.0 - load_f64(hyper, RHO))
    for i in range(n):
        row = load_i64(weights, i)
        if row == 0:
            continue
        squares = load_i64(states, i)
        deltas = squares + 4 * width
        gradient = gradients + i * stride
        for c in range(width):
            g = load_f32(gradient, c)
            a = keep * load_f32(squares, c) + take * g * g
            b = load_f32(deltas, c)
            d = np.sqrt(b + epsilon) / np.sqrt(a + epsilon) * g
            store_f32(squares, c, a)
            store_f32(deltas, c, keep * b + take * d * d)
            store_f32(row, c, load_f32(row, c) - size * d)
