# SPDX-License-Identifier: Apache-2.0
"""`oarlock train --restore`, with and without `--resume`: what each form does, and what is said of the others."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Command = Callable[..., Any]


def test_every_form_of_going_on(train: Command, oarlock: Command) -> None:
    assert train("--epochs", "2", "--name", "a", "--set", "checkpoints_kept=9").code == 0

    # A new job needs no options again: it is as the one was that it comes from.
    ended = oarlock("train", "ncf", "--restore", "a@1", "--name", "b", "--in-process", "--epochs", "3", "--json")
    assert ended.code == 0
    result = json.loads(ended.out)
    assert (result["run"], result["epochs"], len(result["history"])) == (2, 3, 3)
    assert result["history"][0] == json.loads(oarlock("status", "a", "--json").out)["history"][0]
    job = json.loads(oarlock("status", "a", "--json").out)["job"]
    assert f"run 2: went on from cut 1 of job {job}, made in run 1" in oarlock("status", "b").out

    # A damaged cut, and the command that goes on from the one before.
    victim = next(Path("runs/a/checkpoints/cut-000002").glob("rows-*"))
    victim.write_bytes(victim.read_bytes()[:-9])
    ended = oarlock("train", "ncf", "--name", "a", "--resume", "--in-process")
    assert ended.code == 1
    command = "oarlock train ncf --name a --resume --restore @1"
    assert ended.line.endswith(f"cut 1 is the next older one that is whole; `{command}` goes on from that one")
    ended = oarlock(*command.split()[1:], "--in-process", "--json")
    assert ended.code == 0
    assert json.loads(ended.out)["checkpoint"].endswith("cut-000003")
    assert "run 2: went on from cut 1, made in run 1" in oarlock("status", "a").out


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("--restore", "@1", "--name", "b"), 2, "of which job? Give PATH@1 to begin a new job with it, or --resume"),
        (
            ("--resume", "--restore", "a@1", "--name", "a"),
            2,
            "to begin a new job with that checkpoint leave out --resume",
        ),
        (("--resume", "--restore", "@1"), 2, "--resume needs the --name or --dir"),
        (("--resume", "--restore", "@x", "--name", "a"), 1, "write it as @CUT, such as @12"),
        (("--resume", "--restore", "@7", "--name", "a"), 1, "no committed cut 7 in"),
        (("--restore", "a", "--name", "a"), 1, "holds a job already: go on with --resume"),
        (("--name", "b", "--accept-signature"), 2, "is for a job that goes on: give it with --resume or --restore"),
        (("--restore", "aa", "--name", "b"), 1, "aa is no job under runs/, no folder and no URL; jobs: a"),
        (("--restore", "a@1", "--name", "b", "--seed", "5"), 1, "seed cannot change in a job that goes on"),
        (("--restore", "a@1", "--name", "b", "--data", "nowhere"), 1, "nowhere"),
    ],
)
def test_what_is_said_of_others(
    oarlock: Command, made: Path, tmp_path: Path, arguments: tuple[str, ...], code: int, says: str
) -> None:
    shutil.copytree(made, tmp_path / "runs" / "a")
    ended = oarlock("train", "ncf", "--in-process", *arguments)
    assert ended.code == code
    assert says in ended.line
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["a"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """A job of one epoch; copy it before it is changed."""
    from oarlock.launch.config import run_config
    from oarlock.launch.folder import create
    from oarlock.launch.inprocess import run_in_process

    folder = tmp_path_factory.mktemp("made") / "a"
    options = {"batch_samples": 1024}
    run = run_config({"data": str(data), "epochs": 1, "reader": "arrow", "recipe_options": options})
    run_in_process(create(folder, "a", run), folder, watch=lambda status: True, watch_seconds=0.01)
    return folder


def test_a_prepared_job_knows_where_it_begins(oarlock: Command, made: Path, tmp_path: Path) -> None:
    shutil.copytree(made, tmp_path / "runs" / "a")
    ended = oarlock("prepare", "ncf", "--restore", "a", "--name", "b")
    assert ended.code == 0
    spec = json.loads((tmp_path / "runs" / "b" / "job.json").read_text())
    assert spec["restore"] == str(tmp_path / "runs" / "a" / "checkpoints" / "cut-000001")


def test_a_warm_start(train: Command, oarlock: Command, made: Path, tmp_path: Path) -> None:
    shutil.copytree(made, tmp_path / "runs" / "a")
    ended = train("--epochs", "1", "--name", "b", "--warm-start", "a", "--tables", "item", "--json")
    assert ended.code == 0, ended.err
    assert "run 1: began warm with" in oarlock("status", "b").out


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("--tables", "user"), 2, "--tables and --dense say what --warm-start takes over: give that, too"),
        (("--warm-start", "a", "--restore", "a"), 2, "--warm-start and --restore contradict each other"),
        (("--warm-start", "a", "--resume"), 2, "--warm-start and --resume contradict each other"),
        (("--warm-start", "a", "--tables", "=x"), 1, "--tables =x: give names with commas between"),
        (("--warm-start", "a", "--tables", "x,x"), 1, "each once"),
        (("--warm-start", "a", "--tables", "itmes"), 1, "the job has no table 'itmes'; did you mean"),
        (("--warm-start", "@1"), 1, "give the name or folder of a job"),
    ],
)
def test_what_is_said_of_other_warm_starts(
    train: Command, made: Path, tmp_path: Path, arguments: tuple[str, ...], code: int, says: str
) -> None:
    shutil.copytree(made, tmp_path / "runs" / "a")
    ended = train("--name", "b", *arguments)
    assert ended.code == code
    assert says in ended.line
