# SPDX-License-Identifier: Apache-2.0
"""A view of a table whose rows begin narrow: one of each of its two tables, begun at one instant (``embedding/view.py``).

Invariant: what changes a row's other parts changes its first part too, so the first parts tell which rows changed.
Any thread; one view is read by one thread at a time.
"""

import numpy as np
from numpy.typing import NDArray

from oarlock.embedding.content import BlockRows
from oarlock.embedding.expanding_content import joined
from oarlock.embedding.stamps import EVERY
from oarlock.embedding.view import Changes, TableView


class ExpandingView:
    """The views ``narrow`` and ``wide``; beginning: float32[c], the others' state where there are none. The methods are
    those of ``TableView``."""

    def __init__(self, narrow: TableView, wide: TableView, beginning: NDArray[np.float32]) -> None:
        self.number = narrow.number
        self._narrow, self._wide = narrow, wide
        self._beginning = beginning

    @property
    def blocks(self) -> NDArray[np.int32]:
        """Return the blocks that were stored when the view began, ascending: int32[m]."""
        return self._narrow.blocks

    def version(self, block: int) -> int:
        """Return how many operations had changed a block when the view began."""
        return self._narrow.version(block)

    def content(self, block: int) -> BlockRows:
        """Return all of a block as it was."""
        return joined(self._narrow.content(block), self._wide.content(block), self._beginning)

    def changes(self, block: int) -> Changes | None:
        """Return what came to a block since the last committed view; None: that is not known, write it whole."""
        found = self._narrow.changes(block)
        if found is None:
            return None
        others = self._wide.read(block, EVERY, found.rows.keys)
        return Changes(joined(found.rows, others, self._beginning), found.gone)

    def release(self, block: int) -> None:
        """Free what was saved for a block; its view cannot be read any more."""
        self._narrow.release(block)
        self._wide.release(block)

    def close(self) -> None:
        """Release all blocks. May be called again."""
        self._narrow.close()
        self._wide.close()
