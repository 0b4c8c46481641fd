# SPDX-License-Identifier: Apache-2.0
"""Counter-based draws: every random number is a hash of where it is used, so nothing has a generator state.

Invariant: a draw is a pure function of (seed, epoch, split, batch, layer, counter); tests pin its values, and a change
would change every resumed job. ``layer`` says what draws: a graph's layers count from 0, other uses have the numbers
below. A stream is SplitMix64 (Steele, Lea and Flood, OOPSLA 2014), and the counter is the place in it.
Callable from any thread.
"""

import numpy as np
import numpy.typing as npt

from oarlock.embedding.hashing import GOLDEN, mix64
from oarlock.embedding.jit import jit

MASK = (1 << 64) - 1

# Uses that are not layers of a graph. A number never changes its meaning.
SPLIT_ORDER = (1 << 63) + 1
ROW_ORDER = (1 << 63) + 2
NEGATIVES = (1 << 63) + 3
IMPORT_ORDER = (1 << 63) + 4
PLANTED = (1 << 63) + 5
QUANTILES = (1 << 63) + 6

_LOW = np.uint64(0xFFFFFFFF)
_ONE = np.uint64(1)
_11 = np.uint64(11)
_32 = np.uint64(32)


def word(value: int) -> np.uint64:
    """Return ``value`` modulo 2^64: kernels take their numbers as uint64 so that one compiled form serves all."""
    return np.uint64(value & MASK)


@jit
def absorb(stream: np.uint64, value: np.uint64) -> np.uint64:
    """Return element ``value`` of a stream: a draw, or the start of a stream one level deeper."""
    return mix64(stream + (value + _ONE) * GOLDEN)


@jit
def stream_of(seed: np.uint64, epoch: np.uint64, split: np.uint64, batch: np.uint64, layer: np.uint64) -> np.uint64:
    """Return the stream of one layer in one batch; ``absorb(stream, counter)`` is its draw number ``counter``."""
    return absorb(absorb(absorb(absorb(mix64(seed), epoch), split), batch), layer)


@jit
def draw(
    seed: np.uint64, epoch: np.uint64, split: np.uint64, batch: np.uint64, layer: np.uint64, counter: np.uint64
) -> np.uint64:
    """Return one draw: 64 even bits."""
    return absorb(stream_of(seed, epoch, split, batch, layer), counter)


@jit
def below(bits: np.uint64, bound: np.uint64) -> np.uint64:
    """Return floor(bits * bound / 2^64), an integer in [0, bound); no value is favoured by more than bound / 2^64."""
    low = (bits & _LOW) * (bound & _LOW)
    left = (bits >> _32) * (bound & _LOW) + (low >> _32)
    right = (bits & _LOW) * (bound >> _32) + (left & _LOW)
    return (bits >> _32) * (bound >> _32) + (left >> _32) + (right >> _32)


@jit
def unit(bits: np.uint64) -> np.float64:
    """Return a float64 in [0, 1) from the high 53 bits."""
    return np.float64(bits >> _11) * (1.0 / 9007199254740992.0)


@jit
def fill_draws(stream: np.uint64, first: np.uint64, out: npt.NDArray[np.uint64]) -> None:
    """Write draws ``first``, ``first + 1``, ... of a stream to ``out: uint64[n]``."""
    for i in range(out.shape[0]):
        out[i] = absorb(stream, first + np.uint64(i))


@jit
def fill_units(stream: np.uint64, first: np.uint64, out: npt.NDArray[np.float64]) -> None:
    """Write the same draws as numbers in [0, 1) to ``out: float64[n]``."""
    for i in range(out.shape[0]):
        out[i] = unit(absorb(stream, first + np.uint64(i)))
