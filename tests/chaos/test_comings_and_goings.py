# SPDX-License-Identifier: Apache-2.0
"""Real workers that leave when they are asked to and that join by hand: the count is exact, and nobody waits for a lease."""

import asyncio
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from oarlock.benchmarks.counting import check, write_data
from oarlock.benchmarks.kills import RECIPE, plan
from oarlock.client.entry import read_address
from oarlock.launch.folder import create
from oarlock.launch.processes import LocalProcesses

# Longer than the test may take: a split that waits for a lease to end makes it fail.
LEASE_SECONDS = 1000.0

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]


def worker(status: dict[str, Any], pid: int) -> dict[str, Any]:
    """Return a worker's counters as the coordinator knows them, none if it is no member."""
    return next((m["stats"] for m in status["members"] if m["role"] == "worker" and m["pid"] == pid), {})


def test_workers_leave_and_join_while_a_job_runs(tmp_path: Path, seed: int) -> None:
    data, folder = tmp_path / "data", tmp_path / "job"
    write_data(data, rows=60_000, keys=5_000, seed=seed)
    run = plan(data, recipe=RECIPE, epochs=30, seed=seed)
    spec = create(folder, "job", replace(run, workers=2, lease_seconds=LEASE_SECONDS))
    launched = LocalProcesses(spec, folder)
    ended: list[tuple[str, int]] = []

    def join() -> "subprocess.Popen[bytes]":
        command = [sys.executable, "-P", "-m", "oarlock.worker", "--coordinator", read_address(folder)]
        with (folder / "logs" / "by-hand.log").open("ab") as log:
            return subprocess.Popen([*command, "--reader", "arrow"], stdin=subprocess.DEVNULL, stderr=log)

    def scene(status: dict[str, Any]) -> Iterator[None]:
        """One step for every look at the job; ``status`` is always the newest."""
        mine = {c.number: c.process for c in launched.children if c.role == "worker"}
        while not all(worker(status, p.pid).get("samples") for p in mine.values()):
            yield
        mine[0].send_signal(signal.SIGTERM)
        while mine[0].poll() is None:
            yield
        ended.append(("mine", mine[0].returncode))
        third = join()
        try:
            while not worker(status, third.pid).get("samples"):
                yield
            # The other one may go as well: somebody else is there.
            mine[1].send_signal(signal.SIGTERM)
            while mine[1].poll() is None:
                yield
            ended.append(("mine", mine[1].returncode))
            fourth = join()
            try:
                while not worker(status, fourth.pid).get("samples"):
                    yield
                third.send_signal(signal.SIGTERM)
                while third.poll() is None:
                    yield
                ended.append(("by hand", third.returncode))
                while True:
                    yield
            finally:
                ended.append(("by hand", fourth.wait(60)))
        finally:
            third.kill()
            third.wait()

    newest: dict[str, Any] = {}
    steps = scene(newest)

    def watch(status: dict[str, Any]) -> bool:
        if status:
            newest.clear()
            newest.update(status)
            next(steps)
        return True

    final = asyncio.run(launched.run(watch, 0.05))
    steps.close()
    assert final["phase"] == "done", final["reason"]
    assert ended == [("mine", 0), ("mine", 0), ("by hand", 0), ("by hand", 0)]
    assert final["restarts"] == 0
    assert [w for w in final["warnings"] if "left as it was asked to" in w] == final["warnings"]
    assert len(final["warnings"]) == 2
    assert final["lost"] == []
    count = check(data, folder, spec, final["history"])
    assert count.exact, count
    assert count.samples_exact
