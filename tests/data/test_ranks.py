# SPDX-License-Identifier: Apache-2.0
"""Which rank trains what at which step, against the words of SEMANTICS section 5."""

import numpy as np
import pytest

from oarlock.data.order import split_order
from oarlock.data.ranks import RankPlan, Unit
from oarlock.proto.errors import InvalidArgument


@pytest.mark.parametrize(("ranks", "splits", "accumulate"), [(1, 5, 1), (3, 7, 2), (4, 2, 1), (2, 9, 5)])
def test_it_is_what_the_words_say(rng: np.random.Generator, ranks: int, splits: int, accumulate: int) -> None:
    rows = rng.integers(1, 60, splits).tolist()
    plan = RankPlan(rows, seed=9, ranks=ranks, epochs=3, batch_rows=7, accumulate=accumulate)
    before = 0
    for epoch in range(3):
        wanted: list[list[Unit | None]] = [[] for _ in range(ranks)]
        for position, index in enumerate(split_order(9, epoch, splits).tolist()):
            batches = -(-rows[index] // 7)
            groups = -(-batches // accumulate)
            split = epoch * splits + position
            wanted[position % ranks] += [Unit(split, g, g + 1 == groups) for g in range(groups)]
        steps = max(map(len, wanted))
        assert plan.before(epoch) == before
        assert plan.steps(epoch) == steps
        for rank, units in enumerate(wanted):
            assert plan.units(rank, epoch) == units + [None] * (steps - len(units))
        before += steps
    assert plan.total == before


def test_a_job_needs_a_rank() -> None:
    with pytest.raises(InvalidArgument, match="ranks = 0: give an integer >= 1"):
        RankPlan([1], seed=0, ranks=0, epochs=1, batch_rows=1, accumulate=1)
