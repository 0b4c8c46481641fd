# SPDX-License-Identifier: Apache-2.0
"""`oarlock compress`: what it prints, with and without the job's data, and what it refuses."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Oarlock = Callable[..., Any]


def test_a_copy_is_made_and_what_it_costs_is_said(oarlock: Oarlock, train: Oarlock, data: Path) -> None:
    assert train("--epochs", "1", "--name", "first").code == 0
    ended = oarlock("compress", "first", "--method", "int8", "--to", "small", "--json")
    assert ended.code == 0, ended.err
    told = json.loads(ended.out)
    assert (told["cut"], told["to"], told["method"]) == (1, "small", "int8")
    assert told["tables"].keys() == {"user", "item"}
    for costs in told["tables"].values():
        assert costs["after"]["rows"] == costs["before"]["rows"] > 0
        assert costs["after"]["bytes"] < costs["before"]["bytes"]
    assert abs(told["metrics"]["after"]["hr@10"] - told["metrics"]["before"]["hr@10"]) < 0.1
    assert "is there already" in oarlock("compress", "first", "--method", "int8", "--to", "small").line
    ended = oarlock("compress", "first@1", "--method", "prune", "--keep", "0.25", "--table", "user", "--to", "less")
    assert ended.code == 0, ended.err
    lines = [line for line in ended.out.splitlines() if "user" in line or "hr@10" in line]
    assert "0.2" in lines[0]
    assert len(lines) == 2
    # Alone it says why it does not know.
    shutil.copytree("runs/first/checkpoints", "alone")
    ended = oarlock("compress", "alone", "--method", "pq", "--parts", "4", "--to", "other")
    assert "quality is not told: the job's folder" in ended.out
    ended = oarlock("compress", "alone", "--method", "int4", "--no-evaluation", "--to", "another")
    assert "quality is not told: --no-evaluation" in ended.out
    # A copy is served, and is no checkpoint to go on from.
    assert "no checkpoint" in oarlock("digest", "small").line


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--method", "zip"], 2, "invalid choice: 'zip'"),
        (["--method", "int8", "--parts", "4"], 1, "--parts and --method int8 contradict each other"),
        (["--method", "pq", "--keep", "0.5"], 1, "--keep and --method pq contradict each other"),
        (["--method", "prune", "--keep", "0"], 2, "give a share"),
        (["--method", "pq", "--parts", "0"], 2, "give an integer"),
        (["--method", "int8"], 1, "no checkpoint"),
    ],
)
def test_what_does_not_fit_is_said_in_one_line(oarlock: Oarlock, arguments: list[str], code: int, words: str) -> None:
    ended = oarlock("compress", "nothing", "--to", "small", *arguments)
    assert ended.code == code
    assert words in ended.line
    assert ended.out == ""
