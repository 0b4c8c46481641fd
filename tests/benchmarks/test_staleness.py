# SPDX-License-Identifier: Apache-2.0
"""The benchmark of the adaptive bound: what it says of its jobs, and, slow, that it comes to its end."""

import pytest

from oarlock.benchmarks.cache_job import _Watch
from oarlock.benchmarks.staleness import SCALES, compare, measure, told


def case(aucs, bytes_per_sample, seconds=10.0):
    return told(
        [
            {"auc": auc, "train_seconds": seconds, "pull_bytes_per_sample": bytes_per_sample, "hit_rate": 0.5}
            for auc in aucs
        ]
    )


def test_the_adaptive_bound_is_compared_with_the_best_fixed_one():
    fixed = {
        0: case([0.8000, 0.8010], 400.0),
        1: case([0.8002, 0.8014], 350.0, seconds=8.0),
        3: case([0.7998, 0.8010], 300.0),
        10: case([0.7950, 0.7960], 200.0),
    }
    found = compare(fixed, case([0.8003, 0.8011], 280.0, seconds=8.4))
    assert found == {
        "best": 1,
        "auto_auc_minus_best": -0.0001,
        "auto_auc_minus_best_error": 0.0002,
        "auto_time_over_best": 1.05,
        "auto_bytes_over_best": 0.8,
        # Bound 3 is within 0.0005 of the best, and needs fewer bytes.
        "leanest_as_good": 3,
        "auto_bytes_over_leanest": 0.933,
    }


def test_of_one_seed_no_error_is_told():
    one = case([0.8], 300.0)
    assert one["auc_error"] is None
    assert compare({1: one}, one)["auto_auc_minus_best_error"] is None


def test_changes_of_a_bound_are_noted_with_the_batches_before_them():
    watch = _Watch()
    for batches, bound in ((0, 1), (8, 1), (20, 2), (30, 2), (40, 1)):
        stats = {"batches": batches, "caches": {"fields": {"bound": bound}}}
        watch(
            {"evaluated": 0, "members": [{"role": "worker", "id": 4, "stats": stats}, {"role": "shard", "stats": None}]}
        )
    assert watch.bounds == {4: [(0, 1), (20, 2), (40, 1)]}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_case_comes_to_its_end(tmp_path):
    result = measure(SCALES["tiny"], tmp_path)
    assert result["best"] == 1
    assert 0.5 < result["auto"]["auc"] < 1
    assert result["auto"]["hits"] > 0
    assert result["auto_bounds"][0][0][0][1] == 1
    assert result["auto_time_over_best"] > 0
