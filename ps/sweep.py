# SPDX-License-Identifier: Apache-2.0
"""Sweeps: rows that a table's eviction rules take away go in slices, block after block, at a pace set by the steps of pushes.

    block b of B    is swept at the fraction (b + 1) / B of a round; the next round begins where the last one ended
    a round         takes as many steps as an epoch has groups, since rules that count (occurrences, score with its decay)
                    speak of what came since the round before; rules by age and norm alone look four times in an age's
                    length, where that is sooner

Invariant: which slice is due follows from steps and the blocks that are here, never from a clock; a slice changes one block,
under the push lock. Called from one thread.
"""

import logging
from collections.abc import Sequence

import numpy as np

from oarlock.embedding.make import AnyTable
from oarlock.embedding.spec import TableSpec
from oarlock.proto.errors import PSError

logger = logging.getLogger(__name__)

# About 10,000 rows: a push waits for half a millisecond at most.
SLICE_BUCKETS = 2048
LOOKS_PER_AGE = 4


def round_steps(spec: TableSpec, epoch_steps: int) -> int:
    """Return how many steps a round of sweeps takes."""
    rules = spec.eviction
    if not rules.age or rules.occurrences or rules.score:
        return max(1, epoch_steps)
    return max(1, min(epoch_steps, rules.age // LOOKS_PER_AGE))


class _Round:
    """Where the sweep of one table stands: ``begun``: the step at which its round began; ``block``: the next to look at."""

    def __init__(self, table: AnyTable, steps: int) -> None:
        self.table = table
        self.steps = steps
        self.begun = 0
        self.block = 0

    def due(self, step: int) -> int | None:
        """Return the block that is due, None if there is none yet."""
        blocks = self.table.spec.blocks
        # Integers: a fraction in floats may say that the last block is never due.
        until = min(blocks, (step - self.begun) * blocks // self.steps)
        owned = self.table.owned
        found = owned[np.searchsorted(owned, self.block) :]
        if len(found) and found[0] < until:
            return int(found[0])
        if until == blocks:
            # Rounds that nobody had time for are left out.
            self.begun += (step - self.begun) // self.steps * self.steps
            self.block = 0
        return None


class Sweeper:
    """Sweeps those of ``tables`` whose rules look for something."""

    def __init__(self, tables: Sequence[AnyTable], *, epoch_steps: int) -> None:
        self._rounds = [_Round(t, round_steps(t.spec, epoch_steps)) for t in tables if t.spec.eviction.sweeps]
        self.slices = 0

    def begin(self, step: int) -> None:
        """Begin the first round; ``step``: of the first push, which is a high one after a restore."""
        for each in self._rounds:
            each.begun = step

    def go_on(self, step: int) -> None:
        """Go on as one that has swept all that was due before ``step``, whenever it began: under sync rounds begin at step 0."""
        for each in self._rounds:
            behind = (step - 1) % each.steps
            each.begun = step - 1 - behind
            each.block = behind * each.table.spec.blocks // each.steps

    @property
    def idle(self) -> bool:
        """Tell whether there is no table to sweep at all."""
        return not self._rounds

    def sweep_some(self, step: int) -> bool:
        """Sweep one slice of one block, if any is due at ``step``; return whether it was. The push lock is held."""
        for each in self._rounds:
            block = each.due(step)
            if block is None:
                continue
            self.slices += 1
            try:
                left, wrapped, *_ = each.table.sweep(block, tick=step, buckets=SLICE_BUCKETS)
            except (PSError, OSError, MemoryError) as error:
                # Rows stay that could go: no reason to stop training, and the next round looks again.
                logger.warning("event=sweep_failed table=%s block=%d error=%s", each.table.spec.name, block, error)
                each.block = block + 1
                return True
            logger.debug("event=swept table=%s block=%d rows=%d", each.table.spec.name, block, left)
            if wrapped:
                each.block = block + 1
            # The other tables come first the next time.
            self._rounds.remove(each)
            self._rounds.append(each)
            return True
        return False
