# SPDX-License-Identifier: Apache-2.0
"""The coordinator's side of a gate: who is waited for, what stops meanwhile, and when a cut is due."""

from collections.abc import Callable
from typing import Any

import pytest

from oarlock.client.job import STOPPED, TRAINING, WRITING
from oarlock.cluster.gate import Gate
from oarlock.cluster.splits import close_split
from oarlock.proto import coordinator_pb2 as pb
from oarlock.proto.errors import InvalidArgument, LeaseLost, Unavailable

Make = Callable[..., Any]


def at_gate(cluster: Any, worker: int, cut: int = 1) -> int:
    opened: int = cluster.service.gate(pb.GateRequest(header=cluster.header(worker), cut=cut)).opened
    return opened


def test_a_gate_waits_for_those_that_push() -> None:
    gate = Gate(3, shuts=1.0, ends=3.0, workers=[7, 8, 9])
    gate.come(8)
    gate.gone(7)
    gate.come(5)
    assert (gate.passed, gate.missing, gate.workers) == (False, [9], [5, 8])
    gate.come(9)
    gate.gone(8)
    assert (gate.passed, gate.missing, gate.workers) == (True, [], [5, 9])


def test_only_workers_with_a_training_split_are_waited_for(cluster: Any) -> None:
    cluster.shards()
    one, _ = cluster.workers()
    cluster.lease(one)
    gate = cluster.coordinator.cuts.begin()
    assert gate.missing == [one]
    assert gate.shuts > cluster.clock.now, "it hears of the gate with a heartbeat"
    assert gate.ends - gate.shuts == cluster.spec.gate_seconds
    assert at_gate(cluster, one) == 0
    assert gate.passed
    assert gate.workers == [one]


def test_nobody_is_waited_for_when_nothing_is_leased(cluster: Any) -> None:
    cluster.shards()
    cluster.workers()
    gate = cluster.coordinator.cuts.begin()
    assert gate.passed
    assert gate.shuts == cluster.clock.now


def test_after_a_restart_everybody_is_waited_for_who_has_not_told_what_it_holds(cluster: Any) -> None:
    cluster.shards()
    one, two = cluster.workers()
    cluster.restart()
    cluster.heartbeat(two)
    assert cluster.coordinator.cuts.begin().missing == [one]


def test_while_the_gate_stands_nobody_joins_and_once_it_is_shut_nothing_is_leased(cluster: Any) -> None:
    cluster.shards()
    one, two = cluster.workers()
    cluster.lease(one)
    cuts = cluster.coordinator.cuts
    gate = cuts.begin()
    with pytest.raises(Unavailable, match="a cut begins"):
        cluster.join("worker")
    cluster.clock.now = gate.shuts
    assert cluster.lease(two).work == pb.WAIT
    at_gate(cluster, one)
    cuts.open()
    reply = cluster.lease(two)
    assert (reply.work, reply.opened) == (pb.TRAIN, 1)
    assert cluster.join("worker").opened == 1
    assert at_gate(cluster, one) == 1


def test_who_is_given_a_split_before_the_gate_shuts_hears_of_it_and_is_waited_for(cluster: Any) -> None:
    cluster.shards()
    one, two = cluster.workers()
    cluster.lease(one)
    gate = cluster.coordinator.cuts.begin()
    cluster.clock.now += 0.1
    reply = cluster.lease(two)
    assert (reply.work, reply.gate, gate.missing) == (pb.TRAIN, 1, sorted([one, two]))
    assert reply.gate_seconds == pytest.approx(gate.shuts - cluster.clock.now)
    at_gate(cluster, one)
    assert not gate.passed
    at_gate(cluster, two)
    assert gate.workers == sorted([one, two])


def test_workers_hear_of_the_gate_and_of_its_opening_with_heartbeats(cluster: Any) -> None:
    shards = cluster.shards()
    one, _ = cluster.workers()
    cluster.lease(one)
    gate = cluster.coordinator.cuts.begin()
    heard = cluster.heartbeat(one)
    assert (heard.gate, heard.opened) == (1, 0)
    assert heard.gate_seconds == pytest.approx(gate.shuts - cluster.clock.now)
    cluster.clock.now = gate.shuts + 1
    assert cluster.heartbeat(one).gate_seconds == 0
    assert cluster.heartbeat(shards[0]).gate == 0, "shards push nothing"
    cluster.coordinator.cuts.open()
    heard = cluster.heartbeat(one)
    assert (heard.gate, heard.opened) == (0, 1)


def test_a_worker_that_goes_is_not_waited_for(cluster: Any) -> None:
    cluster.shards()
    one, _ = cluster.workers()
    cluster.lease(one)
    gate = cluster.coordinator.cuts.begin()
    cluster.leave(one, "killed")
    assert (gate.passed, gate.workers) == (True, [])
    with pytest.raises(LeaseLost):
        at_gate(cluster, one)


def test_an_epochs_end_holds_training_until_its_views_have_begun(cluster: Any) -> None:
    cluster.shards()
    worker, _ = cluster.workers()
    cluster.train_epoch(worker)
    c = cluster.coordinator
    assert (c.phase, c.cuts.due()) == (WRITING, True)
    c.cuts.begin()
    assert cluster.lease(worker).work == pb.WAIT
    c.cuts.open()
    assert c.phase == TRAINING
    assert cluster.lease(worker).work == pb.TRAIN
    c.cuts.commit(cluster.manifest(1), "/cut-000001")
    assert c.phase == TRAINING


def test_a_cut_that_ends_while_the_next_epoch_waits_for_its_own_lets_nobody_train(cluster: Any) -> None:
    cluster.shards()
    worker, _ = cluster.workers()
    c = cluster.coordinator
    c.cuts.wanted = True
    c.cuts.begin()
    c.cuts.open()
    cluster.train_epoch(worker)
    c.cuts.commit(cluster.manifest(1), "/cut-000001")
    assert (c.phase, c.cuts.due()) == (WRITING, True)
    c.cuts.begin()
    c.cuts.open()
    c.cuts.give_up("a disk is full")
    assert c.phase == TRAINING


def test_a_failure_that_may_pass_is_met_with_another_cut_of_the_same_instant(cluster: Any) -> None:
    cluster.shards()
    worker, _ = cluster.workers()
    cluster.train_epoch(worker)
    c = cluster.coordinator
    c.cuts.begin()
    c.cuts.give_up("shard 1 does not answer", again=True)
    assert (c.phase, c.cuts.due(), c.warnings) == (WRITING, True, [])
    assert c.cuts.begin().cut == 2
    # Once training has gone on that instant is over.
    c.cuts.open()
    c.cuts.give_up("shard 1 does not answer", again=True)
    assert (c.phase, c.cuts.due()) == (TRAINING, False)
    assert c.warnings == ["checkpoint 2 could not be written, training goes on: shard 1 does not answer"]
    assert cluster.status()["cut"] == {
        "last": 2,
        "begun": 0,
        "failed": {"cut": 2, "error": "shard 1 does not answer"},
    }


def test_a_stop_while_a_cut_is_written_ends_with_a_cut_of_its_own(cluster: Any) -> None:
    cluster.shards()
    workers = cluster.workers()
    c = cluster.coordinator
    c.cuts.begin()
    c.cuts.open()
    c.stop(True, "enough")
    for worker in workers:
        cluster.leave(worker)
    c.cuts.commit(cluster.manifest(1), "/cut-000001")
    assert (c.phase, c.cuts.due()) == ("stopping", True)
    cluster.commit(2)
    assert c.phase == STOPPED


def test_a_cut_is_due_after_so_many_steps(make_cluster: Make) -> None:
    cluster = make_cluster(checkpoint_steps=4)
    cluster.shards()
    worker, _ = cluster.workers()
    c = cluster.coordinator
    for due in (False, True):
        (split,) = cluster.lease(worker).splits
        close_split(c, worker, split, 10, 5.0, groups=2)
        assert c.cuts.due() is due
    c.cuts.begin()
    assert not c.cuts.due()


def test_a_cut_is_due_after_so_many_seconds_of_which_somebody_trains(make_cluster: Make) -> None:
    cluster = make_cluster(checkpoint_seconds=10.0)
    shards = cluster.shards()
    cluster.pass_time(11, *shards)
    assert not cluster.coordinator.cuts.due()
    worker = cluster.join("worker").incarnation
    assert cluster.coordinator.cuts.due()
    cluster.coordinator.cuts.begin()
    cluster.pass_time(9, *shards, worker)
    assert not cluster.coordinator.cuts.due()
    cluster.pass_time(1.5, *shards, worker)
    assert cluster.coordinator.cuts.due()


def test_a_cut_is_made_when_somebody_asks(cluster: Any) -> None:
    with pytest.raises(InvalidArgument, match="is gathering: a cut is made of a job that trains"):
        cluster.service.checkpoint(pb.CheckpointRequest())
    cluster.shards()
    assert not cluster.coordinator.cuts.due()
    assert cluster.service.checkpoint(pb.CheckpointRequest()).last == 0
    assert cluster.coordinator.cuts.due()
    cluster.commit()
    assert not cluster.coordinator.cuts.due()


def test_a_cut_that_was_begun_is_known_after_a_restart(cluster: Any) -> None:
    cluster.shards()
    cluster.workers()
    cluster.coordinator.cuts.begin()
    cluster.restart()
    cuts = cluster.coordinator.cuts
    assert (cuts.begun, cuts.last, cuts.opened, cuts.gate) == (1, 1, 1, None)
    cuts.give_up("the coordinator was killed", again=True)
    cluster.restart()
    assert cluster.coordinator.cuts.begun == 0
