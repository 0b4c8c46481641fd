# SPDX-License-Identifier: Apache-2.0
"""Tombstones: which keys left a block by eviction, and at which version of the block.

Invariant: versions ascend; ``since`` tells of every key that left after a version, or that it no longer can. Under the
block's mutex, like all that changes a block.
"""

from bisect import bisect_right

import numpy as np
from numpy.typing import NDArray

MOST = 1 << 20  # keys remembered in one block; whoever is further behind must take the block as a whole


class Tombstones:
    """Keys with versions, oldest first. ``floor``: what left at this version or before is forgotten."""

    def __init__(self) -> None:
        self._pieces: list[tuple[int, NDArray[np.uint64]]] = []
        self._count = 0
        self.floor = 0

    def __len__(self) -> int:
        return self._count

    def record(self, keys: NDArray[np.uint64], version: int) -> None:
        """Note that keys: uint64[n] left with the operation that made the block's version ``version``."""
        if len(keys):
            self._pieces.append((version, keys))
            self._count += len(keys)
        while self._count > MOST and len(self._pieces) > 1:
            self.forget(self._pieces[0][0])

    @property
    def newest(self) -> int:
        """The version with which a key left last; 0: none did."""
        return self._pieces[-1][0] if self._pieces else 0

    def since(self, version: int) -> tuple[NDArray[np.uint64], NDArray[np.int64]] | None:
        """Return keys: uint64[n] that left after ``version`` and their versions: int64[n]; None if some are forgotten."""
        if version < self.floor:
            return None
        pieces = self._pieces[bisect_right(self._pieces, version, key=lambda piece: piece[0]) :]
        keys = [k for _, k in pieces] or [np.empty(0, np.uint64)]
        versions = [np.full(len(k), v, np.int64) for v, k in pieces] or [np.empty(0, np.int64)]
        return np.concatenate(keys), np.concatenate(versions)

    def forget(self, version: int) -> None:
        """Forget what left at ``version`` or before."""
        self.floor = max(self.floor, version)
        self._pieces = [(v, keys) for v, keys in self._pieces if v > version]
        self._count = sum(len(keys) for _, keys in self._pieces)
