# SPDX-License-Identifier: Apache-2.0
"""What a shard took along is counted by all workers that are there, and said to be more where some are not."""

from typing import Any

import numpy as np
import pytest

from oarlock.cluster.losses import Losses
from oarlock.proto import coordinator_pb2 as pb
from oarlock.proto.arrays import unpack
from oarlock.proto.errors import InvalidArgument

BLOCKS = np.array([3, 1], np.int32)


@pytest.fixture
def told() -> list[Any]:
    return []


@pytest.fixture
def losses(told: list[Any]) -> Losses:
    made = Losses(told.append)
    made.begin_run()
    return made


def count(pushes: int, more: bool = False, generation: int = 7) -> list[pb.LossCount]:
    return [pb.LossCount(generation=generation, pushes=pushes, more=more)]


def test_all_that_are_there_are_asked_until_they_answered(losses: Losses, told: list[Any]) -> None:
    losses.begin(0, 7, 2, BLOCKS, [11, 12])
    (question,) = losses.questions(11)
    assert (question.generation, question.cut) == (7, 2)
    assert unpack(question.blocks, np.int32, "blocks").tolist() == [1, 3]
    assert losses.questions(13) == []
    losses.heard(11, count(5))
    losses.heard(11, count(5))
    losses.heard(13, count(9))
    losses.heard(12, count(9, generation=6))
    assert losses.questions(11) == []
    assert not told
    losses.heard(12, count(4))
    assert [(each.pushes, each.shard) for each in told] == [(9, 0)]
    assert losses.questions(12) == []


def test_workers_that_ended_since_the_cut_had_more(losses: Losses, told: list[Any]) -> None:
    losses.gone(10)
    losses.opened(2, 0)
    losses.begin(0, 7, 2, BLOCKS, [11])
    losses.heard(11, count(5))
    losses.begin(0, 8, 0, BLOCKS, [11])
    losses.heard(11, count(5, generation=8))
    losses.gone(12)
    losses.begin(1, 9, 2, BLOCKS, [11, 13])
    losses.heard(11, count(1, generation=9))
    losses.begin(1, 10, 3, BLOCKS, [])
    losses.gone(13)
    words = {each.generation: each.words for each in told}
    # Of cut 3 this life of the coordinator knows nothing.
    assert words == {7: "5", 8: "at least 5", 10: "at least 0", 9: "at least 1"}


def test_cuts_that_came_to_nothing_are_forgotten(losses: Losses) -> None:
    for cut in range(1, 50):
        losses.opened(cut, 3 if cut > 3 else 0)
    assert sorted(losses._ended_at) == [3, 49]


def test_one_that_ends_or_cannot_tell_had_more(losses: Losses, told: list[Any]) -> None:
    losses.opened(2, 0)
    losses.begin(0, 7, 2, BLOCKS, [11, 12])
    losses.heard(11, count(5, more=True))
    losses.heard(12, count(1))
    assert told[0].words == "at least 6"


def test_another_life_knows_no_one_that_ended_before(told: list[Any]) -> None:
    losses = Losses(told.append)
    losses.begin(0, 7, 0, BLOCKS, [])
    losses.opened(2, 0)
    losses.begin(0, 8, 2, BLOCKS, [])
    assert [each.words for each in told] == ["at least 0", "0"]


def test_a_reload_is_counted_and_stays_so(make_cluster: Any) -> None:
    cluster = make_cluster(on_loss="reload")
    one, _ = cluster.shards()
    first, second = cluster.workers()
    cluster.commit(1)
    cluster.leave(one, "killed")
    c = cluster.coordinator
    c.copies.step()
    generation = c.generation
    (question,) = cluster.heartbeat(first).lost
    assert (question.generation, question.cut) == (generation, 1)
    for worker, pushes in ((first, 30), (second, 12)):
        request = pb.HeartbeatRequest(header=cluster.header(worker), losses=count(pushes, generation=generation))
        assert not cluster.service.heartbeat(request).lost
    cluster.adopt()
    for _ in range(3):
        c.copies.step()
    (found,) = [each for each in cluster.status()["recoveries"] if each["kind"] == "reload"]
    assert (found["pushes"], found["more"]) == (42, False)
    assert any("took 42 pushes to" in text for text in cluster.status()["warnings"])
    cluster.restart()
    (found,) = [each for each in cluster.status()["recoveries"] if each["kind"] == "reload"]
    assert found["pushes"] == 42
    request = pb.HeartbeatRequest(header=cluster.header(first), losses=count(1) * 5000)
    with pytest.raises(InvalidArgument, match="losses"):
        cluster.service.heartbeat(request)
