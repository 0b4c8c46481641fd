# SPDX-License-Identifier: Apache-2.0
"""Vectors by key, changed in place, and the exact search among them: the reference for what an index finds.

    slot     the position of a vector in the matrix; a removed one's is used again
    order    the keys that are there, ascending, each with its slot: how a batch of keys finds its slots

Invariant: a key has one slot, a slot that has no key is marked, and its scores count for nothing. Under the cosine all vectors
have length 1, and one of zeros stays so. A batch of updates takes time for itself and to copy the order where keys come or go.
Nothing is locked here: who changes it is alone (``serving/nearest.py``).
"""

from copy import copy
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from oarlock.proto.errors import InvalidArgument

INNER, COSINE = "inner", "cosine"
METRICS = (INNER, COSINE)
# Rows whose scores are taken at once: their product lies in the cache when the best are chosen.
BLOCK_ROWS = 1 << 16

Keys = NDArray[np.uint64]
Floats = NDArray[np.float32]


class Nearest(NamedTuple):
    """For each vector asked about, best first: keys: uint64[q, k] and scores: float32[q, k]; ``counts``: int64[q] are there.

    Behind those keys are 0 and scores -inf.
    """

    keys: Keys
    scores: Floats
    counts: NDArray[np.int64]


class Vectors:
    """Vectors of ``dim`` values, compared by ``metric``."""

    def __init__(self, dim: int, metric: str = INNER) -> None:
        if metric not in METRICS:
            raise InvalidArgument(f"metric {metric!r}: choose one of {', '.join(METRICS)}")
        self.dim = dim
        self.metric = metric
        self.matrix: Floats = np.zeros((0, dim), np.float32)
        self.key_of: Keys = np.zeros(0, np.uint64)
        self.used: NDArray[np.bool_] = np.zeros(0, np.bool_)
        self._sorted: Keys = np.zeros(0, np.uint64)
        self._slots: NDArray[np.int64] = np.zeros(0, np.int64)
        self._free: NDArray[np.int64] = np.zeros(0, np.int64)
        # Slots from here on were never used.
        self.end = 0

    def copy(self) -> "Vectors":
        """Return the same, which can be changed by itself."""
        made = copy(self)
        # The other arrays are exchanged, and never written to.
        made.matrix, made.key_of, made.used = self.matrix.copy(), self.key_of.copy(), self.used.copy()
        return made

    @property
    def rows(self) -> int:
        return len(self._sorted)

    @property
    def keys(self) -> Keys:
        """The keys that are there, ascending; what changes later does not change it."""
        return self._sorted

    @property
    def nbytes(self) -> int:
        """Bytes of vectors, keys and order."""
        arrays = (self.matrix, self.key_of, self.used, self._sorted, self._slots, self._free)
        return sum(array.nbytes for array in arrays)

    def unit(self, rows: Floats) -> Floats:
        """Return rows: float32[n, dim] as they are compared."""
        if self.metric == INNER:
            return np.ascontiguousarray(rows, np.float32)
        length = np.sqrt(np.square(rows, dtype=np.float64).sum(axis=1, keepdims=True))
        return np.ascontiguousarray(np.divide(rows, length, out=np.zeros(rows.shape), where=length > 0), np.float32)

    def find(self, keys: Keys) -> NDArray[np.int64]:
        """Return the slots of keys: int64[n], -1 where there is none."""
        if not self.rows:
            return np.full(len(keys), -1, np.int64)
        at = np.minimum(np.searchsorted(self._sorted, keys), self.rows - 1)
        return np.where(self._sorted[at] == keys, self._slots[at], -1)

    def put(self, keys: Keys, rows: Floats) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Give distinct keys their vectors; return their slots and which of them were there before."""
        rows = self.unit(rows)
        slots = self.find(keys)
        known = slots >= 0
        new = np.flatnonzero(~known)
        if len(new):
            slots[new] = self._take(len(new))
            sort = new[np.argsort(keys[new])]
            at = np.searchsorted(self._sorted, keys[sort])
            self._sorted = np.insert(self._sorted, at, keys[sort])
            self._slots = np.insert(self._slots, at, slots[sort])
            self.key_of[slots[new]] = keys[new]
            self.used[slots[new]] = True
        self.matrix[slots] = rows
        return slots, known

    def _take(self, count: int) -> NDArray[np.int64]:
        """Return slots that nobody has."""
        again, self._free = self._free[:count], self._free[count:]
        begin, self.end = self.end, self.end + count - len(again)
        if self.end > len(self.matrix):
            more = max(self.end, len(self.matrix) * 5 // 4) - len(self.matrix)
            self.matrix = np.concatenate([self.matrix, np.zeros((more, self.dim), np.float32)])
            self.key_of = np.concatenate([self.key_of, np.zeros(more, np.uint64)])
            self.used = np.concatenate([self.used, np.zeros(more, np.bool_)])
        return np.concatenate([again, np.arange(begin, self.end)])

    def drop(self, keys: Keys) -> NDArray[np.int64]:
        """Remove distinct keys; return the slots of those that were there."""
        slots = self.find(keys)
        slots = slots[slots >= 0]
        if len(slots):
            self.used[slots] = False
            gone = np.searchsorted(self._sorted, self.key_of[slots])
            self._sorted, self._slots = np.delete(self._sorted, gone), np.delete(self._slots, gone)
            self._free = np.concatenate([self._free, slots])
        return slots

    def exact(
        self,
        queries: Floats,
        k: int,
        *,
        among: NDArray[np.int64] | None = None,
        without: NDArray[np.int64] | None = None,
    ) -> Nearest:
        """Return the ``k`` nearest of queries: float32[q, dim]. ``among``: only these slots; ``without``: not these."""
        queries = self.unit(queries)
        allowed = self.used[: self.end]
        if without is not None and len(without):
            allowed = allowed.copy()
            allowed[without] = False
        slots = among[allowed[among]] if among is not None else None
        n = self.end if slots is None else len(slots)
        best, where = np.empty((len(queries), 0), np.float32), np.empty((len(queries), 0), np.int64)
        for begin in range(0, n, BLOCK_ROWS):
            run = slice(begin, min(n, begin + BLOCK_ROWS))
            if slots is None:
                scores = queries @ self.matrix[run].T
                scores[:, ~allowed[run]] = -np.inf
                at = np.broadcast_to(np.arange(run.start, run.stop), scores.shape)
            else:
                scores = queries @ self.matrix[slots[run]].T
                at = np.broadcast_to(slots[run], scores.shape)
            top = top_columns(scores, k)
            best = np.concatenate([best, np.take_along_axis(scores, top, 1)], axis=1)
            where = np.concatenate([where, np.take_along_axis(at, top, 1)], axis=1)
        top = top_columns(best, k)
        return self.answer(np.take_along_axis(where, top, 1), np.take_along_axis(best, top, 1), k)

    def answer(self, slots: NDArray[np.int64], scores: Floats, k: int) -> Nearest:
        """Return slots: int64[q, m] with their scores as keys, best first; a score of -inf is no answer."""
        return best_of(self.key_of[slots], scores, k)


def best_of(keys: Keys, scores: Floats, k: int) -> Nearest:
    """Return the ``k`` best of keys: uint64[q, m] by their scores: float32[q, m]; one that is not finite is no answer."""
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    scores, keys = np.take_along_axis(scores, order, 1), np.take_along_axis(keys, order, 1)
    there = np.isfinite(scores)
    found, out = np.zeros((len(scores), k), np.uint64), np.full((len(scores), k), -np.inf, np.float32)
    width = scores.shape[1]
    found[:, :width][there] = keys[there]
    out[:, :width][there] = scores[there]
    return Nearest(found, out, there.sum(axis=1))


def top_columns(scores: Floats, k: int) -> NDArray[np.int64]:
    """Return the columns of the ``k`` largest scores of each line, in any order."""
    if scores.shape[1] <= k:
        return np.broadcast_to(np.arange(scores.shape[1]), scores.shape)
    return np.argpartition(scores, scores.shape[1] - k, axis=1)[:, scores.shape[1] - k :]
