# SPDX-License-Identifier: Apache-2.0
"""A job's folder: whose it is, how it is found, and what may not change when its job goes on."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from oarlock.checkpoint.store import LocalStore
from oarlock.client.autoscale import Autoscale
from oarlock.client.compression import WireSpec
from oarlock.client.entry import write_address
from oarlock.cluster.store import Store
from oarlock.launch.folder import create, is_running, job_folder, locate, record_failure, resume, stored_status
from oarlock.proto.errors import CorruptCheckpoint, InvalidArgument, NotFound, SpecMismatch, Unavailable


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, run_of: Any) -> Path:
    """A finished job of one epoch; copy it before it is changed."""
    from oarlock.launch.inprocess import run_in_process

    folder = tmp_path_factory.mktemp("runs") / "first"
    spec = create(folder, "first", run_of(epochs=1))
    assert run_in_process(spec, folder, watch=lambda status: True, watch_seconds=0.01)["phase"] == "done"
    return folder


@pytest.fixture
def job(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "first"))


@pytest.mark.parametrize("name", ["a/b", "..", ".hidden", "-x", "a b", "é", "x" * 101, "a\n"])
def test_names_that_are_no_names(name: str) -> None:
    with pytest.raises(InvalidArgument, match="use 1 to 100 letters"):
        job_folder(name, "")


def test_names_and_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert job_folder("a", "") == ("a", tmp_path / "runs" / "a")
    assert job_folder("a", "x/y") == ("a", tmp_path / "x" / "y")
    assert job_folder("", "x/y") == ("y", tmp_path / "x" / "y")
    one, two = job_folder("", ""), job_folder("", "")
    assert one[0] != two[0]
    assert one[1] == tmp_path / "runs" / one[0]


def test_a_folder_is_one_jobs_for_ever(start: Any, run_of: Any) -> None:
    spec, folder = start()
    before = {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}
    assert set(before) == {"job.json", "job.toml"}
    with pytest.raises(InvalidArgument, match="holds a job already: go on with --resume"):
        create(folder, "other", run_of())
    assert {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()} == before
    assert spec.name == "job"


def test_a_folder_that_cannot_be_made(tmp_path: Path, run_of: Any) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(InvalidArgument, match="cannot be written"):
        create(tmp_path / "file" / "job", "job", run_of())


def test_jobs_are_found_by_name_folder_and_address(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_of: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(NotFound, match=r"no job 'a'.*Jobs under runs/: none"):
        locate("a")
    folder = tmp_path / "runs" / "a"
    create(folder, "a", run_of())
    assert locate("a") == (Path("runs/a"), None)
    write_address(folder, "127.0.0.1:9")
    assert locate("a") == (Path("runs/a"), "127.0.0.1:9")
    assert locate(str(folder)) == (folder, "127.0.0.1:9")
    assert locate("host:1") == (None, "host:1")
    (folder / "coordinator.json").write_text("{")
    assert locate("a") == (Path("runs/a"), None), "half an address is none"
    with pytest.raises(NotFound, match="Jobs under runs/: a"):
        locate("b")


def test_the_status_of_jobs_that_do_not_run(job: Path, start: Any) -> None:
    status = stored_status(job)
    assert (status["phase"], status["run"], len(status["history"])) == ("done", 1, 1)
    assert status["history"][0]["metrics"].keys() == {"hr@10", "ndcg@10"}
    _, folder = start("never")
    with pytest.raises(NotFound, match="was never started"):
        stored_status(folder)
    (folder / "job.json").write_text("{}")
    with pytest.raises(InvalidArgument, match=r"job\.json cannot be read"):
        stored_status(folder)


def test_a_running_job_is_left_alone(job: Path) -> None:
    before = (job / "job.toml").read_bytes()
    holder = Store(job / "state.sqlite").open()
    try:
        assert is_running(job)
        with pytest.raises(Unavailable, match="job first is running: stop it"):
            resume(job, {"epochs": 9})
        with pytest.raises(Unavailable, match="running, but cannot be asked"):
            stored_status(job)
    finally:
        holder.close()
    assert not is_running(job)
    assert (job / "job.toml").read_bytes() == before


def test_a_failure_that_only_the_launcher_saw(job: Path) -> None:
    record_failure(job, "shard 1: ended by SIGKILL")
    status = stored_status(job)
    assert (status["phase"], status["reason"]) == ("failed", "shard 1: ended by SIGKILL")


def test_resume_may_change_epochs_and_processes(job: Path) -> None:
    before, _ = resume(job, {})
    spec, path = resume(job, {"epochs": 5, "servers": 3, "workers": 1})
    assert (spec.epochs, spec.servers, spec.workers) == (5, 3, 1)
    assert (spec.job, spec.name, spec.config, spec.files) == (before.job, "first", before.config, before.files)
    assert path == str(job / "checkpoints" / "cut-000001")
    again, _ = resume(job, {})
    assert again.epochs == 5, "what was changed stays"


def test_resume_may_change_how_values_travel(job: Path) -> None:
    spec, _ = resume(job, {"compression": {"user": {"push": "int8+feedback"}}})
    assert spec.compression == {"user": WireSpec(push="int8+feedback")}
    spec, _ = resume(job, {"compression": {"user": {"pull": "float16"}, "dense": {"push": "int8"}}})
    assert spec.compression == {"user": WireSpec("float16", "int8+feedback"), "dense": WireSpec(push="int8")}
    assert stored_status(job)["residual_splits_lost"] == 0
    with pytest.raises(InvalidArgument, match=r"compression.usr: the job has no such table; did you mean 'user'"):
        resume(job, {"compression": {"usr": {"pull": "float16"}}})
    with pytest.raises(InvalidArgument, match=r"compression.user = 'int8': give a table"):
        resume(job, {"compression": {"user": "int8"}})


def test_the_scaler_of_a_job_that_goes_on(job: Path) -> None:
    spec, _ = resume(job, {"autoscale": {"servers_most": 4, "looks": 5}})
    assert spec.autoscale == Autoscale(servers_most=4, looks=5)
    assert resume(job, {})[0].autoscale == spec.autoscale
    spec, _ = resume(job, {"autoscale": {"dry_run": True}})
    assert spec.autoscale == Autoscale(servers_most=4, looks=5, dry_run=True), "what is not said is as it was"
    assert stored_status(job)["autoscale"] == {"decisions": []}
    with pytest.raises(InvalidArgument, match="autoscale = 3: give a table"):
        resume(job, {"autoscale": 3})
    assert not resume(job, {"autoscale": {"servers_most": 0}})[0].autoscale
    assert "autoscale" not in stored_status(job)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"seed": 5}, r"seed cannot change .*\(it was 0, now 5\)"),
        (
            {"recipe_options": {"batch_samples": 512}},
            r"recipe_options.batch_samples cannot change .*it was 1024, now 512",
        ),
        ({"recipe_options": {"factors": 4}}, "recipe_options.factors cannot change"),
    ],
)
def test_resume_may_not_change_what_rows_depend_on(job: Path, changes: dict[str, Any], match: str) -> None:
    before = (job / "job.json").read_bytes(), (job / "job.toml").read_bytes()
    with pytest.raises(SpecMismatch, match=match):
        resume(job, changes)
    assert ((job / "job.json").read_bytes(), (job / "job.toml").read_bytes()) == before


def test_resume_on_other_data_is_refused(job: Path, data: Path, tmp_path: Path) -> None:
    other = shutil.copytree(data, tmp_path / "other")
    with pytest.raises(SpecMismatch, match="cannot change in a job that goes on"):
        resume(job, {"data": str(other)})


def test_resume_without_a_job_or_a_checkpoint(start: Any, tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="holds no job"):
        resume(tmp_path / "nowhere", {})
    _, folder = start()
    with pytest.raises(NotFound, match="holds no whole checkpoint: train anew"):
        resume(folder, {})


def test_a_damaged_checkpoint_is_named_and_nothing_is_begun(job: Path) -> None:
    before = (job / "job.json").read_bytes()
    victim = next((job / "checkpoints" / "cut-000001").glob("rows-*.arrow"))
    content = victim.read_bytes()
    for damaged in (content[:-7], content[: len(content) // 2] + b"\x55" + content[len(content) // 2 + 1 :]):
        victim.write_bytes(damaged)
        with pytest.raises(CorruptCheckpoint) as caught:
            resume(job, {"epochs": 3})
        assert victim.name in str(caught.value)
        assert "\n" not in str(caught.value)
        assert "cut 1 is damaged" in str(caught.value)
        assert str(caught.value).endswith("no older cut is whole")
    victim.unlink()
    with pytest.raises(CorruptCheckpoint, match=f"{victim.name}.*missing"):
        resume(job, {"epochs": 3})
    assert (job / "job.json").read_bytes() == before
    victim.write_bytes(content)
    manifest = LocalStore(job / "checkpoints").latest()
    assert manifest is not None
    LocalStore(job / "checkpoints").verify(manifest)
    resume(job, {"epochs": 3})
