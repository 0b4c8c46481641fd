# SPDX-License-Identifier: Apache-2.0
"""From (table, key) to a block and to a place in its index: one 64-bit mix.

Invariant: block = the high bits of the mix, index position = its low bits; neither ever changes for a job, because
placement, checkpoints and clients all rest on it. Pure functions, any thread.
"""

import hashlib

import numpy as np
from numpy.typing import NDArray

from oarlock.embedding.jit import jit

GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio, odd: the increment of SplitMix64
_MULTIPLIER_1 = np.uint64(0xBF58476D1CE4E5B9)
_MULTIPLIER_2 = np.uint64(0x94D049BB133111EB)
_SHIFT_1 = np.uint64(30)
_SHIFT_2 = np.uint64(27)
_SHIFT_3 = np.uint64(31)


def table_salt(name: str) -> np.uint64:
    """Return what tells this table's keys from another's: the first 8 bytes of SHA-256 of its name, little-endian."""
    return np.uint64(int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little"))


@jit
def mix64(x: np.uint64) -> np.uint64:
    """Return a one-to-one scramble of 64 bits in which every input bit flips each output bit about half the time.

    Two rounds of xor-shift and multiply: D. Stafford's variant 13 of the MurmurHash3 finalizer, the output function
    of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014).
    """
    x = (x ^ (x >> _SHIFT_1)) * _MULTIPLIER_1
    x = (x ^ (x >> _SHIFT_2)) * _MULTIPLIER_2
    return x ^ (x >> _SHIFT_3)


@jit
def key_mix(salt: np.uint64, key: np.uint64) -> np.uint64:
    """Return the mix of (table, key)."""
    return mix64(key ^ salt)


@jit
def block_of_mix(mix: np.uint64, bits: int) -> np.int64:
    """Return the block of a mix in a table of 2^``bits`` blocks."""
    if bits == 0:  # a shift by 64 has no defined result
        return np.int64(0)
    return np.int64(mix >> np.uint64(64 - bits))


@jit
def blocks_of(keys: NDArray[np.uint64], salt: np.uint64, bits: int, out: NDArray[np.int32]) -> None:
    """Write the block of each of keys: uint64[n] to out: int32[n]; ``bits`` = log2 of the number of blocks."""
    for i in range(keys.shape[0]):
        out[i] = block_of_mix(key_mix(salt, keys[i]), bits)
