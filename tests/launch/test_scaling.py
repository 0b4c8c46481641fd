# SPDX-License-Identifier: Apache-2.0
"""Real processes that come, go and die while a job counts: the count is exact, and no process is left."""

from pathlib import Path
from typing import Any

import pytest
from counting_job import Job, Scene, nobody_is_left

from oarlock.client.layout import Layout
from oarlock.client.push_notes import blocks_done, read_notes
from oarlock.launch.folder import stored_status

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.mark.parametrize("replicas", [0, 1])
def test_shards_and_workers_come_and_go(
    tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch, replicas: int
) -> None:
    job = Job(tmp_path, seed, replicas=replicas, workers=1, epochs=40)

    def scene() -> Scene:
        while not job.status.get("epoch") or not job.working(2, 1):
            yield
        yield from job.scale("--servers", "4", "--workers", "3")
        while not job.working(4, 3):
            yield
        yield from job.train(2)
        yield from job.scale("--servers", "2", "--workers", "1")
        while not job.working(2, 1):
            yield
        assert (job.there("shard"), job.there("worker")) == ([0, 1], [0])
        yield from job.train(2)

    with nobody_is_left(monkeypatch):
        final = job.play(scene())
    assert (final["restarts"], final["warnings"], final["lost"]) == (0, [], [])
    assert final["recoveries"] == []
    ended = [(c.role, c.process.returncode) for c in job.launched.children]
    assert sorted(ended) == sorted([("coordinator", 0), *[("shard", 0)] * 4, *[("worker", 0)] * 3])


def test_a_job_gets_servers_and_workers_by_itself(tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its rows pass what a server is to have, and whether two workers are worth it is tried: nobody asks for anything."""
    policy = {"servers_most": 2, "workers_most": 2, "server_bytes": 1000, "busy_share": 0.99, "waiting_pushes": 1000}
    patience = {"looks": 2, "look_seconds": 0.5, "cool_down_seconds": 1.0}
    often = {"heartbeat_seconds": 0.05, "checkpoint_epochs": 0}
    job = Job(tmp_path, seed, servers=1, workers=1, epochs=40, autoscale={**policy, **patience}, **often)

    def scene() -> Scene:
        for shards, workers in ((1, 1), (2, 1), (2, 2)):
            while not job.working(shards, workers):
                yield

    with nobody_is_left(monkeypatch):
        final = job.play(scene())
    assert (final["restarts"], final["lost"]) == (0, [])
    first, second = final["autoscale"]["decisions"][:2]
    assert (first["before"], first["servers"], first["workers"]) == ([1, 1], 2, 1)
    assert "of its memory, the bound is 70%" in first["reasons"][0]
    assert (second["before"], second["servers"], second["workers"]) == ([2, 1], 2, 2)
    assert "whether 2 are worth it is tried" in second["reasons"][-1]
    assert stored_status(job.folder)["autoscale"]["decisions"] == final["autoscale"]["decisions"]


def test_a_killed_shard_with_copies_costs_nothing(tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job(tmp_path, seed, replicas=1, epochs=40)

    def scene() -> Scene:
        for _ in range(2):
            while not (job.status.get("epoch") and job.working(2, 2) and job.status["moving"]["at_rest"]):
                yield
            dead = job.kill_a_shard()
            while dead["id"] in job.there("shard") or len(job.there("shard")) < 2:
                yield
            while job.status["incomplete"] or not job.status["moving"]["at_rest"]:
                yield
            yield from job.train(1)

    with nobody_is_left(monkeypatch):
        final = job.play(scene())
    assert final["restarts"] == 2
    for kind in ("promotion", "re-replication"):
        found = [r for r in final["recoveries"] if r["kind"] == kind]
        # Each of the two had half of all blocks, and a copy of the others.
        assert [r["shard"] for r in found] == [0, 1]
        assert all(r["blocks"] > 0 and r["seconds"] < 100 and r["lost"] == "" for r in found)
    assert stored_status(job.folder)["recoveries"] == final["recoveries"]


def test_a_reload_counts_the_pushes_that_it_lost(tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    notes = tmp_path / "notes"
    notes.mkdir()
    job = Job(tmp_path, seed, notes=notes, on_loss="reload", epochs=8, checkpoint_epochs=0)
    dead: dict[str, Any] = {}

    def scene() -> Scene:
        while not (job.status.get("epoch") and job.working(2, 2)):
            yield
        dead.update(job.kill_a_shard())
        while not any("pushes" in each for each in job.status["recoveries"]):
            yield

    with nobody_is_left(monkeypatch):
        final = job.play(scene())
    (found,) = [each for each in final["recoveries"] if each["kind"] == "reload"]
    # A line for every answer of it, a bit for each block.
    blocks = Layout(job.spec.tables, job.spec.dense).blocks
    lines = read_notes(notes, blocks)
    mine = blocks_done(lines[lines["shard"] == dead["incarnation"]], blocks)
    assert (found["pushes"], found["more"]) == (int(mine.sum()), False)
    assert found["pushes"] > 0
    assert any(f"took {found['pushes']} pushes" in text for text in final["warnings"])
