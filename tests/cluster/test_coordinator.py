# SPDX-License-Identifier: Apache-2.0
"""The coordinator: phases, deaths and restarts, driven by messages under a clock that only the test turns."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from oarlock.cluster.coordinator import STOP_SECONDS
from oarlock.cluster.cuts import LAST_PAUSES
from oarlock.proto import coordinator_pb2 as pb
from oarlock.proto.errors import InvalidArgument, LeaseLost, Unavailable

Make = Callable[..., Any]


def test_a_job_from_beginning_to_end(cluster: Any) -> None:
    c = cluster.coordinator
    assert c.phase == "gathering"
    first = cluster.join("shard", "a:1")
    worker = cluster.join("worker", reader="arrow").incarnation
    assert cluster.lease(worker).work == pb.WAIT
    with pytest.raises(Unavailable, match="1 of 2 shards"):
        c.placement()
    second = cluster.join("shard", "a:2")
    assert {first.id, second.id} == {0, 1}
    with pytest.raises(Unavailable, match="not ready"):
        c.placement()
    cluster.adopt()
    assert c.phase == "training"
    assert set(np.frombuffer(c.placement().owners.data, np.int32).tolist()) == {0, 1}
    cluster.train_epoch(worker)
    assert c.phase == "writing"
    assert cluster.lease(worker).work == pb.WAIT
    cluster.commit()
    assert c.phase == "training"
    cluster.train_epoch(worker)
    cluster.commit(2)
    assert c.phase == "done"
    assert cluster.lease(worker).work == pb.FINISHED
    status = cluster.status()
    assert [r["metrics"]["hr"] for r in status["history"]] == [0.25, 0.25]
    assert [r["samples"] for r in status["history"]] == [30, 30]
    assert [k["cut"] for k in status["checkpoints"]] == [1, 2]
    assert status["reader"] == "arrow"


def test_seconds_are_counted_to_training_until_the_last_split_closes(cluster: Any) -> None:
    cluster.shards()
    worker = cluster.workers()[0]
    cluster.coordinator.tick()
    splits = cluster.lease(worker, 64).splits
    cluster.clock.now += 0.25
    for split in splits:
        cluster.close(worker, split)
    work = cluster.coordinator.work
    assert work.trained
    assert (work.train_seconds, work.evaluate_seconds) == (pytest.approx(0.25), 0.0)


def test_a_repeated_join_is_a_sign_of_life(cluster: Any) -> None:
    """Its sender counts its lease from the Join that was answered; the answer to the one before it was lost."""
    first = cluster.join("shard", "a:1", nonce=5)
    cluster.pass_time(cluster.spec.lease_seconds - 0.5)
    assert cluster.join("shard", "a:1", nonce=5).incarnation == first.incarnation
    cluster.pass_time(cluster.spec.lease_seconds - 0.5)
    assert [m.incarnation for m in cluster.coordinator.members.alive("shard")] == [first.incarnation]
    cluster.pass_time(1.5)
    assert cluster.coordinator.members.alive("shard") == []


def test_a_repeated_join_gets_the_same_answer(cluster: Any) -> None:
    first = cluster.join("shard", "a:1", nonce=5)
    again = cluster.join("shard", "a:1", nonce=5)
    assert (first.id, first.incarnation) == (again.id, again.incarnation)
    assert len(cluster.coordinator.members.all) == 1


def test_splits_whose_grant_never_arrived_go_to_others(cluster: Any) -> None:
    cluster.shards()
    one, two = cluster.workers()
    assert list(cluster.lease(one, 2, number=1).splits) == [0, 1]
    assert list(cluster.lease(one, 2, held=[], number=1).splits) == [0, 1]
    assert list(cluster.lease(one, 1, held=[1], number=2).splits) == [0]
    assert list(cluster.lease(two, 1).splits) == [2]


def test_a_late_question_frees_nothing(cluster: Any) -> None:
    cluster.shards()
    one, two = cluster.workers()
    cluster.lease(one, 2, number=2)
    with pytest.raises(Unavailable, match="question 1 came after question 2"):
        cluster.lease(one, 2, held=[], number=1)
    assert list(cluster.lease(two, 1).splits) == [2]


def test_a_dead_workers_splits_go_to_others(cluster: Any) -> None:
    shards = cluster.shards()
    one, two = cluster.workers()
    cluster.lease(one, 2)
    cluster.pass_time(4.0, *shards, two)
    assert list(cluster.lease(two, 3).splits) == [2]
    cluster.pass_time(4.0, *shards, two)
    granted = cluster.lease(two, 3)
    assert list(granted.splits) == [0, 1]
    assert list(granted.fresh) == [False, False]
    with pytest.raises(LeaseLost, match="dead"):
        cluster.close(one, 0)
    assert cluster.coordinator.phase == "training"
    (warning,) = cluster.status()["warnings"]
    assert "worker 0" in warning
    assert "lease ended" in warning


def test_the_coordinators_own_pause_kills_nobody(cluster: Any) -> None:
    shards = cluster.shards()
    workers = cluster.workers()
    cluster.pass_time(1.0, *shards, *workers)
    cluster.clock.now += 3600
    cluster.coordinator.tick()
    assert len(cluster.coordinator.members.alive("worker")) == 2
    cluster.pass_time(4.9)
    assert len(cluster.coordinator.members.alive("worker")) == 2
    cluster.pass_time(1.0)
    assert cluster.coordinator.members.alive("worker") == []
    assert cluster.coordinator.phase == "failed"


def test_a_dead_shard_ends_a_job_that_trains(cluster: Any) -> None:
    _, shard = cluster.shards()
    cluster.leave(shard, "it ran out of memory")
    assert cluster.coordinator.phase == "failed"
    assert cluster.status()["reason"].endswith(
        "is gone: it ran out of memory; go on from the last checkpoint with --resume"
    )


def test_a_shard_that_dies_while_the_job_gathers_is_replaced(cluster: Any) -> None:
    c = cluster.coordinator
    one = cluster.join("shard", "a:1")
    cluster.join("shard", "a:2")
    generation = c.generation
    cluster.leave(one.incarnation, "killed")
    assert c.phase == "gathering"
    assert not c.shards
    c.has_adopted(0, generation)
    assert c.phase == "gathering", "an answer to the earlier placement"
    cluster.restart()
    c = cluster.coordinator
    assert not c.shards
    three = cluster.join("shard", "a:3")
    assert {s.incarnation for s in c.shards.values()} == {m.incarnation for m in c.members.alive("shard")}
    assert c.generation > generation
    cluster.adopt()
    assert c.phase == "training"
    assert three.id == one.id


def test_a_shard_that_comes_back_at_its_address_was_dead(cluster: Any) -> None:
    one = cluster.join("shard", "a:1")
    again = cluster.join("shard", "a:1")
    assert again.incarnation != one.incarnation
    assert len(cluster.coordinator.members.alive("shard")) == 1
    cluster.join("shard", "a:2")
    cluster.adopt()
    assert cluster.coordinator.phase == "training"
    with pytest.raises(InvalidArgument, match="it is failed"):
        cluster.join("shard", "a:2")
    assert "another process listens at its address" in cluster.status()["reason"]


def test_a_shard_too_many_waits_without_blocks(cluster: Any) -> None:
    c = cluster.coordinator
    joined = [cluster.join("shard", f"a:{i}") for i in (1, 2, 3)]
    assert set(c.shards) == {0, 1}
    cluster.leave(joined[2].incarnation, "not needed")
    assert c.phase == "gathering"
    cluster.adopt()
    assert c.phase == "training"


def test_a_spare_takes_the_place_of_a_shard_that_dies_before_training(cluster: Any) -> None:
    c = cluster.coordinator
    joined = [cluster.join("shard", f"a:{i}") for i in (1, 2, 3)]
    cluster.leave(joined[0].incarnation, "killed")
    assert {s.incarnation for s in c.shards.values()} == {j.incarnation for j in joined[1:]}


def test_stop_while_training_waits_for_workers_and_then_for_the_checkpoint(cluster: Any) -> None:
    cluster.shards()
    one, two = cluster.workers()
    cluster.lease(one, 2)
    c = cluster.coordinator
    c.stop(True, "enough")
    assert c.phase == "stopping"
    assert cluster.heartbeat(one).phase == "stopping"
    assert cluster.lease(two).work == pb.FINISHED
    with pytest.raises(InvalidArgument, match="takes nobody in any more: it is stopping"):
        cluster.join("worker")
    cluster.leave(one)
    cluster.leave(two)
    cluster.commit()
    assert (c.phase, c.reason) == ("stopped", "enough")


def test_workers_that_do_not_leave_are_struck_off(cluster: Any) -> None:
    shards = cluster.shards()
    workers = cluster.workers()
    cluster.coordinator.stop(True, "enough")
    cluster.pass_time(STOP_SECONDS - 1, *shards, *workers)
    assert len(cluster.coordinator.members.alive("worker")) == 2
    with pytest.raises(LeaseLost):
        cluster.pass_time(3, *shards, *workers)
    assert cluster.coordinator.members.alive("worker") == []
    assert cluster.coordinator.phase == "stopping"


def test_stop_while_gathering_ends_at_once(cluster: Any) -> None:
    cluster.join("shard", "a:1")
    worker = cluster.workers()[0]
    cluster.coordinator.stop(True, "enough")
    assert cluster.coordinator.phase == "stopped"
    assert cluster.heartbeat(worker).phase == "stopped"
    with pytest.raises(InvalidArgument, match="is over: stopped"):
        cluster.service.placement(pb.PlacementRequest(header=cluster.header(worker)))


@pytest.mark.parametrize("checkpoint", [True, False])
def test_stop_while_writing_keeps_its_reason(cluster: Any, checkpoint: bool) -> None:
    cluster.shards()
    worker, _ = cluster.workers()
    cluster.train_epoch(worker)
    c = cluster.coordinator
    c.stop(checkpoint, "enough")
    assert c.phase == "writing"
    cluster.commit()
    assert (c.phase, c.reason) == ("stopped", "enough")


def test_stop_during_the_last_checkpoint_does_not_undo_the_end(cluster: Any) -> None:
    cluster.shards()
    worker, _ = cluster.workers()
    cluster.train_epoch(worker)
    cluster.commit()
    cluster.train_epoch(worker)
    cluster.coordinator.stop(True, "enough")
    cluster.commit(2)
    assert cluster.coordinator.phase == "done"


def test_a_checkpoint_that_fails_is_a_warning_unless_it_is_the_last(make_cluster: Make) -> None:
    cluster = make_cluster()
    c = cluster.coordinator
    cluster.shards()
    worker, _ = cluster.workers()
    cluster.train_epoch(worker)
    cluster.give_up(1, "no space left")
    assert c.phase == "training"
    assert cluster.status()["warnings"] == ["checkpoint 1 could not be written, training goes on: no space left"]
    cluster.train_epoch(worker)
    for number, pause in enumerate(LAST_PAUSES, 2):
        cluster.give_up(number, "no space left")
        assert c.phase == "writing"
        assert f"tried again in {pause:g} s: no space left" in cluster.status()["warnings"][-1]
        assert not c.cuts.due()
        cluster.clock.now += pause
        assert c.cuts.due()
    cluster.give_up(2 + len(LAST_PAUSES), "no space left")
    assert (c.phase, c.reason) == ("failed", "the last checkpoint could not be written: no space left; there is none")


@pytest.mark.parametrize("every", [{"checkpoint_steps": 4}, {"checkpoint_seconds": 60.0}])
def test_a_checkpoint_that_failed_is_made_when_the_next_one_is_due(make_cluster: Make, every: dict[str, Any]) -> None:
    cluster = make_cluster(**every)
    cuts, work = cluster.coordinator.cuts, cluster.coordinator.work
    cluster.shards()
    worker, _ = cluster.workers()
    for number in (1, 2, 3):
        assert not cuts.due()
        work.steps += 4
        cluster.pass_time(60.0, *[m.incarnation for m in cluster.coordinator.members.all.values()])
        assert cuts.due()
        if number < 3:
            cluster.give_up(number, "no space left")
            assert cluster.status()["cut"]["failed"] == {"cut": number, "error": "no space left"}
            assert cluster.coordinator.phase == "training"
        else:
            cluster.commit(number)
    assert not cuts.due()
    assert [c["cut"] for c in cluster.status()["checkpoints"]] == [3]
    assert worker


def test_a_failed_checkpoint_after_a_stop_that_wanted_one_is_a_failure(cluster: Any) -> None:
    cluster.shards()
    worker, _ = cluster.workers()
    cluster.train_epoch(worker)
    cluster.coordinator.stop(True, "enough")
    for number in range(len(LAST_PAUSES) + 1):
        assert cluster.coordinator.phase == "writing"
        cluster.clock.now += 100
        cluster.give_up(1 + number, "no space left")
    assert cluster.coordinator.phase == "failed"


def test_nothing_overwrites_a_failure(cluster: Any) -> None:
    c = cluster.coordinator
    cluster.shards()
    worker, _ = cluster.workers()
    cluster.train_epoch(worker)
    c.stop(True, "enough")
    c.fail("a shard died while it wrote")
    cluster.commit()
    cluster.give_up(2, "late")
    c.abandon("later")
    c.stop(True, "again")
    assert (c.phase, c.reason) == ("failed", "a shard died while it wrote")


def test_a_split_that_ends_three_workers_ends_the_job(cluster: Any) -> None:
    cluster.shards()
    for i in range(3):
        assert cluster.coordinator.phase == "training"
        worker = cluster.join("worker").incarnation
        (split,) = cluster.lease(worker).splits
        cluster.release(worker, split, f"row 7 is bad, said worker {i}")
        cluster.leave(worker, f"row 7 is bad, said worker {i}")
    assert cluster.coordinator.phase == "failed"
    assert "train split 0 met an error on 3 workers: row 7 is bad" in cluster.status()["reason"]


def test_the_end_of_a_worker_is_no_fault_of_the_splits_that_it_had(cluster: Any) -> None:
    cluster.shards()
    for _ in range(5):
        worker = cluster.join("worker").incarnation
        cluster.lease(worker)
        cluster.leave(worker, "ended by SIGKILL")
    assert cluster.coordinator.phase == "training"


def test_lost_leases_are_no_fault_of_the_split(cluster: Any) -> None:
    shards = cluster.shards()
    for _ in range(5):
        worker = cluster.join("worker").incarnation
        cluster.lease(worker)
        cluster.pass_time(7.0, *shards)
    assert cluster.coordinator.phase == "training"


def test_without_evaluation_files_an_epoch_ends_with_its_training(make_cluster: Make) -> None:
    cluster = make_cluster(evaluation_splits=0, metrics=())
    cluster.shards()
    worker, _ = cluster.workers()
    for cut in (1, 2):
        cluster.train_epoch(worker)
        cluster.coordinator.tick()
        assert cluster.coordinator.phase == "writing"
        cluster.commit(cut)
    assert cluster.coordinator.phase == "done"
    assert cluster.status()["best"] is None


def test_checkpoints_at_the_end_only(make_cluster: Make) -> None:
    cluster = make_cluster(checkpoint_epochs=0)
    cluster.shards()
    worker, _ = cluster.workers()
    cluster.train_epoch(worker)
    assert cluster.coordinator.phase == "training"
    cluster.train_epoch(worker)
    assert cluster.coordinator.phase == "writing"
