# SPDX-License-Identifier: Apache-2.0
"""`oarlock scale`, and what `oarlock status` says of numbers, copies, moves and recoveries. The coordinator is a stub."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from oarlock.cli import scale
from oarlock.cli.autoscale_lines import autoscale_lines
from oarlock.cli.copy_lines import MOST, copy_lines
from oarlock.launch.wanted import settled
from oarlock.proto.coordinator_pb2 import ScaleReply
from oarlock.proto.errors import InvalidArgument, Unavailable
from oarlock.proto.security import Security

Oarlock = Callable[..., Any]


def status(servers: int = 2, workers: int = 1, **changes: Any) -> dict[str, Any]:
    """A job that is as it is wanted to be."""
    members = [{"role": "shard", "id": n} for n in range(servers)] + [
        {"role": "worker", "id": n} for n in range(workers)
    ]
    return {
        "name": "a",
        "phase": "training",
        "scale": {"servers": servers, "workers": workers, "leaving": {"shard": [], "worker": []}},
        "replicas": 1,
        "incomplete": 0,
        "ownerless": 0,
        "moving": {"left": 0, "under_way": 0, "closed": 0, "at_rest": True},
        "blocks": {str(n): 4 for n in range(servers)},
        "recoveries": [],
        "members": members,
        **changes,
    }


MOVES = {"left": 7, "under_way": 3, "closed": 2, "copy": 1, "hand": 2, "at_rest": False}
LEAVING = {"servers": 2, "workers": 1, "leaving": {"shard": [3, 2], "worker": []}}


def test_what_status_says() -> None:
    assert copy_lines(status()) == [
        "servers: 2 wanted, 2 there; workers: 1 wanted, 1 there",
        "2 copies of each block: all are there",
    ]
    assert copy_lines(status(replicas=0)) == ["servers: 2 wanted, 2 there; workers: 1 wanted, 1 there"]
    busy = status(4, scale=LEAVING, incomplete=1, ownerless=5, moving=MOVES)
    assert copy_lines(busy) == [
        "servers: 2 wanted, 4 there, 2, 3 to leave; workers: 1 wanted, 1 there",
        "2 copies of each block: 1 block has fewer",
        "5 blocks of shards that died wait for a new owner",
        "7 blocks still to move, 2 closed for it now",
    ]
    assert copy_lines({"members": []}) == [], "a job that an older version ran"


def test_what_status_says_of_recoveries() -> None:
    done = {"kind": "promotion", "shard": 1, "blocks": 20, "lost": "", "seconds": 0.2149, "run": 1, "ended": "now"}
    lost = {**done, "kind": "reload", "shard": -1, "blocks": 1, "lost": "pushes since cut 4"}
    goes_on = {"kind": "re-replication", "shard": 1, "blocks": 20, "lost": ""}
    # A job that is over has its history, and nothing else.
    assert copy_lines({"members": [], "recoveries": [done, lost, goes_on]}) == [
        "run 1: promotion: 20 blocks of shard 1 in 0.21 s (now)",
        "run 1: reload: 1 block in 0.21 s; lost: pushes since cut 4 (now)",
        "re-replication: 20 blocks of shard 1, under way",
    ]
    many = copy_lines({"members": [], "recoveries": [done] * (MOST + 3)})
    assert (many[0], len(many)) == ("3 earlier recoveries: see --json", MOST + 1)


def test_when_a_job_has_what_was_asked_for() -> None:
    assert settled(status())
    assert not settled(status(moving=MOVES))
    assert not settled(status(incomplete=1))
    assert not settled(status(scale=LEAVING))
    assert not settled(status(blocks={"0": 8})), "one waits for its blocks"
    assert not settled(status(members=status(2, 2)["members"])), "a worker is to leave, and was told so"
    assert not settled(status(scale={**LEAVING, "servers": 3, "leaving": {"shard": [], "worker": []}}))


class Job:
    """A running job: ``found`` before it is asked, then ``looks``, of which the last one stays."""

    def __init__(self) -> None:
        self.found = status()
        self.looks: list[Any] = [status()]
        self.asked: list[tuple[int, int]] = []
        self.error: Exception | None = None

    def running(self, options: argparse.Namespace) -> tuple[Path | None, str, Security, dict[str, Any]]:
        return None, "host:1", Security(), self.found

    def live(self, folder: Path | None, address: str, security: Security) -> dict[str, Any] | None:
        found = self.looks.pop(0) if len(self.looks) > 1 else self.looks[0]
        assert found is None or isinstance(found, dict)
        return found

    def ask(self, address: str, method: str, request: Any, security: Security) -> Any:
        assert (address, method) == ("host:1", "Coordinator.Scale")
        self.asked.append((request.servers, request.workers))
        if self.error is not None:
            raise self.error
        return ScaleReply(servers=request.servers or 2, workers=request.workers or 1, said="2 more servers to come")


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch) -> Job:
    made = Job()
    for name in ("running", "live", "ask"):
        monkeypatch.setattr(scale, name, getattr(made, name))
    monkeypatch.setattr(scale, "LOOK_SECONDS", 0.0)
    monkeypatch.setattr(scale, "SAY_SECONDS", 0.0)
    return made


def test_it_says_what_follows(oarlock: Oarlock, job: Job) -> None:
    ended = oarlock("scale", "a", "--servers", "4")
    assert (ended.code, ended.err) == (0, "")
    assert ended.out == "job a: 4 servers, 1 workers: 2 more servers to come\n"
    assert json.loads(oarlock("scale", "a", "--workers", "3", "--json").out) == {
        "servers": 2,
        "workers": 3,
        "said": "2 more servers to come",
    }
    # 0: as it is.
    assert job.asked == [(4, 0), (0, 3)]


LOOK = {
    "memory": 0.9,
    "busy": 0.25,
    "waiting": 1.24,
    "samples_per_second": 1234.5,
    "created": "then",
    "said": "2 servers, 2 workers\n  cool-down: another 50 s",
    "would": "2 -> 3 servers, 2 workers\n  the fullest server uses 90% of its memory, the bound is 70%",
}
DECISION = {
    "number": 1,
    "before": [1, 2],
    "servers": 2,
    "workers": 2,
    "reasons": ["this", "that"],
    "dry_run": False,
    "created": "before",
}
SCALER = {
    "dry_run": False,
    "servers": [1, 4],
    "workers": None,
    "look_seconds": 20.0,
    "measured_seconds": 3.4,
    "look": LOOK,
    "decisions": [DECISION],
}


def test_what_status_says_of_the_scaler() -> None:
    assert autoscale_lines(status()) == []
    assert autoscale_lines(status(autoscale=SCALER)) == [
        "autoscale: 1 to 4 servers, workers are left alone",
        "autoscale saw memory 90%, busy 25%, 1.2 pushes waiting, 1,234 samples/s: cool-down: another 50 s (then)",
        "autoscale: 1 -> 2 servers: this; that (before)",
    ]
    blank = dict.fromkeys(("memory", "busy", "waiting", "samples_per_second"))
    quiet = {**SCALER, "dry_run": True, "look": {**LOOK, **blank, "said": "2 servers, 2 workers"}, "decisions": []}
    assert autoscale_lines(status(autoscale=quiet)) == [
        "autoscale, dry run: 1 to 4 servers, workers are left alone",
        "autoscale saw nothing: nothing is to change (then)",
    ]
    assert autoscale_lines(status(autoscale={**SCALER, "look": None}))[1] == (
        "autoscale: 3 of 20 s are measured of the first look"
    )
    # Of a job that is over.
    assert (
        autoscale_lines({"autoscale": {"decisions": [{**DECISION, "dry_run": True}] * 9}})
        == ["autoscale, dry run: 1 -> 2 servers: this; that (before)"] * 5
    )


def test_a_dry_run_tells_what_the_scaler_would_do(oarlock: Oarlock, job: Job) -> None:
    job.found = status(autoscale=SCALER)
    ended = oarlock("scale", "a", "--dry-run")
    assert ended.out.splitlines() == [
        "autoscale: 1 to 4 servers, workers are left alone",
        "measured until then: memory 90%, busy 25%, 1.2 pushes waiting, 1,234 samples/s",
        "by this alone: 2 -> 3 servers, 2 workers",
        "  the fullest server uses 90% of its memory, the bound is 70%",
        "decided: 2 servers, 2 workers",
        "  cool-down: another 50 s",
    ]
    assert json.loads(oarlock("scale", "a", "--dry-run", "--json").out) == SCALER
    job.found = status(autoscale={**SCALER, "look": None})
    assert "3 of 20 s are measured" in oarlock("scale", "a", "--dry-run").out
    job.found = status()
    ended = oarlock("scale", "a", "--dry-run")
    assert (ended.code, ended.out) == (1, "")
    assert "job a has no scaler: give its job file a table [autoscale]" in ended.line
    assert job.asked == []


def test_it_waits(oarlock: Oarlock, job: Job) -> None:
    wanted = {"servers": 4, "workers": 1, "leaving": {"shard": [], "worker": []}}
    job.looks = [status(2, scale=wanted), status(2, scale=wanted), status(4, moving=MOVES), status(4)]
    ended = oarlock("scale", "a", "--servers", "4", "--wait", "--json")
    assert ended.code == 0
    assert ended.err.splitlines() == [
        "job a: 4 servers, 1 workers: 2 more servers to come",
        "servers: 4 wanted, 2 there; workers: 1 wanted, 1 there",
        "servers: 4 wanted, 4 there; workers: 1 wanted, 1 there; 7 blocks still to move, 2 closed for it now",
    ]
    result = json.loads(ended.out)
    assert result["servers"] == 4
    assert result["seconds"] >= 0
    job.looks = [status(4)]
    assert "has 4 servers and 1 workers after" in oarlock("scale", "a", "--servers", "4", "--wait").out


@pytest.mark.parametrize(
    ("look", "words"),
    [
        (None, "does not answer any more"),
        (status(2, phase="done"), "is done, before it had what was asked for"),
        (status(3), "was asked for other numbers meanwhile: servers: 3 wanted, 3 there"),
    ],
)
def test_it_waits_for_nothing_that_will_not_be(oarlock: Oarlock, job: Job, look: Any, words: str) -> None:
    job.found, job.looks = status(), [look]
    ended = oarlock("scale", "a", "--servers", "4", "--wait")
    assert ended.code == 1
    assert words in ended.err.splitlines()[-1]
    assert ended.out == ""


def test_what_cannot_be_asked(oarlock: Oarlock, job: Job) -> None:
    job.error = InvalidArgument("replicas = 1 and servers = 1 contradict each other")
    ended = oarlock("scale", "a", "--servers", "1")
    assert (ended.code, ended.line) == (1, "oarlock: replicas = 1 and servers = 1 contradict each other")
    job.found = {"name": "a", "phase": "training", "version": "0.1"}
    assert "is run by Oarlock 0.1, which cannot scale it" in oarlock("scale", "a", "--servers", "3").line
    assert len(job.asked) == 1


def test_jobs_that_do_not_run(oarlock: Oarlock, train: Oarlock) -> None:
    assert "no job 'nobody'" in oarlock("scale", "nobody", "--servers", "3").line
    assert train("--name", "a", "--epochs", "1").code == 0
    ended = oarlock("scale", "a", "--servers", "3")
    assert (ended.code, ended.line) == (1, "oarlock: job a is not running")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "give --servers N, --workers M, or both"),
        (["--dry-run", "--servers", "3"], "--dry-run asks for nothing"),
        (["--dry-run", "--wait"], "--dry-run asks for nothing"),
        (["--servers", "0"], "'0': give an integer from 1 to 4096"),
        (["--workers", "-2"], "'-2': give an integer from 1 to 4096"),
        (["--workers", "many"], "'many': give an integer from 1 to 4096"),
        (["--servers", "4097"], "'4097': give an integer from 1 to 4096"),
    ],
)
def test_wrong_numbers_are_one_line(oarlock: Oarlock, arguments: list[str], words: str) -> None:
    ended = oarlock("scale", "a", *arguments)
    assert ended.code == 2
    assert words in ended.line


def test_settings_of_copies_reach_the_job(oarlock: Oarlock, data: Path) -> None:
    given = ["--data", str(data), "--replicas", "1", "--on-loss", "reload", "--moves-in-flight", "3"]
    assert oarlock("prepare", "ncf", "--name", "a", *given).code == 0
    spec = json.loads(Path("runs/a/job.json").read_text())
    assert (spec["replicas"], spec["on_loss"], spec["moves_in_flight"]) == (1, "reload", 3)
    assert 'on_loss = "reload"' in Path("runs/a/job.toml").read_text()
    for wrong, words in (
        (["--replicas", "1", "--servers", "1"], "replicas = 1 and servers = 1 contradict each other"),
        (["--on-loss", "reload", "--mode", "sync"], "on_loss = 'reload' and mode = 'sync' contradict each other"),
        (["--moves-in-flight", "0"], "moves_in_flight = 0: give an integer"),
    ):
        ended = oarlock("prepare", "ncf", "--name", "b", "--data", str(data), *wrong)
        assert ended.code == 1
        assert words in ended.line


def test_a_scaler_is_a_table_of_the_job_file(oarlock: Oarlock, train: Oarlock, data: Path) -> None:
    given = ["--data", str(data), "--set", "autoscale.servers_most=4", "--set", "autoscale.look_seconds=5"]
    assert oarlock("prepare", "ncf", "--name", "a", *given).code == 0
    spec = json.loads(Path("runs/a/job.json").read_text())
    assert (spec["autoscale"]["servers_most"], spec["autoscale"]["look_seconds"]) == (4, 5.0)
    assert "autoscale = {servers_most = 4, look_seconds = 5}" in Path("runs/a/job.toml").read_text()
    assert oarlock("prepare", "runs/a/job.toml", "--name", "b", "--set", "autoscale.dry_run=true").code == 0
    assert json.loads(Path("runs/b/job.json").read_text())["autoscale"]["dry_run"] is True
    for wrong, words in (
        (["--set", "autoscale.server_most=4"], "did you mean 'servers_most'?"),
        (["--set", "autoscale.looks=3"], "autoscale scales nothing: give servers_most"),
        (["--set", "autoscale=3"], "autoscale = 3: give a table"),
        (
            ["--set", "autoscale.servers_most=1", "--replicas", "1"],
            "servers_most = 1 and replicas = 1 contradict each other",
        ),
    ):
        ended = oarlock("prepare", "ncf", "--name", "c", "--data", str(data), *wrong)
        assert ended.code == 1
        assert words in ended.line
    ended = train("--name", "d", "--set", "autoscale.workers_most=4")
    assert ended.code == 1
    assert "a job in one process keeps the shards and workers that it begins with" in ended.line
    assert not Path("runs/d").exists()


def test_a_job_in_one_process_has_copies(train: Oarlock, oarlock: Oarlock) -> None:
    assert train("--name", "a", "--epochs", "1", "--replicas", "1").code == 0
    assert oarlock("status", "a").code == 0
    with pytest.raises(Unavailable, match="is not running"):
        scale.running(argparse.Namespace(job="a"))
