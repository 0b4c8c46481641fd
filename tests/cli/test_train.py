# SPDX-License-Identifier: Apache-2.0
"""`oarlock train`, `status`, `prepare` and `demo`: what goes to standard output, what to standard error, and the end."""

import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from oarlock.cli import show
from oarlock.cli.show import RunView
from oarlock.client.entry import write_address
from oarlock.proto.rpc import GrpcServer

Command = Callable[..., Any]
SAMPLES = 100 * 25 * 5
KEYS = (
    *("hr@10", "ndcg@10", "best_epoch", "last_hr@10", "samples_per_s", "samples_trained"),
    *("servers", "workers", "reader", "seed"),
)


def test_the_result_is_one_json_object_on_standard_output(train: Command, tmp_path: Path) -> None:
    ended = train("--epochs", "2", "--json", "--seed", "3", "--name", "a", "--workers", "1")
    assert ended.code == 0
    (line,) = ended.out.splitlines()
    result = json.loads(line)
    assert not set(KEYS) - set(result)
    assert (result["servers"], result["workers"], result["reader"], result["seed"]) == (2, 1, "arrow", 3)
    assert result["samples_trained"] == 2 * SAMPLES
    best = result["history"][result["best_epoch"] - 1]
    assert result["hr@10"] == best["metrics"]["hr@10"] == max(r["metrics"]["hr@10"] for r in result["history"])
    assert result["ndcg@10"] == best["metrics"]["ndcg@10"]
    assert result["last_hr@10"] == result["history"][-1]["metrics"]["hr@10"]
    assert result["samples_per_s"] > 0
    assert Path(result["checkpoint"]).is_dir()
    # Progress: plain whole lines, one an epoch.
    assert "\x1b" not in ended.err
    assert [line for line in ended.err.splitlines() if line.startswith(("epoch 1/2  loss", "epoch 2/2  loss"))]
    job = tomllib.loads((tmp_path / "runs" / "a" / "job.toml").read_text())
    assert (job["seed"], job["epochs"], job["recipe_options"]["batch_samples"]) == (3, 2, 1024)


def test_the_resolved_job_file_is_a_job_file(oarlock: Command, train: Command, tmp_path: Path) -> None:
    assert train("--epochs", "1", "--name", "a").code == 0
    ended = oarlock("train", "runs/a/job.toml", "--in-process", "--name", "b", "--json")
    assert ended.code == 0
    first, second = (tmp_path / "runs" / n / "job.toml" for n in "ab")
    assert first.read_text() == second.read_text()


def test_a_hybrid_job_by_options(oarlock: Command, train: Command, tmp_path: Path) -> None:
    assert train("--epochs", "1", "--name", "a", "--mode", "hybrid", "--ranks", "3").code == 0
    job = tomllib.loads((tmp_path / "runs" / "a" / "job.toml").read_text())
    assert (job["mode"], job["ranks"]) == ("hybrid", 3)
    assert "mode hybrid of 3 ranks" in oarlock("status", "a").out
    # The resolved job file is one that another job can be made of.
    assert oarlock("prepare", "runs/a/job.toml", "--name", "b").code == 0
    spec = json.loads((tmp_path / "runs" / "b" / "job.json").read_text())
    assert (spec["mode"], spec["ranks"]) == ("hybrid", 3)
    ended = train("--name", "c", "--mode", "ssp", "--ranks", "2")
    assert ended.code == 1
    assert "ranks = 2 and mode = 'ssp' contradict each other: only sync and hybrid have ranks" in ended.line


def test_without_json_the_result_is_a_sentence(train: Command) -> None:
    ended = train("--epochs", "1", "--name", "a")
    assert ended.code == 0
    assert ended.out.startswith("hr@10 0.")
    assert "reader arrow" in ended.out


def test_a_name_that_is_taken_and_going_on(oarlock: Command, train: Command) -> None:
    assert train("--epochs", "1", "--name", "a").code == 0
    ended = train("--epochs", "1", "--name", "a")
    assert ended.code == 1
    assert "holds a job already: go on with --resume" in ended.line
    ended = oarlock("train", "ncf", "--name", "a", "--resume", "--in-process", "--epochs", "2", "--json")
    assert ended.code == 0
    result = json.loads(ended.out)
    assert (result["run"], result["epochs"], result["samples_trained"]) == (2, 2, 2 * SAMPLES)
    old, new = (line for line in ended.err.splitlines() if line.startswith("epoch "))
    assert (old[:9], old.endswith("(from the checkpoint)")) == ("epoch 1/2", True)
    assert (new[:9], new.endswith("(from the checkpoint)")) == ("epoch 2/2", False)
    ended = oarlock("train", "ncf", "--name", "a", "--resume", "--seed", "9")
    assert ended.code == 1
    assert "seed cannot change" in ended.line
    ended = oarlock("train", "nfc", "--name", "a", "--resume")
    assert ended.code == 1
    assert "did you mean 'ncf'" in ended.line


def test_the_status_of_jobs_that_ended_or_never_began(oarlock: Command, train: Command, data: Path) -> None:
    assert train("--epochs", "1", "--name", "a").code == 0
    for name in ("a", "runs/a", str(Path("runs/a").absolute())):
        ended = oarlock("status", name, "--json")
        assert ended.code == 0
        status = json.loads(ended.out)
        assert (status["name"], status["phase"], len(status["history"])) == ("a", "done", 1)
    ended = oarlock("status", "a")
    assert "job a: done, run 1, 1 of 1 epochs done" in ended.out
    assert "hr@10" in ended.out
    ended = oarlock("stop", "a")
    assert (ended.code, ended.line) == (1, "oarlock: job a is not running")
    ended = oarlock("prepare", "ncf", "--data", str(data), "--name", "b")
    assert (ended.code, ended.out.strip()) == (0, str(Path("runs/b").absolute()))
    for command in ("status", "stop"):
        ended = oarlock(command, "b")
        assert ended.code == 1
        assert "never started" in ended.line or "not running" in ended.line


def test_nobody_answers_at_an_address(oarlock: Command) -> None:
    ended = oarlock("status", "127.0.0.1:1")
    assert ended.code == 1
    assert "127.0.0.1:1" in ended.line


class Another:
    """The coordinator of another job, at the port that this job's had."""

    stopped = False

    def hello(self, request: Any) -> Any:
        raise NotImplementedError

    def status(self, request: Any) -> Any:
        from oarlock.proto.coordinator_pb2 import StatusReply

        return StatusReply(status=json.dumps({"job": "f" * 32, "name": "another", "phase": "training"}))

    def stop(self, request: Any) -> Any:
        Another.stopped = True


def test_another_job_at_the_old_address_is_not_taken_for_this_one(oarlock: Command, train: Command) -> None:
    assert train("--epochs", "1", "--name", "a").code == 0
    server = GrpcServer(Another(), "Coordinator", listen="127.0.0.1:0", threads=2)
    try:
        write_address(Path("runs/a"), server.start())
        assert json.loads(oarlock("status", "a", "--json").out)["name"] == "a"
        assert oarlock("stop", "a").code == 1
        assert not Another.stopped
    finally:
        server.stop()


def test_a_demo(oarlock: Command) -> None:
    ended = oarlock("demo", "--in-process", "--epochs", "1", "--json", "--reader", "arrow")
    assert ended.code == 0
    assert json.loads(ended.out)["epochs"] == 1
    assert "the best possible hr@10 is" in ended.err
    assert not Path("runs").exists()


def test_a_failed_job_ends_with_one_line(train: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    from oarlock.checkpoint.store import LocalStore

    def full(*arguments: Any, **options: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(LocalStore, "write_block", full)
    monkeypatch.setattr("oarlock.cluster.cuts.LAST_PAUSES", (0.1,))
    ended = train("--epochs", "1", "--name", "a", "--json")
    assert ended.code == 1
    assert ended.out == ""
    lines = ended.err.splitlines()
    assert lines[-1].startswith("oarlock: job a failed: the last checkpoint could not be written")
    assert "No space left" in lines[-1]
    assert "there is none" in lines[-1]
    told = [line for line in lines if "No space left" in line]
    assert len(told) == 2
    assert told[0].startswith("warning: the last checkpoint could not be written, it is tried again in 0.1 s: ")


def test_a_screen_that_goes_away_costs_no_job(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(*arguments: Any, **options: Any) -> None:
        raise BrokenPipeError

    monkeypatch.setattr(show.Console, "print", gone)
    with RunView() as view:
        view.say("hello")
        view.show({"phase": "gathering", "reason": "", "history": [], "warnings": ["w"]})
        view.table({"name": "a", "phase": "done", "history": [], "best": None})


RUN = "import sys; from oarlock.cli.main import main; sys.exit(main(sys.argv[1:]))"


@pytest.mark.parametrize(
    "redirect",
    [pytest.param("1>&-", marks=pytest.mark.slow), pytest.param("2>&-", marks=pytest.mark.slow), "0<&- 1>&- 2>&-"],
)
def test_streams_that_the_caller_closed(data: Path, tmp_path: Path, redirect: str) -> None:
    command = f'exec "$@" {redirect}'
    arguments = [
        "train",
        "ncf",
        "--data",
        str(data),
        "--epochs",
        "1",
        "--in-process",
        "--name",
        "a",
        "--reader",
        "arrow",
    ]
    ended = subprocess.run(
        ["sh", "-c", command, "sh", sys.executable, "-P", "-c", RUN, *arguments],
        cwd=tmp_path,
        capture_output=True,
        timeout=90,
    )
    assert ended.returncode == 0, ended.stderr.decode()
    assert b"Traceback" not in ended.stderr
    assert (tmp_path / "runs" / "a" / "checkpoints" / "cut-000001" / "manifest.json").exists()


def test_a_reader_of_the_result_that_is_gone(tmp_path: Path, data: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", RUN, "prepare", "ncf", "--data", str(data), "--name", "a"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    words = process.stderr.read().decode()
    process.stderr.close()
    assert process.wait(60) == 1
    assert "Traceback" not in words
    assert "Exception ignored" not in words


def test_a_run_says_once_what_it_computes_on(train: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENBLAS_CORETYPE", "Haswell")
    core = str(min(os.sched_getaffinity(0)))
    pins = ["--worker-pin-cores", core, "--server-pin-cores", "auto"]
    ended = train("--epochs", "1", "--name", "a", "--workers", "1", "--blas-threads", "2", *pins)
    assert ended.code == 0
    lines = [line for line in ended.err.splitlines() if line.startswith(("processors: ", "warning: "))]
    assert lines[0].startswith("processors: cores ")
    assert f"; workers on {core}; " in lines[0]
    assert "blas_threads 2 (" in lines[0]
    assert "OPENBLAS_CORETYPE=Haswell ties" in lines[1]
    assert "run `unset OPENBLAS_CORETYPE` first" in lines[1]
    assert "times blas_threads = 2 are 2 threads on 1 core" in lines[2]
    assert len(lines) == 3
    assert "event=processors role=job" in Path("runs/a/logs/job.log").read_text()
    job = tomllib.loads(Path("runs/a/job.toml").read_text())
    assert (job["blas_threads"], job["server_pin_cores"], job["worker_pin_cores"]) == (2, "auto", core)


def test_cores_that_are_not_there_are_refused_before_there_is_a_job(train: Command) -> None:
    ended = train("--epochs", "1", "--name", "a", "--worker-pin-cores", "60000-60001")
    assert ended.code == 1
    assert "oarlock: worker_pin_cores = '60000-60001': cores 60000-60001 cannot be used by this process" in ended.line
    assert not Path("runs").exists()
    assert train("--epochs", "1", "--name", "a").code == 0
    ended = train("--resume", "--epochs", "2", "--name", "a", "--server-pin-cores", "60000")
    assert (ended.code, "core 60000 cannot be used" in ended.line) == (1, True)
    assert train("--resume", "--name", "a", "--server-pin-cores", "").code == 0
