# SPDX-License-Identifier: Apache-2.0
"""Real processes that go on from checkpoints of other jobs, while their coordinators are killed."""

import asyncio
import contextlib
import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest

from oarlock.checkpoint.store import open_checkpoint
from oarlock.cli.digest import digest_of
from oarlock.cli.jobs import ask
from oarlock.client.entry import read_address
from oarlock.client.job import JobSpec
from oarlock.data.planted import generate_ncf
from oarlock.launch.config import RunConfig, run_config
from oarlock.launch.folder import create
from oarlock.launch.inprocess import run_in_process
from oarlock.launch.origin import find_origin, values_of
from oarlock.launch.processes import LocalProcesses
from oarlock.proto.coordinator_pb2 import RollbackRequest
from oarlock.proto.errors import PSError
from oarlock.proto.security import Security

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    generate_ncf(folder, users=600, items=400, positives_per_user=40, seed=1)
    return folder


def config(data: Path, **changes: Any) -> RunConfig:
    values = {
        "data": str(data),
        "seed": 3,
        "lease_seconds": 2.0,
        "heartbeat_seconds": 0.2,
        "checkpoints_kept": 99,
        "recipe_options": {"batch_samples": 1024},
        **changes,
    }
    return run_config(values)


def digest(folder: Path) -> str:
    return str(digest_of(*open_checkpoint(folder / "checkpoints")))


class Killer:
    """Kills a job's coordinator with the first statuses that it gives, so often."""

    def __init__(self, spec: JobSpec, folder: Path, kills: int) -> None:
        self.launched = LocalProcesses(spec, folder)
        self.left = kills

    def watch(self, status: dict[str, Any]) -> bool:
        if self.left and status.get("phase") in ("gathering", "training") and "note" not in status:
            self.left -= 1
            child = next(c for c in self.launched.children if c.role == "coordinator")
            os.kill(child.process.pid, signal.SIGKILL)
        return True


def test_two_jobs_begin_with_one_cut_at_once_and_end_as_the_first_did(data: Path, tmp_path: Path) -> None:
    first = tmp_path / "first"
    spec = create(first, "first", config(data, mode="sync", ranks=4, epochs=6))
    assert run_in_process(spec, first, watch=lambda status: True)["phase"] == "done"
    killers = []
    for servers in (1, 3):
        folder = tmp_path / f"on-{servers}"
        values = {**values_of(find_origin(f"{first}/checkpoints@2")), "servers": servers, "workers": 2}
        killers.append(Killer(create(folder, folder.name, run_config(values)), folder, kills=2))

    async def both() -> list[dict[str, Any]]:
        return await asyncio.gather(*(each.launched.run(each.watch) for each in killers))

    for status in asyncio.run(both()):
        assert (status["phase"], status["reason"], len(status["history"])) == ("done", "", 6)
        assert [event["cut"] for event in status["events"]] == [2], "a run that was begun is not begun again"
        assert status["restarts"] == 2
    assert digest(tmp_path / "on-1") == digest(tmp_path / "on-3") == digest(first)


def test_a_warm_start_happens_once_whoever_is_killed(data: Path, tmp_path: Path) -> None:
    first, folder = tmp_path / "first", tmp_path / "second"
    spec = create(first, "first", config(data, epochs=3))
    assert run_in_process(spec, first, watch=lambda status: True)["phase"] == "done"
    warm = {"path": f"{first}/checkpoints@3"}
    spec = create(folder, "second", config(data, epochs=2, servers=3, workers=2, seed=4, warm_start=warm))
    killer = Killer(spec, folder, kills=3)
    status = asyncio.run(killer.launched.run(killer.watch))
    assert (status["phase"], status["reason"], status["restarts"]) == ("done", "", 3)
    assert [event["event"] for event in status["events"]] == ["warm_start"]
    before = open_checkpoint(first / "checkpoints")[1].metrics["history"]
    assert status["history"][0]["loss"] < before[1]["loss"]


def test_a_table_goes_back_whoever_is_killed(data: Path, tmp_path: Path) -> None:
    """The coordinator is killed as soon as it was asked: what it had decided happens, what it had not is asked for again."""
    folder = tmp_path / "job"
    spec = create(folder, "job", config(data, epochs=500, servers=3, workers=2, checkpoint_every="3s"))
    launched = LocalProcesses(spec, folder)
    path = f"{folder}/checkpoints/cut-000001"
    asked, kills = 0, 0

    def watch(status: dict[str, Any]) -> bool:
        nonlocal asked, kills
        if status.get("phase") not in ("training", "writing") or "note" in status or len(status["checkpoints"]) < 2:
            return True
        events = [event for event in status["events"] if event["event"] == "rollback"]
        if not events and not status["rollback"].get("under_way"):
            asked += 1
            threading.Thread(target=ask_for_it, args=(folder, path)).start()
        elif not events and kills < 3:
            kills += 1
            child = next(c for c in launched.children if c.role == "coordinator")
            os.kill(child.process.pid, signal.SIGKILL)
        return not (events and status["checkpoints"][-1]["cut"] > events[0]["gate"])

    status = asyncio.run(launched.run(watch))
    assert (status["phase"], status["reason"]) == ("stopped", "interrupted"), status
    (event,) = [event for event in status["events"] if event["event"] == "rollback"]
    assert (event["table"], event["cut"]) == ("user", 1)
    assert asked >= 1
    assert all(each["samples"] == status["history"][0]["samples"] for each in status["history"]), "each sample once"
    store, manifest = open_checkpoint(folder / "checkpoints")
    store.verify(manifest)


def ask_for_it(folder: Path, path: str) -> None:
    with contextlib.suppress(PSError):
        ask(read_address(folder), "Coordinator.Rollback", RollbackRequest(table="user", path=path), Security())
