# SPDX-License-Identifier: Apache-2.0
"""`oarlock train --trace FILE`: where FILE may stand is said before the job begins, and the file is there when it is over."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trace_check

from oarlock.telemetry import trace_format

Command = Callable[..., Any]


def test_a_traced_job_leaves_one_file(train: Command, tmp_path: Path) -> None:
    ended = train("--epochs", "1", "--name", "a", "--trace", "t.json", "--workers", "1", "--servers", "1")
    assert ended.code == 0
    assert f"trace in {tmp_path / 't.json'}" in ended.err
    found = trace_check.timeline(tmp_path / "t.json")
    assert found.processes.keys() == {"coordinator", "shard 0", "worker 0"}
    assert not (tmp_path / "runs" / "a" / "trace").exists()
    assert sorted(os.listdir(tmp_path)) == ["runs", "t.json"]
    # An earlier trace is replaced.
    ended = train("--epochs", "2", "--name", "a", "--resume", "--trace", "t.json", "--workers", "2")
    assert ended.code == 0
    assert "worker 1" in trace_check.timeline(tmp_path / "t.json").processes


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("missing/t.json", "does not exist: make it first"),
        (".", "this is a folder"),
        ("notes.txt", "a file that is no trace"),
        ("notes.txt/t.json", "does not exist"),
        ("pipe", "a file that is no trace"),
        ("/dev/null", "a file that is no trace"),
        ("/proc/t.json", "cannot be written"),
        ("x" * 300, "cannot be written"),
        ("a\0b", "cannot be written"),
        ("", "this is a folder"),
    ],
)
def test_what_cannot_be_written_is_said_before_anything_is_made(
    train: Command, tmp_path: Path, name: str, words: str
) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    os.mkfifo(tmp_path / "pipe")
    ended = train("--epochs", "1", "--name", "a", "--trace", name)
    assert ended.code == 1
    assert ended.line.startswith("oarlock: --trace ")
    assert words in ended.line
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert sorted(os.listdir(tmp_path)) == ["notes.txt", "pipe"]


def test_a_file_without_rights_is_left_alone(train: Command, tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("nothing is forbidden to root")
    (tmp_path / "locked").mkdir(mode=0o555)
    ended = train("--epochs", "1", "--name", "a", "--trace", "locked/t.json")
    assert ended.code == 1
    assert "cannot be written (Permission denied)" in ended.line


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_real_processes_share_a_clock_and_a_killed_one_leaves_its_part(data: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-P", "-m", "oarlock.cli.main", "train", "ncf", "--reader", "arrow", "--data", str(data)]
    command += ["--name", "a", "--trace", "t.json", "--epochs", "10000", "--set", "heartbeat_seconds=0.1"]
    command += ["--set", "recipe_options.batch_samples=256", "--json"]
    log = tmp_path / "log"
    with log.open("wb") as out:
        process = subprocess.Popen(command, cwd=tmp_path, stdout=out, stderr=out)

    def part_with_work(pattern: str) -> Path:
        """Wait for a part that shows how a batch was computed."""
        while True:
            assert process.poll() is None, log.read_text()
            for found in (tmp_path / "runs" / "a" / "trace").glob(pattern):
                if b'"name":"compute"' in found.read_bytes():
                    return found
            threading.Event().wait(0.05)

    try:
        victim = part_with_work("*-worker-1.json")
        pid = next(found[0]["pid"] for found in trace_format.events(victim) if found is not None)
        os.kill(pid, signal.SIGKILL)
        part_with_work("0006-worker-1.json")
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130, log.read_text()
    finally:
        process.kill()
        process.wait()
    found = trace_check.timeline(tmp_path / "t.json")
    # The one that was started again may have the number of the one before it.
    workers = [rows for name, rows in found.processes.items() if name.startswith("worker ")]
    assert len(workers) == 3
    assert {"coordinator", "shard 0", "shard 1"} < found.processes.keys()
    assert "stopping" in [s.name for s in found.processes["coordinator"]["phase"]]
    pulls = [s for rows in workers for s in rows["pull"]]
    answered = [s for n in range(2) for s in found.processes[f"shard {n}"]["pull"]]
    assert all(s.args["received"] > 0 for s in answered)
    # One clock: what a shard answers lies within what a worker waits for, but for what the killed one took along.
    lost = [s for s in answered if not any(p.begin <= s.begin and s.end <= p.end for p in pulls)]
    assert len(lost) < len(answered) / 2
    assert not [s for s in answered if s.begin < min(p.begin for p in pulls)]
