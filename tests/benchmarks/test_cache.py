# SPDX-License-Identifier: Apache-2.0
"""The benchmark of the row cache comes to its end; what is saved is no matter of the machine."""

from oarlock.benchmarks.cache import BOUNDS, SCALES, measure


def test_every_case_is_told_and_a_wider_bound_saves_more():
    result = measure(SCALES["tiny"])
    by_case = {(case["policy"], case["rows"], case["bound"]): case for case in result["cases"]}
    assert len(by_case) == len(result["cases"]) == 12
    for case in result["cases"]:
        assert 0 <= case["saved"] <= case["kept"] <= 1
        assert case["saved_with_versions"] < case["saved"]
        assert case["cache_ns_per_key"] > 0
    saved = [by_case["lru", result["rows"] // 10, bound]["saved"] for bound in BOUNDS]
    assert saved == sorted(saved)
    assert saved[0] < saved[-1]
    hot = [case["saved_of_hot"] for case in result["hot_key"]]
    assert hot == sorted(hot)
    assert hot[-1] > 0.5
