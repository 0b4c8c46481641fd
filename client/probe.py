# SPDX-License-Identifier: Apache-2.0
"""Probe: one pull that gets fresh rows of a table and remembers the kept ones that would have been used otherwise.

A worker computes on the fresh rows, as without a cache, and compares what it would have lost by the kept ones: both are of the
same samples, at the same time. Invariant: what the pull fills in does not depend on the bound under test. Used once, for one
pull; one event loop, and afterwards whoever computes on its rows.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from oarlock.client.caches import Asked, Caches, Rows
from oarlock.embedding.keys import KeySet
from oarlock.proto.errors import InvalidArgument


class Probe:
    """Stands for ``caches`` in one pull; ``bound``: the one of ``table`` when the pull began, which is tested."""

    def __init__(self, caches: Caches, table: str) -> None:
        self._caches = caches
        self.table = table
        self.bound = caches.bounds[table]
        self._asked: Asked | None = None
        self._kept: Rows = np.empty((0, 0), np.float32)

    def ask(self, run: int, generation: int, keys: Mapping[str, KeySet], rows: Mapping[str, Rows]) -> Asked:
        """As ``Caches.ask``."""
        self.bound = self._caches.bounds[self.table]
        self._asked = self._caches.ask(run, generation, keys, rows, fresh=(self.table,))
        self._kept = rows[self.table].copy()
        return self._asked

    def _lags(self) -> NDArray[np.int64]:
        if self._asked is None:
            raise InvalidArgument(f"the probe of table {self.table} was not pulled with")
        return self._asked.lags(self.table)

    def stale(self, rows: Rows) -> Rows | None:
        """Return rows: float32[n, dim] of the table as they would be under the bound; None if they would be the same."""
        lags = self._lags()
        used = (lags > 0) & (lags <= self.bound)
        return np.where(used[:, None], self._kept, rows) if used.any() else None

    def saved(self, bounds: Sequence[int]) -> tuple[float, ...]:
        """Return, for each of ``bounds``, ascending, which share of the rows would not have come."""
        lags = self._lags()
        within = np.searchsorted(np.sort(lags[lags >= 0]), bounds, side="right")
        return tuple((within / max(1, len(lags))).tolist())
