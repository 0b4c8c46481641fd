# SPDX-License-Identifier: Apache-2.0
"""A job with a scaler: its numbers follow what members tell, and nothing else moves them."""

import json
import math
from typing import Any

import pytest
from scaled_job import POLICY, Job

from oarlock.proto import coordinator_pb2 as pb


def test_servers_follow_memory_up_and_down_and_do_not_flap(make_cluster: Any) -> None:
    job = Job(make_cluster)
    job.run(100)
    assert job.numbers == (2, 2)
    assert job.decisions() == []
    # 900 of 1000 bytes each, the bound is 700.
    job.bytes = 1800
    job.run(9)
    assert job.numbers == (2, 2), "one look is not enough"
    job.run(20)
    assert job.numbers == (3, 2)
    assert len(job.cluster.coordinator.shards) == 3
    job.run(300)
    assert job.decisions() == [(3, 2)], "what was gained is not given back"
    # One would do with 450; two are half of three.
    job.bytes = 450
    job.run(200)
    assert job.decisions() == [(3, 2), (2, 2), (1, 2)]
    assert [len(job.alive(role)) for role in ("shard", "worker")] == [1, 2]
    job.run(300)
    assert job.decisions() == [(3, 2), (2, 2), (1, 2)]


@pytest.mark.parametrize("period", [7, 15, 40, 100])
def test_a_load_that_goes_up_and_down_does_not_flap(make_cluster: Any, period: int) -> None:
    """Between what asks for more and what lets go there is room: 30 % of the bounds."""
    job = Job(make_cluster)
    for i in range(1200 // period):
        job.bytes = 1450 if i % 2 else 1350
        job.run(period)
    assert job.decisions() in ([], [(3, 2)])


def test_changes_are_a_cool_down_apart(make_cluster: Any) -> None:
    job = Job(make_cluster, servers=1)
    job.bytes = 100_000
    at = []
    for _ in range(400):
        job.run(1)
        if len(job.decisions()) > len(at):
            at.append(job.cluster.clock.now)
    assert job.decisions() == [(2, 2), (4, 2)]
    assert at[1] - at[0] >= POLICY["cool_down_seconds"]


def test_workers_follow_their_speed(make_cluster: Any) -> None:
    job = Job(make_cluster, workers=1, servers_most=0, workers_most=8)
    job.run(45)
    assert job.numbers == (2, 2)
    # The second one brought nothing.
    job.speed = 52.0
    job.run(200)
    assert job.numbers == (2, 1)
    assert (
        "each added 4 samples/s, 4% of the 100 of each before"
        in job.cluster.status()["autoscale"]["decisions"][-1]["reasons"][0]
    )


def test_a_decision_is_recorded_and_told(make_cluster: Any) -> None:
    job = Job(make_cluster)
    job.bytes = 1800
    job.run(30)
    told = job.cluster.status()["autoscale"]
    assert told["decisions"] == [
        {
            "number": 1,
            "before": [2, 2],
            "servers": 3,
            "workers": 2,
            "reasons": ["the fullest server uses 90% of its memory, the bound is 70%"],
            "dry_run": False,
            "created": told["decisions"][0]["created"],
        }
    ]
    assert (told["servers"], told["workers"], told["dry_run"]) == ([1, 4], None, False)
    assert job.cluster.coordinator.autoscaling.counts == {("shard", "more"): 1}
    assert job.cluster.coordinator.store.fact("scale")["servers"] == 3
    job.cluster.restart()
    assert job.cluster.status()["autoscale"]["decisions"] == told["decisions"]
    assert job.cluster.status()["scale"]["servers"] == 3


def test_a_cool_down_outlives_the_coordinator(make_cluster: Any) -> None:
    job = Job(make_cluster, servers=1)
    job.bytes = 100_000
    job.run(30)
    assert job.numbers == (2, 2)
    job.run(20)
    job.cluster.restart()
    job.run(59)
    assert job.numbers == (2, 2)
    job.run(40)
    assert job.numbers == (4, 2)


def test_what_somebody_asked_for_outlives_the_coordinator_too(make_cluster: Any) -> None:
    job = Job(make_cluster)
    job.bytes = 1800
    job.cluster.service.scale(pb.ScaleRequest(servers=1))
    job.cluster.restart()
    job.run(55)
    assert job.numbers == (1, 2)
    assert "cool-down" in job.said
    job.run(40)
    assert job.numbers == (2, 2)


def test_what_somebody_asks_for_is_done_and_begins_the_cool_down(make_cluster: Any) -> None:
    job = Job(make_cluster)
    job.bytes = 1800
    job.run(15)
    job.cluster.service.scale(pb.ScaleRequest(servers=1))
    assert job.numbers == (1, 2)
    job.run(55)
    assert job.numbers == (1, 2)
    assert "cool-down" in job.said
    job.run(40)
    assert job.numbers == (2, 2), "the scaler goes on from there"


def test_a_dry_run_changes_nothing(make_cluster: Any) -> None:
    job = Job(make_cluster, dry_run=True)
    job.bytes = 1800
    job.run(40)
    assert job.numbers == (2, 2)
    assert len(job.alive("shard")) == 2
    status = job.cluster.status()
    assert status["autoscale"]["decisions"][0]["dry_run"]
    assert job.decisions() == [(3, 2)]
    assert status["autoscale"]["look"]["would"].startswith("2 -> 3 servers, 2 workers\n")
    assert job.cluster.coordinator.store.fact("scale") is None


def test_copies_have_servers_of_their_own(make_cluster: Any) -> None:
    job = Job(make_cluster, replicas=1)
    job.bytes = 20
    job.run(300)
    assert job.numbers == (2, 2)
    assert job.cluster.status()["autoscale"]["servers"] == [2, 4]


LIES: list[tuple[dict[str, Any], str]] = [
    ({"pushing_seconds": "much"}, "a measurement is no number"),
    ({"pushing_seconds": -1}, "a measurement is no number"),
    ({"pushes_seconds": None}, "a measurement is no number"),
    ({"cpu_seconds": 1 << 70}, "a measurement is no number"),
    ({"cpu_seconds": True}, "a measurement is no number"),
    ({"processors": 0}, "a measurement is no number"),
    ({"processors": 5e-324}, "a measurement is no number"),
    ({"clock": "late"}, "1 of 2 servers were measured"),
    ({"clock": 5}, "1 of 2 servers were measured"),
    ({"load": 3}, "1 of 2 servers were measured"),
    ({"load": {}}, "a measurement is no number"),
    ({"bytes": -3}, ""),
    ({"bytes": [1]}, ""),
]


@pytest.mark.parametrize(("lie", "said"), LIES)
def test_what_a_member_makes_up_changes_nothing(make_cluster: Any, lie: dict[str, Any], said: str) -> None:
    job = Job(make_cluster)
    job.lies[job.alive("shard")[0].incarnation] = lie
    job.bytes = 1800
    job.run(100)
    json.dumps(job.cluster.status(), allow_nan=False)
    assert said in job.said
    assert job.numbers[0] <= 2


@pytest.mark.parametrize("later", [{"load": 3}, {"load": None}, {"load": {}}])
def test_a_member_that_was_measured_and_tells_nothing_any_more_harms_nobody(make_cluster: Any, later: Any) -> None:
    job = Job(make_cluster)
    job.bytes = 1800
    shard = job.alive("shard")[0].incarnation
    for _ in range(20):
        job.run(3.5)
        job.lies[shard] = later
        job.run(3)
        job.lies.clear()
    json.dumps(job.cluster.status(), allow_nan=False)
    assert job.numbers[0] <= 3


def test_counts_that_fall_are_no_numbers(make_cluster: Any) -> None:
    job = Job(make_cluster)
    job.busy = 0.95
    shard = job.alive("shard")[0].incarnation
    for falling in range(200):
        job.lies[shard] = {"pushing_seconds": 1000.0 - falling}
        job.run(0.5)
    assert job.numbers == (2, 2)
    assert "no number" in job.said


def test_nothing_is_decided_without_a_member_or_on_old_words(make_cluster: Any) -> None:
    job = Job(make_cluster)
    job.busy = 0.95
    worker = job.alive("worker")[1].incarnation
    job.lies[worker] = {"samples": 0}
    job.run(15)
    assert "1 of 2 workers were measured" in job.said
    job.run(10)
    # For one that has been there for so long there is nothing to do.
    job.run(40)
    assert job.numbers[0] == 3


def test_a_silent_shard_is_not_decided_on(make_cluster: Any) -> None:
    job = Job(make_cluster)
    job.busy = 0.95
    job.run(9)
    shard = job.alive("shard")[1]
    job.silent.add(shard.incarnation)
    # Its lease is renewed by words that tell nothing.
    for _ in range(60):
        job.run(0.5)
        job.cluster.heartbeat(shard.incarnation)
    assert job.numbers == (2, 2)
    assert "1 of 2 servers were measured" in job.said


def test_what_is_told_during_an_evaluation_is_left_out(make_cluster: Any) -> None:
    job = Job(make_cluster)
    job.busy = 0.0
    job.run(5)
    work = job.cluster.coordinator.work
    closed = work.closed
    job.busy = 5.0
    work.closed = type(closed)(closed.floor + job.cluster.spec.splits, closed.above)
    assert work.trained
    job.run(30)
    assert job.cluster.status()["autoscale"]["measured_seconds"] < 6
    work.closed = closed
    job.busy = 0.0
    job.run(6)
    look = job.cluster.status()["autoscale"]["look"]
    assert look["busy"] == pytest.approx(0.01)
    assert look["samples_per_second"] == pytest.approx(200.0)


def test_while_blocks_move_nothing_is_decided(make_cluster: Any) -> None:
    job = Job(make_cluster)
    job.busy = 0.95
    job.run(9)
    job.obey = lambda: None  # type: ignore[method-assign]
    job.cluster.coordinator.copies._look_at = math.inf
    job.run(100)
    assert job.numbers == (2, 2)
    assert "something is under way" in job.said


def test_what_was_measured_before_blocks_moved_is_forgotten(make_cluster: Any) -> None:
    job = Job(make_cluster)
    job.run(11)
    job.busy = 0.95
    job.run(6)
    copies = job.cluster.coordinator.copies
    copies._look_at = math.inf
    job.run(1)
    copies._look_at, job.busy = None, 0.2
    # A look is made once ten seconds are measured, not those before it and a few after.
    job.run(5)
    assert job.cluster.status()["autoscale"]["measured_seconds"] == pytest.approx(5, abs=1)
    job.run(6)
    assert job.cluster.status()["autoscale"]["look"]["busy"] == pytest.approx(0.2)


def test_waiting_pushes_are_those_that_are_not_worked_on(make_cluster: Any) -> None:
    job = Job(make_cluster)
    job.busy, job.pushes = 0.6, 3.0
    job.run(12)
    look = job.cluster.status()["autoscale"]["look"]
    assert look["busy"] == pytest.approx(0.6)
    assert look["waiting"] == pytest.approx(2.4)
    assert look["memory"] == 0.4


def test_memory_by_what_the_system_allows(make_cluster: Any) -> None:
    """Of 2,000 bytes 900 are needed however little a shard holds: 900 of 1,100 are too many, 900 of 2,000 would not be."""
    job = Job(make_cluster, server_bytes=0)
    job.bytes = 1800
    for shard in job.alive("shard"):
        job.lies[shard.incarnation] = {"resident_bytes": 1800, "limit_bytes": 2000}
    job.run(12)
    assert job.cluster.status()["autoscale"]["look"]["memory"] == pytest.approx(900 / 1100, abs=1e-4)


def test_a_new_run_begins_without_decisions(make_cluster: Any) -> None:
    job = Job(make_cluster)
    job.bytes = 1800
    job.run(30)
    assert job.decisions() == [(3, 2)]
    manifest = job.cluster.manifest()
    job.cluster.coordinator.begin_run(manifest, "/cut-000004")
    assert job.decisions() == []
    assert job.numbers == (2, 2)


def test_a_job_without_a_scaler_has_no_word_of_it(cluster: Any) -> None:
    cluster.shards()
    cluster.pass_time(100)
    assert "autoscale" not in cluster.status()
