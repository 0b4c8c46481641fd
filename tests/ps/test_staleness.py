# SPDX-License-Identifier: Apache-2.0
"""Staleness: what a shard counts of pushes that were computed from older rows."""

import numpy as np

from oarlock.ps.staleness import Staleness


def test_a_summary_is_that_of_the_numbers_given():
    found = Staleness()
    assert found.summary() == {"count": 0}
    numbers = [0] * 50 + [1] * 30 + [3] * 18 + [9, 70]
    for number in numbers:
        found.note(number)
    assert found.summary() == {
        "count": 100,
        "mean": round(float(np.mean(numbers)), 3),
        "most": 70,
        "p99_at_most": 15,
    }
    found.note(-4)
    assert found.summary()["count"] == 100
    found.note(1 << 60)
    assert found.summary()["most"] == 1 << 60
