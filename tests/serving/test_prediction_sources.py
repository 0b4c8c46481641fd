# SPDX-License-Identifier: Apache-2.0
"""Where a predictor comes from: the job's folder, the recipe's own code, and what is refused of both."""

import contextlib
import shutil
import sys
from dataclasses import replace
from typing import Any

import pytest
from predict_rig import Job

from oarlock.checkpoint.files import LocalFiles
from oarlock.checkpoint.store import open_checkpoint
from oarlock.checkpoint.transforms_file import digest_of, write_transforms
from oarlock.export.compress import compress
from oarlock.launch.prediction import NoPrediction, job_beside, predictor_of, spec_of
from oarlock.proto.errors import InvalidArgument, NotFound, SpecMismatch

EVIL = "predict_evil:recipe"


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    return Job("dlrm", tmp_path_factory.mktemp("dlrm"))


def test_the_folder_of_a_checkpoint_is_found(job: Job) -> None:
    place = job.folder / "checkpoints"
    cut = place / f"cut-{job.manifest.cut:06d}"
    assert cut.is_dir()
    assert [job_beside(str(path)) for path in (place, f"{place}@1", cut)] == [job.folder] * 3
    assert job_beside("s3://bucket/folder") is None
    assert job_beside(str(job.folder.parent)) is None


def test_transforms_are_those_of_the_checkpoint_or_none(job: Job, tmp_path: Any) -> None:
    with pytest.raises(NoPrediction, match="give it by --job"):
        predictor_of(job.manifest, job=None)
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(job.folder / "job.json", other / "job.json")
    assert predictor_of(job.manifest, job=other).name == "dlrm"
    text = (other / "job.json").read_text(encoding="utf-8")
    (other / "job.json").write_text(text.replace('\\"log\\":true', '\\"log\\":false'), encoding="utf-8")
    with pytest.raises(NoPrediction, match="is the folder of another job"):
        predictor_of(job.manifest, job=other)
    (other / "job.json").write_text(text.replace(job.manifest.job, "0" * 32), encoding="utf-8")
    with pytest.raises(NoPrediction, match="is the folder of another job"):
        predictor_of(job.manifest, job=other)


def test_transforms_come_with_the_checkpoint(job: Job, tmp_path: Any) -> None:
    alone = tmp_path / "alone"
    shutil.copytree(job.folder / "checkpoints", alone)
    store, manifest = open_checkpoint(str(alone))
    found = predictor_of(manifest, files=store.files)
    assert found.name == "dlrm"
    small = compress(store, manifest, {}, tmp_path / "small")
    for files in (store.files, small.files):
        assert spec_of(manifest, files).transforms == job.spec.transforms
    (file,) = (alone / "plan").iterdir()
    text = file.read_bytes()
    for wrong in (text[:-1], text.replace(b"true", b"frue"), b""):
        assert wrong != text
        file.write_bytes(wrong)
        with pytest.raises(NoPrediction, match="its checksum is not the one in its name"):
            predictor_of(manifest, files=store.files)
    file.unlink()
    with pytest.raises(NoPrediction, match="give it by --job"):
        predictor_of(manifest, files=store.files)
    assert predictor_of(manifest, files=store.files, job=job.folder).name == "dlrm"


def test_a_checkpoint_does_not_say_what_is_imported(job: Job, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "predict_evil.py").write_text("raise SystemExit('imported')\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    manifest = replace(job.manifest, recipe=EVIL)
    with pytest.raises(NoPrediction, match="is none of Oarlock's own: give --recipe predict_evil:recipe"):
        predictor_of(manifest, job=job.folder)
    assert "predict_evil" not in sys.modules
    with pytest.raises(SystemExit):
        predictor_of(manifest, job=job.folder, recipe=EVIL)
    with pytest.raises(InvalidArgument, match="the checkpoint is of recipe oarlock"):
        predictor_of(job.manifest, job=job.folder, recipe=EVIL)


@pytest.mark.parametrize(
    "wrong",
    [{"evaluation_files": 5}, {"metrics": 7}, {"splits": "x"}, {"batch_rows": None}, {"transforms": [1]}, None, []],
    ids=str,
)
def test_a_plan_that_is_none_leaves_rows_alone_or_is_not_looked_at(job: Job, wrong: Any) -> None:
    plan = {**job.manifest.metrics["plan"], **wrong} if isinstance(wrong, dict) else wrong
    manifest = replace(job.manifest, metrics={**job.manifest.metrics, "plan": plan})
    with contextlib.suppress(NoPrediction):
        assert predictor_of(manifest, job=job.folder).name == "dlrm"


@pytest.mark.parametrize("attribute", ["plan_click", "model", "np"])
def test_what_is_no_recipe_is_not_taken_for_one(job: Job, attribute: str) -> None:
    manifest = replace(job.manifest, recipe=f"oarlock.recipes.dlrm:{attribute}")
    with pytest.raises(NoPrediction, match=r"is no recipe|has no 'np'"):
        predictor_of(manifest, job=job.folder)


def test_transforms_with_a_name_that_is_no_text_are_refused(job: Job, tmp_path: Any) -> None:
    text = job.spec.transforms.replace('"city"', '"\\ud800"')
    assert text != job.spec.transforms
    files = LocalFiles(tmp_path)
    write_transforms(files, text)
    plan = {**job.manifest.metrics["plan"], "transforms": digest_of(text)}
    manifest = replace(job.manifest, metrics={**job.manifest.metrics, "plan": plan})
    with pytest.raises(NoPrediction, match="surrogates not allowed"):
        predictor_of(manifest, files=files)


def test_a_graph_that_is_not_the_cuts_is_refused(job: Job) -> None:
    wider = replace(job.manifest, config={**job.manifest.config, "dim": 16})
    with pytest.raises(NoPrediction, match="looks up table fields with dim 16"):
        predictor_of(wider, job=job.folder)
    deeper = replace(job.manifest, config={**job.manifest.config, "top": [64, 32, 16]})
    with pytest.raises(SpecMismatch, match="dense parameters of recipe"):
        predictor_of(deeper, job=job.folder, recipe="dlrm")
    unknown = replace(job.manifest, recipe="oarlock.recipes.nothing:recipe")
    with pytest.raises(NoPrediction, match="no module"):
        predictor_of(unknown, job=job.folder)
    with pytest.raises(NotFound, match="no module"):
        predictor_of(unknown, job=job.folder, recipe="oarlock.recipes.nothing:recipe")
    broken = replace(job.manifest, config={"dims": 3})
    with pytest.raises(NoPrediction, match="configuration of recipe"):
        predictor_of(broken, job=job.folder)
