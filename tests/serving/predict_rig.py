# SPDX-License-Identifier: Apache-2.0
"""Jobs of every recipe, trained for an epoch in one process, with what their evaluations scored. Loaded as ``predict_rig``."""

import csv
import pkgutil
from pathlib import Path
from typing import Any

import follow_rig
import numpy as np
import pyarrow as pa
import pytest
import rig

import oarlock.recipes
from oarlock.checkpoint.store import open_checkpoint
from oarlock.client.push import PushIdentity, RowGradients, cut_push
from oarlock.data.columns import offsets_of
from oarlock.data.files import files_from_json
from oarlock.data.planted import generate_ncf
from oarlock.data.reader import open_reader
from oarlock.data.splits import plan_splits
from oarlock.launch.config import run_config
from oarlock.launch.folder import create
from oarlock.launch.inprocess import run_in_process
from oarlock.launch.prediction import predictor_of
from oarlock.proto.bulk import inlined
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


class Going(follow_rig.Job):
    """Shards that go on from the end of a job that was trained."""

    def __init__(self, trained):
        self.trained, self.spec, self.step = trained, trained.spec, 0
        self.status = {"phase": "training", "events": [], "checkpoints": []}
        self.silent, self.calls, self.clock = set(), [], follow_rig.Clock()
        self.restart(run=trained.manifest.run + 1)

    def restart(self, run, shards=2):
        """Begin a run with the state of the trained job's last cut."""
        self.inner = rig.Job(self.spec, shards=shards, run=run)
        self.inner.coordinator = follow_rig.rows_rig.Coordinator(self.inner)
        cut = self.trained.folder / "checkpoints" / f"cut-{self.trained.manifest.cut:06d}"
        self.inner.place(restore=str(cut))
        for service in self.inner.services.values():
            self.tune(service)

    def go_on(self, rng, size=0.05):
        """Push gradients for rows that there are and for others, and for all dense parameters."""
        self.step += 1
        rows = {}
        for spec in self.spec.tables:
            keyset = rig.group_keys(self.inner.layout, self.inner.routes(), spec.name, self.keys_of(spec.name, rng))
            gradients = rng.normal(0, size, (len(keyset.keys), spec.dim)).astype(np.float32)
            rows[spec.name] = RowGradients(keyset, gradients, 0.5)
        dense = rng.normal(0, size, self.inner.layout.dense_size).astype(np.float32)
        # Of a split that the trained job cannot have left open in its last cut: what that had is skipped.
        identity = PushIdentity(1000, self.step)
        for message in cut_push(self.inner.layout, self.inner.routes(), identity, rows, dense, 0.5):
            request = inlined(message.bulk)
            request.step = self.step
            request.header.CopyFrom(self.inner.header(message.shard.id))
            reply = self.inner.services[message.shard.id].push(request)
            assert (reply.applied > 0, reply.skipped) == (True, 0)

    def keys_of(self, name, rng):
        number = self.inner.layout.table_index[name]
        held = [
            shard.tables[number].export_block(block).keys
            for shard in self.inner.shards.values()
            for block in shard.tables[number].owned.tolist()
        ]
        return np.unique(np.concatenate([np.concatenate(held), rng.integers(0, 1 << 40, 5).astype(np.uint64)]))


class AsShardsHaveIt:
    """The state of a job's shards, as pulls tell it."""

    def __init__(self, job):
        self.job = job
        self.dense = job.inner.dense()

    def lookup_many(self, wanted):
        for table, keys, out in wanted:
            distinct, back = np.unique(keys, return_inverse=True)
            out[:] = self.job.inner.rows(table, distinct)[back]
        return [0] * len(wanted)
