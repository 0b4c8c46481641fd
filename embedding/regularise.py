# SPDX-License-Identifier: Apache-2.0
"""What applies to every optimizer around its own step: clipping, L2, decoupled decay, L1, bounds of the weights.

In this order, each part only where its constant is set:

    before   g = g held to [-clip_value, clip_value]
             g = g clip_norm / |g| where the row's norm |g| is larger (Pascanu et al. 2013)
             g += l2 W                                      coupled L2: the gradient of l2 |W|^2 / 2
             W *= 1 - rate decay                            decoupled decay (Loshchilov, Hutter, ICLR 2019)
    the optimizer's update of W by g
    after    W = sign(W) max(|W| - rate l1, 0)              proximal L1 (Duchi, Singer, JMLR 2009)
             W = W held to [lower, upper]

L2 sees W before its decay, and decay comes before the step, as in PyTorch's AdamW. adam(w), amsgrad and lamb decay in
their own formula, ftrl and group_ftrl have l1 and l2 in theirs: these are left out here. A dense block counts as one row.
Invariant: pure functions of their arguments, float32 in the written order; gradients are never written to. Address 0 = skip.
The caller holds the rows' lock.
"""

import numpy as np

from oarlock.embedding.callback import invoke_update
from oarlock.embedding.jit import jit
from oarlock.embedding.optimizer_spec import OptimizerSpec
from oarlock.embedding.pointer import Int, load_f32, load_f64, load_i64, store_f32
from oarlock.embedding.update_row import (
    CLIP_NORM,
    CLIP_VALUE,
    LOWER,
    PASS_DECAY,
    PASS_L1,
    PASS_L2,
    UPPER,
    sum_squares,
)

OWN_DECAY = frozenset({"adam", "adamw", "amsgrad", "lamb"})
OWN_L1_L2 = frozenset({"ftrl", "group_ftrl"})

BEFORE, AFTER = 1, 2  # bits of passes()

_ZERO = np.float32(0.0)
_ONE = np.float32(1.0)


def passes(spec: OptimizerSpec) -> int:
    """Return which passes a spec needs: BEFORE | AFTER, 0 for none."""
    outside = spec.name not in OWN_L1_L2
    before = spec.clip_value or spec.clip_norm or (outside and spec.l2) or (spec.name not in OWN_DECAY and spec.decay)
    after = (outside and spec.l1) or spec.lower is not None or spec.upper is not None
    return (BEFORE if before else 0) | (AFTER if after else 0)


def plain(spec: OptimizerSpec) -> bool:
    """Return whether a spec uses nothing of this file, so that the optimizer's update is all there is."""
    return passes(spec) == 0


@jit
def before_update(
    weights: Int, n: Int, gradients: Int, stride: Int, width: Int, rate: float, hyper: Int, out: Int
) -> None:
    """Write the prepared gradients of a run of rows to out: address of float32[n, width]; decay the weights."""
    clip_value = np.float32(load_f64(hyper, CLIP_VALUE))
    clip_norm = load_f64(hyper, CLIP_NORM)
    l2 = np.float32(load_f64(hyper, PASS_L2))
    shrink = np.float32(1.0 - rate * load_f64(hyper, PASS_DECAY))
    for i in range(n):
        row = load_i64(weights, i)
        if row == 0:
            continue
        gradient = gradients + i * stride
        prepared = out + 4 * i * width
        if clip_value > _ZERO:
            for c in range(width):
                g = load_f32(gradient, c)
                g = clip_value if g > clip_value else g
                store_f32(prepared, c, -clip_value if g < -clip_value else g)
            gradient = prepared
        scale = _ONE
        if clip_norm > 0.0:
            norm = np.sqrt(sum_squares(gradient, width))
            if norm > clip_norm:
                scale = np.float32(clip_norm / norm)
        if gradient != prepared or scale != _ONE:
            for c in range(width):  # a factor of 1 changes no bit
                store_f32(prepared, c, load_f32(gradient, c) * scale)
        if l2 > _ZERO:
            for c in range(width):
                store_f32(prepared, c, load_f32(prepared, c) + l2 * load_f32(row, c))
        if shrink != _ONE:
            for c in range(width):
                store_f32(row, c, load_f32(row, c) * shrink)


@jit
def after_update(weights: Int, n: Int, width: Int, rate: float, hyper: Int) -> None:
    """Move a run of rows towards 0 by L1, then hold them to the bounds."""
    bound = np.float32(rate * load_f64(hyper, PASS_L1))
    lower = np.float32(load_f64(hyper, LOWER))
    upper = np.float32(load_f64(hyper, UPPER))
    for i in range(n):
        row = load_i64(weights, i)
        if row == 0:
            continue
        if bound > _ZERO:
            for c in range(width):
                w = load_f32(row, c)
                below = w + bound
                above = w - bound
                store_f32(row, c, above if w > bound else (below if w < -bound else _ZERO))
        for c in range(width):
            w = load_f32(row, c)
            w = lower if w < lower else w
            store_f32(row, c, upper if w > upper else w)


@jit
def update_rows(
    update: Int,
    needed: Int,
    weights: Int,
    states: Int,
    n: Int,
    gradients: Int,
    stride: Int,
    width: Int,
    rate: float,
    step: Int,
    hyper: Int,
    scratch: Int,
) -> None:
    """Do the whole of a step on a run of rows: the callback at address ``update`` between the passes ``needed``.

    ``scratch``: address of float32[n, width] for the prepared gradients, read only if ``needed`` has BEFORE.
    """
    if needed & BEFORE:
        before_update(weights, n, gradients, stride, width, rate, hyper, scratch)
        invoke_update(update, weights, states, n, scratch, 4 * width, width, rate, step, hyper)
    else:
        invoke_update(update, weights, states, n, gradients, stride, width, rate, step, hyper)
    if needed & AFTER:
        after_update(weights, n, width, rate, hyper)
