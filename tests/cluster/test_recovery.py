# SPDX-License-Identifier: Apache-2.0
"""A coordinator that is killed and started again, and one that goes back to a checkpoint."""

import sqlite3
from dataclasses import replace
from typing import Any

import pytest

from oarlock.embedding.spec import to_json
from oarlock.proto import coordinator_pb2 as pb
from oarlock.proto.errors import InvalidArgument, SpecMismatch, Unavailable


def test_a_restart_keeps_all_that_was_told(cluster: Any) -> None:
    shards = cluster.shards()
    worker, other = cluster.workers()
    cluster.train_epoch(worker)
    cluster.commit()
    cluster.close(worker, cluster.lease(worker).splits[0])
    before = cluster.status()
    cluster.restart()
    after = cluster.status()
    assert after["term"] == before["term"] + 1
    for name in ("run", "generation", "phase", "epoch", "history", "checkpoints", "splits_closed", "samples", "blocks"):
        assert after[name] == before[name], name
    assert {m["incarnation"] for m in after["members"]} == {*shards, worker, other}
    assert cluster.coordinator.cuts.begin().cut == 2, "one was made before"


def test_after_a_restart_members_have_a_full_term_and_finish_what_they_held(cluster: Any) -> None:
    shards = cluster.shards()
    one, two = cluster.workers()
    (held,) = cluster.lease(one).splits
    cluster.clock.now += 1000
    cluster.restart()
    cluster.pass_time(4.5)
    assert len(cluster.coordinator.members.alive("worker")) == 2
    cluster.pass_time(0.4, *shards, one, two)
    assert list(cluster.lease(two).splits) == [held]
    cluster.close(one, held)
    cluster.close(two, held)
    assert cluster.status()["samples"] == 10


def test_what_a_worker_had_that_a_restarted_coordinator_never_heard_counts_as_come_back(cluster: Any) -> None:
    """Leases are not on disk: as many splits as it can have had, but for those that another one has."""
    shards = cluster.shards()
    one, two = cluster.workers()
    held = list(cluster.lease(one).splits)
    cluster.lease(two)
    cluster.restart()
    assert cluster.lease(one, held=held).work == pb.WAIT
    assert cluster.coordinator.counted()["given_back"] == 0
    cluster.pass_time(cluster.spec.lease_seconds + 1, *shards, one)
    assert [m.incarnation for m in cluster.coordinator.members.alive("worker")] == [one]
    spec = cluster.coordinator.spec
    expected = min(spec.open_splits, spec.splits - 1)
    assert cluster.coordinator.counted()["given_back"] == expected
    cluster.restart()
    assert cluster.coordinator.counted()["given_back"] == expected


def test_evaluation_survives_a_restart(cluster: Any) -> None:
    cluster.shards()
    worker, other = cluster.workers()
    while (reply := cluster.lease(worker)).work == pb.TRAIN:
        cluster.close(worker, reply.splits[0])
    cluster.evaluated(worker, 0, [4.0, 1.0])
    cluster.restart()
    # The other one may hold the split: it is asked first.
    assert cluster.lease(worker, 5).work == pb.WAIT
    cluster.heartbeat(other)
    assert list(cluster.lease(worker, 5).splits) == [1]
    cluster.evaluated(worker, 1, [4.0, 3.0])
    assert cluster.status()["history"][0]["metrics"] == {"hr": 0.5}


def test_a_restart_while_writing_writes_again(cluster: Any) -> None:
    cluster.shards()
    worker, _ = cluster.workers()
    cluster.train_epoch(worker)
    cluster.commit()
    cluster.train_epoch(worker)
    first = cluster.coordinator.cuts.begin().cut
    cluster.restart()
    cluster.coordinator.tick()
    assert cluster.coordinator.phase == "writing", "done without its last checkpoint"
    assert cluster.coordinator.cuts.begin().cut == first + 1, "a number is never used again"
    cluster.commit(first + 1)
    assert cluster.coordinator.phase == "done"


def test_a_restart_while_stopping_goes_on_stopping(cluster: Any) -> None:
    cluster.shards()
    worker, other = cluster.workers()
    cluster.coordinator.stop(True, "enough")
    cluster.restart()
    assert cluster.lease(worker).work == pb.FINISHED
    cluster.leave(worker)
    cluster.leave(other)
    cluster.commit()
    assert (cluster.coordinator.phase, cluster.coordinator.reason) == ("stopped", "enough")


def test_the_state_of_another_job_is_refused(cluster: Any) -> None:
    cluster.kill()
    cluster.spec = replace(cluster.spec, job="f" * 32)
    cluster.start(open_it=False)
    with pytest.raises(InvalidArgument, match="this state belongs to job"):
        cluster.coordinator.open()


def test_what_could_not_be_recorded_is_not_told(cluster: Any) -> None:
    shards = cluster.shards()
    worker, _ = cluster.workers()
    (split,) = cluster.lease(worker).splits

    class Full:
        def __getattr__(self, name: str) -> Any:
            raise AssertionError(name)

        def execute(self, statement: str, values: Any = ()) -> Any:
            error = sqlite3.OperationalError("database or disk is full")
            error.sqlite_errorcode = sqlite3.SQLITE_FULL
            raise error

        def close(self) -> None: ...

    real, cluster.store._db = cluster.store._db, Full()
    # Also when the report is repeated, which finds the split closed in memory.
    for _ in range(2):
        with pytest.raises(Unavailable, match="disk is full"):
            cluster.close(worker, split)
    with pytest.raises(Unavailable, match="disk is full"):
        cluster.coordinator.tick()
    real.close()
    cluster.restart()
    assert cluster.status()["samples"] == 0
    assert len(shards) == 2


# A new run from a checkpoint


def test_a_new_run_begins_where_the_manifest_ends(cluster: Any) -> None:
    old_shards = cluster.shards()
    worker, _ = cluster.workers()
    cluster.train_epoch(worker)
    cluster.commit(1)
    cluster.close(worker, cluster.lease(worker).splits[0])
    saved = cluster.manifest(2)
    cluster.train_epoch(worker)
    cluster.coordinator.fail("a shard died")
    cluster.kill()
    cluster.spec = replace(cluster.spec, servers=3, epochs=3)
    cluster.start()
    c = cluster.coordinator
    c.begin_run(saved, "/cut-000002")
    assert (c.run, c.phase, c.reason) == (2, "gathering", "")
    status = cluster.status()
    assert (len(status["history"]), status["splits_closed"], status["samples"]) == (1, 1, 10)
    assert status["members"] == []
    assert c.cuts.last == 2
    shards = cluster.shards()
    assert len(shards) == 3
    assert not set(shards) & set(old_shards)
    worker = cluster.join("worker", reader="petastorm").incarnation
    granted = cluster.lease(worker, 5)
    assert list(granted.splits) == [4, 5]
    assert not any(granted.fresh), "shards may have marks of them"
    for split in granted.splits:
        cluster.close(worker, split)
    cluster.train_epoch(worker)
    cluster.commit(3)
    cluster.train_epoch(worker)
    cluster.commit(4)
    status = cluster.status()
    assert status["phase"] == "done"
    assert [r["samples"] for r in status["history"]] == [30, 30, 30]
    assert status["reader"] == "petastorm", "of this run"
    cluster.restart()
    assert cluster.status()["run"] == 2
    assert len(cluster.status()["history"]) == 3


def test_splits_that_were_open_at_a_cut_have_lost_what_was_kept_of_them(cluster: Any) -> None:
    """Whoever gets them in the new run begins with nothing kept, and that is told."""
    cluster.shards()
    one, two = cluster.workers()
    assert len(cluster.lease(one, 2).splits) == 2
    cluster.lease(two)
    cluster.leave(two, "it failed")
    c = cluster.coordinator
    assert c.counted()["given_back"] == 1
    c.begin_run(cluster.manifest(), "/cut-000004")
    assert c.counted()["given_back"] == 3
    cluster.restart()
    assert cluster.coordinator.counted()["given_back"] == 3


def test_a_run_with_nothing_left_to_do_is_done_at_once(cluster: Any) -> None:
    cluster.shards()
    worker, _ = cluster.workers()
    for cut in (1, 2):
        cluster.train_epoch(worker)
        cluster.commit(cut)
    c = cluster.coordinator
    c.begin_run(cluster.manifest(2), "/cut-000002")
    cluster.shards()
    c.tick()
    assert c.phase == "done"
    assert cluster.status()["checkpoints"][-1]["path"] == "/cut-000002"


def test_a_checkpoint_of_other_parameters_is_refused(cluster: Any) -> None:
    c = cluster.coordinator
    good = cluster.manifest()
    other = replace(c.spec.tables[0], dim=8)
    for name, manifest in {
        "seed": replace(good, seed=99),
        "tables": replace(good, tables=(to_json(other), *good.tables[1:])),
    }.items():
        with pytest.raises(SpecMismatch, match=f"has another {name} than job job"):
            c.begin_run(manifest, "/cut")
    assert c.run == 1


def test_a_message_that_comes_before_the_first_look_hides_no_absence(cluster: Any) -> None:
    """After a pause the coordinator's threads may answer before its clock is looked at."""
    cluster.shards()
    worker, _ = cluster.workers()
    (split,) = cluster.lease(worker).splits
    cluster.coordinator.tick()
    cluster.clock.now += 3 * cluster.spec.lease_seconds
    cluster.close(worker, split)
    cluster.coordinator.tick()
    assert cluster.coordinator.phase == "training"
    assert len(cluster.coordinator.members.alive("worker")) == 2


def test_a_shards_end_that_was_recorded_alone_is_followed_up(make_cluster: Any) -> None:
    """A coordinator may die after it recorded that a shard is gone, and before it recorded the placement without it."""
    cluster = make_cluster()
    gone, _ = cluster.join("shard", "a:1"), cluster.join("shard", "a:2")
    assert cluster.coordinator.shards
    member = cluster.coordinator.members.all[gone.incarnation]
    with cluster.store as store:
        store.set_member(gone.incarnation, {**member.record(), "state": "dead", "error": "its lease ended"})
    cluster.restart()
    assert not cluster.coordinator.shards
    cluster.join("shard", "a:3")
    assert sorted(s.address for s in cluster.coordinator.shards.values()) == ["a:2", "a:3"]


def test_a_shards_coming_that_was_recorded_alone_is_followed_up(make_cluster: Any) -> None:
    cluster = make_cluster()
    first = cluster.join("shard", "a:1")
    member = cluster.coordinator.members.all[first.incarnation]
    with cluster.store as store:
        store.set_member(77, {**member.record(), "incarnation": 77, "id": 1, "address": "a:2", "nonce": 78})
    cluster.restart()
    assert sorted(s.address for s in cluster.coordinator.shards.values()) == ["a:1", "a:2"]
