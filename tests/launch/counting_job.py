# SPDX-License-Identifier: Apache-2.0
"""A counting job of real processes, during which a scene is played; its count must be exact, and no process is left."""

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
from oarlock.launch.folder import create
from oarlock.launch.processes import LocalProcesses

Scene = Iterator[None]


class Job:
    """A counting job; a scene is played while it runs, a step for each look at it, ``status`` being the newest."""

    def __init__(
        self, tmp_path: Path, seed: int, restarts: int = 1000, notes: Path | None = None, **fields: Any
    ) -> None:
        self.data, self.folder = tmp_path / "data", tmp_path / "job"
        write_data(self.data, rows=20_000, keys=5_000, seed=seed)
        # Small batches make it slow enough to be looked at.
        run = plan(self.data, recipe=RECIPE, seed=seed, recipe_options={"blocks": 32, "batch_rows": 64})
        # No lease may end: what takes one would take longer than the test may.
        self.spec = create(self.folder, "job", replace(run, **{"lease_seconds": 1000.0, "workers": 2, **fields}))
        self.launched = LocalProcesses(self.spec, self.folder, restarts=restarts, push_notes=notes)
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
        assert count.samples_exact
        # What was lost is missing from the others.
        if self.spec.on_loss != "reload":
            assert count.exact, count
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

    def child(self, member: dict[str, Any]) -> Any:
        """Return the process that is a member."""
        return next(c for c in self.launched.children if c.process.pid == member["pid"])

    def kill_a_shard(self) -> dict[str, Any]:
        """Kill the shard that is named first; return what the status said of it."""
        dead: dict[str, Any] = next(m for m in self.status["members"] if m["role"] == "shard")
        self.child(dead).process.kill()
        return dead

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
