# SPDX-License-Identifier: Apache-2.0
"""Bugs of hybrid, planted on purpose as in planted.py: of rows beside dense parts, of their commits, of cuts and of restores."""

import asyncio
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from planted_ranks import applied_without_the_last_rank

from oarlock.client.stage import Commit
from oarlock.cluster import cutting
from oarlock.cluster.cutting import Cutting
from oarlock.ps.hold import Hold
from oarlock.ps.rank_marks import STEP_MARK, HybridMarks, RankMarks
from oarlock.ps.shard import Shard
from oarlock.ps.staged import Staged
from oarlock.worker.hybrid import HybridRank

Patch = pytest.MonkeyPatch


def committed_before_its_rows(patch: Patch) -> None:
    """A rank commits its step while rows of it are on their way."""
    original = HybridRank._step

    async def step(self: HybridRank, group: Any, number: int) -> None:
        pushing = asyncio.ensure_future(original(self, group, number))
        await asyncio.wait([pushing], timeout=0.02)

    patch.setattr(HybridRank, "_step", step)


def dense_values_of_any_step(patch: Patch) -> None:
    """Dense values are pulled as rows are: whatever is there."""
    patch.setattr(Staged, "_without_rows", lambda self, state: None)

    def check(self: Commit, member: Any, shard: Any, sent: Any, reply: Any) -> None:
        self._reported[shard] = reply.generation
        self._news.tell()

    patch.setattr(Commit, "_check", check)


def dense_parts_in_order_of_arrival(patch: Patch) -> None:
    """Dense parts are added up as they came, and not by rank."""
    original = Staged.__init__

    def init(self: Staged, *arguments: Any) -> None:
        original(self, *arguments)
        self._parts.dense = [[]] * self.ranks

    patch.setattr(Staged, "__init__", init)


def dense_part_of_a_repeated_group_counts_again(patch: Patch) -> None:
    """A dense part that comes twice is staged twice."""
    original = Staged.fresh

    def fresh(self: Staged, *arguments: Any) -> Any:
        self._parts.have[:] = False
        return original(self, *arguments)

    patch.setattr(Staged, "fresh", fresh)


def rows_of_a_repeated_group_count_again(patch: Patch) -> None:
    """Rows go by their rank's step as dense parts do, and until that is over nothing says that they were applied."""

    def todo(self: Shard, split: int, group: int, numbers: Any, here: Any) -> Any:
        if split in self.closed:
            return np.zeros(len(numbers), np.bool_)
        return here & self.marks.missing(split, group + 1, numbers)

    patch.setattr(Shard, "_todo", todo)


def successor_believes_what_is_staged(patch: Patch) -> None:
    """What a rank has staged passes for committed, and its successor does not repeat the rows that went with it."""
    original = Staged.told

    def told(self: Staged) -> Any:
        known = self.commits.copy()
        self.commits[self._parts.have.any(axis=1)] = self.range()[0] + 1
        try:
            return original(self)
        finally:
            self.commits[:] = known

    patch.setattr(Staged, "told", told)


def view_begins_with_the_order(patch: Patch) -> None:
    """A shard begins its view at the step that it is at, and not at the one that the cut is of."""
    original = Staged.level

    def level(self: Staged, cut: int, commits: Any, at: int) -> bool:
        original(self, cut, commits, at)
        return True

    patch.setattr(Staged, "level", level)


def cut_of_the_step_that_all_have_committed(patch: Patch) -> None:
    """A cut is made where shards hold still, though some ranks have pushed rows of the step after."""
    patch.setattr(cutting, "cut_step", lambda c, step: step)


def ranks_go_on_before_the_moment(patch: Patch) -> None:
    """A shard whose view has begun keeps nobody back, while it is not yet told what the cut says of its job."""
    patch.setattr(Hold, "keeps_back", lambda self, step: False)


def moment_before_the_step(patch: Patch) -> None:
    """What a manifest says of splits is of before the last step that is in its blocks."""
    original, moment_of, early = Cutting._gathered, cutting.moment_of, {}

    async def gathered(self: Cutting, gate: Any) -> None:
        early[gate.cut] = moment_of(self._c, gate.cut)
        await original(self, gate)

    patch.setattr(Cutting, "_gathered", gathered)
    patch.setattr(cutting, "moment_of", lambda c, cut: early[cut])


def marks_of_rows_are_left_out(patch: Patch) -> None:
    """A cut has the steps of dense blocks, and not which groups its rows hold."""
    original = HybridMarks.copy
    patch.setattr(HybridMarks, "copy", lambda self: {STEP_MARK: original(self)[STEP_MARK]})


def steps_begin_anew_after_a_restore(patch: Patch) -> None:
    """Dense blocks come back with their values, and at step 0."""
    original = RankMarks.restore

    def restore(self: RankMarks, block: int, marks: dict[int, int]) -> None:
        original(self, block, marks)
        self.steps[block] = 0

    patch.setattr(RankMarks, "restore", restore)


def ranks_without_data_count(patch: Patch) -> None:
    """A rank that has no data any more counts as the others, though its part is empty."""
    original = Staged._apply

    def apply(self: Staged, step: int) -> None:
        known = self.samples.copy()
        self.samples[:] = np.where(known > 0, known, known.max())
        try:
            original(self, step)
        finally:
            self.samples[:] = known

    patch.setattr(Staged, "_apply", apply)


PLANTED: tuple[Callable[[Patch], None], ...] = (
    committed_before_its_rows,
    dense_values_of_any_step,
    applied_without_the_last_rank,
    dense_parts_in_order_of_arrival,
    dense_part_of_a_repeated_group_counts_again,
    rows_of_a_repeated_group_count_again,
    successor_believes_what_is_staged,
    view_begins_with_the_order,
    cut_of_the_step_that_all_have_committed,
    ranks_go_on_before_the_moment,
    moment_before_the_step,
    marks_of_rows_are_left_out,
    steps_begin_anew_after_a_restore,
    ranks_without_data_count,
)
