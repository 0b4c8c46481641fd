# SPDX-License-Identifier: Apache-2.0
"""The vocabulary of a categorical field: how often each value occurs, which ones are kept, and who is among them.

Invariant: what is kept is a function of the counts alone, not of the order in which values were seen: the commonest first,
of equally common ones those of lower hash. Open addressing over hashes that are never 0; at most half of the slots are in
use. A Counter belongs to one thread; a Membership is immutable.
"""

import numpy as np
import numpy.typing as npt

from oarlock.data.categories import NULL_CATEGORY, OTHER_CATEGORY, Hashes
from oarlock.embedding.jit import jit
from oarlock.proto.errors import InvalidArgument

MAX_DISTINCT = 4_000_000
_RUN = 1 << 16
_EMPTY = NULL_CATEGORY

Counts = npt.NDArray[np.int64]


@jit
def place_of(hashes: Hashes, wanted: np.uint64) -> np.int64:
    """Return the slot of ``wanted`` in hashes: uint64[2^k], or the empty one where it would be put."""
    mask = np.uint64(hashes.shape[0] - 1)
    slot = wanted & mask
    while hashes[slot] != _EMPTY and hashes[slot] != wanted:
        slot = (slot + np.uint64(1)) & mask
    return np.int64(slot)


@jit
def add_counts(codes: Hashes, times: Counts, hashes: Hashes, counts: Counts) -> int:
    """Add the times of each code but NULL_CATEGORY to its slot; return how many new slots were taken."""
    taken = 0
    for i in range(codes.shape[0]):
        code = codes[i]
        if code != _EMPTY:
            slot = place_of(hashes, code)
            if hashes[slot] == _EMPTY:
                hashes[slot] = code
                taken += 1
            counts[slot] += times[i]
    return taken


@jit
def keep_known(codes: Hashes, hashes: Hashes, out: Hashes) -> None:
    """Write codes: uint64[n] to ``out``, with OTHER_CATEGORY for those that are not among ``hashes``; null stays null."""
    for i in range(codes.shape[0]):
        code = codes[i]
        if code != _EMPTY and hashes[place_of(hashes, code)] == _EMPTY:
            code = OTHER_CATEGORY
        out[i] = code


@jit
def first_unlisted(codes: Hashes, ones: Hashes, zeros: Hashes, others: bool, out: npt.NDArray[np.float32]) -> int:
    """Write 1 for codes among ``ones``, else 0, to ``out: float32[n]``; return the first row of no meaning, or -1.

    Null has none, nor has a code that is in neither list, unless ``others``.
    """
    bad = -1
    for i in range(codes.shape[0]):
        code = codes[i]
        label = np.float32(0.0)
        known = others and code != _EMPTY
        for j in range(ones.shape[0]):
            if code == ones[j]:
                label = np.float32(1.0)
                known = True
        for j in range(zeros.shape[0]):
            if code == zeros[j]:
                known = True
        if bad < 0 and not known:
            bad = i
        out[i] = label
    return bad


def slots_for(values: int) -> int:
    """Return a power of two, at least twice the number of values."""
    return 1 << max(4, (2 * values - 1).bit_length())


class Counter:
    """Counts of a field's values; above ``limit`` distinct ones it refuses."""

    def __init__(self, field: str, limit: int = MAX_DISTINCT) -> None:
        self._field = field
        self._limit = limit
        self._hashes: Hashes = np.full(slots_for(_RUN), _EMPTY)
        self._counts: Counts = np.zeros(self._hashes.size, np.int64)
        self._used = 0

    def add(self, codes: Hashes) -> None:
        """Count codes: uint64[n]; null is not counted."""
        ones = np.ones(min(codes.size, _RUN), np.int64)
        for begin in range(0, codes.size, _RUN):
            part = codes[begin : begin + _RUN]
            if 2 * (self._used + part.size) > self._hashes.size:
                self._grow(slots_for(2 * (self._used + part.size)))
            self._used += int(add_counts(part, ones[: part.size], self._hashes, self._counts))
            if self._used > self._limit:
                raise InvalidArgument(
                    f"fields {self._field}: more than {self._limit:,} distinct values are too many for a vocabulary; "
                    "use hash = BUCKETS, or neither: the values are then the keys themselves"
                )

    def kept(self, min_count: int, max_size: int) -> Hashes:
        """Return uint64[k], ascending: the values that occur ``min_count`` times, of them the ``max_size`` commonest."""
        chosen = self._counts >= min_count
        chosen &= self._hashes != _EMPTY
        hashes, counts = self._hashes[chosen], self._counts[chosen]
        if hashes.size > max_size:
            hashes = hashes[np.lexsort((hashes, -counts))[:max_size]]
        found: Hashes = np.sort(hashes)
        return found

    def _grow(self, slots: int) -> None:
        hashes, counts = self._hashes, self._counts
        self._hashes = np.full(slots, _EMPTY)
        self._counts = np.zeros(slots, np.int64)
        add_counts(hashes, counts, self._hashes, self._counts)


class Membership:
    """Whether a value is one of ``values: uint64[k]``, distinct and none of them NULL_CATEGORY."""

    def __init__(self, values: Hashes) -> None:
        self.values = values
        self._hashes: Hashes = np.full(slots_for(values.size), _EMPTY)
        add_counts(values, np.zeros(values.size, np.int64), self._hashes, np.zeros(self._hashes.size, np.int64))

    def keep(self, codes: Hashes, out: Hashes) -> None:
        """Write codes: uint64[n] to ``out``, OTHER_CATEGORY in place of values that are not here."""
        keep_known(codes, self._hashes, out)
