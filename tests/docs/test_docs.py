# SPDX-License-Identifier: Apache-2.0
"""What the documents say can be done: their Python runs, their commands parse, their links and paths lead somewhere."""

import re
import shlex
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from oarlock.cli.main import build_parser

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
# Run, as one program each, by the test that is named.
RUN_ELSEWHERE = {
    "checkpoint.md": "tests/checkpoint/test_docs.py",
    "life_of_a_pull.md": "tests/docs/test_life_of_a_pull.py",
}
# Blocks that are no program, and the page that has them with the test that compares them with the code.
COMPARED = {
    "hex": ("wire.md", "tests/docs/test_wire.py"),
    "output": ("life_of_a_pull.md", "tests/docs/test_life_of_a_pull.py"),
}


def page(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def blocks(path: Path) -> list[tuple[str, str]]:
    return FENCE.findall(page(path))


def commands(text: str) -> Iterator[list[str]]:
    for line in text.splitlines():
        words = shlex.split(line, comments=True)
        if words:
            yield words


@pytest.fixture(params=PAGES, ids=lambda p: p.name)
def path(request: pytest.FixtureRequest) -> Path:
    found: Path = request.param
    return found


def check_command(words: list[str]) -> None:
    """Raise unless a line of a shell block is a command that exists, with options that it takes."""
    if words[0] == "make":
        targets = re.findall(r"^([a-z-]+):", page(ROOT / "Makefile"), re.MULTILINE)
        assert set(words[1:]) <= set(targets), words
    elif words[0] == "oarlock":
        try:
            build_parser().parse_args(words[1:])
        except SystemExit as error:
            pytest.fail(f"{shlex.join(words)}: the parser ends with {error.code}")
    elif words[:2] == ["python", "-m"]:
        module = ROOT / words[2].removeprefix("oarlock.").replace(".", "/")
        program = module.with_suffix(".py")
        assert (module / "__main__.py").exists() or '__name__ == "__main__"' in page(program), words
    elif words[0] == "curl":
        assert words[-1].startswith("http://127.0.0.1:8501/v2"), (
            "tests/serving/test_curl.py runs those of docs/serving.md"
        )
    elif words[:2] != ["pip", "install"]:
        pytest.fail(f"{shlex.join(words)}: this test knows no such command")


def test_python_runs(path: Path) -> None:
    found = [text for language, text in blocks(path) if language == "python"]
    if path.name in RUN_ELSEWHERE:
        assert found
        assert (ROOT / RUN_ELSEWHERE[path.name]).exists()
        return
    names: dict[str, object] = {}
    for text in found:
        exec(compile(text, str(path), "exec"), names)


def test_shell_blocks_are_commands_that_exist(path: Path) -> None:
    for language, text in blocks(path):
        if language in COMPARED:
            assert path.name == COMPARED[language][0], f"{path.name}: nothing checks a block of {language}"
            assert (ROOT / COMPARED[language][1]).exists()
            continue
        assert language in ("", "python", "sh", "toml", "json"), f"{path.name}: nothing checks a block of {language}"
        if language in ("", "sh"):
            for words in commands(text):
                check_command(words)


def test_commands_within_sentences_exist(path: Path) -> None:
    plain = FENCE.sub("", page(path))
    for text in re.findall(r"`((?:oarlock |make |python -m oarlock)[^`]*)`", plain):
        words = shlex.split(" ".join(text.split()))
        # A sentence may name a command without all that it needs.
        if words[0] == "oarlock":
            help_of = build_parser().format_help()
            assert re.search(rf"^\s+{words[1]}\s", help_of, re.MULTILINE), text
        else:
            check_command(words)


def test_the_readmes_blocks_are_looked_at() -> None:
    found = [words for language, text in blocks(ROOT / "README.md") for words in commands(text)]
    assert ["make", "demo"] in found
    assert ["make", "test"] in found
    assert ["oarlock", "demo"] in found
    assert len([words for words in found if words[0] == "oarlock"]) >= 4


@pytest.mark.parametrize(
    "line", ["make demmo", "oarlock trane ncf", "oarlock train ncf --epoch 3", "python -m oarlock.nobody", "rm -rf x"]
)
def test_a_wrong_command_would_be_found(line: str) -> None:
    with pytest.raises((AssertionError, OSError, pytest.fail.Exception)):
        check_command(shlex.split(line))


def anchors(text: str) -> set[str]:
    heads = re.findall(r"^#+ (.*)$", FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def test_links_resolve(path: Path) -> None:
    for target in LINK.findall(FENCE.sub("", page(path))):
        if re.match(r"https?://", target):
            continue
        name, _, anchor = target.partition("#")
        file = (path.parent / name) if name else path
        assert file.exists(), f"{path.name} links to {target}"
        if anchor:
            assert anchor in anchors(page(file)), f"{path.name} links to {target}"


def test_paths_that_are_named_exist(path: Path) -> None:
    """`worker/trainer.py`, `tests/test_architecture.py`, `data/`: a file or folder of the repository."""
    tops = {p.name for p in ROOT.iterdir() if p.is_dir() and not p.name.startswith(".")}
    for name in re.findall(r"`([\w.\-]+/[\w.\-/]*)`", FENCE.sub("", page(path))):
        first = name.split("/")[0]
        if first not in tops or (first == "data" and not name.endswith((".py", "data/"))):
            continue
        plain = ROOT / name.rstrip("/")
        assert plain.exists() or plain.with_suffix(".py").exists(), f"{path.name} names {name}"


def test_the_reading_order_names_every_package() -> None:
    text = page(ROOT / "README.md")
    table = text[text.index("## The source") :].split("To follow one pull")[0]
    named = re.findall(r"`(\w+)/`", table)
    packages = {p.parent.name for p in ROOT.glob("*/__init__.py")}
    assert packages - {"src", "tests"} == set(named)
    assert max(Counter(named).values()) == 1


def test_words_have_one_meaning() -> None:
    text = page(ROOT / "docs" / "design.md")
    table = text[text.index("## Words") : text.index("## Processes")]
    rows = [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("|")][2:]
    words = [word.strip() for row in rows for word in row.split(",")]
    assert len(words) >= 20
    assert [word for word, count in Counter(words).items() if count > 1] == []
