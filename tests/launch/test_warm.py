# SPDX-License-Identifier: Apache-2.0
"""A new job that begins with rows of another one's checkpoint: how it is said, what it begins with, and that it trains."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from oarlock.checkpoint.store import LocalStore, open_checkpoint
from oarlock.cluster.coordinator import Coordinator
from oarlock.launch.config import load_toml, run_config
from oarlock.launch.folder import create, read_run, read_spec, resume
from oarlock.launch.inprocess import run_in_process
from oarlock.proto.errors import CorruptCheckpoint, InvalidArgument, NotFound

Run = Callable[..., Any]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, run_of: Any) -> Path:
    """A finished job of one epoch."""
    folder = tmp_path_factory.mktemp("runs") / "first"
    spec = create(folder, "first", run_of(epochs=1))
    assert run_in_process(spec, folder, watch=lambda status: True, watch_seconds=0.01)["phase"] == "done"
    return folder


def rows_of(folder: Path, table: str, cut: int | None = None) -> dict[int, bytes]:
    """Return weights and state by key."""
    store = LocalStore(folder / "checkpoints")
    manifest = store.load_manifest(cut)
    images = [store.load_block(manifest, e) for e in manifest.blocks if (e.kind, e.name) == ("rows", table)]
    return {
        key: weights.tobytes() + state.tobytes()
        for image in images
        for key, weights, state in zip(image.keys.tolist(), image.weights, image.state, strict=True)
    }


def test_a_job_begins_with_chosen_tables_and_trains_anew(
    trained: Path, run_of: Any, run_job: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [table.name for table in read_spec(trained).tables]
    folder = tmp_path / "second"
    warm = {"path": str(trained), "tables": {names[0]: names[0]}}
    spec = create(folder, "second", run_of(epochs=1, seed=8, servers=3, warm_start=warm))
    assert spec.warm_start.path == str(trained / "checkpoints" / "cut-000001"), "one cut for good"
    assert load_toml(folder / "job.toml")["warm_start"]["tables"] == {names[0]: names[0]}
    assert read_run(folder).warm_start == {**warm, "path": spec.warm_start.path, "dense": {}, "dimension": "refuse"}
    # A cut before anything was trained shows what it began with: stop as soon as all shards have their blocks.
    cut = Coordinator.has_adopted

    def asks_for_a_cut(self: Coordinator, shard: int, generation: int, listed: int | None = None) -> None:
        # Under one lock: no worker is leased a split in between.
        with self.lock:
            cut(self, shard, generation, listed)
            if self.placed:
                self.stop(True, "enough")

    with monkeypatch.context() as patch:
        patch.setattr(Coordinator, "has_adopted", asks_for_a_cut)
        status = run_job(spec, folder)
    assert (status["phase"], status["samples"]) == ("stopped", 0)
    assert rows_of(folder, names[0]) == rows_of(trained, names[0])
    assert rows_of(folder, names[1]) == {}
    assert [e["event"] for e in status["events"]] == ["warm_start"]
    manifest = LocalStore(folder / "checkpoints").load_manifest()
    assert (manifest.step, manifest.epoch, manifest.closed.floor, manifest.run) == (0, 0, 0, 1)
    # It goes on from its own cut, and is not warmed again.
    spec, path = resume(folder, {})
    status = run_job(spec, folder, path)
    assert (status["phase"], len(status["history"])) == ("done", 1)
    assert [e["event"] for e in status["events"]] == ["warm_start", "restore"]
    before, after = rows_of(trained, names[0]), rows_of(folder, names[0])
    assert set(before) <= set(after)
    assert any(before[key] != after[key] for key in before)


def test_all_of_equal_names_are_taken_without_a_choice(
    trained: Path, run_of: Any, run_job: Run, tmp_path: Path
) -> None:
    old = read_spec(trained)
    folder = tmp_path / "second"
    spec = create(folder, "second", run_of(epochs=1, warm_start={"path": str(trained)}))
    assert spec.warm_start.tables == {t.name: t.name for t in old.tables}
    assert spec.warm_start.dense == {d.name: d.name for d in old.dense}
    status = run_job(spec, folder)
    before = LocalStore(trained / "checkpoints").load_manifest().metrics["history"][0]["loss"]
    assert status["history"][0]["loss"] < before, "it begins where the other one was"


def test_what_cannot_be_taken_leaves_no_folder(trained: Path, run_of: Any, tmp_path: Path) -> None:
    folder = tmp_path / "second"
    for warm, error, match in (
        ({"path": str(tmp_path / "nowhere")}, NotFound, "no checkpoint"),
        ({"path": str(trained), "tables": {"usr": "user"}}, NotFound, "the job has no table 'usr'"),
        ({"path": f"{trained}/checkpoints@7"}, NotFound, "no committed cut 7"),
    ):
        with pytest.raises(error, match=match):
            create(folder, "second", run_of(warm_start=warm))
    with pytest.raises(InvalidArgument, match="unknown field 'paht'; did you mean 'path'"):
        run_of(warm_start={"paht": "x"})
    _, manifest = open_checkpoint(str(trained / "checkpoints"))
    entry = next(e for e in manifest.blocks if e.kind == "dense")
    file = trained / "checkpoints" / entry.folder / entry.file
    data = file.read_bytes()
    file.write_bytes(data[:-3])
    try:
        with pytest.raises(CorruptCheckpoint, match="truncated"):
            create(folder, "second", run_of(warm_start={"path": str(trained)}))
        assert not folder.exists()
        # What is not taken over is not looked at.
        names = [table.name for table in read_spec(trained).tables]
        create(folder, "second", run_of(warm_start={"path": str(trained), "tables": {names[0]: names[0]}}))
    finally:
        file.write_bytes(data)
    with pytest.raises(InvalidArgument, match="with what a job began cannot change"):
        resume(folder, {"warm_start": {}})


def test_a_job_that_goes_on_begins_with_nothing_else(trained: Path, run_of: Any, tmp_path: Path) -> None:
    values = vars(run_of(restore=str(trained), warm_start={"path": str(trained)}))
    with pytest.raises(InvalidArgument, match="contradict each other"):
        create(tmp_path / "second", "second", run_config(values))
