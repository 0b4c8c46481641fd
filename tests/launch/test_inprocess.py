# SPDX-License-Identifier: Apache-2.0
"""A whole job in one process: it learns, its checkpoint is whole, and it goes on from it on other numbers of shards."""

import json
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from oarlock.checkpoint.store import LocalStore
from oarlock.client.job import JobSpec
from oarlock.cluster.coordinator import Coordinator
from oarlock.cluster.store import Store
from oarlock.data.reader import Reader
from oarlock.launch.folder import resume, stored_status
from oarlock.proto.errors import InvalidArgument, Unavailable
from oarlock.worker import trainer

SAMPLES = 100 * 25 * 5  # users, positives each, the positive and four negatives


def test_a_job_learns_and_leaves_a_whole_checkpoint(start: Any, run_job: Any) -> None:
    spec, folder = start(epochs=3)
    seen: list[dict[str, Any]] = []
    status = run_job(spec, folder, stop_when=lambda s: seen.append(s) or False)
    assert status["phase"] == "done"
    history = status["history"]
    assert [r["epoch"] for r in history] == [0, 1, 2]
    assert [r["samples"] for r in history] == [SAMPLES] * 3
    losses = [r["loss"] for r in history]
    assert losses == sorted(losses, reverse=True)
    assert losses[0] < 0.72
    assert all(0 <= r["metrics"]["hr@10"] <= 1 for r in history)
    assert status["best"]["metrics"]["hr@10"] == max(r["metrics"]["hr@10"] for r in history)
    assert [c["cut"] for c in status["checkpoints"]] == [1, 2, 3]
    store = LocalStore(folder / "checkpoints")
    assert store.cuts() == [2, 3], "two are kept"
    manifest = store.latest()
    assert manifest is not None
    store.verify(manifest)
    assert (manifest.cut, manifest.epoch, manifest.open_splits) == (3, 3, ())
    assert seen[0]["phase"] == "gathering"
    json.dumps(seen, allow_nan=False)
    stored = stored_status(folder)
    assert stored["history"] == history
    assert stored["best"] == status["best"]


def test_one_worker_and_one_shard_give_the_same_result_every_time(start: Any, run_job: Any) -> None:
    """With one worker and nothing fetched ahead there is one order of updates, whatever the number of shards."""
    results = []
    for name, servers in (("a", 1), ("b", 1), ("c", 3)):
        spec, folder = start(name, servers=servers, workers=1, open_splits=1, prefetch=1, epochs=1)
        (result,) = run_job(spec, folder)["history"]
        results.append((result["loss"], result["metrics"]))
    assert results[0] == results[1]
    assert results[0] == results[2]


@pytest.mark.petastorm
def test_both_readers_give_the_same_result(start: Any, run_job: Any) -> None:
    results = []
    for reader in ("arrow", "petastorm"):
        spec, folder = start(reader, reader=reader, servers=1, workers=1, open_splits=1, prefetch=1, epochs=1)
        status = run_job(spec, folder)
        assert status["reader"] == reader
        results.append((status["history"][0]["loss"], status["history"][0]["metrics"]))
    assert results[0] == results[1]


def test_a_job_goes_on_with_other_numbers_of_shards_and_workers(start: Any, run_job: Any) -> None:
    spec, folder = start(epochs=1, servers=2)
    first = run_job(spec, folder)
    spec, path = resume(folder, {"epochs": 3, "servers": 3, "workers": 1})
    second = run_job(spec, folder, path)
    assert (second["phase"], second["run"]) == ("done", 2)
    assert second["history"][0] == first["history"][0]
    assert [r["epoch"] for r in second["history"]] == [0, 1, 2]
    assert [r["samples"] for r in second["history"]] == [SAMPLES] * 3
    assert second["history"][1]["loss"] < first["history"][0]["loss"]
    assert len(second["blocks"]) == 3
    assert LocalStore(folder / "checkpoints").cuts() == [2, 3], "numbers go on"
    spec, path = resume(folder, {})
    third = run_job(spec, folder, path)
    assert (third["phase"], third["run"]) == ("done", 3)
    assert third["history"] == second["history"], "nothing was left to do"


def test_a_stop_in_the_middle_of_an_epoch_loses_and_doubles_nothing(start: Any, run_job: Any) -> None:
    # Far more than are trained before somebody looks.
    spec, folder = start(epochs=40)
    stopped = run_job(spec, folder, stop_when=lambda s: s["epoch"] >= 1 and s["splits_closed"] >= 1)
    assert (stopped["phase"], stopped["reason"]) == ("stopped", "interrupted")
    before = len(stopped["history"])
    assert 1 <= before < 40
    spec, path = resume(folder, {})
    status = run_job(spec, folder, path)
    assert status["phase"] == "done"
    assert [r["samples"] for r in status["history"]] == [SAMPLES] * 40
    assert status["history"][:before] == stopped["history"]


def test_a_stop_before_the_job_trains(start: Any, run_job: Any) -> None:
    spec, folder = start()
    status = run_job(spec, folder, stop_when=lambda s: True)
    assert status["phase"] == "stopped"


def test_a_worker_that_fails_ends_the_job_with_its_words(
    start: Any, run_job: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(reader: Reader, *arguments: Any, **options: Any) -> Any:
        raise InvalidArgument("train.parquet: row 7 is bad; replace the file")

    monkeypatch.setattr(trainer, "read_split", fail)
    spec, folder = start()
    status = run_job(spec, folder)
    assert status["phase"] == "failed"
    assert "row 7 is bad" in status["reason"]


def test_a_defect_in_a_worker_is_named_by_its_class(start: Any, run_job: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any, **options: Any) -> Any:
        raise KeyError("user")

    monkeypatch.setattr(trainer, "read_split", fail)
    spec, folder = start(lease_seconds=0.5)
    status = run_job(spec, folder)
    assert (status["phase"], status["reason"]) == ("failed", "a worker failed: KeyError: 'user'")


@pytest.mark.parametrize("error", [Unavailable("the disk is full"), KeyboardInterrupt()])
def test_an_error_of_the_process_itself_leaves_no_thread(
    start: Any, run_job: Any, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    real = Coordinator.tick

    def tick(self: Coordinator) -> None:
        real(self)
        if self.work.epoch:
            raise error

    if isinstance(error, Exception):
        monkeypatch.setattr(Coordinator, "tick", tick)

    def watch(status: dict[str, Any]) -> bool:
        if not isinstance(error, Exception) and status["epoch"]:
            raise error
        return False

    spec, folder = start(epochs=50)
    with pytest.raises(type(error)):
        run_job(spec, folder, stop_when=watch)
    assert not [t for t in threading.enumerate() if t.name.startswith("oarlock")]


def test_the_state_is_locked_while_the_job_runs(start: Any, run_job: Any) -> None:
    spec, folder = start(epochs=1)
    refused = []

    def look(status: dict[str, Any]) -> bool:
        if not refused:
            with pytest.raises(Unavailable, match="another coordinator") as caught:
                Store(folder / "state.sqlite").open()
            refused.append(caught.value)
        return False

    assert run_job(spec, folder, stop_when=look)["phase"] == "done"
    assert refused


def test_a_full_disk_at_a_checkpoint_is_a_warning(
    start: Any, run_job: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    spec, folder = start(epochs=2)
    real = LocalStore.write_block
    failures = []

    def write(self: LocalStore, cut: int, image: Any, **options: Any) -> Any:
        if cut == 1:
            failures.append(cut)
            raise OSError(28, "No space left on device")
        return real(self, cut, image, **options)

    monkeypatch.setattr(LocalStore, "write_block", write)
    status = run_job(spec, folder)
    assert status["phase"] == "done"
    assert failures
    assert "checkpoint 1 could not be written, training goes on" in status["warnings"][0]
    assert "No space left" in status["warnings"][0]
    assert LocalStore(folder / "checkpoints").cuts() == [2]


def test_a_checkpoint_of_another_model_is_refused(start: Any, run_job: Any) -> None:
    spec, folder = start("a", epochs=1)
    run_job(spec, folder)
    other, elsewhere = start("b", epochs=2, recipe_options={"factors": 4})
    assert isinstance(other, JobSpec)
    with pytest.raises(InvalidArgument, match=r"has another (tables|dense) than job b"):
        run_job(other, elsewhere, str(folder / "checkpoints" / "cut-000001"))
    assert replace(other, name="c").name == "c"
