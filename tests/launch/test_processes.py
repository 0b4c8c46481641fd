# SPDX-License-Identifier: Apache-2.0
"""Jobs of real processes, and what is left of them after interrupts and kills: no process, and all samples once."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from oarlock.client.processors import parse_cores

# Two lives of five processes, on a machine that may be busy.
pytestmark = pytest.mark.timeout(400)

SAMPLES = 100 * 25 * 5
# Far more epochs than any test waits for.
ENDLESS = 100_000


class Launched:
    """`oarlock train` as a process of its own group, its output in files."""

    def __init__(self, folder: Path, arguments: list[str], environment: dict[str, str]) -> None:
        self.out, self.err = folder / f"out-{time.monotonic_ns()}", folder / f"err-{time.monotonic_ns()}"
        with self.out.open("wb") as out, self.err.open("wb") as err:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "oarlock.cli.main", "train", *arguments],
                cwd=folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,
            )
        self.family: dict[int, str] = {}

    def look(self) -> dict[int, str]:
        """Return the launcher's children, by pid, and remember them."""
        for task in Path(f"/proc/{self.process.pid}/task").glob("*/children"):
            for pid in task.read_text().split():
                command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
                if "oarlock" in command and "cli.main" not in command:
                    self.family[int(pid)] = command
        return self.family

    def of(self, module: str) -> list[int]:
        return sorted(pid for pid, command in self.look().items() if f"-m {module} " in command)

    def wait_for(self, text: str, seconds: float = 90.0) -> None:
        """Wait until standard error holds ``text``."""
        wait_until(lambda: text in self.err.read_text() or self.process.poll() is not None, seconds)
        self.look()
        assert text in self.err.read_text(), self.err.read_text()

    def end(self, seconds: float = 90.0) -> int:
        code = self.process.wait(seconds)
        self.no_process_is_left()
        return code

    def no_process_is_left(self) -> None:
        assert self.family, "no child was ever seen"
        wait_until(lambda: not self.left(), 15.0)
        assert self.left() == {}

    def left(self) -> dict[int, str]:
        return {pid: command for pid, command in self.family.items() if lives(pid, command)}

    @property
    def result(self) -> dict[str, Any]:
        lines = self.out.read_text().splitlines()
        found: dict[str, Any] = json.loads(lines[-1])
        assert sum(line.startswith("{") for line in lines) == 1
        return found

    @property
    def words(self) -> str:
        text = self.err.read_text()
        assert "Traceback" not in text, text
        return text


def lives(pid: int, command: str) -> bool:
    try:
        now = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
        ended = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False
    return now == command and not ended


def wait_until(condition: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)


@pytest.fixture
def launch(data: Path, tmp_path: Path) -> Iterator[Callable[..., Launched]]:
    made: list[Launched] = []

    def start(*arguments: str, environment: dict[str, str] | None = None) -> Launched:
        given = ["ncf", "--name", "job", "--json", "--reader", "arrow", *arguments]
        if "--data" not in arguments and "--resume" not in arguments:
            given += ["--data", str(data)]
        if "--resume" not in arguments:
            given += ["--set", "recipe_options.batch_samples=1024"]
        kept = {k: v for k, v in os.environ.items() if k != "OPENBLAS_CORETYPE"}
        launched = Launched(tmp_path, given, {**kept, **(environment or {})})
        made.append(launched)
        return launched

    yield start
    for launched in made:
        for pid in launched.look():
            if lives(pid, launched.family[pid]):
                os.kill(pid, signal.SIGKILL)
        if launched.process.poll() is None:
            launched.process.kill()
        launched.process.wait()


def go_on(launch: Callable[..., Launched], epochs_done: int) -> dict[str, Any]:
    """Resume the job for one epoch more than it had; every sample of every epoch was trained once."""
    again = launch("--resume", "--epochs", str(epochs_done + 1), "--servers", "1")
    again.wait_for("gathering")
    assert again.end() == 0, again.words
    result = again.result
    assert result["phase"] == "done"
    assert [r["samples"] for r in result["history"]] == [SAMPLES] * (epochs_done + 1)
    assert result["samples_trained"] == SAMPLES * (epochs_done + 1)
    return result


def test_an_interrupted_job_ends_within_seconds_and_goes_on(launch: Callable[..., Launched]) -> None:
    job = launch("--epochs", str(ENDLESS), "--worker-pin-cores", "auto", "--network-threads", "40")
    job.wait_for("epoch 1/")
    processors_are_as_told(job)
    assert (len(job.of("oarlock.cluster")), len(job.of("oarlock.ps")), len(job.of("oarlock.worker"))) == (1, 2, 2)
    job.process.send_signal(signal.SIGINT)
    assert job.end(45.0) == 130
    assert "job job was stopped (interrupted); go on with `oarlock train ncf --name job --resume`" in job.words
    stopped = job.result
    assert stopped["phase"] == "stopped"
    done = len(stopped["history"])
    # All of an epoch, if it was interrupted while it was evaluated.
    assert 0 <= stopped["samples_trained"] - done * SAMPLES <= SAMPLES
    finished = go_on(launch, done)
    assert finished["history"][:done] == stopped["history"]
    assert (finished["run"], finished["servers"], finished["workers"], finished["reader"]) == (2, 1, 2, "arrow")


def processors_are_as_told(job: Launched) -> None:
    """Cores are shared out among the workers, whose threads all run there; nothing else is pinned."""
    allowed = os.sched_getaffinity(0)
    assert job.words.count("processors: cores ") == 1
    seen: dict[str, set[int]] = {}
    for log in (job.out.parent / "runs" / "job" / "logs").glob("*-*.log"):
        (line,) = [line for line in log.read_text().splitlines() if "event=processors" in line]
        told = dict(word.split("=") for word in line.split()[4:])
        seen[log.stem] = set(parse_cores(told["cores"], "cores"))
        assert told["pinned"] == ("true" if told["role"] == "worker" else "false")
        assert told["blas_threads"] == "1"
        assert told.get("network_threads") == ("40" if told["role"] == "shard" else None)
        assert told.get("compute_threads") == ("1" if told["role"] == "worker" else None)
    workers = [seen.pop("worker-0"), seen.pop("worker-1")]
    assert set.union(*workers) == allowed
    assert not set.intersection(*workers) or len(allowed) == 1
    assert list(seen.values()) == [allowed] * 3
    threads = [
        os.sched_getaffinity(int(task.name))
        for pid in job.of("oarlock.worker")
        for task in Path(f"/proc/{pid}/task").iterdir()
    ]
    assert len(threads) > 10
    assert all(cores in workers for cores in threads)


@pytest.mark.slow
def test_an_interrupt_of_the_whole_group(launch: Callable[..., Launched]) -> None:
    """As a terminal sends it: to the launcher, and to whatever else is in its group."""
    job = launch("--epochs", str(ENDLESS))
    job.wait_for("epoch 1/")
    os.killpg(job.process.pid, signal.SIGINT)
    assert job.end(45.0) == 130
    go_on(launch, len(job.result["history"]))


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["job job in", "gathering"])
def test_an_interrupt_before_the_job_trains(launch: Callable[..., Launched], moment: str) -> None:
    job = launch("--epochs", str(ENDLESS))
    job.wait_for(moment)
    job.process.send_signal(signal.SIGINT)
    assert job.process.wait(45.0) == 130
    wait_until(lambda: not job.left(), 15.0)
    assert job.left() == {}
    assert job.result["phase"] == "stopped"
    assert "was stopped" in job.words


@pytest.mark.slow
def test_a_second_interrupt_does_not_wait(launch: Callable[..., Launched]) -> None:
    # No checkpoint may be under way, and no lease may end: the job then waits for the stopped workers.
    job = launch("--epochs", str(ENDLESS), "--set", "checkpoint_epochs=0", "--set", "lease_seconds=60")
    job.wait_for("epoch 1/")
    for pid in job.of("oarlock.worker"):
        os.kill(pid, signal.SIGSTOP)
    job.process.send_signal(signal.SIGINT)
    job.wait_for("stopping")
    job.process.send_signal(signal.SIGINT)
    assert job.end(15.0) == 130
    assert "oarlock: interrupted" in job.words
    assert job.out.read_text() == ""


@pytest.mark.slow
def test_a_killed_launcher_leaves_no_process(launch: Callable[..., Launched]) -> None:
    job = launch("--epochs", str(ENDLESS))
    job.wait_for("epoch 2/")
    wait_until(lambda: any(job.out.parent.glob("runs/job/checkpoints/*/manifest.json")), 90.0)
    job.process.kill()
    assert job.end() == -signal.SIGKILL
    status = json.loads(run_cli(job, "status", "job", "--json").stdout)
    assert status["phase"] == "not running"
    go_on(launch, status["checkpoints"][-1]["epoch"])


def run_cli(job: Launched, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", "-m", "oarlock.cli.main", *arguments],
        cwd=job.out.parent,
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.slow
def test_a_killed_workers_splits_are_trained_by_the_other(launch: Callable[..., Launched]) -> None:
    job = launch("--epochs", "30", "--restarts", "0")
    job.wait_for("epoch 1/")
    os.kill(job.of("oarlock.worker")[0], signal.SIGKILL)
    assert job.end() == 0, job.words
    assert "was ended by SIGKILL" in job.words
    assert "goes to others" in job.words
    assert [r["samples"] for r in job.result["history"]] == [SAMPLES] * 30
    assert job.result["restarts"] == 0


@pytest.mark.slow
def test_a_killed_worker_is_started_again(launch: Callable[..., Launched]) -> None:
    job = launch("--epochs", str(ENDLESS))
    job.wait_for("epoch 1/")
    first = job.of("oarlock.worker")
    dead = first[0]
    os.kill(dead, signal.SIGKILL)
    job.wait_for("started again (1 of 1000)")
    wait_until(lambda: len(job.of("oarlock.worker")) == 3, 30.0)
    (born,) = set(job.of("oarlock.worker")) - set(first)
    wait_until(lambda: any(m["pid"] == born for m in status_of(job)["members"]), 30.0)
    assert [m["pid"] for m in status_of(job)["members"] if m["pid"] in (dead, born)] == [born]
    job.process.send_signal(signal.SIGINT)
    assert job.end(45.0) == 130
    assert job.result["restarts"] == 1
    go_on(launch, len(job.result["history"]))


def status_of(job: "Launched") -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run_cli(job, "status", "job", "--json").stdout)
    return found


@pytest.mark.slow
def test_without_any_worker_the_job_fails(launch: Callable[..., Launched]) -> None:
    job = launch("--epochs", str(ENDLESS), "--restarts", "0")
    job.wait_for("epoch 1/")
    for pid in job.of("oarlock.worker"):
        os.kill(pid, signal.SIGKILL)
    assert job.end() == 1
    (line,) = [line for line in job.words.splitlines() if line.startswith("oarlock: ")]
    assert "no worker is left" in line


@pytest.mark.slow
def test_a_killed_shard_ends_a_job_without_restarts_with_one_line(launch: Callable[..., Launched]) -> None:
    job = launch("--epochs", str(ENDLESS), "--restarts", "0")
    job.wait_for("epoch 2/")
    os.kill(job.of("oarlock.ps")[1], signal.SIGKILL)
    assert job.end() == 1
    (line,) = [line for line in job.words.splitlines() if line.startswith("oarlock: ")]
    assert "shard" in line
    assert "SIGKILL" in line
    assert "--resume" in line
    assert job.out.read_text() == ""
    status = json.loads(run_cli(job, "status", "job", "--json").stdout)
    assert status["phase"] == "failed"
    assert "shard" in status["reason"]
    go_on(launch, status["checkpoints"][-1]["epoch"])


@pytest.mark.slow
def test_a_killed_coordinator_is_started_again_on_its_address(launch: Callable[..., Launched]) -> None:
    job = launch("--epochs", str(ENDLESS))
    job.wait_for("epoch 2/")
    file = job.out.parent / "runs" / "job" / "coordinator.json"
    before = json.loads(file.read_text())
    others = {pid for pid in job.look() if pid != before["pid"]}
    os.kill(before["pid"], signal.SIGKILL)
    job.wait_for("coordinator 0 was ended by SIGKILL; started again (1 of 1000)")
    wait_until(lambda: json.loads(file.read_text())["pid"] != before["pid"], 30.0)
    after = json.loads(file.read_text())
    assert after["address"] == before["address"]
    status = status_of(job)
    assert (status["run"], status["term"]) == (1, 2)
    wait_until(lambda: len(status_of(job)["history"]) > len(status["history"]) + 1, 30.0)
    assert {m["pid"] for m in status_of(job)["members"]} == others
    job.process.send_signal(signal.SIGINT)
    assert job.end(45.0) == 130
    go_on(launch, len(job.result["history"]))


@pytest.mark.slow
def test_a_killed_coordinator_ends_a_job_without_restarts(launch: Callable[..., Launched]) -> None:
    job = launch("--epochs", str(ENDLESS), "--restarts", "0")
    job.wait_for("epoch 2/")
    os.kill(job.of("oarlock.cluster")[0], signal.SIGKILL)
    assert job.end() == 1
    assert "coordinator 0: ended by SIGKILL" in job.words
    status = json.loads(run_cli(job, "status", "job", "--json").stdout)
    assert status["phase"] == "failed"
    go_on(launch, status["checkpoints"][-1]["epoch"])


@pytest.mark.slow
@pytest.mark.parametrize("module", ["oarlock.cluster.orders", "oarlock.ps.shard", "oarlock.worker.trainer"])
def test_a_process_that_cannot_start_is_named(launch: Callable[..., Launched], tmp_path: Path, module: str) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    role = module.rpartition(".")[0]
    (broken / "sitecustomize.py").write_text(
        f"import sys\nif {role!r} in sys.orig_argv:\n    sys.modules[{module!r}] = None\n"
    )
    job = launch("--epochs", "1", environment={"PYTHONPATH": str(broken)})
    assert job.process.wait(60.0) == 1
    (line,) = [line for line in job.words.splitlines() if line.startswith("oarlock: ")]
    assert module in line
    assert "ModuleNotFoundError" in line
    assert ".log" in line


@pytest.mark.slow
def test_stop_and_status_of_a_running_job(launch: Callable[..., Launched]) -> None:
    job = launch("--epochs", str(ENDLESS))
    job.wait_for("epoch 1/")
    folder = job.out.parent / "runs" / "job"
    address = json.loads((folder / "coordinator.json").read_text())["address"]
    for name in ("job", str(folder), address):
        status = json.loads(run_cli(job, "status", name, "--json").stdout)
        assert (status["name"], len(status["members"])) == ("job", 4)
        assert status["phase"] in ("training", "writing")
    assert "members" in run_cli(job, "status", "job").stdout
    second = launch("--resume")
    assert second.process.wait(60.0) == 1
    assert "job job is running" in second.words
    assert run_cli(job, "stop", "job").returncode == 0
    assert job.end() == 130
    assert "oarlock stop" in job.words
    assert "not running" in run_cli(job, "stop", "job").stderr
    go_on(launch, len(job.result["history"]))


@pytest.mark.slow
def test_rows_that_cannot_be_read_end_the_job_with_one_line(
    launch: Callable[..., Launched], data: Path, tmp_path: Path
) -> None:
    damaged = Path(shutil.copytree(data, tmp_path / "damaged"))
    (file,) = (damaged / "train").glob("*.parquet")
    content = bytearray(file.read_bytes())
    content[4 : len(content) // 2] = b"\xff" * (len(content) // 2 - 4)
    file.write_bytes(content)
    job = launch("--epochs", "1", "--data", str(damaged))
    job.wait_for("gathering")
    assert job.end() == 1
    (line,) = [line for line in job.words.splitlines() if line.startswith("oarlock: ")]
    assert "train" in line
