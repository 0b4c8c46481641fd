# SPDX-License-Identifier: Apache-2.0
"""Real processes that come, go and die while a job counts: the count is exact, and no process is left."""

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from oarlock.benchmarks.counting import check, write_data
from oarlock.benchmarks.kills import MARKER, RECIPE, plan, processes_left
from oarlock.client.job import DONE, OVER
from oarlock.launch.folder import create, stored_status
from oarlock.launch.processes import LocalProcesses

Scene = Iterator[None]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


class Job:
    """A counting job; a scene is played while it runs, a step for each look at it, ``status`` being the newest."""

    def __init__(self, tmp_path: Path, seed: int, **fields: Any) -> None:
        self.data, self.folder = tmp_path / "data", tmp_path / "job"
        write_data(self.data, rows=20_000, keys=5_000, seed=seed)
        # Small batches make it slow enough to be looked at.
        run = plan(self.data, recipe=RECIPE, seed=seed, recipe_options={"blocks": 32, "batch_rows": 64})
        # No lease may end: what takes one would take longer than the test may.
        self.spec = create(self.folder, "job", replace(run, lease_seconds=1000.0, **{"workers": 2, **fields}))
        self.launched = LocalProcesses(self.spec, self.folder)
        self.status: dict[str, Any] = {}

    def play(self, scene: Scene) -> dict[str, Any]:
        """Run the job to its end, which is after the scene's; return its last status, whose count is exact."""
        over = False

        def watch(status: dict[str, Any]) -> bool:
            nonlocal over
            if status and status["phase"] not in OVER:
                self.status = status
                over = over or next(scene, "over") == "over"
            return True

        try:
            final = asyncio.run(self.launched.run(watch, 0.05))
        finally:
            scene.close()
        assert final["phase"] == DONE, final["reason"]
        assert over, "the job was over before the scene was"
        count = check(self.data, self.folder, self.spec, final["history"])
        assert count.exact, count
        assert count.samples_exact
        assert count.evaluation_exact
        return final

    def there(self, role: str) -> list[int]:
        """Return the ids of members."""
        return sorted(m["id"] for m in self.status.get("members", ()) if m["role"] == role)

    def working(self, shards: int, workers: int) -> bool:
        """Whether so many are there, with blocks and with samples."""
        stats = [(m["role"], m["stats"]) for m in self.status["members"]]
        return [role for role, _ in stats].count("shard") == sum(
            b > 0 for b in self.status["blocks"].values()
        ) == shards and [bool(s.get("samples")) for role, s in stats if role == "worker"] == [True] * workers

    def train(self, epochs: int) -> Scene:
        """Let it train so many epochs more."""
        wanted = self.status["epoch"] + epochs
        while self.status["epoch"] < wanted:
            yield

    def scale(self, *arguments: str) -> Scene:
        """Have `oarlock scale` ask for other numbers, and wait for them."""
        command = [sys.executable, "-P", "-m", "oarlock.cli.main", "scale", str(self.folder), "--wait", "--json"]
        with subprocess.Popen(
            [*command, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as asked:
            try:
                while asked.poll() is None:
                    yield
                out, err = asked.communicate()
                assert asked.returncode == 0, err
                assert json.loads(out)["seconds"] > 0
            finally:
                asked.kill()


@contextmanager
def nobody_is_left(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv(MARKER, f"scaling-{os.getpid()}")
    yield
    assert processes_left(f"scaling-{os.getpid()}") == 0


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
            dead = next(m for m in job.status["members"] if m["role"] == "shard")
            child = next(c for c in job.launched.children if c.process.pid == dead["pid"])
            child.process.kill()
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
