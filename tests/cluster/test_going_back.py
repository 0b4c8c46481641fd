# SPDX-License-Identifier: Apache-2.0
"""A coordinator whose job lost blocks for good: what it decides, and what is on disk at every moment of it."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from oarlock.checkpoint.roots import Roots
from oarlock.checkpoint.store import CheckpointStore, LocalStore
from oarlock.client.membership import STAYS
from oarlock.cluster.beginning import begin, next_run
from oarlock.cluster.coordinator import Coordinator
from oarlock.cluster.going_back import MOST_TIMES
from oarlock.cluster.service import CoordinatorService
from oarlock.cluster.store import Store
from oarlock.proto import coordinator_pb2 as pb
from oarlock.proto.errors import PermissionDenied, Unavailable, WrongRun


class Dead(Exception):
    """The process died."""


class Mortal(Store):
    """A store whose process dies instead of a statement: ``left`` from now, 0: the next one; None: never."""

    left: int | None = None

    def _execute(self, statement: str, values: tuple[Any, ...] = ()) -> list[Any]:
        if self.left is not None:
            if self.left == 0:
                raise Dead
            self.left -= 1
        return super()._execute(statement, values)

    def hand_on(self) -> "Mortal":
        after = Mortal(self._path)
        after._db, self._db, after.left = self._db, None, self.left
        return after

    def __exit__(self, kind: Any, *rest: Any) -> None:
        if kind is not Dead:
            super().__exit__(kind, *rest)


@pytest.fixture
def checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CheckpointStore:
    monkeypatch.setattr(CheckpointStore, "check_sizes", lambda *_: None)
    return LocalStore(tmp_path / "checkpoints")


@pytest.fixture
def job(make_cluster: Callable[..., Any]) -> Any:
    """A job that trains, whose coordinator may go back."""
    return trains(make_cluster())


def opened(cluster: Any, store: CheckpointStore, *, dies_at: int | None = None) -> Coordinator:
    """Start the coordinator as its process does."""
    cluster.store = Mortal(cluster.path).open()
    cluster.store.left = dies_at
    c = Coordinator(cluster.store, cluster.spec, clock=cluster.clock, rng=cluster.rng, goes_back=True)
    cluster.coordinator, cluster.service = c, CoordinatorService(c)
    c.open()
    begin(c, "", store)
    return c


def trains(cluster: Any) -> Any:
    cluster.kill()
    opened(cluster, LocalStore(cluster.path.parent / "checkpoints"))
    cluster.joined = cluster.shards()
    return cluster


def cut(cluster: Any, store: CheckpointStore, number: int) -> None:
    """Make a cut that a job can go back to."""
    cuts = cluster.coordinator.cuts
    assert cuts.begin().cut == number
    manifest = cluster.manifest(number)
    cuts.open()
    store.commit(manifest)
    cuts.commit(manifest, f"{store.files.root}/cut-{number:06d}")


def go_on(cluster: Any, store: CheckpointStore) -> Coordinator:
    c = next_run(cluster.coordinator, store)
    cluster.store = c.store
    cluster.coordinator = c
    cluster.service.take_over(c)
    return c


def test_it_goes_back_to_its_last_cut(job: Any, checkpoints: CheckpointStore) -> None:
    worker, _ = job.workers()
    job.train_epoch(worker)
    cut(job, checkpoints, 1)
    job.close(worker, job.lease(worker).splits[0])
    old = job.header(job.joined[0])
    before = job.coordinator
    job.leave(job.joined[1], "killed")
    assert (before.phase, before.handed_on is None) == ("training", False)
    # Nobody is answered between two runs, but for who asks how it is.
    for ask in (lambda: job.heartbeat(worker), lambda: job.join("worker"), lambda: job.lease(worker)):
        with pytest.raises(Unavailable):
            ask()
    assert job.status()["run"] == 1
    c = go_on(job, checkpoints)
    assert (c.run, c.term, c.phase, c.work.epoch) == (2, before.term + 1, "gathering", 1)
    assert c.restore.endswith("cut-000001")
    assert c.work.closed.floor == 3
    assert job.status()["lost"][0]["incarnation"] == job.joined[1]
    with pytest.raises(WrongRun) as refused:
        job.service.heartbeat(pb.HeartbeatRequest(header=old))
    assert refused.value.details[STAYS] is True
    (warning,) = job.status()["warnings"]
    assert "all go back to cut 1, in run 2" in warning
    job.clock.now += 2.5
    job.shards()
    c.copies.step()
    assert c.phase == "training"
    (found,) = job.status()["recoveries"]
    assert (found["kind"], found["shard"], found["cut"], found["run"], found["seconds"]) == ("rollback", 1, 1, 2, 2.5)
    assert "groups of splits that were closed, and what was open, since cut 1" in found["lost"]
    assert c.cuts.begin().cut == 2


def test_without_a_cut_it_begins_again(job: Any, checkpoints: CheckpointStore) -> None:
    worker, _ = job.workers()
    job.train_epoch(worker)
    job.leave(job.joined[0], "killed")
    c = go_on(job, checkpoints)
    assert (c.run, c.restore, c.work.epoch, c.work.closed.floor, c.work.history) == (2, "", 0, 0, [])
    assert (c.work.samples, c.work.steps, c.work.results) == (0, 0, {})
    (event,) = c.events.all
    assert (event["event"], event["cut"], event["path"]) == ("restore", 0, "")
    job.store.close()
    c = opened(job, checkpoints)
    assert (c.run, c.work.history, c.work.closed.floor) == (2, [], 0)


def test_a_cut_that_was_committed_and_not_recorded_counts(job: Any, checkpoints: CheckpointStore) -> None:
    cut(job, checkpoints, 1)
    assert job.coordinator.cuts.begin().cut == 2
    checkpoints.commit(job.manifest(2))
    job.coordinator.cuts.open()
    job.leave(job.joined[0], "killed")
    assert go_on(job, checkpoints).restore.endswith("cut-000002")


def test_a_cut_of_another_run_does_not(job: Any, checkpoints: CheckpointStore) -> None:
    cut(job, checkpoints, 1)
    assert job.coordinator.cuts.begin().cut == 2
    checkpoints.commit(replace(job.manifest(2), run=7))
    job.leave(job.joined[0], "killed")
    assert go_on(job, checkpoints).restore.endswith("cut-000001")


def test_processes_of_before_a_resume_are_not_asked_to_stay(job: Any, checkpoints: CheckpointStore) -> None:
    cut(job, checkpoints, 1)
    first = job.header(job.joined[0])
    job.store.close()
    job.store = Mortal(job.path).open()
    job.coordinator = Coordinator(job.store, job.spec, clock=job.clock, rng=job.rng, goes_back=True)
    job.service = CoordinatorService(job.coordinator)
    job.coordinator.open()
    begin(job.coordinator, f"{checkpoints.files.root}/cut-000001", checkpoints)
    two = job.shards()
    second = job.header(two[0])
    job.leave(two[1], "killed")
    go_on(job, checkpoints)
    assert job.coordinator.run == 3
    for header, stays in ((first, None), (second, True)):
        with pytest.raises(WrongRun) as refused:
            job.service.heartbeat(pb.HeartbeatRequest(header=header))
        assert refused.value.details.get(STAYS) is stays


def test_a_checkpoint_that_is_gone_fails_the_job(job: Any, checkpoints: CheckpointStore) -> None:
    cut(job, checkpoints, 1)
    (Path(str(checkpoints.files.root)) / "cut-000001" / "MANIFEST.json").unlink(missing_ok=True)
    for each in Path(str(checkpoints.files.root)).rglob("*"):
        if each.is_file():
            each.unlink()
    job.leave(job.joined[0], "killed")
    c = go_on(job, checkpoints)
    assert c.phase == "failed"
    assert "it cannot go back to" in c.reason
    assert c.reason.endswith("go on from the last checkpoint with --resume")


def test_a_job_that_never_comes_further_fails_in_the_end(job: Any, checkpoints: CheckpointStore) -> None:
    cut(job, checkpoints, 1)
    joined = job.joined
    for run in range(2, 2 + MOST_TIMES):
        job.leave(joined[0], "killed")
        assert go_on(job, checkpoints).run == run
        joined = job.shards()
    job.leave(joined[0], "killed")
    assert job.coordinator.phase == "failed"


def test_a_cut_begins_the_count_anew(job: Any, checkpoints: CheckpointStore) -> None:
    joined = job.joined
    for number in range(1, MOST_TIMES + 3):
        last = job.coordinator.cuts.last
        cut(job, checkpoints, last + 1)
        job.leave(joined[number % 2], "killed")
        assert go_on(job, checkpoints).phase == "gathering"
        joined = job.shards()


def test_numbers_that_were_asked_for_stay(job: Any, checkpoints: CheckpointStore) -> None:
    workers = job.workers()
    job.service.scale(pb.ScaleRequest(workers=1))
    job.leave(job.joined[0], "killed")
    c = go_on(job, checkpoints)
    assert (c.scaling.servers, c.scaling.workers) == (2, 1)
    assert len([job.join("worker") for _ in workers]) == 2
    job.shards()
    assert c.phase == "training"
    assert job.status()["scale"]["leaving"]["worker"] == [1], "who was to leave is told again"


def test_paths_that_are_refused_stay_refused(job: Any, checkpoints: CheckpointStore, tmp_path: Path) -> None:
    job.coordinator.roots = Roots((str(tmp_path),))
    job.leave(job.joined[0], "killed")
    c = go_on(job, checkpoints)
    assert c.run == 2
    with pytest.raises(PermissionDenied, match="/elsewhere"):
        c.roots.check("/elsewhere")


def test_whoever_stops_it_between_two_runs_is_heard(job: Any, checkpoints: CheckpointStore) -> None:
    job.leave(job.joined[0], "killed")
    job.coordinator.stop(True, "enough")
    c = go_on(job, checkpoints)
    assert (c.run, c.phase, c.reason) == (2, "stopped", "enough")


@pytest.mark.parametrize("with_cut", [True, False])
def test_whenever_it_dies_the_next_one_goes_on(
    make_cluster: Any, checkpoints: CheckpointStore, tmp_path: Path, with_cut: bool
) -> None:
    """At every statement: afterwards the run is 2, begun once, or the shard's death is not recorded at all."""
    unrecorded, moments = 0, 0
    while True:
        cluster = make_cluster(job=f"{moments:032x}")
        cluster.path = tmp_path / f"mortal-{with_cut}-{moments}.sqlite"
        cluster.kill()
        store = LocalStore(tmp_path / f"cuts-{with_cut}-{moments}")
        opened(cluster, store)
        joined = cluster.shards()
        if with_cut:
            cut(cluster, store, 1)
        cluster.store.left = moments
        try:
            cluster.leave(joined[0], "killed")
            go_on(cluster, store)
        except Dead:
            died = True
        else:
            died = False
        for each in (cluster.store, cluster.coordinator.handed_on):
            if each is not None:
                each.close()
        c = opened(cluster, store)
        while c.handed_on is not None:
            c = go_on(cluster, store)
        gone = next(m for m in c.members.all.values() if m.incarnation == joined[0])
        if gone.state == "alive":
            # Nobody has heard it: whoever saw it says so again.
            unrecorded += 1
            assert (c.run, c.phase) == (1, "training")
        else:
            assert (c.run, c.phase) == (2, "gathering")
            assert [e["run"] for e in c.events.all] == [2]
            assert len(c.recoveries.told()) == 1
            assert [m.state for m in c.members.all.values() if m.incarnation == joined[1]] == ["left"]
        cluster.store.close()
        cluster.store = c.store
        moments += 1
        if not died:
            break
    assert moments > 30
    assert 0 < unrecorded < 6
