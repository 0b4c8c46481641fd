# SPDX-License-Identifier: Apache-2.0
"""What sources say comes out as the format wants it, read back line by line; what is wrong stays away and is counted."""

import logging
import math
from typing import Any

import numpy as np
import pytest
import scrape

from oarlock.telemetry.exposition import exposition
from oarlock.telemetry.histogram import SECONDS, Histogram
from oarlock.telemetry.registry import FAILURES, Registry
from oarlock.telemetry.system import system_source


def page(registry: Registry) -> dict[str, Any]:
    found: dict[str, Any] = scrape.parse(exposition(registry.collect()))
    return found


def test_numbers_labels_and_histograms_come_out_as_they_went_in(rng: np.random.Generator) -> None:
    registry = Registry()
    seen = Histogram()
    values = rng.lognormal(-6, 2, 500)
    for value in (*values, *SECONDS):
        seen.observe(float(value))
    registry.add(
        lambda: {
            "oarlock_shard_pulls_total": (1 << 60) + 1,
            "oarlock_shard_step": np.int64(7),
            "oarlock_shard_pull_seconds": seen,
            "oarlock_table_rows": {"user": 3, "item": np.float32(0.5)},
        },
        shard="0",
    )
    registry.add(lambda: {"oarlock_shard_pulls_total": 2}, shard="1")
    registry.add(lambda: {"oarlock_rpc_client_failures_total": {("Shard.Pull", "Unavailable"): 4}})
    found = page(registry)
    assert found["oarlock_shard_pulls_total"].kind == "counter"
    assert f"{(1 << 60) + 1}\n" in exposition(registry.collect())
    assert found["oarlock_shard_pulls_total"].at(shard="1") == 2
    assert found["oarlock_shard_step"].at(shard="0") == 7
    assert found["oarlock_table_rows"].at(shard="0", table="item") == 0.5
    assert found["oarlock_rpc_client_failures_total"].at(method="Shard.Pull", error="Unavailable") == 4
    buckets = found["oarlock_shard_pull_seconds"].samples
    everything = np.concatenate([values, SECONDS])
    for bound in SECONDS:
        label = next(dict(labels)["le"] for _, labels in buckets if dict(labels).get("le") == repr(bound))
        assert buckets["_bucket", (("shard", "0"), ("le", label))] == (everything <= bound).sum()
    assert found["oarlock_shard_pull_seconds"].count(shard="0") == len(everything)
    assert math.isclose(buckets["_sum", (("shard", "0"),)], everything.sum())


HOSTILE = ['"', "\\", "\n", '\\"', "a\\nb", '",le="1"} 5\noarlock_up 1', "{}", "ä€𝄞", "", "\\\n\\"]


@pytest.mark.parametrize("text", HOSTILE)
def test_whatever_a_label_holds_stays_in_it(text: str) -> None:
    registry = Registry()
    registry.add(lambda: {"oarlock_table_rows": {text: 1, "other": 2}}, shard=text)
    found = page(registry)
    assert found["oarlock_table_rows"].at(shard=text, table=text) == 1
    assert found["oarlock_table_rows"].at(shard=text, table="other") == 2
    assert list(found) == ["oarlock_table_rows", FAILURES]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e-300, -0.0, 1e22, 0.1, -5])
def test_a_gauge_may_be_any_number(value: float) -> None:
    registry = Registry()
    registry.add(lambda: {"oarlock_coordinator_epoch_loss": value})
    found = page(registry)["oarlock_coordinator_epoch_loss"].at()
    assert found == value or (math.isnan(found) and math.isnan(value))


@pytest.mark.parametrize(
    "wrong",
    [
        {"oarlock_shard_pulls_total": 1, "oarlock_shard_nobody": 1},
        {"oarlock_shard_pulls_total": "5"},
        {"oarlock_shard_pulls_total": None},
        {"oarlock_shard_pulls_total": Histogram()},
        {"oarlock_shard_pull_seconds": 5},
        {"oarlock_table_rows": 5},
        {"oarlock_table_rows": {("user", "item"): 5}},
        {"oarlock_shard_pulls_total": {"user": 5}},
        None,
    ],
)
def test_a_source_that_is_wrong_costs_its_own_values_alone(wrong: Any, caplog: pytest.LogCaptureFixture) -> None:
    registry = Registry()
    registry.add(lambda: wrong, shard="0")
    registry.add(lambda: {"oarlock_shard_pulls_total": 3}, shard="1")
    with caplog.at_level(logging.WARNING, "oarlock"):
        first, second = page(registry), page(registry)
    assert list(first) == ["oarlock_shard_pulls_total", FAILURES]
    assert len(first["oarlock_shard_pulls_total"].samples) == 1
    assert (first[FAILURES].at(), second[FAILURES].at()) == (1, 2)
    # Said once, however often somebody scrapes.
    assert len(caplog.records) == 1


def test_a_source_that_raises_is_counted_and_one_that_was_removed_is_not_asked() -> None:
    registry = Registry()

    def broken() -> dict[str, float]:
        raise RuntimeError("dictionary changed size")

    with registry.added(broken):
        assert page(registry)[FAILURES].at() == 1
    assert page(registry)[FAILURES].at() == 1


def test_of_two_values_under_the_same_labels_one_is_told() -> None:
    registry = Registry()
    registry.add(lambda: {"oarlock_shard_step": 1}, shard="0")
    registry.add(lambda: {"oarlock_shard_step": 2}, shard="0")
    assert page(registry)["oarlock_shard_step"].samples == {("", (("shard", "0"),)): 1}


def test_the_system_tells_of_this_process() -> None:
    registry = Registry()
    registry.add(system_source())
    found = page(registry)
    assert found[FAILURES].at() == 0
    assert 0 < found["process_resident_memory_bytes"].at() < found["process_virtual_memory_bytes"].at()
    assert 0 < found["process_open_fds"].at() <= found["process_max_fds"].at()
    assert found["process_threads"].at() >= 1
    assert found["process_start_time_seconds"].at() > 1.5e9
    assert found["process_cpu_seconds_total"].at() > 0
