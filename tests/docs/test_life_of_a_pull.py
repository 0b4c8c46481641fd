# SPDX-License-Identifier: Apache-2.0
"""``docs/life_of_a_pull.md`` is true: it runs as one program and prints what it says, and all that it names is there."""

import contextlib
import io
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "life_of_a_pull.md"
TEXT = PAGE.read_text(encoding="utf-8")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PROSE = FENCE.sub("", TEXT)


def test_the_program_prints_what_the_page_says() -> None:
    blocks = list(FENCE.finditer(TEXT))
    # Each block of the program is followed by what it prints.
    assert [block[1] for block in blocks] == ["python", "output"] * (len(blocks) // 2)
    assert len(blocks) >= 20
    names: dict[str, Any] = {"__name__": "life_of_a_pull"}
    for program, output in zip(blocks[::2], blocks[1::2], strict=True):
        line = TEXT.count("\n", 0, program.start(2))
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            # The empty lines give a failure the line of the page.
            exec(compile("\n" * line + program[2], str(PAGE), "exec"), names)
        assert printed.getvalue() == output[2], f"the block at line {line} of the page"


def defines(file: Path, name: str) -> bool:
    """Whether ``file`` has a class or function of that name; ``A.b``: a class A with a function b behind it."""
    text = file.read_text(encoding="utf-8")
    for part in name.split("."):
        found = re.search(rf"^ *(?:async )?(?:def|class) {part}\b", text, re.MULTILINE)
        if found is None:
            return False
        text = text[found.end() :]
    return True


def places() -> list[tuple[str, str]]:
    """Return (file, class or function) of all steps: below **Where:**, names stand behind their file."""
    found = []
    for paragraph in re.findall(r"^\*\*Where:\*\* (.*?)\n\n", PROSE, re.MULTILINE | re.DOTALL):
        file = ""
        for token in re.findall(r"`([^`]+)`", paragraph):
            if token.endswith(".py"):
                file = token
            else:
                found.append((file, token))
    return found


@pytest.mark.parametrize(("file", "name"), sorted(set(places())), ids=lambda value: value.replace("/", "-"))
def test_what_a_step_names_is_where_it_says(file: str, name: str) -> None:
    assert (ROOT / file).is_file()
    assert defines(ROOT / file, name), f"{file} has no {name}"


def test_every_step_says_where_it_happens() -> None:
    assert len(re.findall(r"^### \d+\. ", TEXT, re.MULTILINE)) == 10
    # The ten steps, the push, and the lost answer.
    assert PROSE.count("**Where:**") == 12
    assert len({file for file, _ in places()}) >= 20


def test_every_name_in_the_text_is_in_the_code() -> None:
    files = {file for file, _ in places()} | {"proto/errors.py", "proto/shard.proto"}
    source = "".join((ROOT / file).read_text(encoding="utf-8") for file in files)
    # What the page's own program defines.
    source += "".join(block[2] for block in FENCE.finditer(TEXT))
    for token in set(re.findall(r"`([^`]+)`", PROSE)):
        if "/" in token:
            assert (ROOT / token).exists(), token
        else:
            assert all(re.search(rf"\b{part}\b", source) for part in token.split(".")), token


def test_a_wrong_name_would_be_found() -> None:
    assert defines(ROOT / "embedding/table.py", "Table.pull")
    assert not defines(ROOT / "embedding/table.py", "Table.fetch")
    assert not defines(ROOT / "embedding/table.py", "Sable.pull")
    assert not defines(ROOT / "embedding/index.py", "Table")
