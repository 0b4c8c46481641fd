# SPDX-License-Identifier: Apache-2.0
"""What is said of a job's cuts: how far one is, which one failed, which is the best."""

import io
from typing import Any

import pytest
from rich.console import Console

from oarlock.cli import show
from oarlock.cli.cut_lines import cut_lines, progress_line

MADE = [{"cut": 3, "path": "s3://b/x/cut-000003", "epoch": 1}, {"cut": 5, "path": "s3://b/x/cut-000005", "epoch": 2}]


def test_how_far_a_cut_is() -> None:
    assert progress_line({"cut": {"last": 5, "begun": 0}}) == progress_line({}) == ""
    assert progress_line({"cut": {"begun": 6, "written_bytes": 0, "bytes": 0}}) == "cut 6: workers come to the gate"
    half = {"cut": {"begun": 6, "written_bytes": 250_000_000, "bytes": 1_000_000_000}}
    assert progress_line(half) == "cut 6: 250 of 1,000 MB written (25%)"


def test_the_newest_the_best_and_the_one_that_failed() -> None:
    status: dict[str, Any] = {"checkpoints": MADE, "cut": {"best": 3, "failed": {"cut": 6, "error": "no space left"}}}
    assert cut_lines(status) == [
        "newest checkpoint: cut 5, s3://b/x/cut-000005",
        "best checkpoint: cut 3, after epoch 1, s3://b/x/cut-000003",
        "cut 6 came to nothing: no space left",
    ]
    # What has been made good since is no news.
    status["cut"] = {"best": 9, "failed": {"cut": 4, "error": "no space left"}}
    assert cut_lines(status) == ["newest checkpoint: cut 5, s3://b/x/cut-000005"]
    assert cut_lines({"checkpoints": [], "cut": {}}) == cut_lines({}) == []


def test_a_cut_that_takes_long_is_told_of_in_lines_where_there_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(show.time, "monotonic", lambda: now)
    view, out = show.RunView(), io.StringIO()
    view._console = Console(file=out, width=200)
    status: dict[str, Any] = {"phase": "training", "reason": "", "history": [], "epochs": 1, "members": []}
    for begun, written, at in (
        (0, 0, 100.0),
        (6, 100, 105.0),
        (6, 200, 111.0),
        (6, 300, 119.0),
        (0, 0, 300.0),
        (7, 1, 301.0),
    ):
        now = at
        cut = {"begun": begun, "written_bytes": written * 1_000_000, "bytes": 400_000_000} if begun else {"begun": 0}
        view.show({**status, "cut": cut})
    assert out.getvalue().splitlines() == ["cut 6: 200 of 400 MB written (50%)"]
