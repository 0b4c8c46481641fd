# SPDX-License-Identifier: Apache-2.0
"""Jobs of every recipe, trained for an epoch in one process, with what their evaluations scored. Loaded as ``predict_rig``."""

import csv
import pkgutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

import oarlock.recipes
from oarlock.checkpoint.store import open_checkpoint
from oarlock.data.columns import offsets_of
from oarlock.data.files import files_from_json
from oarlock.data.planted import generate_ncf
from oarlock.data.reader import open_reader
from oarlock.data.splits import plan_splits
from oarlock.launch.config import run_config
from oarlock.launch.folder import create
from oarlock.launch.inprocess import run_in_process
from oarlock.launch.prediction import predictor_of
from oarlock.serving.predictor import Predictor
from oarlock.serving.tensors import Tensor

RECIPES = sorted(m.name for m in pkgutil.iter_modules(oarlock.recipes.__path__) if not m.name.startswith("_"))
SCHEMA = """
format = "csv"
[label]
column = "click"
[[numbers]]
column = "age"
fill = "mean"
standardise = true
[[numbers]]
column = "spent"
log = true
[[fields]]
column = "city"
vocabulary = {min_count = 2, max_size = 1000}
[[fields]]
column = "item"
[[fields]]
column = "age"
quantiles = 8
[[fields]]
cross = ["city", "item"]
hash = 500
"""
OPTIONS: dict[str, dict[str, Any]] = {
    "dlrm": {"dim": 8, "bottom": [32, 16], "top": [64, 32]},
    "wide_deep": {"dim": 8, "layers": [64, 32]},
    "ncf": {"factors": 8, "layers": [32, 16, 8]},
}


def write_clicks(folder: Path, rows: int = 3000, seed: int = 3) -> None:
    """Write clicks with missing numbers and categories, and some that training did not see."""
    folder.mkdir(parents=True)
    (folder / "schema.toml").write_text(SCHEMA, encoding="utf-8")
    rng = np.random.default_rng(seed)
    effect = rng.normal(0, 1.5, 30), rng.normal(0, 1.5, 60)
    for part, n, more in (("train", rows, 0), ("test", rows // 3, 10)):
        city, item = rng.integers(0, 20 + more, n), rng.integers(0, 40 + more, n)
        age, spent = rng.normal(40, 12, n), rng.lognormal(1, 1, n)
        click = rng.random(n) < 1 / (1 + np.exp(-effect[0][city] - effect[1][item] - 0.03 * (age - 40)))
        lines = ["click,age,spent,city,item"]
        for i in range(n):
            known = "" if i % 50 == 7 else f"{age[i]:.2f}"
            town = "" if i % 40 == 9 else f"c{city[i]}"
            lines.append(f"{int(click[i])},{known},{spent[i]:.3f},{town},{item[i]}")
        (folder / f"{part}.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")


def texts(name: str, values: list[str]) -> Tensor:
    return Tensor(name, "BYTES", (len(values),), pa.array([v.encode() for v in values], pa.binary()))


class Job:
    """A job of ``name`` that was trained; ``scores``: what its evaluation computed; ``inputs``: the same rows, raw."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.folder = folder / "job"
        data = folder / "data"
        if name == "ncf":
            generate_ncf(data, users=120, items=150, positives_per_user=20, seed=4)
        else:
            write_clicks(data)
        values = {"recipe": name, "data": str(data), "recipe_options": OPTIONS.get(name, {})}
        spec = create(self.folder, "job", run_config({**values, "epochs": 1, "seed": 5, "workers": 1, "servers": 1}))
        seen: list[np.ndarray[Any, Any]] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("oarlock.data.tabular.cache_folder", lambda: folder)
            from oarlock.worker import evaluator

            predict = evaluator.predict

            def noted(*arguments: Any) -> Any:
                found = predict(*arguments)
                seen.append(found.copy())
                return found

            patch.setattr(evaluator, "predict", noted)
            self.status = run_in_process(spec, self.folder, watch=lambda status: True, watch_seconds=0.01)
            assert self.status["phase"] == "done", self.status
            self.spec = spec
            self.scores = np.concatenate(seen)
            self.inputs = self._ncf() if name == "ncf" else self._clicks(data)
        self.store, self.manifest = open_checkpoint(str(self.folder / "checkpoints"))

    def predictor(self, **options: Any) -> Predictor:
        return predictor_of(self.manifest, job=self.folder, **options)

    def _clicks(self, data: Path) -> list[Tensor]:
        with (data / "test.csv").open(encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        return [texts(name, [row[name] for row in rows]) for name in ("age", "spent", "city", "item")]

    def _ncf(self) -> list[Tensor]:
        from oarlock.recipes.ncf import NcfWorkload

        files = files_from_json(list(self.spec.evaluation_files))
        users, items = [], []
        for plan in plan_splits(files, self.spec.evaluation_rows_per_split):
            rows = open_reader("arrow").read(plan, list(NcfWorkload.evaluation_columns))
            ends = rows[offsets_of("negatives")]
            for i, (user, item) in enumerate(zip(rows["user"], rows["item"], strict=True)):
                listed = [item, *rows["negatives"][ends[i] : ends[i + 1]]]
                users += [user] * len(listed)
                items += listed
        found = {"user": np.array(users, np.uint64), "item": np.array(items, np.uint64)}
        return [Tensor(name, "UINT64", (len(values),), values) for name, values in found.items()]
