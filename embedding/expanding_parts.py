# SPDX-License-Identifier: Apache-2.0
"""The two tables that a table whose rows begin narrow is made of (``embedding/expanding.py``, which alone changes them).

Invariant: with the same keys, steps and gradients each of them has the values that these columns have in an ordinary table.
"""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from oarlock.embedding.precision import PRECISIONS
from oarlock.embedding.slab import layout
from oarlock.embedding.spec import Guard, TableSpec
from oarlock.embedding.store import keeps
from oarlock.embedding.table import Table


class Narrow(Table):
    """The first parts, which count what a score is made of."""

    def __init__(self, spec: TableSpec, *, seed: int) -> None:
        first = spec.parts[0]
        super().__init__(replace(spec, dim=first.width, parts=(first,), expand_score=0.0), seed=seed)
        self.layout = layout(first.width, self.layout.state_columns, PRECISIONS.index(spec.dtype), keeps(spec))
        self.counters = self.layout.counters


class Wide(Table):
    """The other parts, whose first values are those of their columns in the whole row."""

    def __init__(self, spec: TableSpec, *, seed: int) -> None:
        begin = spec.parts[0].width
        super().__init__(
            TableSpec(
                spec.name,
                spec.dim - begin,
                blocks=spec.blocks,
                dtype=spec.dtype,
                parts=spec.parts[1:],
                absent="zeros",
                guard=Guard(limit=spec.guard.limit, sample=0),
            ),
            seed=seed,
        )
        self._ends += begin
        self.first = self.first._replace(begin=begin)

    @property
    def beginning(self) -> NDArray[np.float32]:
        """Return the state: float32[columns] of a row that is not there, as contents carry it."""
        out: NDArray[np.float32] = np.zeros(self.state_columns, np.float32)
        out[: len(self._state)] = self._state
        return out
