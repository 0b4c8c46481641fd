# SPDX-License-Identifier: Apache-2.0
"""Copies, as members see them: joins while a job trains, scaling, reports and their answers, deaths, and a coordinator's own."""

import json
from itertools import chain
from typing import Any

import numpy as np
import pytest

from oarlock.client.job import JobSpec
from oarlock.cluster.moving import COPY, HAND
from oarlock.cluster.scaling import GATHER_SECONDS
from oarlock.proto import coordinator_pb2 as pb
from oarlock.proto.arrays import pack, unpack
from oarlock.proto.errors import InvalidArgument, Unavailable


@pytest.fixture
def pair(make_cluster: Any) -> Any:
    """Two shards with copies of each other's blocks, in training."""
    cluster = make_cluster(replicas=1)
    cluster.joined = cluster.shards()
    return cluster


def report(cluster: Any, sender: int, told: Any, blocks: list[int], generations: list[int], **other: Any) -> Any:
    request = pb.ReportRequest(
        header=cluster.header(sender),
        told=told,
        blocks=pack(np.array(blocks, np.int32)),
        generations=pack(np.array(generations, np.uint64)),
        **other,
    )
    return cluster.service.report(request)


def come(cluster: Any, address: str) -> Any:
    """Let a shard join and be known to all."""
    joined = cluster.join("shard", address)
    cluster.coordinator.copies.step()
    cluster.adopt()
    return joined


def test_blocks_begin_with_their_copies(pair: Any) -> None:
    records = pair.coordinator.records
    assert (records.sizes() == 2).all()
    assert pair.status()["incomplete"] == 0
    assert pair.status()["copies"] == {"0": len(records.owners), "1": len(records.owners)}


def test_a_shard_that_comes_late_has_no_blocks_until_it_is_wanted(pair: Any) -> None:
    c = pair.coordinator
    joined = come(pair, "a:9")
    assert joined.id == 2
    assert sorted(c.shards) == [0, 1], "as many as are wanted have blocks"
    assert pair.service.scale(pb.ScaleRequest(servers=3)).said == "2 more workers to come"
    c.copies.step()
    assert sorted(c.shards) == [0, 1, 2]
    pair.adopt()
    assert c.copies.step(), "copies are ordered"
    assert {f.move.to for f in c.copies.moving.flights.values()} == {2}


def test_a_shard_that_comes_waits_a_little_for_the_others_that_are_wanted(pair: Any) -> None:
    c = pair.coordinator
    pair.service.scale(pb.ScaleRequest(servers=4))
    come(pair, "a:9")
    assert c.copies.step() == []
    assert c.copies.looks
    come(pair, "a:10")
    c.copies.step()
    # Each is to have a quarter: nobody gets what the other one would have to be given.
    moves = [*(f.move for f in c.copies.moving.flights.values()), *chain(*c.copies.moving._waiting.values())]
    sizes = np.bincount([move.to for move in moves], minlength=4)
    assert sizes[2] > 0
    assert abs(int(sizes[2]) - int(sizes[3])) <= 1


def test_a_shard_that_comes_does_not_wait_for_ever(pair: Any) -> None:
    pair.service.scale(pb.ScaleRequest(servers=4))
    come(pair, "a:9")
    assert pair.coordinator.copies.step() == []
    pair.clock.now += GATHER_SECONDS
    assert pair.coordinator.copies.step(), "copies are ordered"


def test_where_copies_lack_a_shard_that_comes_does_not_wait(pair: Any) -> None:
    pair.service.scale(pb.ScaleRequest(servers=4))
    pair.coordinator.member_gone(pair.coordinator.members.all[pair.coordinator.shards[0].incarnation], "dead")
    joined = pair.join("shard", "a:9")
    assert joined.id == 2
    assert pair.coordinator.copies._look_at == pair.clock.now


def test_a_move_by_its_reports(pair: Any) -> None:
    c = pair.coordinator
    pair.service.scale(pb.ScaleRequest(servers=3))
    come(pair, "a:9")
    order = next(o for o in c.copies.step() if o.kind == COPY)
    owner = c.shards[order.owner].incarnation
    block = order.block
    c.cuts.stand()
    with pytest.raises(Unavailable, match="a cut begins"):
        report(pair, owner, pb.ADDED, [block], [1], shard=2)
    c.cuts.open()
    reply = report(pair, owner, pb.ADDED, [block], [1], shard=2)
    assert unpack(reply.record.blocks, np.int32, "blocks").tolist() == [block]
    assert 2 in c.records.of(block)[1]
    generation = c.records.of(block)[2]
    again = report(pair, owner, pb.ADDED, [block], [1], shard=2)
    assert again == reply, "of an older record nothing is taken"
    assert not report(pair, owner, pb.CONFIRMED, [block], [generation]).HasField("record")
    hand = [o for o in c.copies.step() if o.kind == HAND and o.block == block]
    if hand:
        told = {"shard": 2, "order": hand[0].order, "term": hand[0].term}
        report(pair, owner, pb.HANDED, [block], [generation], **told)
        assert c.records.of(block)[0] == 2


def test_what_has_not_begun_is_given_up_when_something_else_is_wanted(
    pair: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    c = pair.coordinator
    monkeypatch.setattr("oarlock.cluster.moving.MOST_COPIES", 1)
    pair.service.scale(pb.ScaleRequest(servers=3))
    come(pair, "a:9")
    c.copies.step()
    begun = dict(c.copies.moving.flights)
    assert {flight.move.to for flight in begun.values()} == {2}
    pair.service.scale(pb.ScaleRequest(servers=2))
    c.copies.step()
    for order in c.copies.step():
        report(pair, c.shards[order.owner].incarnation, pb.ADDED, [order.block], [order.generation], shard=2)
    pair.adopt()
    c.copies.step()
    assert set(c.records.named(2).tolist()) <= set(begun), "no other block came to the one that leaves"


def test_a_report_of_another_shard_than_the_owner_changes_nothing(pair: Any) -> None:
    c = pair.coordinator
    block = int(np.flatnonzero(c.records.owners == 0)[0])
    other = c.shards[1].incarnation
    report(pair, other, pb.ADDED, [block], [1], shard=1)
    report(pair, other, pb.SLOW, [block], [1], shard=0)
    assert c.records.of(block) == (0, [0, 1], 1)


def test_an_owner_that_dies_is_followed_by_its_copy(pair: Any) -> None:
    c = pair.coordinator
    pair.leave(pair.joined[0], "killed")
    assert c.phase == "training"
    ((shard, blocks),) = c.copies.promotion.ask(c.clock()).items()
    assert shard == 1
    pair.restart()
    c = pair.coordinator
    pair.adopt()
    c.copies.step()
    asked = c.copies.promotion.ask(c.clock())
    assert asked == {1: blocks}, "a coordinator that was started again asks again"
    c.copies.promotion.answered(1, blocks, [1] * len(blocks), [5] * len(blocks))
    c.copies.step()
    assert (c.records.owners == 1).all()
    assert pair.status()["incomplete"] == len(c.records.owners)
    pair.adopt()
    c.copies.step()
    assert pair.status()["recoveries"][0]["kind"] == "promotion"
    pair.restart()
    c = pair.coordinator
    assert [r["kind"] for r in pair.status()["recoveries"]] == ["promotion", "re-replication"], "that one goes on"
    assert "seconds" not in pair.status()["recoveries"][1]
    pair.adopt()
    assert pair.join("shard", "a:8").id == 2, "a number that nobody had"
    assert c.phase == "training"


def test_while_a_gate_stands_nothing_is_recorded_of_a_death(pair: Any) -> None:
    c = pair.coordinator
    c.cuts.stand()
    pair.leave(pair.joined[0], "killed")
    c.copies.step()
    assert c.generation == 1
    c.cuts.open()
    c.copies.step()
    assert c.copies.promotion.blocks


def test_both_copies_lost_is_no_silent_gap(pair: Any) -> None:
    pair.leave(pair.joined[0], "killed")
    pair.leave(pair.joined[1], "killed")
    assert pair.coordinator.phase == "failed"
    assert pair.status()["reason"].endswith("go on from the last checkpoint with --resume")


def test_reload_makes_lost_blocks_anew_and_says_what_that_lost(make_cluster: Any) -> None:
    cluster = make_cluster(on_loss="reload")
    one, _ = cluster.shards()
    cluster.commit(1)
    c = cluster.coordinator
    lost = np.flatnonzero(c.records.owners == 0).tolist()
    cluster.leave(one, "killed")
    c.copies.step()
    assert c.phase == "training"
    assert (sorted(c.copies.creating), c.copies.created_from) == (lost, "/cut-000001")
    assert (c.records.owners == 1).all()
    cluster.restart()
    c = cluster.coordinator
    assert sorted(c.copies.creating) == lost
    cluster.adopt()
    c.copies.step()
    assert not c.copies.creating


def test_a_shard_that_came_before_all_others_were_known_to_be_dead_is_given_their_blocks(make_cluster: Any) -> None:
    cluster = make_cluster(on_loss="reload")
    joined = cluster.shards()
    cluster.commit(1)
    c = cluster.coordinator
    come(cluster, "a:9")
    assert sorted(c.shards) == [0, 1]
    assert c.copies.at_rest
    for one in joined:
        cluster.leave(one, "killed")
    for _ in range(3):
        c.copies.step()
        cluster.adopt()
    assert (c.records.owners == 2).all()


def test_a_shard_that_is_not_wanted_is_told_to_leave(pair: Any) -> None:
    c = pair.coordinator
    third = come(pair, "a:9")
    said = pair.service.scale(pb.ScaleRequest(servers=2, workers=1))
    assert (said.servers, said.workers) == (2, 1)
    assert pair.heartbeat(third.incarnation).leave
    assert not pair.heartbeat(pair.joined[0]).leave
    pair.restart()
    assert pair.heartbeat(third.incarnation).leave, "it was recorded"
    assert pair.coordinator.scaling.servers == c.scaling.servers


def test_surplus_workers_are_leased_no_more(pair: Any) -> None:
    one, two = pair.workers()
    pair.service.scale(pb.ScaleRequest(workers=1))
    assert pair.lease(two).work == pb.FINISHED
    assert pair.lease(one).work == pb.TRAIN
    assert pair.status()["scale"]["leaving"]["worker"] == [1]


@pytest.mark.parametrize(("servers", "words"), [(1, "replicas = 1 and servers = 1"), (5000, "servers = 5000")])
def test_what_cannot_be_wanted(pair: Any, servers: int, words: str) -> None:
    with pytest.raises(InvalidArgument, match=words):
        pair.service.scale(pb.ScaleRequest(servers=servers))


def test_records_are_told_as_changes_to_who_knows_the_others(pair: Any) -> None:
    worker, _ = pair.workers()
    c = pair.coordinator

    def ask(generation: int, whole: bool = False) -> Any:
        return pair.service.placement(
            pb.PlacementRequest(header=pair.header(worker, generation=generation), whole=whole)
        )

    with c.store as store:
        c.records.change(store, np.array([3], np.int32), np.array([1], np.int32), np.array([[1, 0]], np.int32))
    assert unpack(ask(1).blocks, np.int32, "blocks").tolist() == [3]
    for told in (ask(0), ask(1, whole=True), ask(2), ask(99)):
        assert not told.HasField("blocks")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"replicas": 3}, "replicas = 3: give an integer from 0 to 2"),
        ({"replicas": 2}, "replicas = 2 and servers = 2 contradict each other"),
        ({"on_loss": "cry"}, "on_loss = 'cry'"),
        (
            {"on_loss": "reload", "mode": "sync", "ranks": 2},
            "on_loss = 'reload' and mode = 'sync' contradict each other",
        ),
        ({"moves_in_flight": 0}, "moves_in_flight = 0"),
    ],
)
def test_settings_that_are_refused(make_cluster: Any, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidArgument, match=words):
        make_cluster(**changes)


def test_a_job_of_before_there_were_copies(pair: Any) -> None:
    values = json.loads(pair.spec.to_json())
    for name in ("replicas", "on_loss", "moves_in_flight"):
        del values[name]
    assert JobSpec.from_json(json.dumps(values)).replicas == 0
