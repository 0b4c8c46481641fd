# SPDX-License-Identifier: Apache-2.0
"""The page about planning: its table of fields is the policy's, and the tests that it names exist."""

import dataclasses
import re
from pathlib import Path

from oarlock.client.autoscale import Autoscale

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "planning.md").read_text(encoding="utf-8")


def test_every_field_of_autoscale_has_its_row() -> None:
    rows = re.findall(r"^\| `(\w+)` \| ([\d.]+|false) \|", PAGE, re.MULTILINE)
    # As a job file has them.
    assert rows == [(f.name, str(f.default).lower()) for f in dataclasses.fields(Autoscale)]


def test_the_tests_that_are_named_exist() -> None:
    named = re.findall(r"`(test_\w+)`", PAGE)
    found = (ROOT / "tests" / "cluster" / "test_planning.py").read_text(encoding="utf-8")
    assert named
    for name in named:
        assert f"def {name}(" in found
