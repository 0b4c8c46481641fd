# SPDX-License-Identifier: Apache-2.0
"""Updates that follow the gradient with at most a memory of the last ones: sgd, momentum, nesterov, dcasgd.

Invariant: pure functions of their arguments, float32 in the written order; the arguments are those of
``embedding/callback.py``, the formulas those of ``embedding/optimizers.py``. The caller holds the rows' lock.
"""

from typing import Any

import numpy as np

from oarlock.embedding.callback import callback
from oarlock.embedding.pointer import load_i64
from oarlock.embedding.update_row import DELAY, MOMENTUM, constant, read, write


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
            write(row, c, read(row, c) - size * read(gradient, c))


@callback
def update_momentum(
    weights: Any, states: Any, n: Any, gradients: Any, stride: Any, width: Any, rate: Any, step: Any, hyper: Any
) -> None:
    """b = momentum b + g; W -= rate b."""
    size = np.float32(rate)
    keep = np.float32(constant(hyper, MOMENTUM))
    for i in range(n):
        row = load_i64(weights, i)
        if row == 0:
            continue
        state = load_i64(states, i)
        gradient = gradients + i * stride
        for c in range(width):
            b = keep * read(state, c) + read(gradient, c)
            write(state, c, b)
            write(row, c, read(row, c) - size * b)


@callback
def update_nesterov(
    weights: Any, states: Any, n: Any, gradients: Any, stride: Any, width: Any, rate: Any, step: Any, hyper: Any
) -> None:
    """b = momentum b + g; W -= rate (g + momentum b)."""
    size = np.float32(rate)
    keep = np.float32(constant(hyper, MOMENTUM))
    for i in range(n):
        row = load_i64(weights, i)
        if row == 0:
            continue
        state = load_i64(states, i)
        gradient = gradients + i * stride
        for c in range(width):
            g = read(gradient, c)
            b = keep * read(state, c) + g
            write(state, c, b)
            write(row, c, read(row, c) - size * (g + keep * b))


@callback
def update_dcasgd(
    weights: Any, states: Any, n: Any, gradients: Any, stride: Any, width: Any, rate: Any, step: Any, hyper: Any
) -> None:
    """W -= rate (g + delay g^2 d); d = what this update changed W by."""
    size = np.float32(rate)
    delay = np.float32(constant(hyper, DELAY))
    for i in range(n):
        row = load_i64(weights, i)
        if row == 0:
            continue
        state = load_i64(states, i)
        gradient = gradients + i * stride
        for c in range(width):
            g = read(gradient, c)
            w = read(row, c)
            after = w - size * (g + delay * g * g * read(state, c))
            write(state, c, after - w)
            write(row, c, after)
