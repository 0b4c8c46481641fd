# SPDX-License-Identifier: Apache-2.0
"""The lines of mixed dimensions: of all matrices of so many lines, the one that brings rows nearest to themselves.

They are the first right singular vectors of the rows, which are read block by block and never together.
Invariant: the same rows give the same lines, orthonormal. Pure; one thread.
"""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray


def fit_lines(parts: Iterable[NDArray[np.float32]], dim: int, values: int) -> NDArray[np.float32]:
    """Return lines: float32[values, dim] for rows, that come in parts: float32[n, dim] each."""
    gram = np.zeros((dim, dim))
    for rows in parts:
        exact = rows.astype(np.float64)
        gram += exact.T @ exact
    # Ascending; without any rows they are some of the axes.
    lines = np.linalg.eigh(gram)[1].T[::-1][:values]
    largest = np.take_along_axis(lines, np.abs(lines).argmax(axis=1)[:, None], axis=1)
    return np.ascontiguousarray(lines * np.sign(largest), np.float32)
