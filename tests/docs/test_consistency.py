# SPDX-License-Identifier: Apache-2.0
"""docs/consistency.md names tests, planted bugs and invariants: all of them exist, and no invariant is left out."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "consistency.md").read_text(encoding="utf-8")


def functions(path: Path) -> set[str]:
    return {n.name for n in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(n, ast.FunctionDef)}


def test_every_test_that_is_named_exists() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", TEXT)
    assert len(named) > 25
    for file, name in named:
        assert name in functions(ROOT / file), f"{file} has no {name}"


def test_planted_bugs_exist() -> None:
    folder = ROOT / "tests" / "simulation"
    planted = set().union(*(functions(file) for file in folder.glob("planted*.py")))
    named = {n for line in re.findall(r"planted bugs? ((?:`\w+`(?:, )?)+)", TEXT) for n in re.findall(r"`(\w+)`", line)}
    assert len(named) > 8
    assert named <= planted


def test_every_invariant_is_explained() -> None:
    sources = "".join(p.read_text(encoding="utf-8") for p in (ROOT / "simulation").glob("*.py"))
    raised = set(re.findall(r"[\"']([A-Z]\d)[\"':]", sources))
    table = TEXT[TEXT.index("| name | must hold |") :].split("\n\n")[0]
    assert raised == set(re.findall(r"\b[A-Z]\d\b", table))
