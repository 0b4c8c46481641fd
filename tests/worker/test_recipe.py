# SPDX-License-Identifier: Apache-2.0
"""Recipes are found by name, and a user's own needs no change to Oarlock: a whole job of one runs in this process."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from oarlock.launch.config import run_config
from oarlock.launch.folder import create
from oarlock.launch.inprocess import run_in_process
from oarlock.proto.errors import NotFound
from oarlock.recipes.ncf import recipe as ncf
from oarlock.worker.recipe import load_recipe, recipe_name

OWN = '''
"""Logistic regression on one feature: the rate at which each key is positive."""
from dataclasses import asdict, dataclass

import numpy as np

from oarlock.data.columns import ColumnSpec
from oarlock.data.files import list_files
from oarlock.embedding.spec import Initializer, OptimizerSpec, TableSpec
from oarlock.nn import Linear, Model, binary_cross_entropy, lookup
from oarlock.worker.recipe import EvaluationBatch, Example, Plan, Rates

COLUMNS = (ColumnSpec("key", "key"), ColumnSpec("label", "label"))


@dataclass(frozen=True)
class Config:
    rate: float = 3.0


def model():
    logit = Linear(1, name="out", initializer=Initializer("uniform", 1.0, 0.0))(lookup("key", table="key", dim=2))
    return Model(score=logit, loss=binary_cross_entropy(logit, label="label"))


class Workload:
    columns = evaluation_columns = COLUMNS
    max_samples = 64

    def __init__(self, spec):
        self.model = model()
        self.rate = spec.config["rate"]

    def start(self):
        pass

    def samples(self, rows):
        return rows

    def encode(self, rows, *, epoch, split, batch):
        return Example(len(rows["key"]), {"key": rows["key"]}, {"label": rows["label"]})

    def rates(self, done):
        return Rates(self.rate, 0.0)

    def evaluation(self, rows):
        yield EvaluationBatch(Example(len(rows["key"]), {"key": rows["key"]}, {}), rows["label"])

    def sums(self, batch, scores):
        return [len(scores), float(((scores > 0) == (batch.context > 0.5)).sum())]


class Recipe:
    Config = Config

    def plan(self, config, data, *, epochs):
        table = TableSpec("key", 2, OptimizerSpec("sgd"), Initializer("normal", scale=0.1), 4)
        files = list_files(data)
        return Plan(asdict(config), files, files, 32, 64, 16, (table,), model(), ("right",))

    def workload(self, spec):
        return Workload(spec)


recipe = Recipe()
'''


def test_names() -> None:
    assert recipe_name("ncf") == "oarlock.recipes.ncf:recipe"
    assert recipe_name("mine.module:thing") == "mine.module:thing"
    assert load_recipe(recipe_name("ncf")) is ncf
    with pytest.raises(NotFound, match=r"no recipe 'ncff'; did you mean 'ncf'\? There are: .*ncf.*module:attribute"):
        recipe_name("ncff")
    with pytest.raises(NotFound, match=r"no recipe 'zzzzzz'\. There are: "):
        recipe_name("zzzzzz")


def test_what_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "needs_more.py").write_text("import no_such_thing\n")
    with pytest.raises(NotFound, match="no module 'nobodys'"):
        load_recipe("nobodys.module:recipe")
    with pytest.raises(NotFound, match="no module 'no_such_thing'"):
        load_recipe("needs_more:recipe")
    with pytest.raises(NotFound, match="module json has no 'recipe'"):
        load_recipe("json:recipe")
    with pytest.raises(NotFound, match="has no ''"):
        load_recipe("json:")


@pytest.fixture
def write_labels(tmp_path: Path) -> Callable[[np.random.Generator], Path]:
    def write(rng: np.random.Generator) -> Path:
        key = rng.integers(0, 20, 200)
        folder = tmp_path / "data"
        folder.mkdir()
        table = pa.table({"key": key, "label": (key % 3 == 0).astype(np.float32)})
        pq.write_table(table, folder / "part.parquet", row_group_size=32)
        return folder

    return write


def test_a_job_of_ones_own_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator, write_labels: Any
) -> None:
    (tmp_path / "own_recipe.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    values = {
        "recipe": "own_recipe:recipe",
        "data": str(write_labels(rng)),
        "epochs": 12,
        "reader": "arrow",
        "checkpoint_epochs": 0,
        "heartbeat_seconds": 0.1,
        "recipe_options": {"rate": 4.0},
    }
    spec = create(tmp_path / "job", "own", run_config(values))
    assert (spec.recipe, spec.config) == ("own_recipe:recipe", {"rate": 4.0})
    status = run_in_process(spec, tmp_path / "job", watch=lambda status: True, watch_seconds=0.02)
    assert status["phase"] == "done"
    history = status["history"]
    assert [epoch["samples"] for epoch in history] == [200] * 12
    assert history[-1]["loss"] < 0.1 < history[0]["loss"]
    assert history[-1]["metrics"]["right"] == 1.0
