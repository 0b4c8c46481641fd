# SPDX-License-Identifier: Apache-2.0
"""Row cache: rows of a table that a worker keeps from batch to batch, after HET (Miao et al., VLDB 2022).

    versions_of   before a pull: which versions are kept of a batch's keys; their rows are copied out at once
    merge         after it: the rows that came because they are absent here, or too old, replace them and are kept

The owner of a row alone decides whether a kept one may still be used (docs/cache.md), so the cache may forget any row at
any time, and between the two calls of one batch there may be those of others: a batch computes on what was copied out
for it. Invariant: memory never grows; a kept row is as old as its version says, or newer. One thread at a time.
"""

import numpy as np
from numpy.typing import NDArray

from oarlock.client.cache_kernels import (
    EVICTED,
    FINE,
    KEPT,
    OUTSIDE,
    PLACE_BYTES,
    TOP,
    TWICE,
    WORDS,
    Memory,
    read_answer,
    read_kept,
    take_answer,
)
from oarlock.embedding.pointer import LINE, address_of, check_output, kernel_array
from oarlock.embedding.spec import MAX_DIM, CacheSpec
from oarlock.proto.errors import InvalidArgument, Malformed, OutOfMemory

Keys = NDArray[np.uint64]
Rows = NDArray[np.float32]
Versions = NDArray[np.uint32]


def _in_lines(size: int) -> tuple[NDArray[np.uint8], int]:
    """Return memory of so many bytes, and the address in it at which a cache line begins."""
    memory = np.empty(size + LINE, np.uint8)
    return memory, address_of(memory) + -address_of(memory) % LINE


class RowCache:
    """Up to ``spec.rows`` rows of ``dim`` float32 of one table.

    hits: rows that batches used as they were kept; misses: rows that came; outdated: those of them that were kept, but too
    old; evictions: rows that gave their place to others. Counted since the cache was made.
    """

    def __init__(self, spec: CacheSpec, dim: int) -> None:
        if isinstance(dim, bool) or not isinstance(dim, int) or not 1 <= dim <= MAX_DIM:
            raise InvalidArgument(f"dim = {dim!r}: give an integer from 1 to {MAX_DIM}")
        self.spec, self.dim = spec, dim
        self.hits = self.misses = self.outdated = 0
        entries = max(16, 1 << (2 * spec.rows - 1).bit_length())
        top = TOP if spec.policy == "lfu" else 0
        try:  # memory that is never written to is not taken from the machine
            self._index: NDArray[np.int64] = np.zeros(entries, np.int64)
            self._places, places = _in_lines(spec.rows * PLACE_BYTES)
            self._rows, rows = _in_lines(spec.rows * 4 * dim)
        except MemoryError:
            raise OutOfMemory(f"no memory for a cache of {spec.rows} rows of dim {dim}: set cache.rows lower") from None
        self._lists: NDArray[np.int64] = np.zeros((top + 1, 2), np.int64)
        self._words: NDArray[np.int64] = np.zeros(WORDS, np.int64)
        index, lists, words = (address_of(array) for array in (self._index, self._lists, self._words))
        self._memory = Memory(index, places, rows, lists, words, entries - 1, spec.rows, 4 * dim, top)

    def __len__(self) -> int:
        return int(self._words[KEPT])

    @property
    def evictions(self) -> int:
        return int(self._words[EVICTED])

    @property
    def saved_bytes(self) -> int:
        """Return the bytes of rows that did not have to come."""
        return self.hits * 4 * self.dim

    @property
    def nbytes(self) -> int:
        """Return the bytes of memory that the cache has, full or not."""
        arrays = (self._index, self._places, self._rows, self._lists, self._words)
        return sum(array.nbytes for array in arrays)

    def clear(self) -> None:
        """Forget all rows, as a new run does: what was restored may be of an earlier version."""
        self._index[:] = 0
        self._lists[:] = 0
        evicted = self.evictions
        self._words[:] = 0
        self._words[EVICTED] = evicted

    def versions_of(self, keys: Keys, out: Rows) -> Versions:
        """Return the versions: uint32[n] that are kept of keys: uint64[n], 0: none; write these rows to out: float32[n, dim].

        The other lines of ``out`` are left as they are. It changes nothing here.
        """
        keys = kernel_array("keys", keys, np.uint64)
        self._fits("out", out, len(keys))
        check_output("out", out)
        versions = np.empty(len(keys), np.uint32)
        read_kept(self._memory, keys, versions, address_of(out))
        return versions

    def merge(
        self, keys: Keys, kept: Versions, positions: NDArray[np.int32], rows: Rows, versions: Versions, out: Rows
    ) -> None:
        """Complete ``out``, which ``versions_of`` of the same keys gave ``kept`` for, with what came; keep what came.

        rows: float32[m, dim] and versions: uint32[m] are those of the keys at positions: int32[m], each once, in any order. A
        version of 0 is not kept. Rows that this batch uses do not go for others of it: what has no place is not kept.
        Malformed, before anything is changed, if a row that is not kept did not come.
        """
        keys = kernel_array("keys", keys, np.uint64)
        kept = kernel_array("kept", kept, np.uint32)
        positions = kernel_array("positions", positions, np.int32)
        rows = kernel_array("rows", rows, np.float32, 2)
        versions = kernel_array("versions", versions, np.uint32)
        n, m = len(keys), len(positions)
        self._fits("out", out, n)
        check_output("out", out)
        self._fits("rows", rows, m)
        if len(kept) != n or len(versions) != m:
            raise Malformed(f"{len(kept)} and {len(versions)} versions for {n} keys and {m} rows that came")
        came, fault = np.empty(n, np.int32), np.zeros(1, np.int64)
        code = read_answer(kept, positions, came, fault)
        if code != FINE:
            at = int(fault[0])
            if code == OUTSIDE:
                raise Malformed(f"a row came for position {at} of {n} keys")
            fact = "came twice" if code == TWICE else "did not come, and no row of it is kept"
            raise Malformed(f"the row of key {int(keys[at])}, at position {at}, {fact}")
        self.hits += n - m
        self.misses += m
        self.outdated += int(np.count_nonzero(kept[positions]))
        take_answer(self._memory, keys, came, address_of(rows), versions, np.empty(n, np.int64), address_of(out))

    def merge_in_place(
        self, keys: Keys, kept: Versions, came: NDArray[np.bool_], versions: Versions, out: Rows
    ) -> None:
        """As ``merge``, where the rows that came, those with came: bool[n], are in their lines of ``out`` already.

        versions: uint32[n]; those of the other rows say nothing.
        """
        keys = kernel_array("keys", keys, np.uint64)
        kept = kernel_array("kept", kept, np.uint32)
        came = kernel_array("came", came, np.bool_)
        versions = kernel_array("versions", versions, np.uint32)
        n = len(keys)
        self._fits("out", out, n)
        check_output("out", out)
        if not len(kept) == len(came) == len(versions) == n:
            raise Malformed(f"{len(kept)} and {len(versions)} versions, {len(came)} marks for {n} keys")
        lacking = (kept == 0) & ~came
        if lacking.any():
            at = int(lacking.argmax())
            raise Malformed(f"the row of key {int(keys[at])}, at position {at}, did not come, and no row of it is kept")
        m = int(np.count_nonzero(came))
        self.hits += n - m
        self.misses += m
        self.outdated += int(np.count_nonzero(kept[came]))
        numbers = np.where(came, np.arange(1, n + 1, dtype=np.int32), np.int32(0))
        take_answer(self._memory, keys, numbers, address_of(out), versions, np.empty(n, np.int64), address_of(out))

    def _fits(self, name: str, values: Rows, n: int) -> None:
        if values.dtype != np.float32 or values.shape != (n, self.dim):
            raise Malformed(f"{name} is {values.dtype}{list(values.shape)}, expected float32[{n}, {self.dim}]")


def warm_up() -> None:
    """Compile, or load, the cache's kernels; which policy it has does not matter to them."""
    cache = RowCache(CacheSpec(1, policy="lfu"), 1)
    for key in range(2):
        keys, out = np.array([key], np.uint64), np.zeros((1, 1), np.float32)
        kept = cache.versions_of(keys, out)
        cache.merge(keys, kept, np.zeros(1, np.int32), out, np.ones(1, np.uint32), out)
