# SPDX-License-Identifier: Apache-2.0
"""The codebook of product quantisation, found among rows by k-means.

Invariant: the same rows and seed give the same lines. Pure; called from one thread, with a sample that fits into memory.
"""

import itertools

import numpy as np
from numpy.typing import NDArray

from oarlock.embedding.packed import LINES, nearest_lines, part_starts


def train_codebook(sample: NDArray[np.float32], parts: int, *, seed: int = 0, rounds: int = 12) -> NDArray[np.float32]:
    """Return the codebook: float32[256, dim] that k-means finds for rows: float32[n, dim], each part by itself."""
    rng = np.random.default_rng(seed)
    n, dim = sample.shape
    codebook = np.zeros((LINES, dim), np.float32)
    if not n:
        return codebook
    starts = part_starts(dim, parts)
    for begin, end in itertools.pairwise(starts.tolist()):
        points = np.ascontiguousarray(sample[:, begin:end])
        lines = points[rng.choice(n, LINES, replace=n < LINES)].copy()
        for _ in range(rounds):
            near = nearest_lines(points, lines)
            count = np.bincount(near, minlength=LINES)
            for column in range(end - begin):
                total = np.bincount(near, points[:, column], minlength=LINES)
                lines[:, column] = np.where(count, total / np.maximum(count, 1), lines[:, column])
            # What nobody is near to begins anew where somebody is.
            empty = np.flatnonzero(count == 0)
            lines[empty] = points[rng.integers(0, n, len(empty))]
        codebook[:, begin:end] = lines
    return codebook
