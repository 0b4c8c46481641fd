# SPDX-License-Identifier: Apache-2.0
"""Parts of a step, as a shard stages them: copies that outlive their message, and what several of them add up to.

Invariant: what is made here depends on the parts and their order alone. Pure; any thread.
"""

import numpy as np
from numpy.typing import NDArray

from oarlock.embedding.keys import merge
from oarlock.ps.request import DensePush, RowPush


def copied(part: RowPush) -> RowPush:
    """Return a part that outlives its message."""
    keys = part.keys
    own = type(keys)(keys.table, keys.keys.copy(), keys.blocks.copy(), keys.counts.copy(), keys.numbers.copy())
    return RowPush(own, part.gradients.copy(), part.rate, part.occurrences.copy(), part.clicks.copy())


def only(part: DensePush, chosen: NDArray[np.bool_], lengths: NDArray[np.int64]) -> DensePush:
    """Return the chosen blocks of a part, in memory of their own."""
    gradients = part.gradients[np.repeat(chosen, lengths)].copy()
    taken = lengths[chosen]
    return DensePush(part.numbers[chosen], gradients, np.cumsum(taken) - taken, part.rate)


def occurrences_of(parts: list[RowPush], inverse: NDArray[np.int32], keys: int) -> NDArray[np.uint32]:
    if not any(len(p.occurrences) for p in parts):
        return np.empty(0, np.uint32)
    given = [p.occurrences if len(p.occurrences) else np.ones(len(p.keys.keys), np.uint32) for p in parts]
    # Integers below 2^53 in float64.
    return np.bincount(inverse, np.concatenate(given), minlength=keys).astype(np.uint32)


def clicks_of(parts: list[RowPush], inverse: NDArray[np.int32], keys: int) -> NDArray[np.float32]:
    if not any(len(p.clicks) for p in parts):
        return np.empty(0, np.float32)
    given = [p.clicks if len(p.clicks) else np.zeros(len(p.keys.keys), np.float32) for p in parts]
    out: NDArray[np.float32] = np.empty((keys, 1), np.float32)
    merge(np.concatenate(given)[:, None], inverse, out)
    return out[:, 0]
