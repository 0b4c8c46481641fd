# SPDX-License-Identifier: Apache-2.0
"""The compute signature of a sync job's workers: refused if it is another one, unless a new run accepts it, which is recorded."""

import json
from dataclasses import replace
from typing import Any

import pytest

from oarlock.cluster.beginning import begin
from oarlock.cluster.recovery import go_back
from oarlock.proto.errors import InvalidArgument

OLD, NEW = {"blas": "a", "numpy": "1"}, {"blas": "b", "numpy": "1"}


def join(cluster: Any, signature: dict[str, str]) -> Any:
    return cluster.join("worker", signature=json.dumps(signature))


@pytest.fixture
def sync(make_cluster: Any) -> Any:
    cluster = make_cluster(mode="sync", ranks=2)
    cluster.shards()
    join(cluster, OLD)
    return cluster


def again(cluster: Any, *, accept: bool) -> Any:
    """Begin a new run from the present state."""
    saved = cluster.manifest(4)
    cluster.restart()
    cluster.coordinator.accept_signature = accept
    cluster.coordinator.begin_run(saved, "/cut-000004")
    cluster.shards()
    return cluster


def test_another_one_is_refused_with_the_way_out(sync: Any) -> None:
    with pytest.raises(InvalidArgument, match=r"blas = 'a', this one with 'b': .*--resume --accept-signature"):
        join(sync, NEW)
    again(sync, accept=False)
    with pytest.raises(InvalidArgument, match="blas = 'a'"):
        join(sync, NEW)


def test_it_is_accepted_for_a_new_run_and_told_for_good(sync: Any) -> None:
    again(sync, accept=True)
    assert [e["event"] for e in sync.status()["events"]] == ["restore"]
    # The next life was not told to accept anything.
    sync.restart()
    join(sync, NEW)
    event = sync.status()["events"][-1]
    assert (event["event"], event["was"], event["now"], event["run"]) == ("signature", {"blas": "a"}, {"blas": "b"}, 2)
    assert "workers compute with another blas from here on: bits may differ" in sync.status()["warnings"]
    with pytest.raises(InvalidArgument, match="blas = 'b', this one with 'a'"):
        join(sync, OLD)
    sync.restart()
    join(sync, NEW)
    assert [e["event"] for e in sync.status()["events"]] == ["restore", "signature"]


def test_what_is_as_before_needs_no_record(sync: Any) -> None:
    again(sync, accept=True)
    join(sync, OLD)
    assert [e["event"] for e in sync.status()["events"]] == ["restore"]
    with pytest.raises(InvalidArgument, match="blas"):
        join(sync, NEW)


@pytest.mark.parametrize("told", [OLD, None, {}, {"blas": 3}, "blas"])
def test_a_job_made_of_a_checkpoint_takes_it_over(sync: Any, make_cluster: Any, told: Any) -> None:
    found = sync.manifest(4)
    metrics = {**found.metrics, "signature": told}
    other = make_cluster(mode="sync", ranks=2, job="f" * 32)
    begin(other.coordinator, "", type("Empty", (), {"cuts": list, "folders": lambda self, kind: []})())
    go_back(other.coordinator, replace(found, metrics=metrics), "/cut-000004")
    other.shards()
    if told == OLD:
        with pytest.raises(InvalidArgument, match="blas = 'a'"):
            join(other, NEW)
    else:
        join(other, NEW)
        assert [e["event"] for e in other.status()["events"]] == ["restore"]
