# SPDX-License-Identifier: Apache-2.0
"""Going on from a cut: in a new job, or back in the same one. Under sync the end must be the same to the bit."""

import json
import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from oarlock.checkpoint.manifest import Manifest
from oarlock.checkpoint.store import LocalStore, open_checkpoint, open_store
from oarlock.cli.digest import digest_of
from oarlock.launch.config import run_config
from oarlock.launch.folder import create, read_spec, resume, stored_status
from oarlock.launch.inprocess import run_in_process
from oarlock.launch.origin import find_origin, values_of
from oarlock.proto.errors import CorruptCheckpoint, InvalidArgument, NotFound, SpecMismatch


def run(
    spec: Any, folder: Path, restore: str = "", stop: Callable[[dict[str, Any]], bool] = lambda status: False
) -> Any:
    return run_in_process(spec, folder, restore=restore, watch=lambda status: not stop(status), watch_seconds=0.01)


def cuts(folder: Path) -> list[int]:
    return LocalStore(folder / "checkpoints").cuts()


def digest(folder: Path, cut: int | None = None) -> str:
    store = LocalStore(folder / "checkpoints")
    return str(digest_of(store, store.load_manifest(cut)))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, run_of: Any) -> Path:
    """A finished sync job with a cut after each of its three epochs; copy it before it is changed."""
    folder = tmp_path_factory.mktemp("runs") / "first"
    spec = create(folder, "first", run_of(mode="sync", ranks=2, epochs=3, checkpoints_kept=9))
    assert run(spec, folder)["phase"] == "done"
    assert cuts(folder) == [1, 2, 3]
    return folder


@pytest.fixture
def job(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(trained, tmp_path / "runs" / "first"))


def made_of(target: str, **changes: Any) -> Any:
    return run_config({**values_of(find_origin(target)), **changes})


def test_a_new_job_goes_on_with_another_ones_training_to_the_same_end(job: Path, tmp_path: Path) -> None:
    before = sorted(path.relative_to(job) for path in job.rglob("*"))
    folder = tmp_path / "runs" / "second"
    spec = create(folder, "second", made_of("first@1", servers=3, workers=1, checkpoints_kept=9))
    old = read_spec(job)
    assert spec.job != old.job
    assert (spec.seed, spec.files, spec.ranks, spec.tables) == (old.seed, old.files, old.ranks, old.tables)
    status = run(spec, folder)
    assert (status["phase"], len(status["history"]), status["run"]) == ("done", 3, 2)
    assert cuts(folder) == [2, 3], "a number is never used again"
    assert [digest(folder, cut) for cut in (2, 3)] == [digest(job, cut) for cut in (2, 3)]
    (event,) = status["events"]
    assert (event["event"], event["cut"], event["of_job"], event["of_run"]) == ("restore", 1, old.job, 1)
    manifest = LocalStore(folder / "checkpoints").load_manifest(3)
    assert (manifest.job, manifest.metrics["events"]) == (spec.job, [event])
    assert sorted(path.relative_to(job) for path in job.rglob("*")) == before, "the job that it came from is as it was"


def test_a_job_goes_back_and_what_it_went_back_from_confuses_nothing(job: Path) -> None:
    end = digest(job, 3)
    spec, path = resume(job, {"servers": 1, "checkpoints_kept": 2}, cut=1)
    assert path == str(job / "checkpoints" / "cut-000001")
    # It is stopped before it has made a cut of its own: cut 3 is the newest by number, but of the run that was abandoned.
    run(spec, job, path, stop=lambda status: True)
    shutil.rmtree(job / "checkpoints" / "cut-000004", ignore_errors=True)
    _, path = resume(job, {})
    assert path.endswith("cut-000001")
    spec, path = resume(job, {"servers": 3})
    status = run(spec, job, path)
    assert (status["phase"], len(status["history"])) == ("done", 3)
    assert [event["cut"] for event in status["events"]] == [1, 1]
    kept = cuts(job)
    last = kept[-1]
    assert last > 4
    assert digest(job) == end
    # Two of the line are kept, and what was abandoned goes with what is older than they are.
    assert kept == [last - 1, last]


def test_abandoned_cuts_are_known_by_manifests_if_the_coordinators_file_is_lost(job: Path) -> None:
    spec, path = resume(job, {"checkpoints_kept": 9}, cut=1)
    run(spec, job, path, stop=lambda status: bool(status["checkpoints"][-1]["cut"] > 3))
    (job / "state.sqlite").unlink()
    own = [cut for cut in cuts(job) if cut > 3]
    assert own
    for older in (*reversed(own[:-1]), 1):
        newest = cuts(job)[-1]
        damage(next((job / "checkpoints" / f"cut-{newest:06d}").glob("dense-*")))
        with pytest.raises(CorruptCheckpoint, match=f"cut {newest} is damaged") as caught:
            resume(job, {})
        assert caught.value.details["older"] == older, "cuts 2 and 3 are of the run that was abandoned"
        shutil.rmtree(job / "checkpoints" / f"cut-{newest:06d}")


def test_numbers_of_runs_and_cuts_are_above_all_that_the_folder_has(job: Path) -> None:
    """Also without the coordinator's file: cut 1 is gone on from, and cuts 2 and 3 stay what they are."""
    ends = [digest(job, cut) for cut in (2, 3)]
    (job / "state.sqlite").unlink()
    (job / "checkpoints" / "cut-000007").mkdir()
    spec, path = resume(job, {"checkpoints_kept": 9}, cut=1)
    status = run(spec, job, path)
    assert [cut for cut in cuts(job) if cut > 3] == [8, 9]
    assert [digest(job, cut) for cut in (2, 3)] == ends == [digest(job, cut) for cut in (8, 9)]
    assert status["run"] == 2
    assert LocalStore(job / "checkpoints").load_manifest(8).run == 2
    assert stored_status(job)["events"] == status["events"]


@pytest.mark.slow
def test_several_jobs_begin_with_one_cut_at_once(job: Path, tmp_path: Path) -> None:
    """On one shard and on three, while the files are read by both."""
    remote = open_store(f"memory://{tmp_path}/elsewhere")
    for file in (job / "checkpoints").rglob("*"):
        if file.is_file():
            name = str(file.relative_to(job / "checkpoints"))
            remote.files.write_file(name, [file.read_bytes()])
    url = remote.files.root
    folders = [tmp_path / f"copy-{n}" for n in (1, 3)]
    data = values_of(find_origin("first"))["data"]
    specs = []
    for n, folder in zip((1, 3), folders, strict=True):
        values = values_of(find_origin(f"{url}@1"))
        assert "data" not in values, "a manifest alone does not say where data are now"
        specs.append(create(folder, folder.name, run_config({**values, "data": data, "servers": n, "reader": "arrow"})))
    threads = [threading.Thread(target=run, args=pair) for pair in zip(specs, folders, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [digest(folder) for folder in folders] == [digest(job, 3)] * 2


def test_data_may_lie_elsewhere_if_they_are_the_same(job: Path, data: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(data, tmp_path / "other"))
    spec = create(tmp_path / "moved", "moved", made_of("first@2", data=str(other)))
    assert all(str(other) in each["path"] for each in spec.files)
    victim = next((other / "train").glob("*.parquet"))
    victim.rename(victim.with_name("another.parquet"))
    with pytest.raises(SpecMismatch, match="files cannot change"):
        create(tmp_path / "renamed", "renamed", made_of("first@2", data=str(other)))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"seed": 5}, "seed cannot change"),
        ({"recipe_options": {"batch_samples": 512}}, "recipe_options.* cannot change"),
        ({"ranks": 3}, "ranks cannot change"),
        ({"blas_threads": 2}, "blas_threads cannot change"),
        ({"accumulate": 2}, "accumulate cannot change"),
    ],
)
@pytest.mark.parametrize("at_hand", [True, False])
def test_what_its_training_depends_on_cannot_change(
    job: Path, tmp_path: Path, changes: dict[str, Any], match: str, at_hand: bool
) -> None:
    values = values_of(find_origin("first@1"))
    if not at_hand:
        # Its manifest says as much as its folder.
        (job / "job.json").unlink()
        values = {**values_of(find_origin(str(job / "checkpoints") + "@1")), "data": values["data"]}
    with pytest.raises(SpecMismatch, match=match):
        create(tmp_path / "other", "other", run_config({**values, **changes}))
    assert not (tmp_path / "other").exists()


def test_where_a_new_job_begins_is_settled_when_it_is_made(job: Path, tmp_path: Path) -> None:
    folder = tmp_path / "second"
    spec = create(folder, "second", made_of("first"))
    assert spec.restore == str(job / "checkpoints" / "cut-000003")
    # Nothing was begun: it begins there, also when it is resumed, and where it began cannot change.
    again, path = resume(folder, {"epochs": 4})
    assert path == again.restore == spec.restore
    with pytest.raises(InvalidArgument, match="with what a job began cannot change"):
        resume(folder, {"restore": str(job / "checkpoints" / "cut-000002")})


@pytest.mark.parametrize(
    ("target", "error", "match"),
    [
        ("nowhere", NotFound, r"nowhere is no job under runs/, no folder and no URL; jobs: first"),
        ("first@9", NotFound, r"no committed cut 9 in .*there is: 1, 2, 3"),
        ("@3", InvalidArgument, "give the name or folder of a job"),
        ("", InvalidArgument, "give the name or folder of a job"),
        ("a\0b", InvalidArgument, "give the name or folder of a job"),
        ("memory://nothing/at/all", NotFound, "no checkpoint in"),
        ("sftp://me:zebra@host/first@2", InvalidArgument, "checkpoint = .sftp://host.... has a password or a query"),
    ],
)
def test_what_is_no_checkpoint(job: Path, target: str, error: type, match: str) -> None:
    with pytest.raises(error, match=match):
        find_origin(target)


def test_a_cut_of_another_job_in_the_folder_is_refused(job: Path) -> None:
    spec = read_spec(job)
    (job / "job.json").write_text(replace(spec, job="f" * 32).to_json(), encoding="utf-8")
    with pytest.raises(SpecMismatch, match="is of job"):
        resume(job, {}, cut=2)
    with pytest.raises(NotFound, match=r"no committed cut 7 .* there is: 1, 2, 3"):
        resume(job, {}, cut=7)


def damage(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:-9])


def test_of_damaged_cuts_the_next_whole_one_of_the_line_is_named(job: Path, tmp_path: Path) -> None:
    checkpoints = job / "checkpoints"
    damage(next((checkpoints / "cut-000003").glob("rows-*")))
    with pytest.raises(
        CorruptCheckpoint, match=r"cut 3 is damaged: .*truncated.*; cut 2 is the next older one"
    ) as caught:
        resume(job, {})
    assert caught.value.details["older"] == 2
    damage(checkpoints / "cut-000002" / "manifest.json")
    with pytest.raises(CorruptCheckpoint, match="cut 1 is the next older one"):
        resume(job, {})
    damage(next((checkpoints / "cut-000001").glob("dense-*")))
    with pytest.raises(CorruptCheckpoint, match="no older cut is whole") as caught:
        resume(job, {})
    assert caught.value.details["older"] is None
    with pytest.raises(CorruptCheckpoint, match="cut 1 is damaged"):
        resume(job, {}, cut=1)
    with pytest.raises(CorruptCheckpoint, match="truncated"):
        create(tmp_path / "new", "new", made_of("first@1"))
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_a_manifest_that_does_not_say_how_far_its_job_was(job: Path, tmp_path: Path) -> None:
    """It may come from anywhere: what it says is not believed."""
    store, found = open_checkpoint(str(job / "checkpoints") + "@3")
    history = found.metrics["history"]
    for number, metrics in enumerate(
        (
            {},
            {**found.metrics, "history": history[:1]},
            {**found.metrics, "history": [{**each, "loss": "x"} for each in history]},
            {**found.metrics, "history": [{**each, "epoch": 7} for each in history]},
            {**found.metrics, "counted": {"no_such_count": 1}},
            {**found.metrics, "counted": {"steps": [1]}},
            {**found.metrics, "evaluations": {"x": [1.0]}},
            {**found.metrics, "evaluations": {"99999": [1.0, 2.0]}},
            {**found.metrics, "evaluations": 3},
        )
    ):
        folder = tmp_path / f"job-{number}"
        other: Manifest = replace(found, cut=20 + number, metrics=metrics, blocks=found.blocks)
        store.commit(other)
        spec = create(folder, folder.name, made_of(f"first@{20 + number}"))
        with pytest.raises(CorruptCheckpoint, match=r"how far its job was|is of no job like"):
            run(spec, folder)


def test_the_plan_in_a_manifest_is_json_and_older_ones_have_none(job: Path) -> None:
    store, found = open_checkpoint(str(job / "checkpoints") + "@3")
    assert json.loads(json.dumps(found.metrics["plan"])) == read_spec(job).plan()
    metrics = {name: value for name, value in found.metrics.items() if name not in ("plan", "events")}
    store.commit(replace(found, cut=20, metrics=metrics))
    (job / "job.json").unlink()
    values = values_of(find_origin(str(job / "checkpoints")))
    assert values["recipe"] == found.recipe
    assert "ranks" not in values


def test_a_sync_job_goes_on_elsewhere_if_that_is_accepted(job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from oarlock.client import signature

    monkeypatch.setattr(signature, "__version__", "another")
    spec, path = resume(job, {"epochs": 4})
    status = run(spec, job, path)
    assert status["phase"] == "failed"
    assert "--accept-signature" in status["reason"]
    spec, path = resume(job, {"epochs": 4})
    status = run_in_process(
        spec, job, restore=path, accept_signature=True, watch=lambda status: True, watch_seconds=0.01
    )
    assert (status["phase"], len(status["history"])) == ("done", 4)
    assert [e["event"] for e in status["events"]] == ["restore", "restore", "signature"]
    assert status["events"][-1]["now"] == {"oarlock": "another"}
    manifest = LocalStore(job / "checkpoints").load_manifest()
    assert manifest.metrics["events"] == status["events"]
    assert manifest.metrics["signature"]["oarlock"] == "another"
