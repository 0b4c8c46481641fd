# SPDX-License-Identifier: Apache-2.0
"""`oarlock chaos`: wrong usage is one line; a ledger tells what was done and what it came to."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from oarlock.cli import chaos as command
from oarlock.cli.chaos import lines_of
from oarlock.launch.config import run_config
from oarlock.proto.tokens import new_tokens

Oarlock = Callable[..., Any]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "give one of JOB.toml and --demo"),
        (["job.toml", "--demo"], "give one of JOB.toml and --demo"),
        (["ncf"], "'ncf' is no job file"),
        (["--demo", "--data", "d"], "--demo makes its own data"),
        (["--demo", "--events", "0"], "'0': give an integer from 1 to 100000"),
        (["--demo", "--events", "-3"], "--events"),
        (["--demo", "--events", "1" * 40], "give an integer from 1 to 100000"),
        (["--demo", "--gap", "0"], "'0': give seconds from 0.05 to 3600"),
        (["--demo", "--gap", "nan"], "'nan': give seconds"),
        (["--demo", "--gap", "inf"], "'inf': give seconds"),
        (["--demo", "--gap", "1s"], "'1s': give seconds"),
        (["--demo", "--seed", "x"], "'x': give an integer from 0"),
        (["--demo", "--seed", "²"], "give an integer from 0"),
        (["--demo", "--quiet-runs", "101"], "give an integer from 0 to 100"),
        (["--demo", "--set", "epochs"], "write it as NAME=VALUE"),
        (["--demo", "--event", "3"], "did you mean --events?"),
    ],
)
def test_wrong_usage_is_one_line(oarlock: Oarlock, arguments: list[str], words: str) -> None:
    ended = oarlock("chaos", *arguments)
    assert ended.code == 2
    assert words in ended.line
    assert ended.out == ""


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "absent.toml"),
        ("epochs = ", "job.toml"),
        ('recipe = "ncf"', "no data: give --data DIR"),
        ('data = "d"\nreplicas = 9', "replicas"),
        ('data = "d"\nrecipe = "nfc"', "did you mean 'ncf'"),
        ('data = "d"\ncheckpoint_path = "/x"', "checkpoint_path = '/x' and --quiet-runs contradict each other"),
    ],
)
def test_bad_job_files_are_one_line(oarlock: Oarlock, tmp_path: Path, text: str | None, words: str) -> None:
    job = tmp_path / ("absent.toml" if text is None else "job.toml")
    if text is not None:
        job.write_text(text, encoding="utf-8")
    ended = oarlock("chaos", str(job), "--quiet-runs", "1")
    assert ended.code == 1
    assert words in ended.line
    assert ended.out == ""


def test_the_security_of_a_job_file_is_that_of_its_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = tmp_path / "tokens.toml"
    tokens.touch(mode=0o600)
    tokens.write_text(new_tokens())
    given: dict[str, Any] = {}
    monkeypatch.setattr(command, "run_job", lambda *_, **launching: given.update(launching))
    run = run_config({"recipe": "ncf", "data": "d", "security": {"token_file": str(tokens)}})
    command._train(SimpleNamespace(), tmp_path, run, None)  # type: ignore[arg-type]
    assert given["security"].identifies
    assert given["security"].spec.token_file == str(tokens)


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("replicas", [0, 1])
def test_a_job_file_under_chaos(oarlock: Oarlock, data: Path, tmp_path: Path, replicas: int) -> None:
    job = tmp_path / "job.toml"
    job.write_text(
        f'recipe = "ncf"\ndata = "{data}"\nepochs = 60\nreplicas = {replicas}\nlease_seconds = 2.0\nheartbeat_seconds = 0.2\n',
        encoding="utf-8",
    )
    ended = oarlock("chaos", str(job), "--events", "5", "--gap", "0.7", "--seed", "4", "--quiet-runs", "1", "--json")
    assert ended.code == 0, ended.err
    result = json.loads(ended.out.splitlines()[-1])
    assert result["phase"] == "done"
    assert 1 <= result["events"] <= result["asked"] == 5
    assert len(result["ledger"]) == result["events"] + result["passed_over"]
    assert result["groups_unacknowledged"] == 0
    assert len(set(result["samples"])) == 1, "every epoch has all samples"
    assert any(kind.endswith("shard") and kind.startswith(("kill", "stop")) for kind in result["kinds"]) <= bool(
        replicas
    )
    assert (result["metric"], len(result["quiet"])) == ("hr@10", 1)
    assert abs(result["value"] - result["quiet"][0]) == pytest.approx(result["gap"], abs=1e-6)
    assert ("not kill shard, stop shard: without copies" in ended.err) == (not replicas)


def test_what_is_said_below_the_table() -> None:
    result: dict[str, Any] = {
        "events": 3,
        "asked": 5,
        "seconds": 12.3,
        "recover_s_p50": 0.5,
        "recover_s_max": 1.25,
        "paused_recover_s_max": None,
        "worker_recover_s_max": 2.0,
        "coordinator_recover_s_max": None,
        "groups": 40,
        "groups_unacknowledged": 0,
        "metric": "auc",
        "value": 0.71,
        "quiet": [0.7, 0.73],
        "gap": 0.005,
    }
    lines = lines_of(result)
    assert lines[0] == "3 of 5 events in 12 s"
    assert "0.50 s in the median, 1.25 s at the worst; stopped ones: -" in lines[1]
    assert lines[2] == "of 40 groups none had no push acknowledged"
    assert lines[3] == "auc 0.7100 in the last epoch; of quiet runs 0.7000, 0.7300: 0.0050 from their mean"
    assert "of 40 groups 2 had" in lines_of({**result, "groups_unacknowledged": 2})[2]
    assert len(lines_of({**result, "groups_unacknowledged": None, "value": None})) == 2
