# SPDX-License-Identifier: Apache-2.0
"""Sweeps: rows that a table's eviction rules take away go in slices, block after block, at a pace set by the steps of pushes.

    block b of B    is swept at the fraction (b + 1) / B of a round; the next round begins where the last one ended
    a round         takes as many steps as an epoch has groups, since rules that count (occurrences, score with its decay)
                    speak of what came since the round before; rules by age and norm alone look four times in an age's
                    length, where that is sooner

Under sync the rounds begin with the job, and a block that is due by a step is swept whole as a part of that step: copies of it
do so by themselves. Otherwise they are told what a slice did.

Invariant: which slice is due follows from steps and the blocks that are owned here, never from a clock; a slice changes one
block, under the push lock. Called from one thread, but for what is a part of a step.
"""

import logging
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from oarlock.embedding.make import AnyTable
from oarlock.embedding.spec import TableSpec
from oarlock.proto.errors import PSError
from oarlock.ps.does import Swept

if TYPE_CHECKING:
    from oarlock.ps.shard import Shard

logger = logging.getLogger(__name__)

# About 10,000 rows: a push waits for half a millisecond at most.
SLICE_BUCKETS = 2048
LOOKS_PER_AGE = 4
# More than any block's index has.
ALL_BUCKETS = 1 << 62


def round_steps(spec: TableSpec, epoch_steps: int) -> int:
    """Return how many steps a round of sweeps takes."""
    rules = spec.eviction
    if not rules.age or rules.occurrences or rules.score:
        return max(1, epoch_steps)
    return max(1, min(epoch_steps, rules.age // LOOKS_PER_AGE))


class _Round:
    """Where the sweep of one table stands: ``begun``: the step at which its round began; ``block``: the next to look at.

    ``base``: the number of its first block.
    """

    def __init__(self, table: AnyTable, base: int, steps: int) -> None:
        self.table = table
        self.base = base
        self.steps = steps
        self.begun = 0
        self.block = 0

    def due(self, step: int, owned: NDArray[np.bool_]) -> int | None:
        """Return the block that is due of those that are ``owned`` bool[blocks of the job], None if there is none yet."""
        blocks = self.table.spec.blocks
        # Integers: a fraction in floats may say that the last block is never due.
        until = min(blocks, (step - self.begun) * blocks // self.steps)
        found = np.flatnonzero(owned[self.base + self.block : self.base + max(self.block, until)])
        if len(found):
            return self.block + int(found[0])
        if until == blocks:
            # Rounds that nobody had time for are left out.
            self.begun += (step - self.begun) // self.steps * self.steps
            self.block = 0
        return None

    def at(self, step: int) -> range:
        """Return the blocks that become due by this one step, in rounds of which the first began at step 0."""
        blocks, behind = self.table.spec.blocks, (step - 1) % self.steps
        return range(behind * blocks // self.steps, (behind + 1) * blocks // self.steps)


class Sweeper:
    """Sweeps those tables of ``shard`` whose rules look for something."""

    def __init__(self, shard: "Shard", *, epoch_steps: int) -> None:
        self._shard = shard
        self._rounds = [
            _Round(table, base, round_steps(table.spec, epoch_steps))
            for table, base in zip(shard.tables, shard.layout.table_base, strict=True)
            if table.spec.eviction.sweeps
        ]
        self.slices = 0

    def begin(self, step: int) -> None:
        """Begin the first round; ``step``: of the first push, which is a high one after a restore."""
        for each in self._rounds:
            each.begun = step

    @property
    def idle(self) -> bool:
        """Tell whether there is no table to sweep at all."""
        return not self._rounds

    def sweep_some(self, step: int) -> bool:
        """Sweep one slice of one owned block, if any is due at ``step``; return whether it was. The push lock is held."""
        for each in self._rounds:
            block = each.due(step, self._shard.owned)
            if block is None:
                continue
            wrapped, swept = self._sweep(each, block, step, SLICE_BUCKETS)
            if swept is not None and self._shard.told is not None and (len(swept.gone) or len(swept.decayed)):
                self._shard.did(np.array([each.base + block], np.int32), swept)
            if wrapped:
                each.block = block + 1
            # The other tables come first the next time.
            self._rounds.remove(each)
            self._rounds.append(each)
            return True
        return False

    def sweep_at(self, step: int, chosen: NDArray[np.bool_]) -> None:
        """Sweep those of the chosen blocks, bool[blocks of the job], that are due by a step that they have just applied.

        Under sync: who comes next must find the same rows everywhere. The push lock is held.
        """
        for each in self._rounds:
            for block in each.at(step):
                if chosen[each.base + block]:
                    self._sweep(each, block, step, ALL_BUCKETS)

    def _sweep(self, each: _Round, block: int, step: int, buckets: int) -> tuple[bool, Swept | None]:
        """Sweep a slice; return whether the block is done with, and what that did, None if it failed."""
        self.slices += 1
        try:
            left, wrapped, gone, decayed = each.table.sweep(block, tick=step, buckets=buckets)
        except (PSError, OSError, MemoryError) as error:
            # Rows stay that could go: no reason to stop training, and the next round looks again.
            logger.warning("event=sweep_failed table=%s block=%d error=%s", each.table.spec.name, block, error)
            return True, None
        logger.debug("event=swept table=%s block=%d rows=%d", each.table.spec.name, block, left)
        return wrapped, Swept(gone, decayed)
