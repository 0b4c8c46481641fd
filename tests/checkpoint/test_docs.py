# SPDX-License-Identifier: Apache-2.0
"""``docs/checkpoint.md`` is true: its Python blocks run, in order, as one program."""

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

from oarlock.checkpoint.format import format_text
from oarlock.checkpoint.manifest import Manifest

PAGE = Path(__file__).resolve().parents[2] / "docs" / "checkpoint.md"


def test_its_blocks_run(tmp_path: Path) -> None:
    text = PAGE.read_text(encoding="utf-8")
    names: dict[str, Any] = {"folder": tmp_path}
    blocks = list(re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))
    assert len(blocks) == text.count("```") // 2 >= 8
    for block in blocks:
        line = text.count("\n", 0, block.start(1))
        # The empty lines give a failure the line of the page.
        exec(compile("\n" * line + block[1], str(PAGE), "exec"), names)


def test_it_names_every_field_and_the_version() -> None:
    text = PAGE.read_text(encoding="utf-8")
    rows = {
        name for row in re.findall(r"^\| (.*?) \|", text, re.MULTILINE) for name in re.findall(r"`([a-z_.]+)`", row)
    }
    assert {f.name for f in fields(Manifest)} | {"checksum"} <= rows
    assert f"version of this format, `{format_text()}`" in text
