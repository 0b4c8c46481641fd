# SPDX-License-Identifier: Apache-2.0
"""Dropout's draws: which values are kept, from a counter alone, so that a repeated step drops what it dropped before.

Invariant: whether value (i, j) of a step is kept depends on (seed, step, layer, i * width + j) and the rate only; no
generator has a state. The rules of ``nn.kernels`` hold here too.
"""

from typing import Any

import numpy as np

from oarlock.embedding.hashing import mix64
from oarlock.embedding.jit import jit

Array = np.ndarray[Any, Any]

ZERO = np.float32(0)
# So that these draws are not those of another use of the same seed: the first digits of pi.
_SALT = np.uint64(0x3243F6A8885A308D)
# The counter's stride of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014): 2^64 divided by the golden ratio, odd.
_STRIDE = np.uint64(0x9E3779B97F4A7C15)
_HALF = np.uint64(32)


@jit
def mask_key(seed: np.uint64, step: np.uint64, layer: np.uint64) -> np.uint64:
    """Return where the draws of one layer in one step begin."""
    return mix64(mix64(mix64(seed ^ _SALT) + step) + layer)


@jit
def dropout(
    source: Array, s0: int, target: Array, t0: int, width: int, key: np.uint64, below: np.uint64, scale: np.float32
) -> None:
    """Write source * scale where the value's 32 random bits are not under ``below``, else source * 0: NaN stays NaN.

    Also its own backward, with the gradient as source.
    """
    for i in range(source.shape[0]):
        value = source[i, s0 : s0 + width]
        out = target[i, t0 : t0 + width]
        begin = key + np.uint64(i) * np.uint64(width) * _STRIDE
        for j in range(width):
            bits = mix64(begin + np.uint64(j) * _STRIDE) >> _HALF
            out[j] = value[j] * (ZERO if bits < below else scale)
