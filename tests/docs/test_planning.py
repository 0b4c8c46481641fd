# SPDX-License-Identifier: Apache-2.0
"""The page about planning: its table of fields is the policy's, and the tests that it names exist."""

import dataclasses
import re
import tomllib
from pathlib import Path

from oarlock.client.autoscale import Autoscale, read_autoscale

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "planning.md").read_text(encoding="utf-8")


def test_every_field_of_autoscale_has_its_row() -> None:
    rows = re.findall(r"^\| `(\w+)` \| ([\d.]+|false) \|", PAGE, re.MULTILINE)
    # As a job file has them.
    assert rows == [(f.name, str(f.default).lower()) for f in dataclasses.fields(Autoscale)]


def test_the_tables_of_job_files_are_read() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = [
        b for text in (PAGE, readme) for b in re.findall(r"```toml\n(.*?)```", text, re.DOTALL) if "[autoscale]" in b
    ]
    assert len(blocks) == 2
    for block in blocks:
        assert read_autoscale(tomllib.loads(block)["autoscale"], "job file").servers_most == 4


def test_the_tests_that_are_named_exist() -> None:
    named = re.findall(r"`(test_\w+)`", PAGE)
    found = (ROOT / "tests" / "cluster" / "test_planning.py").read_text(encoding="utf-8")
    assert named
    for name in named:
        assert f"def {name}(" in found
