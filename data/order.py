# SPDX-License-Identifier: Apache-2.0
"""The order of splits in an epoch, of rows in a split: pure functions of (seed, epoch, split).

Invariant: an order is a permutation and never changes for the same numbers, on any machine and numpy version; tests
pin its values, because a resumed job relies on it. Callable from any thread.
"""

import numpy as np
import numpy.typing as npt

from oarlock.data.draws import ROW_ORDER, SPLIT_ORDER, absorb, fill_draws, word
from oarlock.embedding.hashing import mix64
from oarlock.proto.errors import InvalidArgument


def permutation(n: int, *key: int) -> npt.NDArray[np.int64]:
    """Return int64[n]: the positions 0..n-1 sorted by their hashes under ``key``, equal hashes in ascending order."""
    if n < 0:
        raise InvalidArgument(f"permutation of {n} positions: give a number >= 0")
    stream = mix64(word(len(key)))
    for part in key:
        stream = absorb(np.uint64(stream), word(part))
    hashes = np.empty(n, np.uint64)
    fill_draws(np.uint64(stream), np.uint64(0), hashes)
    return np.argsort(hashes, kind="stable").astype(np.int64, copy=False)


def split_order(seed: int, epoch: int, splits: int) -> npt.NDArray[np.int64]:
    """Return int64[splits]: which planned split stands at each position of this epoch."""
    return permutation(splits, SPLIT_ORDER, seed, epoch)


def row_order(seed: int, epoch: int, split: int, rows: int) -> npt.NDArray[np.int64]:
    """Return int64[rows]: raw row positions of a split in training order; batch b is the b-th run of batch_size."""
    return permutation(rows, ROW_ORDER, seed, epoch, split)
