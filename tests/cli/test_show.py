# SPDX-License-Identifier: Apache-2.0
"""The view of a running job while its coordinator is away: the last status stays, with a note, and nothing is said twice."""

from typing import Any

import pytest

from oarlock.cli.show import RunView, epochs_table
from oarlock.cli.train import _sentence

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


# Metrics, whatever their names are


def result(epoch: int, auc: float | None, **changes: Any) -> dict[str, Any]:
    return {
        "epoch": epoch,
        "samples": 1000,
        "loss": 0.5,
        "metrics": {"auc": auc, "hr@10": 0.25},
        "train_seconds": 2.0,
        "evaluate_seconds": 1.0,
        **changes,
    }


def test_an_epoch_is_told_with_its_metrics(capsys: pytest.CaptureFixture[str]) -> None:
    history = [result(0, 0.75), result(1, None, evaluated=123_456)]
    with RunView() as view:
        view.show(status(history=history))
    first, second = capsys.readouterr().err.splitlines()
    assert first == (
        "epoch 1/3  loss 0.5000  auc 0.7500  hr@10 0.2500  1,000 samples in 2.0 s (500/s), evaluated in 1.0 s"
    )
    assert second == (
        "epoch 2/3  loss 0.5000  auc -  hr@10 0.2500  1,000 samples in 2.0 s (500/s), evaluated on 123,456 in 1.0 s"
    )


def test_the_table_has_a_column_for_every_metric() -> None:
    shown_status = status(name="a", history=[result(0, 0.75), result(1, None)], best=result(0, 0.75))
    table = epochs_table(shown_status)
    cells = {column.header: list(column.cells) for column in table.columns}
    assert (cells["auc"], cells["hr@10"]) == (["0.7500", "-"], ["0.2500", "0.2500"])
    assert cells["epoch"] == ["1 *", "2"]


def test_the_last_line_names_the_best_epochs_metrics() -> None:
    history = [result(0, 0.75), result(1, 0.5)]
    told = _sentence({"auc": 0.75, "hr@10": 0.25, "last_auc": 0.5, "best_epoch": 1, "seconds": 3.0, "history": history})
    assert told == "auc 0.7500  hr@10 0.2500  best_epoch 1  seconds 3.0"
    assert _sentence({"auc": None, "hr@10": 0.25, "history": history}) == "auc -  hr@10 0.2500"
    assert _sentence({"seconds": 3.0, "history": []}) == "seconds 3.0"
