# SPDX-License-Identifier: Apache-2.0
"""The page about elasticity: its settings are those of a job, with their defaults, and the files that it names are there."""

import dataclasses
import re
from pathlib import Path

from oarlock.client.job import JobSpec
from oarlock.launch.config import RunConfig

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "elasticity.md").read_text(encoding="utf-8")


def table(head: str) -> list[list[str]]:
    """Return the cells of the table whose first column is called ``head``."""
    found = re.search(rf"^\| {head} \|.*\n\|[-|]+\n((?:\|.*\n)+)", PAGE, re.MULTILINE)
    assert found is not None, head
    return [[cell.strip() for cell in line.strip("|\n").split("|")] for line in found[1].splitlines()]


def test_settings_are_those_of_a_job() -> None:
    fields = {f.name: f.default for f in dataclasses.fields(JobSpec)}
    ours = {f.name: f.default for f in dataclasses.fields(RunConfig)}
    for cell, default, meaning in table("setting"):
        name = cell.strip("`")
        assert default.strip("`") == str(fields[name]) == str(ours[name]), name
        assert meaning


def test_files_that_decide_are_there() -> None:
    named = [cell.strip("`") for cell, _ in table("file")]
    assert len(named) == len(set(named)) >= 8
    assert all((ROOT / "cluster" / name).is_file() for name in named)
