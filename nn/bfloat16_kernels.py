# SPDX-License-Identifier: Apache-2.0
"""The kernels around a product in bfloat16: what rounds its inputs, and what makes of its result a layer's output.

A bfloat16 is the upper half of a float32, kept as uint16; widening is exact, rounding is to nearest, ties to even. An
array of them is uint16[batch, width], all of it; float32 arguments are as in ``nn.kernels``, whose rules hold here too.
Invariant: arithmetic is in float32 and only what is stored is rounded. NaN stays NaN and an infinity stays itself; what
is nearer to 2^128 than to the largest bfloat16 becomes infinite, as under IEEE rounding.
"""

from typing import Any

import numpy as np

from oarlock.embedding.jit import jit

Array = np.ndarray[Any, Any]

TILE = 64
ZERO = np.float32(0)
HALF_ZERO = np.uint16(0)
_16 = np.uint32(16)
_LAST = np.uint32(1)
_HALF = np.uint32(0x7FFF)  # just below half of the last kept bit's value; plus that bit, it rounds to nearest even
_MAGNITUDE = np.uint32(0x7FFFFFFF)
_INFINITY = np.uint32(0x7F800000)
_QUIET = np.uint32(0x400000)


@jit
def narrow(value: Any) -> Any:
    """Return the bfloat16 next to a float32."""
    bits = np.float32(value).view(np.uint32)
    # A NaN's lower half may be all that makes it one, and the addition could carry it into the sign.
    if bits & _MAGNITUDE > _INFINITY:
        return np.uint16((bits | _QUIET) >> _16)
    return np.uint16(np.uint32(bits + (_HALF + ((bits >> _16) & _LAST))) >> _16)


@jit
def widen(half: Any) -> Any:
    """Return the float32 that a bfloat16 is."""
    return np.uint32(np.uint32(half) << _16).view(np.float32)


@jit
def pack(source: Array, s0: int, width: int, target: Array) -> None:
    """Write the bfloat16 of the source."""
    for i in range(target.shape[0]):
        value = source[i, s0 : s0 + width]
        out = target[i]
        for j in range(width):
            out[j] = narrow(value[j])


@jit
def unpack(source: Array, target: Array, t0: int) -> None:
    """Write the float32 of the source."""
    width = source.shape[1]
    for i in range(source.shape[0]):
        value = source[i]
        out = target[i, t0 : t0 + width]
        for j in range(width):
            out[j] = widen(value[j])


@jit
def finish(target: Array, bias: Array, relu: bool) -> None:
    """Write target + bias, under relu if so wished, in place."""
    width = bias.shape[0]
    for i in range(target.shape[0]):
        out = target[i]
        for j in range(width):
            value = widen(out[j]) + bias[j]
            out[j] = HALF_ZERO if relu and value < ZERO else narrow(value)


@jit
def finish_wide(product: Array, bias: Array, relu: bool, target: Array, t0: int) -> None:
    """Write product + bias, under relu if so wished, to a float32 target."""
    width = bias.shape[0]
    for i in range(product.shape[0]):
        value = product[i]
        out = target[i, t0 : t0 + width]
        for j in range(width):
            one = widen(value[j]) + bias[j]
            out[j] = ZERO if relu and one < ZERO else one


@jit
def bias_gradient(output: Array, relu: bool, gradient: Array, tile: Array, out: Array) -> None:
    """Under relu clear the gradient where output <= 0, in place; write its sum over samples to ``out: float32[width]``.

    The sum runs tile by tile, as in ``kernels.bias_gradient``; ``tile: float32[>= width]`` is scratch.
    """
    width = out.shape[0]
    batch = gradient.shape[0]
    part = tile[:width]
    for j in range(width):
        out[j] = ZERO
    for begin in range(0, batch, TILE):
        for j in range(width):
            part[j] = ZERO
        for i in range(begin, min(begin + TILE, batch)):
            value = gradient[i]
            active = output[i]
            for j in range(width):
                kept = HALF_ZERO if relu and widen(active[j]) <= ZERO else value[j]
                value[j] = kept
                part[j] += widen(kept)
        for j in range(width):
            out[j] += part[j]


@jit
def relu_bias_gradient_wide(
    output: Array, o0: int, gradient: Array, g0: int, tile: Array, out: Array, target: Array
) -> None:
    """Write the bfloat16 of the float32 gradient, 0 where output <= 0, and its sum before rounding, as bias_gradient does."""
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
            packed = target[i]
            for j in range(width):
                kept = ZERO if active[j] <= ZERO else value[j]
                packed[j] = narrow(kept)
                part[j] += kept
        for j in range(width):
            out[j] += part[j]
