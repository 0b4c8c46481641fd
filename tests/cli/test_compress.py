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
    assert (told["cut"], told["to"]) == (1, "small")
    assert {name: costs["method"] for name, costs in told["tables"].items()} == {"user": "int8", "item": "int8"}
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
    # A method for each table; those of which nothing is said stay as they are.
    for arguments, methods in (
        (("--table", "item=pq:8", "--table", "user=mixed:0.2:4"), {"item": ("pq", 8), "user": ("mixed", 16)}),
        (("--table", "item=prune:0.5", "--method", "int8"), {"item": ("prune", 160), "user": ("int8", 44)}),
        (
            ("--table", "item=mixed", "--table", "user", "--method", "int4"),
            {"item": ("mixed", 40), "user": ("int4", 24)},
        ),
        (
            (
                "--table",
                "item=int4",
            ),
            {"item": ("int4", 24)},
        ),
    ):
        by = ("--by", "change") if "mixed" in str(methods) else ()
        ended = oarlock(
            "compress",
            "first",
            *arguments,
            *by,
            "--no-evaluation",
            "--json",
            "--to",
            f"of-{len(methods)}{arguments[1]}",
        )
        assert ended.code == 0, ended.err
        tables = json.loads(ended.out)["tables"]
        dims = {name: costs["before"]["row_bytes"] for name, costs in tables.items()}
        assert dims == dict.fromkeys(methods, 160)
        assert {name: (costs["method"], costs["after"]["row_bytes"]) for name, costs in tables.items()} == methods
    assert "does not keep how often" in oarlock("compress", "first", "--method", "mixed", "--to", "other").line
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
        (["--table", "item=zip"], 1, "write int8, int4, pq:PARTS"),
        (["--table", "item=int8:4"], 1, "write int8, int4, pq:PARTS"),
        (["--table", "item=pq:x"], 1, "'x' is not an integer"),
        (["--table", "item=mixed:2"], 1, "'2' is not a share"),
        (["--table", "item=mixed:nan:4"], 1, "'nan' is not a share"),
        (["--table", "item"], 1, "give --method METHOD, or a method for each table"),
        ([], 1, "give --method METHOD, or a method for each table"),
        (["--table", "item=int8", "--table", "item=int4"], 1, "names one table twice"),
        (["--table", "item=int8", "--parts", "4"], 1, "--parts is for --method"),
        (["--method", "int8", "--by", "score"], 1, "--by is for mixed and prune"),
    ],
)
def test_what_does_not_fit_is_said_in_one_line(oarlock: Oarlock, arguments: list[str], code: int, words: str) -> None:
    ended = oarlock("compress", "nothing", "--to", "small", *arguments)
    assert ended.code == code
    assert words in ended.line
    assert ended.out == ""
