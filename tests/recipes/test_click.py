# SPDX-License-Identifier: Apache-2.0
"""Wide & Deep and DLRM: their graphs against the formula, their batches, and a job that learns what was planted."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from threadpoolctl import threadpool_limits

from oarlock.client.job import JobSpec
from oarlock.data.files import files_from_json
from oarlock.data.reader import open_reader
from oarlock.data.splits import plan_splits
from oarlock.launch.config import recipe_config, run_config
from oarlock.launch.folder import create
from oarlock.launch.inprocess import run_in_process
from oarlock.launch.job import make_spec
from oarlock.nn import bfloat16
from oarlock.proto.errors import InvalidArgument
from oarlock.recipes import _click, dlrm, wide_deep
from oarlock.recipes._click import BATCHES_PER_EPOCH, LEAST_BATCH, METRICS, MOST_BATCH, RATES, ClickWorkload, _batch
from oarlock.worker.recipe import recipe_name

RECIPES = {"wide_deep": wide_deep, "dlrm": dlrm}
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
cross = ["city", "item"]
hash = 500
"""


def write(folder: Path, rows: int, seed: int, *, numbers: bool = True) -> Path:
    """Write clicks whose odds follow the city, the item and, a little, the age; return the folder."""
    folder.mkdir(parents=True)
    schema = SCHEMA
    if not numbers:
        schema = SCHEMA[: SCHEMA.index("[[numbers]]")] + SCHEMA[SCHEMA.index("[[fields]]") :]
    (folder / "schema.toml").write_text(schema, encoding="utf-8")
    rng = np.random.default_rng(seed)
    effect = rng.normal(0, 1.5, 20), rng.normal(0, 1.5, 40)
    for part, n in (("train", rows), ("test", rows // 4)):
        city, item = rng.integers(0, 20, n), rng.integers(0, 40, n)
        age, spent = rng.normal(40, 12, n), rng.lognormal(1, 1, n)
        logit = effect[0][city] + effect[1][item] + 0.03 * (age - 40)
        click = rng.random(n) < 1 / (1 + np.exp(-logit))
        lines = ["click,age,spent,city,item"]
        for i in range(n):
            known = "" if i % 50 == 7 else f"{age[i]:.2f}"
            lines.append(f"{int(click[i])},{known},{spent[i]:.3f},c{city[i]},{item[i]}")
        (folder / f"{part}.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        # Converted text goes there, compiled kernels stay where they are.
        folder = tmp_path_factory.mktemp("cache")
        patch.setattr("oarlock.data.tabular.cache_folder", lambda: folder)
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("click") / "data", 4000, 3)


def spec_of(name: str, data: Path, **options: Any) -> JobSpec:
    return make_spec(run_config({"recipe": name, "data": str(data), "recipe_options": options}), "job")


def first_batch(spec: JobSpec, workload: ClickWorkload) -> Any:
    (plan, *_) = plan_splits(files_from_json(list(spec.files)), spec.rows_per_split)
    return open_reader("arrow").read(plan, list(workload.columns))


@pytest.mark.parametrize("rows", [1, 1000, 16_384, 40_000, 262_144, 10**8])
def test_a_batch_is_a_power_of_two_within_bounds(rows: int) -> None:
    size = _batch(rows)
    assert size & (size - 1) == 0
    assert LEAST_BATCH <= size <= MOST_BATCH
    assert size in (LEAST_BATCH, MOST_BATCH) or rows // size >= BATCHES_PER_EPOCH


@pytest.mark.parametrize("name", RECIPES)
def test_a_plan_carries_what_workers_need(name: str, data: Path) -> None:
    spec = spec_of(name, data, dim=4)
    assert spec.metrics == METRICS
    assert spec.transforms
    workload = RECIPES[name].recipe.workload(spec)
    rows = first_batch(spec, workload)
    example = workload.encode(rows, epoch=0, split=0, batch=0)
    assert example.keys["fields"].shape == (example.samples, 3)
    assert example.feeds["numbers"].shape == (example.samples, 2)
    assert set(np.unique(example.feeds["label"])) == {0.0, 1.0}
    (batch, *_) = workload.evaluation(rows)
    assert np.array_equal(workload.labels(batch), example.feeds["label"][: batch.example.samples])
    # The same again, from the spec alone: what a successor computes.
    again = RECIPES[name].recipe.workload(JobSpec.from_json(spec.to_json()))
    other = again.encode(rows, epoch=3, split=1, batch=2)
    assert np.array_equal(other.keys["fields"], example.keys["fields"])
    assert np.array_equal(other.feeds["numbers"], example.feeds["numbers"])


@pytest.mark.parametrize("name", RECIPES)
def test_what_layers_multiply_in_is_refused_unless_it_can_be_had(
    name: str, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert RECIPES[name].recipe.workload(spec_of(name, data, dim=4)).model.dense_dtype == "float32"
    with pytest.raises(InvalidArgument, match="dense_dtype = 'float16': give one of float32, bfloat16"):
        spec_of(name, data, dim=4, dense_dtype="float16")

    def absent() -> None:
        raise InvalidArgument("no PyTorch")

    monkeypatch.setattr(bfloat16, "load_torch", absent)
    # Before the data are read.
    monkeypatch.setattr(_click, "tabular_files", None)
    with pytest.raises(InvalidArgument, match="no PyTorch"):
        spec_of(name, data, dim=4, dense_dtype="bfloat16")


def relu(x: Any) -> Any:
    return np.maximum(x, 0)


def scores(name: str, spec: JobSpec, rows: Any, values: dict[str, Any], numbers: Any) -> Any:
    """The models as their papers have them, in numpy float64."""

    def linear(layer: str, x: Any) -> Any:
        out = x @ values[f"{layer}.weight"]
        return out + values[f"{layer}.bias"] if f"{layer}.bias" in values else out

    if name == "wide_deep":
        wide = rows[:, :, 0].sum(1, keepdims=True) + linear("wide_numbers", numbers)
        hidden = np.concatenate([numbers, rows[:, :, 1:].reshape(len(rows), -1)], axis=1)
        for i in range(len(spec.config["layers"])):
            hidden = relu(linear(f"deep{i + 1}", hidden))
        logit = wide + linear("score", hidden)
    else:
        hidden = numbers
        for i in range(len(spec.config["bottom"]) + 1):
            hidden = relu(linear(f"bottom{i + 1}", hidden))
        vectors = np.concatenate([hidden[:, None], rows], axis=1)
        dots = vectors @ vectors.transpose(0, 2, 1)
        pairs = [dots[:, i, j] for i in range(vectors.shape[1]) for j in range(i)]
        hidden = np.concatenate([hidden, np.stack(pairs, axis=1)], axis=1)
        for i in range(len(spec.config["top"])):
            hidden = relu(linear(f"top{i + 1}", hidden))
        logit = linear("score", hidden)
    return 1 / (1 + np.exp(-logit[:, 0]))


@pytest.mark.parametrize("name", RECIPES)
def test_a_score_is_that_of_the_formula(name: str, data: Path) -> None:
    widths = {"wide_deep": {"layers": [8, 5]}, "dlrm": {"bottom": [6], "top": [7, 5]}}[name]
    spec = spec_of(name, data, dim=4, **widths)
    workload = RECIPES[name].recipe.workload(spec)
    program = workload.model.bind(32)
    rng = np.random.default_rng(1)
    flat = rng.normal(0, 0.5, program.flat_parameters.shape).astype(np.float32)
    program.flat_parameters[:] = flat
    values, at = {}, 0
    for parameter in workload.model.parameters:
        values[parameter.name] = flat[at : at + parameter.size].reshape(parameter.shape).astype(np.float64)
        at += parameter.size
    width = spec.tables[0].dim
    rows = rng.normal(0, 0.5, (30, width)).astype(np.float32)
    inverse = rng.integers(0, 30, (32, 3)).astype(np.int32)
    numbers = rng.normal(0, 1, (32, 2)).astype(np.float32)
    found = program.predict({"fields": (rows, inverse), "numbers": numbers}, 32)
    wanted = scores(name, spec, rows[inverse].astype(np.float64), values, numbers.astype(np.float64))
    assert np.allclose(found.reshape(-1), wanted, atol=1e-5)


def check_job(name: str, tmp_path: Path, *, numbers: bool, job: dict[str, Any] | None = None, **more: Any) -> JobSpec:
    folder = write(tmp_path / "data", 6000, 5, numbers=numbers)
    small = {"wide_deep": {"layers": [16]}, "dlrm": {"bottom": [16], "top": [16]}}[name]
    options = {"dim": 4, "batch_samples": 100, "row_rate": 0.02, "dense_rate": 0.01, **small, **more}
    values = {"recipe": name, "data": str(folder), "epochs": 3, "seed": 1, "servers": 1, "workers": 1, **(job or {})}
    run = run_config({**values, "recipe_options": options})
    spec = create(tmp_path / "job", "job", run)
    status = run_in_process(spec, tmp_path / "job", watch=lambda _: True)
    assert status["phase"] == "done"
    (*_, last) = status["history"]
    # The odds themselves reach about 0.86 here; the item alone 0.75.
    assert last["metrics"]["auc"] > 0.80
    assert last["metrics"]["logloss"] < 0.52
    assert abs(last["metrics"]["calibration"] - 1) < 0.15
    assert status["history"][0]["loss"] > last["loss"]
    return spec


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("numbers", [True, False])
def test_a_job_learns_what_was_planted(name: str, numbers: bool, tmp_path: Path) -> None:
    check_job(name, tmp_path, numbers=numbers)


@pytest.mark.parametrize("name", ["dlrm", pytest.param("wide_deep", marks=pytest.mark.slow)])
def test_a_job_learns_by_local_steps(name: str, tmp_path: Path) -> None:
    spec = check_job(
        name,
        tmp_path,
        numbers=True,
        job={"mode": "geo", "accumulate": 4, "epochs": 4},
        optimizer="sgd",
        row_rate=2.0,
        dense_rate=0.1,
        row_scale=0.1,
    )
    assert (spec.mode, spec.accumulate) == ("geo", 4)


@pytest.mark.parametrize("name", RECIPES)
def test_one_optimizer_for_all_parameters(name: str, data: Path) -> None:
    def optimizers(spec: JobSpec) -> set[str]:
        rows = {part.optimizer.name for table in spec.tables for part in table.all_parts}
        return rows | {dense.optimizer.name for dense in spec.dense}

    own, sgd = spec_of(name, data, dim=4), spec_of(name, data, dim=4, optimizer="sgd")
    assert optimizers(own) == {"adam", "ftrl"} - ({"ftrl"} if name == "dlrm" else set())
    assert optimizers(sgd) == {"sgd"}
    workload = RECIPES[name].recipe.workload
    assert workload(own).rates(0.0) == {"wide_deep": (0.02, 0.001), "dlrm": (0.01, 0.001)}[name]
    assert workload(sgd).rates(0.0) == RATES["sgd"] == (sgd.config["row_rate"], sgd.config["dense_rate"])
    given = spec_of(name, data, dim=4, optimizer="sgd", row_rate=0.0, dense_rate=3)
    assert workload(given).rates(0.0) == (0.0, 3.0)
    assert replace(sgd, mode="geo", accumulate=8).mode == "geo"
    with pytest.raises(InvalidArgument, match=r"mode = 'geo' and the optimizer of fields, '(adam|ftrl)', contradict"):
        replace(own, mode="geo")


@pytest.mark.torch
@pytest.mark.parametrize("name", RECIPES)
def test_a_job_in_bfloat16_learns_as_well(name: str, tmp_path: Path) -> None:
    wide = {"wide_deep": {"layers": [300, 32]}, "dlrm": {"bottom": [64], "top": [420, 32]}}[name]
    with threadpool_limits(1, "blas"):
        spec = check_job(name, tmp_path, numbers=True, dense_dtype="bfloat16", **wide)
    model = RECIPES[name].recipe.workload(spec).model
    assert model.dense_dtype == "bfloat16"
    assert any(bfloat16.in_bfloat16(node) for node in model.loss_nodes)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("wide_deep", {"layers": []}, "layers"),
        ("wide_deep", {"dim": 0}, "dim"),
        ("wide_deep", {"row_rate": -1.0}, "row_rate"),
        ("wide_deep", {"optimizer": "adam"}, "optimizer = 'adam': give 'sgd', or ''"),
        ("wide_deep", {"optimizer": "sgd", "wide_l1": 0.5}, "wide_l1 = 0.5 and optimizer = 'sgd' contradict"),
        ("dlrm", {"top": [4, 0]}, "top"),
        ("dlrm", {"bottom": [0]}, "bottom"),
        ("dlrm", {"layers": [4]}, "layers"),
    ],
)
def test_settings_that_make_no_model_are_refused_by_name(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        recipe_config(RECIPES[name].recipe, options)


def test_what_recipes_share_is_no_recipe() -> None:
    assert recipe_name("dlrm") == "oarlock.recipes.dlrm:recipe"
    with pytest.raises(Exception, match="dlrm, ncf, wide_deep"):
        recipe_name("_click")


def test_final_rate_is_reached_in_a_straight_line(data: Path) -> None:
    spec = spec_of("wide_deep", data, row_rate=0.5, dense_rate=0.25, final_rate=0.2)
    workload = wide_deep.recipe.workload(spec)
    assert workload.rates(0.0) == (0.5, 0.25)
    assert np.allclose(workload.rates(0.5), (0.3, 0.15))
    assert np.allclose(workload.rates(2.0), (0.1, 0.05))
    assert replace(workload._config, dim=3).dim == 3
