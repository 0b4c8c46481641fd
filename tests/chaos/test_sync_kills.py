# SPDX-License-Identifier: Apache-2.0
"""A sync job of real processes, whose workers and coordinator are killed, has the digest of one that nobody touched."""

import asyncio
import json
import os
import signal
from pathlib import Path
from random import Random
from typing import Any

import pytest
from sync_job import config, digest

from oarlock.data.planted import generate_ncf
from oarlock.launch.folder import create
from oarlock.launch.inprocess import run_in_process
from oarlock.launch.processes import LocalProcesses

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

KILLS = 8


def test_kills_make_no_difference(tmp_path: Path, seed: int) -> None:
    data = tmp_path / "data"
    generate_ncf(data, users=600, items=400, positives_per_user=40, seed=1)
    quiet = tmp_path / "quiet"
    run = config(data, epochs=25, servers=1, workers=1)
    assert run_in_process(create(quiet, "quiet", run), quiet, watch=lambda status: True)["phase"] == "done"
    folder, rng, kills = tmp_path / "disturbed", Random(seed), []
    launched = LocalProcesses(create(folder, "disturbed", config(data, epochs=25, servers=3, workers=3)), folder)

    def watch(status: dict[str, Any]) -> bool:
        members = [m for m in status.get("members", ()) if m["role"] == "worker" and m["stats"].get("batches")]
        if (
            status.get("phase") == "training"
            and "note" not in status
            and members
            and len(kills) < KILLS
            and rng.random() < 0.1
        ):
            if len(kills) % 4 == 3:
                pid = json.loads((folder / "coordinator.json").read_text(encoding="utf-8"))["pid"]
            else:
                pid = rng.choice(members)["pid"]
            try:
                os.kill(pid, signal.SIGKILL)
                kills.append(pid)
            except ProcessLookupError:
                pass
        return True

    status = asyncio.run(launched.run(watch, 0.1))
    assert status["phase"] == "done", status["reason"]
    assert len(kills) >= 3
    assert digest(folder) == digest(quiet)
