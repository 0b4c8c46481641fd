# SPDX-License-Identifier: Apache-2.0
"""The view of a running job while its coordinator is away: the last status stays, with a note, and nothing is said twice."""

from typing import Any

import pytest

from oarlock.cli.show import RunView

NOTE = "the coordinator is being started again"


def status(**changes: Any) -> dict[str, Any]:
    return {
        "phase": "training",
        "reason": "",
        "epoch": 1,
        "epochs": 3,
        "history": [],
        "warnings": [],
        "splits": 10,
        "splits_closed": 4,
        "evaluated": 0,
        "evaluation_splits": 2,
        "members": [{"stats": {"samples": 1000}}],
        **changes,
    }


def shown(view: RunView) -> tuple[str, float, str]:
    (task,) = view._progress.tasks
    return task.description, task.completed, task.fields["note"]


def test_the_coordinators_absence_is_noted_and_nothing_else_moves(capsys: pytest.CaptureFixture[str]) -> None:
    warning = "coordinator 0 was ended by SIGKILL; started again (1 of 1000)"
    with RunView() as view:
        view._since -= 2.0
        view.show(status())
        before = shown(view)
        assert before[:2] == ("epoch 2/3 training", 4)
        assert before[2].endswith(" samples/s")
        for _ in range(3):
            # What came before it would now give a speed of nothing.
            view._since -= 2.0
            view.show(status(note=NOTE, warnings=[warning]))
            assert shown(view) == (*before[:2], NOTE)
        view._since -= 2.0
        view.show(status(warnings=[warning], splits_closed=6, members=[{"stats": {"samples": 3000}}]))
        description, completed, note = shown(view)
        assert (description, completed) == ("epoch 2/3 training", 6)
        assert note.endswith(" samples/s")
        assert note != "0 samples/s"
    assert capsys.readouterr().err.count(warning) == 1
