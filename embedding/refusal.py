# SPDX-License-Identifier: Apache-2.0
"""Which gradients are refused: those with NaN, an infinity, or a value so large that it would end in one.

Invariant: as integers, the bits of float32 magnitudes order as the numbers do, with infinities and NaN above them all; so
one comparison finds all three. Kernels only, any thread.
"""

import numpy as np
from numpy.typing import NDArray

from oarlock.embedding.jit import jit
from oarlock.embedding.pointer import Int, load_u32

# The square of a value at this limit still fits an accumulator; a table may set a lower one.
GRADIENT_LIMIT = 1e15

_MAGNITUDE = np.uint32(0x7FFFFFFF)


def limit_bits(limit: float = GRADIENT_LIMIT) -> np.uint32:
    """Return the least refused magnitude as the kernels take it."""
    return np.uint32(np.float32(limit).view(np.uint32))


@jit
def poisonous(gradient: Int, dim: int, limit: np.uint32) -> bool:
    """Tell whether one of float32[dim] at an address is refused."""
    bad = np.uint32(0)
    for column in range(dim):
        bad |= np.uint32((load_u32(gradient, column) & _MAGNITUDE) >= limit)
    return bool(bad != 0)


@jit
def refuse(bits: NDArray[np.uint32], limit: np.uint32, refused: NDArray[np.uint8]) -> int:
    """Mark in refused: uint8[n] the lines of bits: uint32[n, dim] (float32 seen as integers) that are; return how many."""
    found = 0
    for i in range(bits.shape[0]):
        bad = 0
        for column in range(bits.shape[1]):
            bad |= (bits[i, column] & _MAGNITUDE) >= limit
        refused[i] = bad
        found += bad
    return found
