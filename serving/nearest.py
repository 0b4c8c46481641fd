# SPDX-License-Identifier: Apache-2.0
"""The nearest rows of a table to a vector: exactly, or by an index of faiss that is kept in step with the rows.

The index is an inverted file: vectors lie in lists by the nearest of some centroids, and a search looks through the lists whose
centroids are nearest to the query. How many is found out when it is built: so that of the ``WANTED`` nearest of some rows it
finds at least the share ``RECALL``. A small table has no index and is searched exactly. Invariant: vectors and index have the
same keys whenever nobody writes; a search sees all of an update or nothing of it. Any thread. The index needs the package
``faiss``: ``pip install "oarlock[recall]"``.
"""

import math
import time
from collections.abc import Callable
from copy import copy
from typing import Any

import numpy as np
from numpy.typing import NDArray

from oarlock.proto.errors import InvalidArgument
from oarlock.serving.sharing import Sharing
from oarlock.serving.vectors import INNER, Floats, Keys, Nearest, Vectors

_NONE: Keys = np.empty(0, np.uint64)
# Fewer rows are searched exactly in a millisecond.
LEAST_ROWS = 10_000
# Lists: four times the root of the rows, up to MANY; from there on as many as the root, up to MOST.
MANY_LISTS, MOST_LISTS = 2048, 16_384
# Vectors for each list from which centroids are found, and rounds of k-means.
TRAIN_ROWS, ROUNDS = 40, 6
# Vectors that are entered at once as it is built.
ADD_ROWS = 1 << 16
# What the index is adjusted by: this share of so many nearest ones, of so many rows taken as queries.
RECALL, WANTED, QUERIES = 0.98, 100, 128


class NearestIndex:
    """The vectors of one table. ``ann`` = False: exact alone."""

    def __init__(self, dim: int, metric: str = INNER, *, ann: bool = True) -> None:
        self._vectors = Vectors(dim, metric)
        self._ann = ann
        self._lock = Sharing()
        self._index: Any = None
        self._faiss: Any = None
        # Lists that a search looks through, the share that was found so, and the time to build it all.
        self.probes = 0
        self.recall: float | None = None
        self.build_seconds = 0.0
        # Rows that came, changed or went since the centroids were found.
        self.changed = 0
        # Of which state of the model its vectors are.
        self.stamp: Any = None
        if ann:
            self._faiss = load_faiss()

    def copy(self) -> "NearestIndex":
        """Return the same, which can be changed by itself, in twice the memory; nobody changes this one meanwhile."""
        made = copy(self)
        made._lock = Sharing()
        made._vectors = self._vectors.copy()
        if self._index is not None:
            made._index = self._faiss.clone_index(self._index)
        return made

    @property
    def rows(self) -> int:
        return self._vectors.rows

    @property
    def dim(self) -> int:
        return self._vectors.dim

    @property
    def nbytes(self) -> int:
        """Bytes of vectors and keys, and about those of the index, which has the vectors again."""
        index = 0 if self._index is None else self._vectors.rows * (4 * self._vectors.dim + 8 + 32)
        return self._vectors.nbytes + index

    @property
    def trained(self) -> bool:
        """Whether there is an index, and a search need not look at all rows."""
        return self._index is not None

    def build(
        self, keys: Keys, rows: Floats, *, stamp: Any = None, going_on: Callable[[], object] = lambda: None
    ) -> None:
        """Begin with rows: float32[n, dim] of distinct keys: uint64[n]. ``stamp``: what ``search`` says its answers are of.

        ``going_on`` is called every second or few; what it raises ends it, and then this is to be thrown away.
        """
        begun = time.perf_counter()
        with self._lock.writing():
            self._vectors = Vectors(self._vectors.dim, self._vectors.metric)
            self._index, self.recall, self.probes, self.changed = None, None, 0, 0
            self._vectors.put(keys, rows)
            if self._ann and len(keys) >= LEAST_ROWS:
                self._train(going_on)
            self.stamp = stamp
            self.build_seconds = time.perf_counter() - begun

    def _train(self, going_on: Callable[[], object]) -> None:
        vectors, faiss = self._vectors, self._faiss
        n = vectors.end
        root = math.sqrt(n)
        lists = round(min(MOST_LISTS, max(root, min(4 * root, MANY_LISTS))))
        quantizer = faiss.IndexFlatIP(vectors.dim)
        index = faiss.IndexIVFFlat(quantizer, vectors.dim, lists, faiss.METRIC_INNER_PRODUCT)
        index.cp.niter, index.cp.max_points_per_centroid, index.cp.min_points_per_centroid = ROUNDS, TRAIN_ROWS, 1
        rng = np.random.default_rng(0)
        matrix = vectors.matrix[:n]
        index.train(matrix[rng.choice(n, min(n, TRAIN_ROWS * lists), replace=False)])
        # So that a vector is found in its list, to be removed, without a look at all of them.
        index.set_direct_map_type(faiss.DirectMap.Hashtable)
        for begin in range(0, n, ADD_ROWS):
            going_on()
            run = slice(begin, min(n, begin + ADD_ROWS))
            index.add_with_ids(matrix[run], np.arange(run.start, run.stop))
        queries = matrix[rng.choice(n, min(n, QUERIES), replace=False)]
        truth = vectors.exact(queries, WANTED).keys
        self._index = index
        probes = 1
        while True:
            going_on()
            found = self._search(queries, WANTED, probes, None).keys
            share = float(np.mean([len(np.intersect1d(*pair)) / WANTED for pair in zip(found, truth, strict=True)]))
            if share >= RECALL or probes >= lists:
                break
            probes = min(lists, probes + max(1, probes * 2 // 5))
        self.probes, self.recall = probes, share

    def update(self, keys: Keys, rows: Floats, *, stamp: Any = None) -> None:
        """Give keys: uint64[n] the vectors rows: float32[n, dim], be they there already or not; the last of a key counts."""
        self.apply(keys, rows, _NONE, stamp=stamp)

    def remove(self, keys: Keys, *, stamp: Any = None) -> int:
        """Let keys: uint64[n] go; return how many of them were there."""
        return self.apply(_NONE, np.empty((0, self._vectors.dim), np.float32), keys, stamp=stamp)

    def apply(self, keys: Keys, rows: Floats, gone: Keys, *, stamp: Any = None) -> int:
        """Let keys ``gone`` go, and give ``keys`` their vectors, at one moment; return how many went. No ``stamp``: as before."""
        keys, rows = _last(keys, rows)
        if rows.shape != (len(keys), self._vectors.dim):
            raise InvalidArgument(f"rows of {list(rows.shape)} for {len(keys)} keys of {self._vectors.dim} values")
        with self._lock.writing():
            removed = self._vectors.drop(np.unique(gone)) if len(gone) else np.empty(0, np.int64)
            if self._index is not None:
                self._forget(removed)
            if len(keys):
                slots, known = self._vectors.put(keys, rows)
                if self._index is not None:
                    self._forget(slots[known])
                    self._index.add_with_ids(self._vectors.matrix[slots], slots)
            self.changed += len(keys) + len(removed)
            self.stamp = self.stamp if stamp is None else stamp
        return len(removed)

    def _forget(self, slots: NDArray[np.int64]) -> None:
        if len(slots):
            slots = np.ascontiguousarray(slots)
            self._index.remove_ids(self._faiss.IDSelectorArray(len(slots), self._faiss.swig_ptr(slots)))

    @property
    def keys(self) -> Keys:
        """The keys that are there, uint64[n], ascending."""
        with self._lock.reading():
            return self._vectors.keys

    def holds(self, keys: Keys) -> NDArray[np.bool_]:
        """Tell which of keys: uint64[n] are there."""
        with self._lock.reading():
            there: NDArray[np.bool_] = self._vectors.find(keys) >= 0
            return there

    def differing(self, keys: Keys, rows: Floats) -> NDArray[np.bool_]:
        """Tell which of keys: uint64[n] are not there, or with another vector."""
        with self._lock.reading():
            slots = self._vectors.find(keys)
            there = slots >= 0
            other = ~there
            other[there] = (self._vectors.matrix[slots[there]] != self._vectors.unit(rows[there])).any(axis=1)
            return other

    def search(
        self,
        queries: Floats,
        k: int,
        *,
        exact: bool = False,
        among: Keys | None = None,
        without: Keys | None = None,
    ) -> tuple[Nearest, Any]:
        """Return the ``k`` nearest rows of queries: float32[q, dim], and the stamp of the vectors that were looked at.

        ``among``: only of these keys, which are compared exactly; ``without``: of all but these. ``exact``: not by the index.
        """
        with self._lock.reading():
            excluded = None
            if without is not None and len(without):
                excluded = self._vectors.find(without)
                excluded = excluded[excluded >= 0]
            if among is not None:
                slots = np.unique(self._vectors.find(among))
                found = self._vectors.exact(queries, k, among=slots[slots >= 0], without=excluded)
            elif exact or self._index is None:
                found = self._vectors.exact(queries, k, without=excluded)
            else:
                found = self._search(queries, k, self.probes, excluded)
            return found, self.stamp

    def _search(self, queries: Floats, k: int, probes: int, excluded: NDArray[np.int64] | None) -> Nearest:
        faiss = self._faiss
        options = {"nprobe": probes}
        if excluded is not None and len(excluded):
            batch = faiss.IDSelectorBatch(np.ascontiguousarray(excluded))
            options["sel"] = faiss.IDSelectorNot(batch)
        scores, slots = self._index.search(self._vectors.unit(queries), k, params=faiss.SearchParametersIVF(**options))
        scores[slots < 0] = -np.inf
        return self._vectors.answer(slots, scores, k)


def _last(keys: Keys, rows: Floats) -> tuple[Keys, Floats]:
    """Return distinct keys, ascending, each with the last of its rows."""
    distinct, at = np.unique(keys[::-1], return_index=True)
    return distinct, rows[len(keys) - 1 - at]


def load_faiss() -> Any:
    """Return the package faiss; InvalidArgument says how to get it."""
    try:
        import faiss
    except ImportError:
        raise InvalidArgument(
            'the package faiss is not installed, which nearest neighbours are found with: pip install "oarlock[recall]", or '
            "ask for exact search"
        ) from None
    return faiss
