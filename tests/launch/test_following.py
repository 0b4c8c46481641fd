# SPDX-License-Identifier: Apache-2.0
"""`oarlock serve --follow` beside a job of real processes that is scaled: counts are served fresh, and never go back."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from counting_job import Job, Scene, nobody_is_left

from oarlock.benchmarks.counting import _counted
from oarlock.proto.errors import Unavailable
from oarlock.serving import Client

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
KEYS = np.arange(5000, dtype=np.uint64)


@contextmanager
def following(folder: Path, log: Path) -> Iterator[Client]:
    """Serve a job that runs, as people do."""
    command = [sys.executable, "-P", "-m", "oarlock.cli.main", "serve", "--follow", str(folder), "--json"]
    with (
        log.open("w") as err,
        subprocess.Popen([*command, "--log-level", "info"], stdout=subprocess.PIPE, stderr=err, text=True) as process,
    ):
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line, log.read_text()
            with Client(json.loads(line)["address"]) as client:
                yield client
            process.terminate()
            assert process.wait(60) == 0, log.read_text()
        finally:
            process.kill()


class Prober:
    """Asks for all counts, which never go back, of a version that never does, either."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self.counts = np.zeros(len(KEYS), np.float32)
        self.version: Any = None
        self.answers = 0

    def ask(self) -> None:
        found = self._client.lookup({"key": KEYS})
        counts = found["key"][:, 0]
        assert (counts >= self.counts).all(), np.flatnonzero(counts < self.counts)
        assert self.version is None or found.version[:2] >= self.version[:2]
        self.counts, self.version = counts, found.version
        self.answers += 1


def test_a_job_is_followed_while_it_is_scaled(tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job(tmp_path, seed, workers=1, epochs=20)
    fresh: list[float] = []

    def scene() -> Scene:
        while not job.status.get("epoch") or not job.working(2, 1):
            yield
        with following(job.folder, tmp_path / "log") as client:
            prober = Prober(client)
            for numbers in (("4", "2"), ("2", "1")):
                for _ in job.scale("--servers", numbers[0], "--workers", numbers[1]):
                    prober.ask()
                    yield
                # Moved blocks come whole; then it is fresh again.
                deadline = time.monotonic() + 60
                while prober.version.seconds_since > 2.0:
                    assert time.monotonic() < deadline, client.describe().problem
                    prober.ask()
                    yield
                fresh.append(prober.version.seconds_since)
            held.append((client, prober))
            yield
            while not done:
                yield

    held: list[tuple[Client, Prober]] = []
    done: list[bool] = []
    with nobody_is_left(monkeypatch):
        playing = scene()

        def watched() -> Scene:
            for _ in playing:
                yield
                if held:
                    # The job goes on to its end; whoever follows stays.
                    return

        final = job.play(watched())
        (client, prober), counted = held[0], _counted(job.folder, len(KEYS))[0]
        deadline = time.monotonic() + 60
        cut = final["checkpoints"][-1]["cut"]
        # The end of the training is in the last cut, if it was not told before.
        while not np.array_equal(prober.counts, counted) or prober.version.cut < cut:
            assert time.monotonic() < deadline, client.describe()
            prober.ask()
        assert "coordinator" in client.describe().problem
        done.append(True)
        list(playing)
    assert len(fresh) == 2
    assert prober.answers > 20


def test_a_roll_back_is_followed_at_once(tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shard without a copy dies: all goes back to the last cut, and so do the counts that are served."""
    job = Job(tmp_path, seed, workers=1, epochs=30)

    def scene() -> Scene:
        while not job.status.get("epoch") or not job.working(2, 1) or not job.status["checkpoints"]:
            yield
        with following(job.folder, tmp_path / "log") as client:
            prober = Prober(client)
            prober.ask()
            run = prober.version.run
            job.kill_a_shard()
            while job.status["run"] == run:
                yield
            deadline = time.monotonic() + 60
            while prober.version.run == run or prober.version.seconds_since > 2.0:
                assert time.monotonic() < deadline, client.describe().problem
                try:
                    prober.ask()
                except Unavailable as error:  # pragma: no cover
                    raise AssertionError("an answer failed") from error
                except AssertionError:
                    # Of the new run, which is behind.
                    found = client.lookup({"key": KEYS})
                    assert found.version.run > run
                    prober.counts, prober.version = found["key"][:, 0], found.version
                yield
            for _ in range(20):
                prober.ask()
                yield

    with nobody_is_left(monkeypatch):
        job.play(scene())
