# SPDX-License-Identifier: Apache-2.0
"""The three products of a Linear by tiles of registers, with bias, relu and their gradients done before a tile leaves them.

Faster than BLAS on one thread where the CPU has AVX-512, since each result is written once and no pass over samples follows.
Invariant: no operand is read or written outside of its columns; a sample's values do not depend on the other samples, and sums
over samples are taken in parts of ``PART`` in their order. Where a matrix is no multiple of a tile the last tile lies over
the one before. The rules of ``nn.kernels`` hold here too; ``scratch`` holds ``scratch_size`` floats of anything.
"""

from typing import Any

import numpy as np

from oarlock.embedding.jit import jit
from oarlock.embedding.pointer import address_in
from oarlock.embedding.tile import (
    LANES,
    ROWS,
    added_half_tile,
    added_tile,
    biased_half_tile,
    biased_tile,
    masked_half_tile,
    masked_tile,
    suits_cpu,
)

Array = np.ndarray[Any, Any]

ZERO: np.float32 = np.float32(0)
LOWEST: np.float32 = np.float32(-np.inf)
WIDE = 2 * LANES
# So many samples of a tile's columns of both factors stay in the first cache.
PART = 128


def fits(inputs: int, units: int) -> bool:
    """Return whether a Linear of these widths has room for a tile in each of its products."""
    return min(inputs, units) >= LANES


def fits_forward(units: int) -> bool:
    """Return whether a Linear of that many units has room for a tile in its forward product, however few inputs it has."""
    return units >= LANES


def scratch_size(inputs: int, units: int) -> int:
    """Return how many floats of scratch the products of such a Linear need."""
    return max(inputs * (units + WIDE), units * (inputs + WIDE)) + max(inputs, units)


def prepared_size(inputs: int, units: int) -> int:
    """Return how many floats ``prepare`` writes of such a weight, or some more."""
    return units + inputs * (units + WIDE)


@jit
def _panel(width: int, j: int) -> int:
    """Return how many columns the tile has that begins at column j, or before it where that many are not left."""
    return WIDE if width - j > LANES and width >= WIDE else LANES


@jit
def pack(weight: Array, panels: Array) -> None:
    """Write ``weight: float32[K, N]`` as panels of 32 columns, the last of 32 or 16; each ends at or before column N."""
    length, width = weight.shape
    at = 0
    j = 0
    while j < width:
        each = _panel(width, j)
        begin = min(j, width - each)
        for k in range(length):
            source = weight[k, begin : begin + each]
            out = panels[at : at + each]
            for c in range(each):
                out[c] = source[c]
            at += each
        j = begin + each


@jit
def pack_transposed(weight: Array, panels: Array) -> None:
    """Write the transpose of ``weight: float32[N, K]`` as ``pack`` does."""
    width, length = weight.shape
    at = 0
    j = 0
    while j < width:
        each = _panel(width, j)
        begin = min(j, width - each)
        for first in range(0, length, LANES):
            last = min(first + LANES, length)
            for c in range(each):
                for k in range(first, last):
                    panels[at + k * each + c] = weight[begin + c, k]
        at += each * length
        j = begin + each


@jit
def prepare(weight: Array, scratch: Array) -> None:
    """Have in ``scratch`` what ``forward_prepared`` needs of a weight."""
    width = weight.shape[1]
    # So that one signature does, there is always a bias.
    scratch[:width] = ZERO
    pack(weight, scratch[width:])


@jit
def forward_prepared(
    source: Array, s0: int, weight: Array, bias: Array, relu: bool, prepared: Array, target: Array, t0: int
) -> None:
    """Do as ``forward``, with the weight as it was when ``prepare`` wrote ``prepared``."""
    length, width = weight.shape
    biased = address_in(bias if len(bias) else prepared, 0)
    _rows(source, s0, prepared[width:], length, width, biased, ZERO if relu else LOWEST, target, t0)


@jit
def forward(
    source: Array, s0: int, weight: Array, bias: Array, relu: bool, scratch: Array, target: Array, t0: int
) -> None:
    """Write source @ weight + bias, and relu of it; an empty bias adds nothing. NaN stays NaN. At least 14 samples."""
    prepare(weight, scratch)
    forward_prepared(source, s0, weight, bias, relu, scratch, target, t0)


@jit
def backward(gradient: Array, g0: int, weight: Array, scratch: Array, target: Array, t0: int) -> None:
    """Write gradient @ weight^T. At least 14 samples."""
    width, length = weight.shape
    none = scratch[:width]
    none[:] = ZERO
    panels = scratch[width:]
    pack_transposed(weight, panels)
    _rows(gradient, g0, panels, length, width, address_in(none, 0), LOWEST, target, t0)


@jit
def _rows(
    source: Array, s0: int, panels: Array, length: int, width: int, bias: int, floor: np.float32, target: Array, t0: int
) -> None:
    pitch, out_pitch = source.strides[0], target.strides[0]
    a, b, out = address_in(source, 4 * s0), address_in(panels, 0), address_in(target, 4 * t0)
    batch = target.shape[0]
    i = 0
    while i < batch:
        i = min(i, batch - ROWS)
        line, to, panel = a + i * pitch, out + i * out_pitch, b
        j = 0
        while j < width:
            if _panel(width, j) == WIDE:
                j = min(j, width - WIDE)
                biased_tile(line, pitch, panel, 4 * WIDE, length, to + 4 * j, out_pitch, bias + 4 * j, floor)
                panel += 4 * WIDE * length
                j += WIDE
            else:
                j = min(j, width - LANES)
                biased_half_tile(line, pitch, panel, 4 * LANES, length, to + 4 * j, out_pitch, bias + 4 * j, floor)
                panel += 4 * LANES * length
                j += LANES
        i += ROWS


@jit
def backward_relu(
    gradient: Array,
    g0: int,
    weight: Array,
    scratch: Array,
    output: Array,
    o0: int,
    target: Array,
    t0: int,
    bias_gradient: Array,
) -> None:
    """Write gradient @ weight^T where ``output``, of the relu before this Linear, is not <= 0, else 0, and its sum over samples.

    At least 14 samples.
    """
    width, length = weight.shape
    panels = scratch[width:]
    pack_transposed(weight, panels)
    bias_gradient[:] = ZERO
    pitch, on_pitch, out_pitch = gradient.strides[0], output.strides[0], target.strides[0]
    a, b, totals = address_in(gradient, 4 * g0), address_in(panels, 0), address_in(bias_gradient, 0)
    on, out = address_in(output, 4 * o0), address_in(target, 4 * t0)
    batch = target.shape[0]
    i = 0
    while i < batch:
        old = max(0, i - (batch - ROWS))
        i -= old
        line, to, mask, panel = a + i * pitch, out + i * out_pitch, on + i * on_pitch, b
        j = 0
        while j < width:
            if _panel(width, j) == WIDE:
                k = min(j, width - WIDE)
                masked_tile(
                    line,
                    pitch,
                    panel,
                    4 * WIDE,
                    length,
                    to + 4 * k,
                    out_pitch,
                    mask + 4 * k,
                    on_pitch,
                    totals + 4 * k,
                    old,
                    j - k,
                )
                panel += 4 * WIDE * length
                j = k + WIDE
            else:
                k = min(j, width - LANES)
                masked_half_tile(
                    line,
                    pitch,
                    panel,
                    4 * LANES,
                    length,
                    to + 4 * k,
                    out_pitch,
                    mask + 4 * k,
                    on_pitch,
                    totals + 4 * k,
                    old,
                    j - k,
                )
                panel += 4 * LANES * length
                j = k + LANES
        i += ROWS


@jit
def weight_gradient(source: Array, s0: int, gradient: Array, g0: int, out: Array) -> None:
    """Write source^T @ gradient."""
    height, width = out.shape
    pitch, right_pitch, out_pitch = source.strides[0], gradient.strides[0], out.strides[0]
    a, b, to = address_in(source, 4 * s0), address_in(gradient, 4 * g0), address_in(out, 0)
    batch = source.shape[0]
    for first in range(0, batch, PART):
        length = min(PART, batch - first)
        left, right = a + first * pitch, b + first * right_pitch
        i = 0
        while i < height:
            old = max(0, i - (height - ROWS))
            i -= old
            line = to + i * out_pitch
            j = 0
            while j < width:
                if _panel(width, j) == WIDE:
                    k = min(j, width - WIDE)
                    added_tile(
                        left + 4 * i,
                        pitch,
                        right + 4 * k,
                        right_pitch,
                        length,
                        line + 4 * k,
                        out_pitch,
                        first,
                        old,
                        j - k,
                    )
                    j = k + WIDE
                else:
                    k = min(j, width - LANES)
                    added_half_tile(
                        left + 4 * i,
                        pitch,
                        right + 4 * k,
                        right_pitch,
                        length,
                        line + 4 * k,
                        out_pitch,
                        first,
                        old,
                        j - k,
                    )
                    j = k + LANES
            i += ROWS


def warm_up() -> None:
    """Compile the kernels, where they would be chosen at all."""
    if not suits_cpu():
        return
    samples, square = np.zeros((ROWS, LANES), np.float32), np.zeros((LANES, LANES), np.float32)
    scratch, bias = np.zeros(scratch_size(LANES, LANES), np.float32), np.zeros(LANES, np.float32)
    forward(samples, 0, square, bias, True, scratch, samples.copy(), 0)
    prepare(square, scratch)
    forward_prepared(samples, 0, square, bias, True, scratch, samples.copy(), 0)
    backward(samples, 0, square, scratch, samples.copy(), 0)
    backward_relu(samples, 0, square, scratch, samples, 0, samples.copy(), 0, bias)
    weight_gradient(samples, 0, samples, 0, square)
