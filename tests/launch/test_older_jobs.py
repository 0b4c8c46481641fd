# SPDX-License-Identifier: Apache-2.0
"""Folders of jobs that an older version made: fields that it did not know are absent, and mean what it did without them."""

import json
import shutil
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from oarlock.checkpoint.format import MANIFEST, cut_folder
from oarlock.checkpoint.manifest import Manifest
from oarlock.checkpoint.store import LocalStore
from oarlock.client.job import JobSpec
from oarlock.launch.config import run_config, to_toml
from oarlock.launch.folder import create, read_run, read_spec, resume, stored_status
from oarlock.launch.inprocess import run_in_process
from oarlock.proto.errors import SpecMismatch

# What the version of 2026-11-21 knew, the first with click recipes.
RUN = """recipe data epochs seed mode staleness reader checkpoint_epochs checkpoints_kept servers workers open_splits prefetch
    lease_seconds heartbeat_seconds restarts recipe_options"""
JOB = """job name seed recipe tables dense files evaluation_files splits evaluation_splits rows_per_split
    evaluation_rows_per_split batch_rows epochs servers workers metrics config transforms mode staleness checkpoint_epochs
    checkpoints_kept reader open_splits prefetch lease_seconds heartbeat_seconds"""
CONFIG = "dim batch_samples row_rate dense_rate final_rate row_scale layers wide_l1"
TABLE = """name dim optimizer initializer blocks dtype parts absent usage admission eviction guard memory_bytes
    expand_score"""
SCHEMA = """format = "csv"
[label]
column = "click"

[[fields]]
column = "city"
"""


def only(values: dict[str, Any], names: str) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name in names.split()}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished job of one epoch."""
    root = tmp_path_factory.mktemp("older")
    data = root / "data"
    data.mkdir()
    (data / "schema.toml").write_text(SCHEMA, encoding="utf-8")
    rng = np.random.default_rng(4)
    for part, rows in (("train", 600), ("test", 200)):
        lines = [
            f"{click},{city}" for click, city in zip(rng.integers(0, 2, rows), rng.integers(0, 9, rows), strict=True)
        ]
        (data / f"{part}.csv").write_text("\n".join(["click,city", *lines, ""]), encoding="utf-8")
    folder = root / "job"
    options = {"dim": 2, "layers": [2], "batch_samples": 128}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("oarlock.data.tabular.cache_folder", lambda: root / "cache")
        values = {"recipe": "wide_deep", "data": str(data), "epochs": 1, "reader": "arrow", "recipe_options": options}
        spec = create(folder, "job", run_config({**values, "heartbeat_seconds": 0.1}))
        assert run_in_process(spec, folder, watch=lambda status: True, watch_seconds=0.01)["phase"] == "done"
    return folder


@pytest.fixture
def older(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same job as the older version would have left it."""
    monkeypatch.setattr("oarlock.data.tabular.cache_folder", lambda: made.parent / "cache")
    folder = Path(shutil.copytree(made, tmp_path / "job"))
    values = tomllib.loads((folder / "job.toml").read_text(encoding="utf-8"))
    options = only(values["recipe_options"], CONFIG)
    kept = only(values, RUN.removesuffix("recipe_options"))
    lines = [f"{name} = {json.dumps(value)}" for name, value in kept.items()]
    lines += ["", "[recipe_options]", *(f"{name} = {json.dumps(value)}" for name, value in options.items())]
    (folder / "job.toml").write_text("\n".join(lines) + "\n", encoding="utf-8")
    job = only(json.loads((folder / "job.json").read_text(encoding="utf-8")), JOB)
    assert set(job) == set(JOB.split())
    job["config"] = only(job["config"], CONFIG)
    assert set(job["config"]) == set(CONFIG.split())
    job["tables"] = [only(table, TABLE) for table in job["tables"]]
    (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
    path = folder / "checkpoints" / cut_folder(1) / MANIFEST
    manifest = Manifest.decode(path.read_bytes())
    written = {**manifest.__dict__, "tables": tuple(only(table, TABLE) for table in manifest.tables)}
    written["config"] = only(manifest.config, CONFIG)
    written.pop("_specs", None)
    path.write_bytes(Manifest(**written).encode())
    return folder


def test_an_older_job_goes_on(older: Path) -> None:
    before = read_spec(older)
    assert stored_status(older)["phase"] == "done"
    spec, restore = resume(older, {"epochs": 2})
    assert (spec.config["dense_dtype"], spec.config["optimizer"]) == ("float32", "")
    assert only(read_spec(older).config, CONFIG) == before.config
    status = run_in_process(spec, older, restore=restore, watch=lambda status: True, watch_seconds=0.01)
    assert (status["phase"], len(status["history"]), status["run"]) == ("done", 2, 2)
    # It is as any other one from now on.
    assert resume(older, {"epochs": 3})[0].config == spec.config


def test_a_field_that_is_absent_may_be_given_as_it_was(older: Path) -> None:
    spec, _ = resume(older, {"recipe_options": {"dense_dtype": "float32", "optimizer": ""}})
    assert spec.config["dense_dtype"] == "float32"


@pytest.mark.parametrize(("name", "value"), [("optimizer", "sgd"), ("dim", 4)])
def test_a_field_that_is_absent_cannot_change(older: Path, name: str, value: Any) -> None:
    before = (older / "job.json").read_bytes()
    with pytest.raises(SpecMismatch, match=f"recipe_options.{name} cannot change"):
        resume(older, {"recipe_options": {name: value}})
    assert (older / "job.json").read_bytes() == before


def test_a_field_written_into_an_older_file_cannot_change_either(older: Path) -> None:
    with (older / "job.toml").open("a", encoding="utf-8") as file:
        file.write('optimizer = "sgd"\n')
    with pytest.raises(SpecMismatch, match=r"recipe_options.optimizer cannot change .*\(it was '', now 'sgd'\)"):
        resume(older, {})


def test_what_is_absent_is_what_is_written_down_now(older: Path, made: Path) -> None:
    """Every field that came later has the default at which the job was run: resolved, both folders are the same."""
    assert read_run(older) != read_run(made)
    assert JobSpec.from_json((older / "job.json").read_text(encoding="utf-8")).tables == read_spec(made).tables
    resume(older, {})
    again, known = read_run(older), read_run(made)
    assert to_toml(again, again.recipe_options) == to_toml(known, known.recipe_options)
    assert LocalStore(older / "checkpoints").latest() is not None
