# SPDX-License-Identifier: Apache-2.0
"""The NCF recipe against its paper: the formula, the batches, the ranking, and the rules by which it adapts to data."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from oarlock.client.job import JobSpec
from oarlock.data.columns import offsets_of
from oarlock.data.files import files_to_json
from oarlock.data.interactions import load_catalogue, load_positives, read_info
from oarlock.data.planted import generate_ncf
from oarlock.data.reader import open_reader
from oarlock.data.splits import plan_splits
from oarlock.launch.config import recipe_config, run_config
from oarlock.launch.job import make_spec
from oarlock.nn import Model
from oarlock.proto.errors import InvalidArgument
from oarlock.recipes.ncf import MANY_PAIRS, MODELS, NcfConfig, NcfWorkload, adapted, model, recipe


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ncf") / "data"
    generate_ncf(folder, users=120, items=150, positives_per_user=30, seed=4)
    return folder


@pytest.fixture(scope="module")
def spec(data: Path) -> JobSpec:
    options = {"batch_samples": 640, "negatives": 3}
    return make_spec(run_config({"data": str(data), "epochs": 2, "seed": 9, "recipe_options": options}), "job")


@pytest.fixture(scope="module")
def workload(spec: JobSpec) -> NcfWorkload:
    made = NcfWorkload(spec)
    made.start()
    return made


# 1. The configuration


@pytest.mark.parametrize("negatives", [1, 4, 9])
def test_adapted_batches_grow_with_the_data_within_limits(negatives: int) -> None:
    config = NcfConfig(negatives=negatives)
    few = [adapted(config, pairs=n) for n in (1, 100, 5_000, 20_000, 44_000, 99_000, MANY_PAIRS)]
    sizes = [c.batch_samples for c in few]
    assert sizes == sorted(sizes)
    assert sizes[0] == 256
    assert sizes[-1] <= 4096
    many = [adapted(config, pairs=n) for n in (MANY_PAIRS + 1, 10**7, 10**10)]
    assert len({(c.batch_samples, c.row_rate, c.dense_rate) for c in many}) == 1
    for c in (*few, *many):
        assert 256 <= c.batch_samples <= 4096
        assert 0 < c.dense_rate <= c.row_rate < 0.1
    # Only what was left open is filled in.
    assert replace(few[3], batch_samples=0, row_rate=0.0, dense_rate=0.0) == config


@pytest.mark.parametrize("pairs", [10, 50_000, 10**7])
def test_what_is_given_wins(pairs: int) -> None:
    given = {"batch_samples": 77, "row_rate": 0.5, "dense_rate": 0.25}
    for name, value in given.items():
        found = adapted(NcfConfig(**{name: value}), pairs=pairs)
        assert getattr(found, name) == value
        rest = {n: getattr(found, n) for n in given if n != name}
        plain = adapted(NcfConfig(), pairs=pairs)
        assert rest == {n: getattr(plain, n) for n in rest}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model", "gnf"),
        ("layers", (8,)),
        ("layers", (7, 4)),
        ("layers", (8, 0)),
        ("factors", 0),
        ("negatives", 0),
        ("top_k", 0),
        ("batch_samples", -1),
        ("row_rate", -0.1),
        ("dense_rate", float("nan")),
        ("final_rate", float("inf")),
        ("row_scale", -1.0),
    ],
)
def test_errors_name_the_field(field: str, value: Any) -> None:
    with pytest.raises(InvalidArgument, match=rf"ncf\.{field} = "):
        NcfConfig(**{field: value})


def test_unknown_and_mistyped_options_are_named() -> None:
    with pytest.raises(InvalidArgument, match=r"unknown field 'factor'; did you mean 'factors'\?"):
        recipe_config(recipe, {"factor": 3})
    with pytest.raises(InvalidArgument, match="layers = 5: give a list, each an integer"):
        recipe_config(recipe, {"layers": 5})
    with pytest.raises(InvalidArgument, match="factors = '8': give an integer"):
        recipe_config(recipe, {"factors": "8"})
    assert recipe_config(recipe, {"layers": [8, 4]}) == NcfConfig(layers=(8, 4))


# 2. The model


def numpy_ncf(config: NcfConfig, p: dict[str, Any], user: Any, item: Any) -> Any:
    """He et al. 2017: GMF (9), MLP (10) and their union NeuMF (12), as logits; a row holds GMF's factors first."""
    f = config.factors if config.model != "mlp" else 0
    towers = []
    if config.model != "mlp":
        towers.append(user[:, :f] * item[:, :f])
    if config.model != "gmf":
        z = np.concatenate([user[:, f:], item[:, f:]], axis=1)
        for i in range(1, len(config.layers)):
            z = np.maximum(z @ p[f"mlp{i}.weight"] + p[f"mlp{i}.bias"], 0)
        towers.append(z)
    return (np.concatenate(towers, axis=1) @ p["score.weight"] + p["score.bias"])[:, 0]


def parameters(made: Model) -> int:
    return sum(int(np.prod(spec.shape)) for spec in made.parameters)


@pytest.mark.parametrize(
    ("name", "dim", "count"),
    [
        # NeuMF-8: 64 to 32, 16 and 8, then 8 + 8 to 1.
        ("neumf", 8 + 32, 64 * 32 + 32 + 32 * 16 + 16 + 16 * 8 + 8 + 16 + 1),
        ("gmf", 8, 8 + 1),
        ("mlp", 32, 64 * 32 + 32 + 32 * 16 + 16 + 16 * 8 + 8 + 8 + 1),
    ],
)
def test_the_papers_sizes(name: str, dim: int, count: int) -> None:
    made = model(NcfConfig(model=name))
    assert made.tables == {"user": dim, "item": dim}
    assert parameters(made) == count


@pytest.mark.parametrize("layers", [(64, 32, 16, 8), (6, 5)])
@pytest.mark.parametrize("name", MODELS)
def test_the_papers_formula(name: str, layers: tuple[int, ...], rng: np.random.Generator) -> None:
    config = NcfConfig(model=name, factors=5, layers=layers)
    made = model(config)
    program = made.bind(64)
    program.flat_parameters[:] = rng.normal(0, 0.5, program.flat_parameters.shape)
    rows = {t: rng.normal(0, 1, (20, dim)).astype(np.float32) for t, dim in made.tables.items()}
    inverse = {t: rng.integers(0, 20, 50).astype(np.int32) for t in rows}
    found = program.predict({t: (rows[t], inverse[t]) for t in rows}, 50)
    wide = {n: v.astype(np.float64) for n, v in program.parameters.items()}
    user, item = (rows[t].astype(np.float64)[inverse[t]] for t in ("user", "item"))
    expected = numpy_ncf(config, wide, user, item)
    assert expected.std() > 0.1
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    label = rng.integers(0, 2, 50).astype(np.float32)
    loss = program.train({**{t: (rows[t], inverse[t]) for t in rows}, "label": label}, 50)
    chance = 1 / (1 + np.exp(-expected))
    assert loss == pytest.approx(-np.mean(np.log(np.where(label > 0, chance, 1 - chance))), rel=1e-4)


# 3. The plan


def test_the_plan_of_a_data_set(data: Path) -> None:
    info = read_info(data)
    for options in ({}, {"batch_samples": 256, "model": "gmf"}, {"model": "mlp", "batch_samples": 1, "layers": (4, 2)}):
        config = NcfConfig(**options)
        plan = recipe.plan(config, data, epochs=3)
        assert NcfConfig(**plan.config) == adapted(config, pairs=info.train_rows)
        assert sum(f.rows for f in plan.files) == info.train_rows
        assert sum(f.rows for f in plan.evaluation_files) == info.test_rows
        assert plan.batch_rows == max(1, plan.config["batch_samples"] // 5)
        assert 1 <= plan.rows_per_split <= max(1, info.train_rows // 8)
        assert 1 <= plan.evaluation_rows_per_split <= info.test_rows
        assert plan.metrics == ("hr@10", "ndcg@10")
        assert {t.name: t.dim for t in plan.tables} == plan.model.tables
        for table in plan.tables:
            assert table.blocks >= 16
            assert table.blocks & (table.blocks - 1) == 0
            assert table.optimizer.name == "adam"
            assert (table.initializer.kind, table.initializer.scale) == ("normal", 0.01)
    assert recipe.plan(NcfConfig(top_k=3), data, epochs=1).metrics == ("hr@3", "ndcg@3")


def test_the_spec_is_made_of_the_plan(spec: JobSpec, data: Path) -> None:
    assert spec.recipe == "oarlock.recipes.ncf:recipe"
    assert spec.splits == len(
        plan_splits(recipe.plan(NcfConfig(**spec.config), data, epochs=2).files, spec.rows_per_split)
    )
    assert spec.batch_rows == 160
    assert JobSpec.from_json(spec.to_json()) == replace(spec, config={**spec.config, "layers": [64, 32, 16, 8]})


def test_blocks_grow_with_the_table() -> None:
    from oarlock.recipes.ncf import _blocks

    counts = [_blocks(keys, 40) for keys in (0, 1, 10**4, 10**6, 10**7, 10**8, 10**12)]
    assert counts == sorted(counts)
    assert counts[0] == 16
    assert counts[-1] == 1 << 16
    for keys, blocks in zip((10**6, 10**7, 10**8), counts[3:6], strict=True):
        assert keys * 120 * 4 / blocks <= 8 << 20


# 4. The worker's side


def rows_of(data: Path, first: int, last: int) -> dict[str, Any]:
    everything = load_rows(data)
    return {name: values[first:last] for name, values in everything.items()}


def load_rows(data: Path) -> dict[str, Any]:
    (plan,) = plan_splits(recipe.plan(NcfConfig(), data, epochs=1).files, 1 << 30)
    return open_reader("arrow").read(plan, list(NcfWorkload.columns))


def as_bytes(example: Any) -> list[bytes]:
    return [example.keys["user"].tobytes(), example.keys["item"].tobytes(), example.feeds["label"].tobytes()]


def test_a_batch_is_a_pure_function_of_seed_epoch_split_and_batch(
    spec: JobSpec, workload: NcfWorkload, data: Path
) -> None:
    rows = rows_of(data, 10, 90)
    where = {"epoch": 1, "split": 7, "batch": 2}
    first = as_bytes(workload.encode(rows, **where))
    workload.encode(rows_of(data, 0, 160), epoch=0, split=0, batch=0)
    assert as_bytes(workload.encode(rows, **where)) == first
    other = NcfWorkload(spec)
    other.start()
    assert as_bytes(other.encode(rows, **where)) == first
    for name in where:
        changed = as_bytes(workload.encode(rows, **{**where, name: 3}))
        assert changed[1] != first[1]
        assert (changed[0], changed[2]) == (first[0], first[2])
    seeded = NcfWorkload(replace(spec, seed=10))
    seeded.start()
    assert as_bytes(seeded.encode(rows, **where))[1] != first[1]


def test_each_positive_is_followed_by_its_negatives(workload: NcfWorkload, spec: JobSpec, data: Path) -> None:
    rows = load_rows(data)
    positives = load_positives(recipe.plan(NcfConfig(), data, epochs=1).files)
    mine = {
        int(user): set(positives.items[positives.offsets[i] : positives.offsets[i + 1]].tolist())
        for i, user in enumerate(positives.users)
    }
    drawn = set()
    for batch in range(4):
        part = {name: values[batch * 160 : (batch + 1) * 160] for name, values in rows.items()}
        made = workload.encode(part, epoch=0, split=batch, batch=batch)
        assert made.samples == 640 == workload.samples(160) <= workload.max_samples
        users, items = made.keys["user"].reshape(-1, 4), made.keys["item"].reshape(-1, 4)
        np.testing.assert_array_equal(users, np.repeat(part["user"][:, None], 4, axis=1))
        np.testing.assert_array_equal(items[:, 0], part["item"])
        np.testing.assert_array_equal(made.feeds["label"].reshape(-1, 4), np.tile([1, 0, 0, 0], (160, 1)))
        for user, negatives in zip(users[:, 0].tolist(), items[:, 1:].tolist(), strict=True):
            assert not mine[user] & set(negatives)
            drawn |= set(negatives)
    plan = recipe.plan(NcfConfig(), data, epochs=1)
    assert drawn <= set(load_catalogue(plan.files, plan.evaluation_files).tolist())
    assert len(drawn) > 100


def test_rates_go_in_a_straight_line(spec: JobSpec) -> None:
    config = {**spec.config, "row_rate": 0.4, "dense_rate": 0.2, "final_rate": 0.5}
    made = NcfWorkload(replace(spec, config=config))
    found = [made.rates(done) for done in (0.0, 0.5, 1.0, 1.1)]
    assert [r.rows for r in found] == pytest.approx([0.4, 0.3, 0.2, 0.2])
    assert [r.dense for r in found] == pytest.approx([0.2, 0.15, 0.1, 0.1])


def lists_of(*lists: list[int]) -> dict[str, Any]:
    """Test rows of users 100, 101, ..., each list with its positive first."""
    return {
        "user": np.arange(100, 100 + len(lists), dtype=np.uint64),
        "item": np.array([one[0] for one in lists], np.uint64),
        "negatives": np.array([i for one in lists for i in one[1:]], np.uint64),
        offsets_of("negatives"): np.cumsum([0, *(len(one) - 1 for one in lists)]).astype(np.int64),
    }


def test_evaluation_is_cut_at_max_samples_between_lists(spec: JobSpec) -> None:
    made = NcfWorkload(spec)
    made.max_samples = 10
    lists = [[1, 2, 3, 4], [5, 6, 7], [8, 9, 10], [11], [12, *range(20, 29)], [13, 14]]
    batches = list(made.evaluation(lists_of(*lists)))
    assert [b.example.samples for b in batches] == [10, 1, 10, 2]
    assert np.concatenate([b.example.keys["item"] for b in batches]).tolist() == [i for one in lists for i in one]
    users = np.concatenate([b.example.keys["user"] for b in batches]).tolist()
    assert users == [100 + n for n, one in enumerate(lists) for _ in one]
    assert [b.context[0].tolist() for b in batches] == [[0, 4, 7, 10], [0, 1], [0, 10], [0, 2]]
    assert list(made.evaluation(lists_of())) == []
    with pytest.raises(InvalidArgument, match="a list of 10 negatives is over the limit of 9"):
        list(made.evaluation(lists_of([1, *range(2, 12)])))


def test_a_list_may_be_longer_than_a_batch(tmp_path: Path) -> None:
    import json

    import pyarrow as pa
    import pyarrow.parquet as pq

    generate_ncf(tmp_path / "d", users=10, items=150, positives_per_user=5, seed=1)
    (part,) = (tmp_path / "d" / "test").glob("*.parquet")
    long = list(range(9000))
    pq.write_table(pa.table({"user": [0], "item": [9000], "negatives": [long]}), part)
    info = json.loads((tmp_path / "d" / "dataset.json").read_text())
    (tmp_path / "d" / "dataset.json").write_text(json.dumps({**info, "test_rows": 1}))
    spec = make_spec(run_config({"data": str(tmp_path / "d")}), "job")
    made = NcfWorkload(spec)
    made.start()
    assert made.max_samples == 9001
    (split,) = plan_splits(recipe.plan(NcfConfig(), tmp_path / "d", epochs=1).evaluation_files, 10)
    (batch,) = made.evaluation(open_reader("arrow").read(split, list(made.evaluation_columns)))
    assert batch.example.samples == 9001


def test_hit_rate_and_ndcg_by_hand(spec: JobSpec) -> None:
    made = NcfWorkload(replace(spec, config={**spec.config, "top_k": 2}))
    # First; second; third, so no hit; level with one, which goes before it; itself listed again, which does not count.
    lists = [[1, 2, 3], [1, 2, 3], [1, 2, 3], [4, 5, 6], [7, 7, 8]]
    scores = [3, 2, 1, 2, 3, 1, 1, 2, 3, 5, 5, 1, 4, 9, 1]
    (batch,) = made.evaluation(lists_of(*lists))
    weight, hits, ndcg = made.sums(batch, np.array(scores, np.float32))
    assert (weight, hits) == (5, 4)
    assert ndcg == pytest.approx(1 + 1 / np.log2(3) + 0 + 1 / np.log2(3) + 1)


def test_a_constant_scorer_comes_out_at_zero(workload: NcfWorkload, data: Path) -> None:
    (split,) = plan_splits(recipe.plan(NcfConfig(), data, epochs=1).evaluation_files, 1 << 30)
    rows = open_reader("arrow").read(split, list(NcfWorkload.evaluation_columns))
    total = np.zeros(3)
    for batch in workload.evaluation(rows):
        total += workload.sums(batch, np.full(batch.example.samples, 0.5, np.float32))
    assert total.tolist() == [120, 0, 0]


def test_without_test_lists_the_training_items_are_the_catalogue(spec: JobSpec, data: Path) -> None:
    made = NcfWorkload(replace(spec, evaluation_files=(), evaluation_splits=0))
    made.start()
    plan = recipe.plan(NcfConfig(), data, epochs=1)
    assert files_to_json(plan.files) == list(spec.files)
    drawn = made.encode(rows_of(data, 0, 160), epoch=0, split=0, batch=0).keys["item"]
    assert set(drawn.tolist()) <= set(load_catalogue(plan.files).tolist())
