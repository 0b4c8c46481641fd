# SPDX-License-Identifier: Apache-2.0
"""Splits: the pieces of the training data that are leased to workers.

A plan cuts the files once, in file order; an epoch visits all of the plan in its own order. Invariant: every row group
that has rows is in exactly one planned split, and split id = epoch * len(plan) + position in the epoch's order.
Everything is pure: callable from any thread.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from oarlock.data.files import DataFile
from oarlock.data.order import split_order
from oarlock.proto.errors import InvalidArgument


@dataclass(frozen=True)
class SplitPlan:
    """Row groups ``first_group`` to ``stop_group - 1`` of a file, with ``rows`` rows: number ``index`` of a plan."""

    index: int
    file: DataFile
    first_group: int
    stop_group: int
    rows: int

    @property
    def first_row(self) -> int:
        """Return the position in the file of the split's first row."""
        return sum(self.file.row_groups[: self.first_group])

    def __str__(self) -> str:
        last = self.stop_group - 1
        groups = f"row group {last}" if last == self.first_group else f"row groups {self.first_group} to {last}"
        return f"{self.file.path}, {groups}"


def plan_splits(files: Sequence[DataFile], rows_per_split: int) -> tuple[SplitPlan, ...]:
    """Return the plan: runs of whole consecutive row groups of one file, closed as soon as they have enough rows."""
    if rows_per_split < 1:
        raise InvalidArgument(f"rows_per_split = {rows_per_split}: give an integer >= 1")
    plan: list[SplitPlan] = []
    for file in files:
        first = rows = 0
        for group, count in enumerate(file.row_groups):
            rows += count
            last = group + 1 == len(file.row_groups)
            # A file's tail without rows is left out: a split that trains nothing would only cost a lease.
            if rows >= rows_per_split or (last and rows):
                plan.append(SplitPlan(len(plan), file, first, group + 1, rows))
                first, rows = group + 1, 0
    if not plan:
        raise InvalidArgument(f"the {len(files)} data files hold no row: nothing can be trained; check the data")
    return tuple(plan)


def locate(split_id: int, plan: Sequence[SplitPlan], seed: int) -> tuple[int, SplitPlan]:
    """Return (epoch, planned split) of a split id."""
    if split_id < 0:
        raise InvalidArgument(f"split {split_id}: give a number >= 0")
    epoch, position = divmod(split_id, len(plan))
    return epoch, plan[_epoch_order(seed, epoch, len(plan))[position]]


@lru_cache(maxsize=4)
def _epoch_order(seed: int, epoch: int, splits: int) -> tuple[int, ...]:
    return tuple(split_order(seed, epoch, splits).tolist())
