# SPDX-License-Identifier: Apache-2.0
"""The benchmark of serving comes to its end, with Redis and without, leaves nothing behind, and finds wrong answers."""

import os
from typing import Any

import numpy as np
import pytest

from oarlock.benchmarks import serving
from oarlock.benchmarks.serving_measures import at_rate, compare_latency, draw, take_turn
from oarlock.benchmarks.serving_model import row_values
from oarlock.benchmarks.serving_sides import missing_of_redis

RATIOS = {"lookup_vs_redis", "lookup_1000_vs_redis", "lookup_100_vs_redis", "p99_vs_redis", "bytes_vs_redis"}


@pytest.mark.slow
def test_it_comes_to_its_end(run_tiny: Any) -> None:
    result, said = run_tiny("serving")
    assert result["failed"] == 0
    assert set(result) >= RATIOS
    followed = result["followed"]
    assert (followed["failed"], followed["unseen"]) == (0, 0)
    assert 0 < result["freshness_p99_s"] <= followed["freshness_s"]["max"]
    assert 0 < result["tombstone_p99_s"] <= followed["tombstone_s"]["max"]
    assert followed["updated_rows_per_second"] > 0
    why = missing_of_redis()
    assert (result["why"]["redis"] or "") == why
    assert all((result[name] is None) == bool(why) for name in RATIOS)
    assert set(result) >= {"recall_at_100", "ann_speedup"}
    if result["recall_at_100"] is not None:
        assert result["recall_at_100"] >= 0.9
        assert result["ann_speedup"] == min(result["recall"][when]["speedup"] for when in ("before", "after_changes"))
    assert ("NO COMPARISON WITH REDIS" in said) == bool(why)
    predicted = result["predict"]
    assert set(predicted["by_batch"]) == {"1", "32", "256"}
    assert result["predict_p99_ms"] > 0
    assert (result["predict_vs_onnx"] is None) == (predicted["why_no_onnx"] is not None)
    found = result["by_dim"]["16"]
    assert set(found["lookup"]) == set(found["latency"]) == {"100", "1000", "10000"}
    for each in found["latency"].values():
        assert set(each["ms"]["oarlock"]) == {"p50", "p99", "p99.9"}


def test_wrong_rows_are_found() -> None:
    keys = np.arange(10, dtype=np.uint64)
    right = row_values(keys, 16)
    assert serving._wrong(right, keys, 16) == 0
    right[3, 2] += 1
    assert serving._wrong(right, keys, 16) == 1


def test_one_side_alone_has_latencies_and_no_ratio() -> None:
    requests = draw(np.arange(10, dtype=np.uint64), 2, np.random.default_rng(0))
    found = compare_latency(
        {"oarlock": (lambda keys: row_values(keys, 2), 0)}, requests, rate=1e4, turns=1, seconds=0.001
    )
    assert set(found["ms"]) == {"oarlock"}
    assert found["p99_ratio"] is None


def test_turns_count_what_was_asked_and_rates_are_kept() -> None:
    keys = np.arange(100, dtype=np.uint64)
    asked = []
    requests = draw(keys, 7, np.random.default_rng(0))

    def lookup(wanted: np.ndarray) -> np.ndarray:
        asked.append(len(wanted))
        return row_values(wanted, 4)

    turn = take_turn(lookup, os.getpid(), requests, 0.01)
    assert turn.requests == len(asked)
    assert turn.rows == 7 * len(asked)
    assert turn.client_seconds > 0
    late = at_rate(lookup, requests, rate=1000.0, seconds=0.05)
    assert len(late) == 50
    assert late.min() >= 0
