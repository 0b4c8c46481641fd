# SPDX-License-Identifier: Apache-2.0
"""The view of a running job while its coordinator is away: the last status stays, with a note, and nothing is said twice."""

from typing import Any

import pytest

from oarlock.cli.show import RunView, epochs_table, restored_epochs, wire_lines
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


def test_what_the_scaler_decides_is_told_once(capsys: pytest.CaptureFixture[str]) -> None:
    first = {
        "number": 1,
        "before": [1, 1],
        "servers": 2,
        "workers": 1,
        "reasons": ["full"],
        "dry_run": False,
        "created": "t",
    }
    second = {**first, "number": 2, "before": [2, 1], "workers": 2, "reasons": ["a", "b"], "dry_run": True}
    with RunView() as view:
        for decisions in ([], [first], [first], [first, second], [second]):
            view.show(status(autoscale={"decisions": decisions}))
    said = [line for line in capsys.readouterr().err.splitlines() if "autoscale" in line]
    assert said == ["autoscale: 1 -> 2 servers: full (t)", "autoscale, dry run: 1 -> 2 workers: a; b (t)"]


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


def test_epochs_of_before_a_restore_are_told_apart(capsys: pytest.CaptureFixture[str]) -> None:
    made = [{"cut": cut, "path": f"runs/a/cut-{cut}", "epoch": cut} for cut in (1, 2, 3)]
    events = [
        {"event": "restore", "run": run, "cut": cut, "path": f"runs/a/cut-{cut}"} for run, cut in ((2, 3), (3, 1))
    ]
    history = [result(0, 0.75), result(1, 0.5)]
    with RunView() as view:
        view.show(status(run=3, history=history, checkpoints=made, events=events))
    first, second = capsys.readouterr().err.splitlines()
    assert first.endswith("evaluated in 1.0 s  (from the checkpoint)")
    assert second.endswith("evaluated in 1.0 s")
    assert restored_epochs(status(run=1, checkpoints=made, events=events)) == 0


def test_the_table_has_a_column_for_every_metric() -> None:
    shown_status = status(name="a", history=[result(0, 0.75), result(1, None)], best=result(0, 0.75))
    table = epochs_table(shown_status)
    cells = {column.header: list(column.cells) for column in table.columns}
    assert (cells["auc"], cells["hr@10"]) == (["0.7500", "-"], ["0.2500", "0.2500"])
    assert cells["epoch"] == ["1 *", "2"]


def test_the_last_line_names_the_best_epochs_metrics() -> None:
    history = [result(0, 0.75), result(1, 0.5)]
    found = {
        "auc": 0.75,
        "hr@10": 0.25,
        "last_auc": 0.5,
        "last_hr@10": 0.25,
        "seconds": 3.0,
        "checkpoint": "runs/a/cut-2",
    }
    told = _sentence({**found, "best_epoch": 1, "history": history})
    # The checkpoint is the last epoch's.
    assert told == (
        "auc 0.7500  hr@10 0.2500  best_epoch 1  last_auc 0.5000  last_hr@10 0.2500  seconds 3.0  last_checkpoint runs/a/cut-2"
    )
    told = _sentence({**found, "best_epoch": 2, "history": history})
    assert told == "auc 0.7500  hr@10 0.2500  best_epoch 2  seconds 3.0  last_checkpoint runs/a/cut-2"
    assert _sentence({"auc": None, "hr@10": 0.25, "history": history}) == "auc -  hr@10 0.2500"
    assert _sentence({"seconds": 3.0, "history": []}) == "seconds 3.0"


# What travels


def of(role: str, **stats: Any) -> dict[str, Any]:
    return {"role": role, "stats": stats}


def test_a_job_without_compression_and_caches_has_no_line_on_them() -> None:
    shard = of("shard", pull_bytes=100, pull_bytes_saved=0, push_bytes=100, push_bytes_saved=0)
    assert wire_lines(status(members=[shard, of("worker")])) == []
    assert wire_lines(status(members=[], compression={})) == []


def test_the_forms_of_a_job_and_what_they_saved() -> None:
    compression = {
        "user": {"pull": "float16", "push": "int8+feedback", "zstd": True},
        "dense": {"pull": "float32", "push": "bfloat16", "zstd": False},
    }
    forms = "compression of user: pull float16, push int8+feedback, zstd; dense: pull float32, push bfloat16"
    assert wire_lines(status(members=[], compression=compression)) == [forms], "a job that is over"
    fresh = of("shard", pull_bytes=0, pull_bytes_saved=0, push_bytes=0, push_bytes_saved=0)
    assert wire_lines(status(members=[fresh], compression=compression)) == [forms]
    shards = [
        of("shard", pull_bytes=1_500_000, pull_bytes_saved=1_000_000, push_bytes=3_000_000, push_bytes_saved=9_000_000),
        of("shard", pull_bytes=500_000, pull_bytes_saved=1_000_000, push_bytes=1_000_000, push_bytes_saved=3_000_000),
    ]
    (line,) = wire_lines(status(members=[*shards, of("worker", samples=3)], compression=compression))
    assert line == f"{forms}; pulls: 2.0 of 4.0 MB saved (50%); pushes: 12.0 of 16.0 MB saved (75%)"


def test_the_share_of_rows_that_caches_had() -> None:
    members = [
        of(
            "worker",
            caches={"user": {"hits": 700, "misses": 100, "saved_bytes": 2_000_000}, "item": {"hits": 0, "misses": 0}},
        ),
        of("worker", caches={"user": {"hits": 100, "misses": 100, "saved_bytes": 1_000_000}}),
        of("shard"),
    ]
    assert wire_lines(status(members=members)) == [
        "cache of user: 80.0% of 1,000 rows did not have to come; 3.0 MB saved"
    ]


@pytest.mark.parametrize(
    "told", [{"caches": 3}, {"caches": {"user": 3}}, {"caches": {"user": {"hits": "x", "misses": [1]}}}]
)
def test_members_may_tell_anything(told: dict[str, Any]) -> None:
    assert wire_lines(status(members=[of("worker", **told)])) == []
