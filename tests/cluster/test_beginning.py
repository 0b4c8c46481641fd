# SPDX-License-Identifier: Apache-2.0
"""With which checkpoint a coordinator begins a run when it starts, and with which numbers."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from oarlock.checkpoint.manifest import Manifest
from oarlock.checkpoint.store import CheckpointStore, LocalStore
from oarlock.cluster.beginning import begin, past_of
from oarlock.proto.errors import SpecMismatch


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return LocalStore(tmp_path / "checkpoints")


@pytest.fixture
def commit(store: CheckpointStore, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Commit a cut of a cluster's present state; its blocks are nowhere, and nobody looks."""
    monkeypatch.setattr(CheckpointStore, "check_sizes", lambda *_: None)

    def make(cluster: Any, cut: int, **changes: Any) -> str:
        manifest: Manifest = replace(cluster.manifest(cut), **changes)
        store.commit(manifest)
        return f"{store.files.root}/cut-{cut:06d}"

    return make


def test_a_job_made_of_a_checkpoint_begins_with_it_once(
    make_cluster: Any, store: CheckpointStore, commit: Callable[..., str], tmp_path: Path
) -> None:
    old = make_cluster()
    old.shards()
    worker, _ = old.workers()
    old.train_epoch(worker)
    path = commit(old, 12)
    cluster = make_cluster(job="f" * 32, restore=path)
    mine = LocalStore(tmp_path / "mine")
    # Killed before it had recorded the run: it begins as before.
    cluster.restart()
    begin(cluster.coordinator, "", mine)
    c = cluster.coordinator
    assert (c.run, c.restore, c.work.epoch, c.cuts.last) == (2, path, 1, 12)
    cluster.shards()
    cluster.restart()
    begin(cluster.coordinator, "", mine)
    c = cluster.coordinator
    assert (c.run, c.phase) == (2, "training"), "it was begun already"
    assert c.cuts.begin().cut == 13
    assert [(e["event"], e["cut"], e["of_job"]) for e in c.events.all] == [("restore", 12, old.spec.job)]
    assert cluster.status()["events"] == c.events.all


def test_a_job_of_its_own_begins_with_nothing(cluster: Any, store: CheckpointStore) -> None:
    begin(cluster.coordinator, "", store)
    assert (cluster.coordinator.run, cluster.coordinator.events.all) == (1, [])


def test_numbers_go_on_above_all_that_the_folder_has(
    make_cluster: Any, store: CheckpointStore, commit: Callable[..., str]
) -> None:
    old = make_cluster()
    old.shards()
    path = commit(old, 3)
    events = ({"event": "restore", "cut": 1, "last": 2, "run": 6},)
    commit(old, 8, run=6, metrics={**old.manifest(8).metrics, "events": events})
    commit(old, 9, run=40, job="e" * 32)
    # Files of an attempt, without a manifest.
    store.files.write_file("cut-000011/rows-user-00000.arrow", [b"x"])
    assert past_of(store, old.spec.job) == (11, 6, events)
    # Its own file is lost.
    cluster = make_cluster()
    begin(cluster.coordinator, path, store)
    c = cluster.coordinator
    assert (c.run, c.cuts.last) == (7, 11)
    assert [(e["cut"], e["last"]) for e in c.events.all] == [(1, 2), (3, 11)]


def test_a_checkpoint_of_other_parameters_begins_nothing(
    make_cluster: Any, store: CheckpointStore, commit: Callable[..., str]
) -> None:
    old = make_cluster()
    old.shards()
    path = commit(old, 3)
    cluster = make_cluster(seed=4)
    with pytest.raises(SpecMismatch, match="has another seed than job job"):
        begin(cluster.coordinator, path, store)
    assert (cluster.coordinator.run, cluster.coordinator.events.all) == (1, [])


def test_what_was_restored_outlives_the_coordinator(make_cluster: Any) -> None:
    cluster = make_cluster()
    cluster.shards()
    saved = cluster.manifest(4)
    cluster.coordinator.cuts.last = 6
    cluster.coordinator.begin_run(saved, "/cut-000004")
    cluster.restart()
    (restore,) = cluster.coordinator.events.restores
    assert restore == (4, 6)
    assert cluster.coordinator.has_begun
