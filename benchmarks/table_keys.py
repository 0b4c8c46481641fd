# SPDX-License-Identifier: Apache-2.0
"""The keys that a table holds in a benchmark, and requests for them: uniform, or by Zipf's law.

Invariant: key number r of a universe is always the same key, and all are distinct; a request's keys are distinct and grouped
by block, as KeySorter groups a batch's. Everything follows from the seed. Pure functions of their arguments, any thread.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from oarlock.embedding.hashing import GOLDEN, blocks_of

ZIPF = 1.05
LAWS = ("uniform", "zipf_1.05")
REQUEST_KEYS = 15_000
_SCATTER = 2654435761  # a prime: neighbours in rank are no neighbours in number


class Request(NamedTuple):
    """keys: uint64[n] grouped; blocks: int32[m], ascending; counts: int32[m]."""

    keys: NDArray[np.uint64]
    blocks: NDArray[np.int32]
    counts: NDArray[np.int32]


class Universe:
    """The keys number 0 to ``rows`` - 1 of a table with the given salt and 2^``bits`` blocks; more lie beyond."""

    def __init__(self, salt: np.uint64, bits: int, rows: int, seed: int = 1) -> None:
        self.rows = rows
        self._salt = salt
        self._bits = bits
        self._random = np.random.default_rng(seed)

    def keys(self, numbers: NDArray[np.int64]) -> NDArray[np.uint64]:
        """Return the keys of numbers: int64[n], in that order."""
        return (numbers.astype(np.uint64) + np.uint64(1)) * GOLDEN

    def group(self, keys: NDArray[np.uint64]) -> Request:
        """Return a request for distinct keys."""
        blocks = np.empty(keys.shape[0], np.int32)
        blocks_of(keys, self._salt, self._bits, blocks)
        # 16 bits wide where that is enough: numpy then sorts in linear time.
        order = np.argsort(blocks.astype(np.uint16) if self._bits <= 16 else blocks, kind="stable")
        counts = np.bincount(blocks, minlength=1 << self._bits)
        present = np.flatnonzero(counts)
        return Request(keys[order], present.astype(np.int32), counts[present].astype(np.int32))

    def span(self, begin: int, end: int) -> Request:
        """Return a request for the keys number begin to end - 1."""
        return self.group(self.keys(np.arange(begin, end, dtype=np.int64)))

    def draw(self, law: str, half: int | None = None, size: int = REQUEST_KEYS) -> Request:
        """Return a request for distinct keys drawn by a law; ``half`` = 0 or 1: from that half of the blocks only."""
        available = self.rows if half is None else self.rows // 3
        size = min(size, max(1, available // 2))
        numbers = np.empty(0, np.int64)
        while True:
            more = self._numbers(law, 2 * size if law == LAWS[1] or half is not None else size + size // 16 + 64)
            if half is not None:
                more = more[self._halves(more) == half]
            numbers = np.concatenate([numbers, more])
            _, first = np.unique(numbers, return_index=True)
            if first.shape[0] >= size:
                return self.group(self.keys(numbers[np.sort(first)[:size]]))

    def _numbers(self, law: str, n: int) -> NDArray[np.int64]:
        if law == LAWS[0]:
            return self._random.integers(0, self.rows, n)
        # The inverse of the law's distribution function, taken as continuous.
        reach = float(self.rows + 1) ** (1 - ZIPF) - 1
        ranks: NDArray[np.int64] = ((1 + self._random.random(n) * reach) ** (1 / (1 - ZIPF))).astype(np.int64) - 1
        numbers: NDArray[np.int64] = (np.clip(ranks, 0, self.rows - 1) * _SCATTER + 12345) % self.rows
        return numbers

    def _halves(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        keys = self.keys(numbers)
        blocks = np.empty(keys.shape[0], np.int32)
        blocks_of(keys, self._salt, self._bits, blocks)
        return (blocks >> max(self._bits - 1, 0)).astype(np.int64)
