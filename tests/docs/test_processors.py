# SPDX-License-Identifier: Apache-2.0
"""The page on threads and cores names the fields that there are, with their defaults."""

import dataclasses
import re
from pathlib import Path

from oarlock.cli.options import build_parser
from oarlock.launch.config import RunConfig

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "processors.md").read_text(encoding="utf-8")


def test_every_field_stands_in_the_table_with_its_default() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \| (\S+) \| (?:worker|shard) \|", PAGE, re.MULTILINE))
    defaults = {
        f.name: f.default
        for f in dataclasses.fields(RunConfig)
        if re.search("_threads$|_pin_cores$|^request_memory", f.name)
    }
    assert rows == {name: str(default or "anywhere") for name, default in defaults.items()}


def test_every_field_is_an_option() -> None:
    for name in re.findall(r"^\| `(\w+)` \| \S+ \| (?:worker|shard) \|", PAGE, re.MULTILINE):
        given = build_parser().parse_args(["train", "ncf", f"--{name.replace('_', '-')}", "3"])
        assert str(getattr(given, name)) == "3"
