# SPDX-License-Identifier: Apache-2.0
"""`oarlock serve --recall`: what is refused before anything is served."""

import sys
from collections.abc import Callable
from typing import Any

import pytest

Oarlock = Callable[..., Any]


def test_what_cannot_be_indexed_is_said_in_one_line(
    oarlock: Oarlock, train: Oarlock, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert train("--epochs", "1", "--name", "first").code == 0
    monkeypatch.setitem(sys.modules, "faiss", None)
    for arguments, words in (
        (("runs/first", "--recall", "item:near"), "with inner or cosine as metric"),
        (("runs/first", "--recall", "item"), "pip install"),
        (("runs/first", "--recall", "item:exact", "--recall", "item:exact"), "indexed twice"),
        (("runs/first", "--recall", "film:exact"), "no table 'film'"),
        (("runs/first", "--recall", "item:inner:0-999:exact"), "columns 0-999 of table item"),
        (("--follow", "first", "--recall", "film:exact"), "no table 'film'"),
        (("--follow", "first", "--recall", "item:inner:0-999:exact"), "columns 0-999 of table item"),
        (("--follow", "first", "--recall", "item:exact", "--recall", "item"), "pip install"),
        (("--follow", "first", "--recall", "item:exact", "--recall", "item:exact"), "indexed twice"),
    ):
        ended = oarlock("serve", *arguments)
        assert ended.code == 1
        assert words in ended.err.splitlines()[-1]
