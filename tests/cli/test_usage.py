# SPDX-License-Identifier: Apache-2.0
"""Wrong usage: exit code 2 and one line with the near name; and help that says what everything is."""

import argparse
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from oarlock.cli.options import build_parser

Oarlock = Callable[..., Any]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "oarlock: the following arguments are required: COMMAND"),
        (["trian"], "invalid choice: 'trian'"),
        (["train"], "oarlock train: the following arguments are required: recipe"),
        (["train", "ncf", "--epohcs", "3"], "unknown argument --epohcs; did you mean --epochs?"),
        (["train", "ncf", "--epohcs=3"], "did you mean --epochs?"),
        (["train", "ncf", "--epoch", "3"], "did you mean --epochs?"),
        (["train", "ncf", "extra"], "unknown argument extra"),
        (["train", "ncf", "--epochs", "three"], "argument --epochs: invalid int value: 'three'"),
        (["train", "ncf", "--reader", "csv"], "invalid choice: 'csv'"),
        (["train", "ncf", "--set", "epochs"], "'epochs': write it as NAME=VALUE"),
        (["train", "ncf", "--set", "a..b=3"], "write it as NAME=VALUE"),
        (["train", "ncf", "--resume"], "--resume needs the --name or --dir of the job"),
        (["data", "generate", "ncf"], "oarlock data generate: the following arguments are required: OUT_DIR"),
        (["data", "generate", "ncf", "d", "--usres", "3"], "did you mean --users?"),
        (["data"], "oarlock data: the following arguments are required: VERB"),
        (["status"], "oarlock status: the following arguments are required: JOB"),
        (["prepare", "ncf", "--resume"], "unknown argument --resume"),
    ],
)
def test_wrong_usage_is_one_line(oarlock: Oarlock, arguments: list[str], words: str) -> None:
    ended = oarlock(*arguments)
    assert ended.code == 2
    assert words in ended.line
    assert "--help`" in ended.line
    assert ended.out == ""


def parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for child in action.choices.values():
                yield from parsers(child)


@pytest.mark.parametrize("parser", list(parsers(build_parser())), ids=lambda p: p.prog)
def test_help_explains_every_option(parser: argparse.ArgumentParser, oarlock: Oarlock) -> None:
    for action in parser._actions:
        if not isinstance(action, argparse._SubParsersAction):
            assert action.help, f"{parser.prog} {action.option_strings or action.dest}"
    ended = oarlock(*parser.prog.split()[1:], "--help")
    assert ended.code == 0
    assert ended.out.startswith(f"usage: {parser.prog}")
    assert max(map(len, ended.out.splitlines())) <= 120


def test_the_version(oarlock: Oarlock) -> None:
    ended = oarlock("--version")
    assert ended.code == 0
    assert ended.out.startswith("oarlock ")
