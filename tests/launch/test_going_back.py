# SPDX-License-Identifier: Apache-2.0
"""Jobs of real processes that lose the only copy of some blocks: they go back by themselves, and come to what they would have."""

import asyncio
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from counting_job import Job, Scene, nobody_is_left

from oarlock.checkpoint.store import open_checkpoint
from oarlock.cli.digest import digest_of
from oarlock.client.job import DONE, FAILED
from oarlock.data.planted import generate_ncf
from oarlock.launch.config import run_config
from oarlock.launch.folder import create, stored_status
from oarlock.launch.inprocess import run_in_process
from oarlock.launch.processes import LocalProcesses

pytestmark = [pytest.mark.slow, pytest.mark.timeout(500)]

MODES: dict[str, dict[str, Any]] = {
    "async": {},
    "ssp": {"mode": "ssp", "staleness": 2},
    "geo": {"mode": "geo"},
}


def kill_once(job: Job, *, epochs: int) -> Scene:
    """Kill a shard once so many epochs are trained, and wait until the next run trains with as many as before."""
    run = None
    while run is None or job.status["run"] == run or not job.working(2, 2):
        if run is None and job.status.get("epoch", -1) >= epochs and job.working(2, 2):
            run = job.status["run"]
            job.kill_a_shard()
        yield


@pytest.mark.parametrize("mode", MODES)
def test_the_count_is_exact_in_the_end(tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    job = Job(tmp_path, seed, epochs=12, checkpoint_epochs=1, **MODES[mode])

    def scene() -> Scene:
        yield from kill_once(job, epochs=2)
        # The same processes, but for the one that died.
        assert [c.process.poll() for c in job.launched.children] == [None] * 5
        yield from kill_once(job, epochs=job.status["epoch"] + 1)
        yield from job.train(1)

    with nobody_is_left(monkeypatch):
        final = job.play(scene())
    assert (final["run"], final["restarts"]) == (3, 2)
    # That each epoch is there once, with all its samples, is part of the count.
    assert [r["epoch"] for r in final["history"]] == list(range(12))
    found = final["recoveries"]
    assert [(r["kind"], r["run"]) for r in found] == [("rollback", 2), ("rollback", 3)]
    for r in found:
        assert r["cut"] > 0
        assert f"since cut {r['cut']}" in r["lost"]
        assert r["blocks"] > 0
    assert [e["event"] for e in final["events"]] == ["restore", "restore"]
    assert sum("all go back to cut" in w for w in final["warnings"]) == 2
    assert stored_status(job.folder)["recoveries"] == found


def test_without_a_cut_it_begins_again(tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job(tmp_path, seed, epochs=6, checkpoint_epochs=0)

    def scene() -> Scene:
        yield from kill_once(job, epochs=1)
        assert job.status["checkpoints"] == []

    with nobody_is_left(monkeypatch):
        final = job.play(scene())
    (found,) = final["recoveries"]
    assert (final["run"], found["kind"], found["cut"]) == (2, "rollback", 0)
    assert "since the beginning" in found["lost"]


def test_a_coordinator_that_dies_with_the_shard(tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job(tmp_path, seed, epochs=8, checkpoint_epochs=1)

    def scene() -> Scene:
        while not (job.status.get("epoch", 0) >= 1 and job.working(2, 2)):
            yield
        job.kill_a_shard()
        job.launched.children[0].process.kill()
        while job.status["run"] == 1 or not job.working(2, 2):
            yield

    with nobody_is_left(monkeypatch):
        final = job.play(scene())
    assert (final["run"], final["restarts"]) == (2, 2)


def test_a_shard_that_hangs_is_replaced(tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job(tmp_path, seed, epochs=8, checkpoint_epochs=1, lease_seconds=6.0)

    def scene() -> Scene:
        while not (job.status.get("epoch", 0) >= 1 and job.working(2, 2)):
            yield
        hangs = next(m for m in job.status["members"] if m["role"] == "shard")
        os.kill(hangs["pid"], signal.SIGSTOP)
        while job.status["run"] == 1 or not job.working(2, 2):
            yield
        assert hangs["pid"] not in [m["pid"] for m in job.status["members"]]

    with nobody_is_left(monkeypatch):
        final = job.play(scene())
    assert final["run"] >= 2


def test_without_restarts_the_job_fails_and_says_how_to_go_on(
    tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = Job(tmp_path, seed, restarts=0, epochs=1000, checkpoint_epochs=1)
    killed = False

    def watch(status: dict[str, Any]) -> bool:
        nonlocal killed
        job.status = status or job.status
        if status and not killed and status.get("checkpoints") and job.working(2, 2):
            job.kill_a_shard()
            killed = True
        return True

    with nobody_is_left(monkeypatch):
        final = asyncio.run(job.launched.run(watch, 0.05))
    assert final["phase"] == FAILED
    assert final["reason"].startswith("shard ")
    assert final["reason"].endswith("go on from the last checkpoint with --resume")
    assert stored_status(job.folder)["phase"] == FAILED


@pytest.mark.parametrize("mode", ["sync", "hybrid"])
def test_ranks_go_on_from_the_cuts_step(tmp_path: Path, mode: str) -> None:
    """Under sync the digest is that of a job that nobody touched."""
    data = tmp_path / "data"
    generate_ncf(data, users=600, items=400, positives_per_user=40, seed=1)
    run = run_config(
        {
            "data": str(data),
            "mode": mode,
            "ranks": 4,
            "epochs": 8,
            "seed": 3,
            "reader": "arrow",
            "recipe_options": {"batch_samples": 1024},
            "servers": 2,
            "workers": 2,
            "lease_seconds": 60.0,
        }
    )
    folder, killed = tmp_path / "disturbed", False
    launched = LocalProcesses(create(folder, "disturbed", run), folder)

    def watch(status: dict[str, Any]) -> bool:
        nonlocal killed
        shards = [m for m in status.get("members", ()) if m["role"] == "shard"]
        if not killed and len(status.get("history", ())) >= 2 and len(shards) == 2 and status["phase"] == "training":
            os.kill(shards[0]["pid"], signal.SIGKILL)
            killed = True
        return True

    status = asyncio.run(launched.run(watch, 0.05))
    assert status["phase"] == DONE, status["reason"]
    assert (killed, status["run"], len(status["history"])) == (True, 2, 8)
    if mode == "sync":
        quiet = tmp_path / "quiet"
        spec = create(quiet, "quiet", replace(run, servers=1, workers=1))
        assert run_in_process(spec, quiet, watch=lambda status: True)["phase"] == DONE
        digests = [str(digest_of(*open_checkpoint(each / "checkpoints"))) for each in (folder, quiet)]
        assert digests[0] == digests[1]
        assert [r["loss"] for r in status["history"]] == [r["loss"] for r in stored_status(quiet)["history"]]
