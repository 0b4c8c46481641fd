# SPDX-License-Identifier: Apache-2.0
"""Bounds that cut a number into equally full buckets, from a sample of bounded size.

Invariant: the sample is the ``SAMPLE`` values whose rows have the lowest draws, so it is a function of the rows alone, not of
how they were cut into batches; up to ``SAMPLE`` values it is all of them. A sample belongs to one thread.
"""

import numpy as np
import numpy.typing as npt

from oarlock.data.draws import QUANTILES, fill_draws, stream_of, word
from oarlock.proto.errors import InvalidArgument

SAMPLE = 1 << 17


class QuantileSample:
    """A sample of the numbers of field ``index``; rows are named by their position among all rows."""

    def __init__(self, field: str, index: int, size: int = SAMPLE) -> None:
        self._field = field
        self._size = size
        self._stream = stream_of(word(0), word(0), word(0), word(index), word(QUANTILES))
        self._draws = np.empty(0, np.uint64)
        self._values = np.empty(0, np.float32)

    def add(self, first_row: int, values: npt.NDArray[np.float32]) -> None:
        """Add values: float32[n] of rows ``first_row``, ``first_row + 1``, ...; missing ones (NaN) are left out."""
        draws = np.empty(values.size, np.uint64)
        fill_draws(np.uint64(self._stream), np.uint64(first_row), draws)
        chosen = ~np.isnan(values)
        if self._draws.size == self._size:
            chosen &= draws < self._draws.max()
        draws = np.concatenate([self._draws, draws[chosen]])
        values = np.concatenate([self._values, values[chosen]])
        if draws.size > self._size:
            # Draws are distinct: a stream's counters go through a one-to-one mix.
            kept = np.argpartition(draws, self._size)[: self._size]
            draws, values = draws[kept], values[kept]
        self._draws, self._values = draws, values

    def bounds(self, buckets: int) -> npt.NDArray[np.float32]:
        """Return float32[at most buckets - 1], ascending and distinct: a value belongs to as many as it reaches."""
        if not self._values.size:
            raise InvalidArgument(
                f"fields {self._field}: the column holds no number to take quantiles of; leave it out"
            )
        ordered = np.sort(self._values)
        places = np.arange(1, buckets, dtype=np.int64) * ordered.size // buckets
        found = np.unique(ordered[places])
        # A bound that every value reaches cuts nothing off.
        bounds: npt.NDArray[np.float32] = found[found > ordered[0]]
        return bounds
