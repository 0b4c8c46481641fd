# SPDX-License-Identifier: Apache-2.0
"""A recipe whose workload has ``labels``: whole jobs in this process give exact metrics, however the evaluation was cut."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from oarlock.checkpoint.store import open_checkpoint
from oarlock.data.scores import METRICS, Scores
from oarlock.launch.config import run_config
from oarlock.launch.folder import create, stored_status
from oarlock.launch.inprocess import run_in_process
from oarlock.recipes.ncf import NcfWorkload
from oarlock.worker.recipe import Labelled, Summed, load_recipe

LABELLED = '''
"""Logistic regression on one feature, evaluated by its scores and labels."""
from dataclasses import asdict, dataclass

import numpy as np

from oarlock.data.columns import ColumnSpec
from oarlock.data.files import list_files
from oarlock.embedding.spec import Initializer, OptimizerSpec, TableSpec
from oarlock.nn import Linear, Model, binary_cross_entropy, lookup, sigmoid
from oarlock.worker.recipe import EvaluationBatch, Example, Plan, Rates

COLUMNS = (ColumnSpec("key", "key"), ColumnSpec("label", "label"))
BATCH = 24


@dataclass(frozen=True)
class Config:
    rate: float = 3.0
    evaluation_rows: int = 64
    metrics: tuple[str, ...] = ("auc", "logloss", "accuracy", "calibration")
    own_scores: bool = False


def model(config):
    logit = Linear(1, name="out", initializer=Initializer("uniform", 1.0, 0.0))(lookup("key", table="key", dim=2))
    score = logit if config.own_scores else sigmoid(logit)
    return Model(score=score, loss=binary_cross_entropy(logit, label="label"))


class Workload:
    columns = evaluation_columns = COLUMNS
    max_samples = 64

    def __init__(self, spec):
        self.config = Config(**spec.config)
        self.model = model(self.config)

    def start(self):
        pass

    def samples(self, rows):
        return rows

    def encode(self, rows, *, epoch, split, batch):
        return Example(len(rows["key"]), {"key": rows["key"]}, {"label": rows["label"]})

    def rates(self, done):
        return Rates(self.config.rate, 0.0)

    def evaluation(self, rows):
        for first in range(0, len(rows["key"]), BATCH):
            key, label = rows["key"][first : first + BATCH], rows["label"][first : first + BATCH]
            yield EvaluationBatch(Example(len(key), {"key": key}, {}), label)

    def labels(self, batch):
        return batch.context

    def sums(self, batch, scores):
        raise AssertionError("a workload with labels is not asked for sums")


class Recipe:
    Config = Config

    def plan(self, config, data, *, epochs):
        table = TableSpec("key", 2, OptimizerSpec("sgd"), Initializer("normal", scale=0.1), 4)
        files = list_files(data)
        metrics = tuple(config.metrics)
        return Plan(asdict(config), files, files, 32, config.evaluation_rows, 16, (table,), model(config), metrics)

    def workload(self, spec):
        return Workload(spec)


recipe = Recipe()
'''


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator) -> Callable[..., Any]:
    (tmp_path / "labelled_recipe.py").write_text(LABELLED)
    monkeypatch.syspath_prepend(str(tmp_path))
    folder = tmp_path / "data"
    folder.mkdir()
    key = rng.integers(0, 20, 300)
    label = (rng.random(300) < np.where(key % 3 == 0, 0.8, 0.1)).astype(np.float32)
    pq.write_table(pa.table({"key": key, "label": label}), folder / "part.parquet", row_group_size=16)
    number = iter(range(100))

    def play(watch: Any = lambda status: True, restore: str = "", job: str = "", **changes: Any) -> Any:
        values = {
            "recipe": "labelled_recipe:recipe",
            "data": str(folder),
            "seed": 4,
            "epochs": 3,
            "reader": "arrow",
            "heartbeat_seconds": 0.1,
            "recipe_options": {},
            **changes,
        }
        where = tmp_path / (job or f"job-{next(number)}")
        spec = create(where, where.name, run_config(values))
        return spec, where, run_in_process(spec, where, watch=watch, watch_seconds=0.02, restore=restore)

    return play


def test_a_job_with_labels_is_evaluated_by_its_scores(run: Callable[..., Any]) -> None:
    spec, folder, status = run()
    assert status["phase"] == "done", status["reason"]
    assert spec.metrics == METRICS
    assert spec.evaluation_splits == 5
    for result in status["history"]:
        assert list(result["metrics"]) == list(METRICS)
        assert result["evaluated"] == 300
    last = status["history"][-1]["metrics"]
    assert 0.75 < last["auc"] < 1.0
    assert 0.75 < last["accuracy"] < 1.0
    assert 0.2 < last["logloss"] < 0.6
    assert 0.8 < last["calibration"] < 1.25
    assert status["best"]["metrics"]["auc"] == max(r["metrics"]["auc"] for r in status["history"])
    assert stored_status(folder)["best"] == status["best"]
    manifest = open_checkpoint(status["checkpoints"][-1]["path"])[1]
    assert json.loads(json.dumps(status["history"])) == manifest.metrics["history"]


def test_the_metrics_are_those_of_the_scores_at_hand(run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Against all scores and labels in one piece, taken where the evaluator hands them over."""
    taken: list[tuple[Any, Any]] = []
    add = Scores.add

    def note(self: Scores, score: Any, label: Any) -> None:
        taken.append((score.copy(), label.copy()))
        add(self, score, label)

    monkeypatch.setattr(Scores, "add", note)
    status = run(epochs=1)[2]
    score, label = (np.concatenate(column) for column in zip(*taken, strict=True))
    assert len(score) == 300
    won = (score[:, None] > score[None, :]) + 0.5 * (score[:, None] == score[None, :])
    auc = won[np.ix_(label == 1, label == 0)].mean()
    assert status["history"][0]["metrics"]["auc"] == pytest.approx(auc, rel=1e-12)


def test_neither_the_cut_nor_the_number_of_workers_changes_a_bit(run: Callable[..., Any]) -> None:
    """Nothing is learnt at rate 0, so all jobs have the same rows; only who evaluates what differs."""
    seen = set()
    for workers, rows in ((1, 300), (1, 16), (2, 16), (2, 48)):
        options = {"rate": 0.0, "evaluation_rows": rows}
        _, _, status = run(workers=workers, epochs=1, recipe_options=options)
        assert status["phase"] == "done", status["reason"]
        seen.add(tuple(status["history"][0]["metrics"].values()))
    assert len(seen) == 1


def test_the_best_epoch_by_logloss_is_the_one_with_the_least(run: Callable[..., Any]) -> None:
    _, folder, status = run(recipe_options={"metrics": ["logloss"], "rate": 1.0})
    losses = [r["metrics"]["logloss"] for r in status["history"]]
    assert len(set(losses)) == 3
    assert status["best"]["metrics"]["logloss"] == min(losses)
    assert stored_status(folder)["best"] == status["best"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"metrics": ["hr@10"]}, "no metric 'hr@10' is made of these"),
        ({"own_scores": True}, r"give probabilities, as Model\(score=sigmoid"),
    ],
)
def test_a_recipe_that_does_it_wrong_is_told(run: Callable[..., Any], options: Any, words: str) -> None:
    status = run(recipe_options=options)[2]
    assert status["phase"] == "failed"
    assert re.search(words, status["reason"]), status["reason"]


def test_labels_make_a_workload_labelled(run: Callable[..., Any]) -> None:
    spec = run(epochs=1)[0]
    made = load_recipe("labelled_recipe:recipe").workload(spec)
    assert isinstance(made, Labelled)
    assert isinstance(made, Summed)
    assert issubclass(NcfWorkload, Summed)
    assert not issubclass(NcfWorkload, Labelled)
