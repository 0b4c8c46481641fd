# SPDX-License-Identifier: Apache-2.0
"""`oarlock serve --follow` beside a job of real processes that is scaled: counts are served fresh, and never go back."""

import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from counting_job import Job, Scene, nobody_is_left
from serving_process import following

from oarlock.benchmarks.counting import _counted
from oarlock.serving import Client

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
KEYS = np.arange(5000, dtype=np.uint64)


class Prober:
    """Asks for all counts, which never go back within a run, of a version that never does."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self.counts = np.zeros(len(KEYS), np.float32)
        self.version: Any = None
        self.answers = 0

    def ask(self) -> None:
        found = self._client.lookup({"key": KEYS})
        counts = found["key"][:, 0]
        if self.version is not None and found.version.run > self.version.run:
            # Of a cut, which is behind what was abandoned.
            self.counts = np.zeros(len(KEYS), np.float32)
        assert (counts >= self.counts).all(), np.flatnonzero(counts < self.counts)
        assert self.version is None or found.version[:2] >= self.version[:2]
        self.counts, self.version = counts, found.version
        self.answers += 1


def test_a_job_is_followed_while_it_is_scaled(tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job(tmp_path, seed, workers=1, epochs=20)
    followers: list[Client] = []
    probers: list[Prober] = []
    fresh: list[float] = []

    def scene() -> Scene:
        while not job.status.get("epoch") or not job.working(2, 1):
            yield
        client, _ = stack.enter_context(following(job.folder, tmp_path / "log"))
        prober = Prober(client)
        followers.append(client)
        probers.append(prober)
        for servers, workers in (("4", "2"), ("2", "1")):
            for _ in job.scale("--servers", servers, "--workers", workers):
                prober.ask()
                yield
            # Moved blocks come whole; then it is fresh again.
            deadline = time.monotonic() + 60
            while prober.version.seconds_since > 2.0:
                assert time.monotonic() < deadline, client.describe().problem
                prober.ask()
                yield
            fresh.append(prober.version.seconds_since)

    with nobody_is_left(monkeypatch), ExitStack() as stack:
        final = job.play(scene())
        counted, cut = _counted(job.folder, len(KEYS))[0], final["checkpoints"][-1]["cut"]
        (client,), (prober,) = followers, probers
        deadline = time.monotonic() + 60
        # The end of the training is in the last cut, if it was not told before.
        while not np.array_equal(prober.counts, counted) or prober.version.cut < cut:
            assert time.monotonic() < deadline, client.describe()
            prober.ask()
        assert "coordinator" in client.describe().problem
    assert len(fresh) == 2
    assert prober.answers > 20


def test_a_roll_back_is_followed_at_once(tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shard without a copy dies: all goes back to the last cut, and so do the counts that are served."""
    job = Job(tmp_path, seed, workers=1, epochs=30)

    def scene() -> Scene:
        while not job.status.get("epoch") or not job.working(2, 1) or not job.status["checkpoints"]:
            yield
        with following(job.folder, tmp_path / "log") as (client, _):
            prober = Prober(client)
            prober.ask()
            run = prober.version.run
            job.kill_a_shard()
            while job.status["run"] == run:
                yield
            deadline = time.monotonic() + 60
            while prober.version.run == run or prober.version.seconds_since > 2.0:
                assert time.monotonic() < deadline, client.describe().problem
                prober.ask()
                yield
            for _ in range(20):
                prober.ask()
                yield

    with nobody_is_left(monkeypatch):
        job.play(scene())
