# SPDX-License-Identifier: Apache-2.0
"""Models as ONNX, run by onnxruntime: numbers of training's evaluation, from rows and from keys; what unknown keys read as."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from oarlock.checkpoint.store import open_checkpoint
from oarlock.client.job import JobSpec
from oarlock.data.files import files_from_json
from oarlock.data.reader import open_reader
from oarlock.data.scores import Scores
from oarlock.data.splits import plan_splits
from oarlock.embedding.spec import Initializer, Part, TableSpec
from oarlock.export.model import export_model, model_of, table_rows
from oarlock.export.onnx import dense_graph, whole_graph
from oarlock.export.tables import dense_values
from oarlock.launch.folder import read_spec
from oarlock.nn import (
    Linear,
    Model,
    add,
    binary_cross_entropy,
    columns,
    concat,
    dense_input,
    dropout,
    field_columns,
    interactions,
    lookup,
    multiply,
    pool,
    relu,
    sigmoid,
    tanh,
)
from oarlock.proto.errors import InvalidArgument, OutOfMemory, SpecMismatch, UnknownTable
from oarlock.serving.snapshot import Snapshot, open_snapshot
from oarlock.worker.recipe import EvaluationBatch, Example, load_recipe

RECIPES = ("wide_deep", "dlrm", "ncf")

ort = pytest.importorskip("onnxruntime")
pytest.importorskip("onnx")


def session(made: Any) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(made if isinstance(made, bytes) else made.SerializeToString(), options)


class Trained:
    """What a job of a recipe left, and what its evaluation sees."""

    def __init__(self, folder: Path) -> None:
        self.spec: JobSpec = read_spec(folder)
        self.store, self.manifest = open_checkpoint(folder / "checkpoints")
        self.workload = load_recipe(self.spec.recipe).workload(self.spec)
        self.workload.start()
        self.snapshot: Snapshot = open_snapshot(self.store, self.manifest)
        self.program = self.workload.model.bind(self.workload.max_samples)
        for name, values in dense_values(self.store, self.manifest).items():
            self.program.parameters[name][...] = values

    def batches(self) -> Iterator[EvaluationBatch]:
        for plan in plan_splits(files_from_json(list(self.spec.evaluation_files)), self.spec.evaluation_rows_per_split):
            rows = open_reader("arrow").read(plan, list(self.workload.evaluation_columns))
            yield from self.workload.evaluation(rows)

    def rows(self, example: Example) -> dict[str, np.ndarray[Any, Any]]:
        """Rows of each lookup's keys, as a serving process gives them: float32[samples * fields, dim]."""
        out = {}
        for each in self.workload.model.lookups:
            keys = example.keys[each.name].reshape(-1)
            out[each.name] = np.empty((len(keys), each.dim), np.float32)
            self.snapshot.tables[each.table].lookup(keys, out[each.name])
        return out

    def score(self, example: Example, rows: dict[str, np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
        feeds: dict[str, Any] = dict(example.feeds)
        feeds.pop(self.workload.model.label, None)
        for each in self.workload.model.lookups:
            inverse = np.arange(len(rows[each.name]), dtype=np.int32).reshape(example.samples, each.fields)
            feeds[each.name] = (rows[each.name], inverse)
        return self.program.predict(feeds, example.samples).copy()


@pytest.fixture(params=RECIPES)
def job(request: pytest.FixtureRequest, trained: Any) -> Trained:
    return Trained(trained(request.param))


def dense_feeds(job: Trained, example: Example) -> dict[str, np.ndarray[Any, Any]]:
    return {d.name: example.feeds[d.name] for d in job.workload.model.dense_inputs}


def test_the_dense_graph_gives_the_numbers_of_evaluation(job: Trained, tmp_path: Path) -> None:
    export_model(job.store, job.manifest, job.spec, tmp_path / "a.onnx")
    run = session((tmp_path / "a.onnx").read_bytes())
    scores, worst, samples = Scores(), 0.0, 0
    for batch in job.batches():
        example = batch.example
        rows = job.rows(example)
        feeds = {name: values.reshape(example.samples, -1) for name, values in rows.items()}
        (found,) = run.run(["score"], feeds | dense_feeds(job, example))
        want = job.score(example, rows)
        assert found.shape == want.shape == (example.samples,)
        worst, samples = max(worst, float(np.abs(found - want).max())), samples + len(found)
        if job.spec.metrics[0] == "auc":
            scores.add(found, job.workload.labels(batch))
    assert samples > 100
    assert worst <= 1e-6
    if job.spec.metrics[0] == "auc":
        assert abs((scores.metrics()["auc"] or 0.0) - job.manifest.metrics["auc"]) <= 1e-6


def test_the_whole_model_gives_them_from_keys(job: Trained, tmp_path: Path) -> None:
    export_model(job.store, job.manifest, job.spec, tmp_path / "a.onnx", rows=True)
    run = session((tmp_path / "a.onnx").read_bytes())
    compared = absent = 0
    for batch in job.batches():
        example = batch.example
        keys = {
            each.name: example.keys[each.name].reshape(example.samples, each.fields).view(np.int64)
            for each in job.workload.model.lookups
        }
        found, missing = run.run(["score", "missing"], keys | dense_feeds(job, example))
        known = missing == 0
        want = job.score(example, job.rows(example))
        assert np.abs(found[known] - want[known]).max(initial=0) <= 1e-6
        compared += int(known.sum())
        absent += int((~known).sum())
    assert compared > 100
    # A key that no row has is another one.
    strange = {name: np.full((1, values.shape[1]), -5, np.int64) for name, values in keys.items()}
    one = {d.name: np.zeros((1, d.width), np.float32) for d in job.workload.model.dense_inputs}
    _, missing = run.run(None, strange | one)
    assert missing.tolist() == [sum(values.shape[1] for values in keys.values())]


def test_every_operation_has_its_form() -> None:
    rows = lookup("rows", table="t", dim=4, fields=3)
    numbers = dense_input("numbers", width=5)
    both = concat([field_columns(rows, 1, 3), tanh(numbers), dropout(relu(columns(rows, 2, 9)), 0.5)])
    hidden = Linear(4, activation="tanh", name="one", bias=False)(both)
    hidden = multiply(hidden, add(sigmoid(hidden), pool(rows, 3)))
    hidden = concat([interactions(hidden, rows), interactions(None, rows), hidden])
    hidden = Linear(3, activation="sigmoid", name="two")(hidden)
    logit = Linear(1, name="score")(hidden)
    model = Model(score=logit, loss=binary_cross_entropy(logit, label="y"))
    rng = np.random.default_rng(1)
    program = model.bind(50)
    program.flat_parameters[:] = rng.normal(0, 0.5, program.flat_parameters.shape)
    values = rng.normal(0, 1, (20, 4)).astype(np.float32)
    inverse = rng.integers(0, 20, (50, 3)).astype(np.int32)
    fed = rng.normal(0, 1, (50, 5)).astype(np.float32)
    want = program.predict({"rows": (values, inverse), "numbers": fed}, 50)
    run = session(dense_graph(model, program.parameters))
    for n in (50, 1):
        (found,) = run.run(None, {"rows": values[inverse[:n]].reshape(n, -1), "numbers": fed[:n]})
        assert np.abs(found - want[:n]).max() <= 1e-6


def whole(absent: str, parts: tuple[Part, ...], count: int) -> tuple[Any, float, Any]:
    """A model that adds up the two rows of a sample: (session, sum of the weight of the layer, keys)."""
    rows = lookup("rows", table="t", dim=3, fields=2)
    logit = Linear(1, name="sum", bias=False)(rows)
    model = Model(score=logit, loss=binary_cross_entropy(logit, label="y"))
    spec = TableSpec("t", 3, parts=parts, absent=absent, blocks=1)
    keys = np.array([3, 2**64 - 1, 2**63], np.uint64)[:count]
    weights = np.arange(9, dtype=np.float32).reshape(3, 3)[:count]
    made = whole_graph(model, {"sum.weight": np.ones((6, 1), np.float32)}, {"t": spec}, {"t": (keys, weights)})
    return session(made), keys, model


def test_a_key_without_a_row_reads_as_is_said() -> None:
    parts = (Part(1, initializer=Initializer("constant", 0.5)), Part(2, initializer=Initializer("normal", 0.25, 0.1)))
    asked = np.array([[3, 2**64 - 1], [2**63, 4], [0, 1]], np.uint64).view(np.int64)
    run, _, _ = whole("first", parts, 3)
    score, missing = run.run(None, {"rows": asked})
    assert score.tolist() == [3 + 12, 21 + 1.0, 2.0]
    assert missing.tolist() == [0, 1, 2]
    run, _, _ = whole("zeros", parts, 3)
    assert run.run(None, {"rows": asked})[0].tolist() == [15, 21, 0]
    # A table without rows.
    run, _, _ = whole("first", parts, 0)
    score, missing = run.run(None, {"rows": asked})
    assert score.tolist() == [2.0] * 3
    assert missing.tolist() == [2] * 3


def test_what_does_not_fit_is_refused(trained: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = Trained(trained("ncf"))
    model, parameters = model_of(job.spec), dense_values(job.store, job.manifest)
    with pytest.raises(SpecMismatch, match=r"score\.weight is missing"):
        dense_graph(model, {name: values for name, values in parameters.items() if name != "score.weight"})
    with pytest.raises(SpecMismatch, match="has shape"):
        dense_graph(model, {name: values.T for name, values in parameters.items()})
    with pytest.raises(UnknownTable, match="'item', of which there are no rows"):
        whole_graph(model, parameters, {}, {})
    with pytest.raises(OutOfMemory, match="more than 100 bytes"):
        table_rows(job.store, job.manifest, "user", 100)
    rows = {name: table_rows(job.store, job.manifest, name, 1 << 20) for name in ("user", "item")}
    with pytest.raises(InvalidArgument, match="export the dense graph alone"):
        whole_graph(model, parameters, job.manifest.table_specs(), rows, max_row_bytes=100)
    with pytest.raises(InvalidArgument, match=r"ends in \.onnx"):
        export_model(job.store, job.manifest, job.spec, tmp_path / "a.bin")
    with pytest.raises(OutOfMemory):
        export_model(job.store, job.manifest, job.spec, tmp_path / "a.onnx", rows=True, max_row_bytes=100)
    assert not list(tmp_path.iterdir())
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(InvalidArgument, match="pip install"):
        dense_graph(model, parameters)
