# SPDX-License-Identifier: Apache-2.0
"""Where the pages of metrics are: said once by the view of a running job, and by `oarlock status` for every member."""

from typing import Any

import pytest
from rich.console import Console

from oarlock.cli.jobs import _members
from oarlock.cli.show import RunView


def status(**changes: Any) -> dict[str, Any]:
    return {"phase": "training", "reason": "", "history": [], "members": [], **changes}


def test_the_view_says_once_where_the_coordinators_page_is(capsys: pytest.CaptureFixture[str]) -> None:
    with RunView() as view:
        view.show(status(metrics=""))
        for _ in range(3):
            view.show(status(metrics="127.0.0.1:9100"))
        # What is stored of a job says nothing of it; another life of the coordinator may have another page.
        view.show(status())
        view.show(status(metrics=""))
        view.show(status(metrics="127.0.0.1:9101"))
    said = [line for line in capsys.readouterr().err.splitlines() if "metrics" in line]
    assert said == [f"metrics at http://127.0.0.1:{port}/metrics" for port in (9100, 9101)]


def member(number: int, **stats: Any) -> dict[str, Any]:
    return {"role": "shard", "id": number, "address": f"h:{number}", "host": "h", "pid": 7, "stats": stats}


def text_of(*members: dict[str, Any]) -> str:
    console = Console(width=200)
    with console.capture() as captured:
        console.print(_members({"members": list(members)}))
    return captured.get()


def test_members_are_shown_with_their_pages_if_any_has_one() -> None:
    assert "metrics" not in text_of(member(0, rows=5), member(1))
    shown = text_of(member(0, rows=5, metrics="127.0.0.1:9101"), member(1))
    assert "metrics" in shown
    assert "127.0.0.1:9101" in shown


def test_what_members_say_is_no_style() -> None:
    words = "[red]page[/] [/nothing]"
    assert words in text_of(member(0, metrics=words, open_splits=["[/]"]))
