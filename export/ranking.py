# SPDX-License-Identifier: Apache-2.0
"""Which rows of a table count most: those seen most often, with the highest score, or farthest from their first value.

Invariant: the same rows give the same choice, of exactly as many rows as the share says; of equal ones the first. Pure.
"""

import numpy as np
from numpy.typing import NDArray

from oarlock.checkpoint.block_file import BlockImage
from oarlock.embedding.frozen import FrozenBlock, FrozenTable
from oarlock.embedding.lookup import counter_names
from oarlock.embedding.spec import TableSpec


def ranks_of(spec: TableSpec, by: str, image: BlockImage, seed: int) -> NDArray[np.float64]:
    """Return the rank of each row of a block, float64[n], by one of ``method.RANKS`` that the table keeps."""
    if by == "change":
        return _change(spec, seed, image.keys, image.weights)
    names = counter_names(spec)
    if by == "occurrences":
        return image.counters[:, names.index("occurrences")].astype(np.float64)
    shows, clicks = (
        np.ascontiguousarray(image.counters[:, names.index(name)]).view(np.float32).astype(np.float64)
        for name in ("shows", "clicks")
    )
    score: NDArray[np.float64] = (shows - clicks) * spec.admission.nonclick + clicks * spec.admission.click
    return score


def chosen(ranks: NDArray[np.float64], share: float) -> NDArray[np.bool_]:
    """Return which rows are the ``share`` of all, one at least, that rank highest: bool[n]."""
    n = len(ranks)
    if not n:
        return np.zeros(0, np.bool_)
    wanted = max(1, round(share * n))
    least = np.partition(ranks, n - wanted)[n - wanted]
    found: NDArray[np.bool_] = ranks > least
    found[np.flatnonzero(ranks == least)[: wanted - int(found.sum())]] = True
    return found


def _change(spec: TableSpec, seed: int, keys: NDArray[np.uint64], weights: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return how far each row is from what its key reads as without a row."""
    none = np.empty(0, np.uint64), np.empty((0, spec.dim), np.float32), np.empty((0, 1), np.float32)
    bare = FrozenTable(spec, [FrozenBlock(spec, *none) for _ in range(spec.blocks)], seed=seed)
    first = np.empty_like(weights)
    bare.lookup(keys, first)
    change: NDArray[np.float64] = np.sqrt(np.square(weights - first, dtype=np.float64).sum(axis=1))
    return change
