# SPDX-License-Identifier: Apache-2.0
"""Scores of evaluation splits at the coordinator: kept by split, merged alike in any order, and refused when they are wrong."""

import asyncio
import itertools
import sqlite3
import struct
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from oarlock.cluster.evaluation import check, check_alike, merge
from oarlock.cluster.orders import Orders
from oarlock.cluster.store import Store
from oarlock.cluster.work import EpochResult, Work
from oarlock.data.scores import MAX_BYTES, MAX_SAMPLES, METRICS, Scores
from oarlock.proto import coordinator_pb2 as pb
from oarlock.proto.errors import InvalidArgument, Malformed

Make = Callable[..., Any]
# Nobody waits so long but for what never comes.
SECONDS = 30


def scores(score: list[float], label: list[float]) -> bytes:
    found = Scores()
    found.add(np.array(score, np.float32), np.array(label, np.float32))
    return found.to_bytes()


def claim_of(samples: int) -> bytes:
    """Bytes of one score that say there were so many samples, one of them positive."""
    return struct.pack("<4sHBBB3xIfQB", b"SCOR", 1, 0, 8, 1, 1, 0.5, samples - 1, 1)


# The one negative of the second split is scored above a positive of the first: no mean of splits' AUCs gives 5/6.
FIRST, SECOND = scores([0.2, 0.6, 0.8], [0, 1, 1]), scores([0.7, 0.9], [0, 1])
TOGETHER = {
    "auc": 5 / 6,
    "accuracy": 4 / 5,
    "calibration": pytest.approx(3.2 / 3, rel=1e-6),
    "logloss": pytest.approx(-np.mean(np.log([0.8, 0.6, 0.8, 0.3, 0.9])), rel=1e-6),
}
ONE_CLASS = scores([0.5, 0.75], [1, 1])


@pytest.fixture
def trained(make_cluster: Make) -> Any:
    """A job whose first epoch is trained and has two splits to evaluate; ``one`` and ``two`` are its workers."""
    cluster = make_cluster(metrics=METRICS)
    cluster.shards()
    cluster.one, cluster.two = cluster.workers()
    for split in cluster.lease(cluster.one, 3).splits:
        cluster.close(cluster.one, split)
    return cluster


def evaluate(cluster: Any) -> None:
    """Lease one evaluation split to each worker."""
    assert list(cluster.lease(cluster.one).splits) == [0]
    assert list(cluster.lease(cluster.two).splits) == [1]


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_scores_of_two_workers_merge_exactly_in_any_order(trained: Any, order: tuple[int, int]) -> None:
    evaluate(trained)
    for split in order:
        trained.scored((trained.one, trained.two)[split], split, (FIRST, SECOND)[split])
    (result,) = trained.status()["history"]
    assert result["metrics"] == TOGETHER
    assert list(result["metrics"]) == list(METRICS), "in the order of the plan"
    assert result["evaluated"] == 5
    assert trained.status()["warnings"] == []


def test_scores_survive_a_restart_between_two_splits(trained: Any, make_cluster: Make) -> None:
    evaluate(trained)
    trained.scored(trained.two, 1, SECOND)
    trained.restart()
    assert trained.coordinator.work.results == {1: SECOND}
    for worker in (trained.one, trained.two):
        trained.heartbeat(worker)
    assert list(trained.lease(trained.one, 5).splits) == [0], "the other one is not evaluated again"
    trained.scored(trained.one, 0, FIRST)
    trained.restart()
    (result,) = trained.status()["history"]
    assert result["metrics"] == TOGETHER
    assert result["evaluated"] == 5
    assert trained.store.evaluations() == {}


def test_a_repeated_report_changes_nothing(trained: Any) -> None:
    evaluate(trained)
    trained.scored(trained.one, 0, FIRST)
    trained.scored(trained.one, 0, SECOND)
    assert trained.coordinator.work.results == {0: FIRST}
    assert trained.store.evaluations() == {0: FIRST}


def test_a_checkpoint_within_an_evaluation_leaves_scores_out_and_they_are_made_again(trained: Any) -> None:
    evaluate(trained)
    trained.scored(trained.two, 1, SECOND)
    saved = trained.manifest(2)
    assert saved.metrics["evaluations"] == {}
    trained.coordinator.begin_run(saved, "/cut-000002")
    trained.shards()
    worker = trained.join("worker").incarnation
    assert list(trained.lease(worker, 5).splits) == [0, 1]
    trained.scored(worker, 0, FIRST)
    trained.scored(worker, 1, SECOND)
    assert trained.status()["history"][0]["metrics"] == TOGETHER


def test_labels_of_one_class_give_no_auc_and_a_warning(trained: Any) -> None:
    evaluate(trained)
    trained.scored(trained.one, 0, ONE_CLASS)
    trained.scored(trained.two, 1, Scores().to_bytes())
    (result,) = trained.status()["history"]
    assert result["metrics"]["auc"] is None
    assert result["metrics"]["calibration"] == 0.625
    assert trained.status()["warnings"] == [
        "epoch 1 has no auc: the 2 evaluated samples lack a class of labels that it takes"
    ]


@pytest.mark.parametrize(
    ("data", "error", "words"),
    [
        (b"x", Malformed, "no scores"),
        (FIRST[:-1], Malformed, "do not make"),
        (FIRST + b"\0", Malformed, "do not make"),
        (bytes(MAX_BYTES + 1), InvalidArgument, "make evaluation splits smaller"),
    ],
)
def test_hostile_scores_are_refused_and_change_nothing(trained: Any, data: bytes, error: Any, words: str) -> None:
    evaluate(trained)
    before = trained.status()
    with pytest.raises(error, match=words):
        trained.scored(trained.one, 0, data)
    assert trained.status() == before
    assert trained.store.evaluations() == {}
    trained.scored(trained.one, 0, FIRST)


def test_what_may_come_can_be_merged(trained: Any) -> None:
    """Few bytes may stand for many samples: so many of each split that all of them together are still counted exactly."""

    evaluate(trained)
    half = MAX_SAMPLES // 2
    for samples in (half + 1, MAX_SAMPLES):
        with pytest.raises(
            InvalidArgument, match=f"scores of {samples} samples came; 2 splits have at most {half} each"
        ):
            trained.scored(trained.one, 0, claim_of(samples))
    trained.scored(trained.one, 0, claim_of(half))
    trained.scored(trained.two, 1, claim_of(half))
    (result,) = trained.status()["history"]
    assert (result["evaluated"], result["metrics"]["auc"]) == (MAX_SAMPLES, 0.5)


def test_scores_and_sums_do_not_mix(trained: Any) -> None:
    evaluate(trained)
    with pytest.raises(InvalidArgument, match="scores and 2 sums came: give one"):
        trained.scored(trained.one, 0, FIRST, sums=(1.0, 2.0))
    trained.evaluated(trained.one, 0, [2.0, 1.0, 1.0, 1.0, 1.0])
    with pytest.raises(InvalidArgument, match="scores came, and sums of the epoch's other splits"):
        trained.scored(trained.two, 1, SECOND)
    assert trained.store.evaluations() == {0: [2.0, 1.0, 1.0, 1.0, 1.0]}
    with pytest.raises(InvalidArgument, match="sums came, and scores"):
        check_alike(1, [1.0], [FIRST])


def test_metrics_that_scores_do_not_give(cluster: Any) -> None:
    cluster.shards()
    one = cluster.workers()[0]
    for split in cluster.lease(one, 3).splits:
        cluster.close(one, split)
    cluster.lease(one)
    with pytest.raises(InvalidArgument, match=r"no metric 'hr' is made of these.* among auc, logloss"):
        cluster.scored(one, 0, FIRST)


# Pure


def test_check_gives_back_what_is_stored() -> None:
    assert check(0, [], FIRST, ("logloss",), 1) == FIRST
    assert check(0, [4.0, 1.0], b"", ("hr",), 1) == [4.0, 1.0]


def test_only_the_planned_metrics_come_in_their_order() -> None:
    found = merge([FIRST, SECOND], ("logloss", "auc"))
    assert list(found.metrics.items()) == [("logloss", TOGETHER["logloss"]), ("auc", 5 / 6)]
    assert found.samples == 5
    assert merge([], ("auc",)) == ({"auc": None}, 0)


def test_the_order_of_arrival_does_not_change_a_bit(rng: np.random.Generator) -> None:
    parts = [scores(rng.random(50).tolist(), rng.random(50).tolist()) for _ in range(4)]
    seen = set()
    for order in itertools.permutations(range(4)):
        w = Work(1, 4, 1, METRICS)
        w.grant(1, 1)
        w.close(1, 0, 1, 1.0)
        w.grant(1, 4)
        for split in order:
            w.evaluate(1, split, parts[split])
        seen.add(tuple(w.finish_epoch().metrics.values()))
    assert len(seen) == 1


@pytest.mark.parametrize(
    ("metric", "values", "best"),
    [
        ("auc", (0.6, 0.8, 0.8), 1),
        ("logloss", (0.4, 0.3, 0.35), 1),
        ("calibration", (2.0, 0.25, 1.1), 2),
        ("auc", (None, 0.1, None), 1),
        ("auc", (None, None, None), 0),
    ],
)
def test_the_best_epoch(metric: str, values: Any, best: int) -> None:
    w = Work(1, 1, 3, (metric,))
    w.history = [EpochResult(e, 1, 0.5, {metric: v}, 1.0, 1.0) for e, v in enumerate(values)]
    found = w.best()
    assert found is not None
    assert found.epoch == best


# Files of before


def test_a_state_from_before_there_were_scores_is_taken_up(cluster: Any) -> None:
    """Its table has no such column, and its epochs no such field."""
    cluster.shards()
    worker, _ = cluster.workers()
    cluster.train_epoch(worker)
    cluster.commit()
    while (reply := cluster.lease(worker)).work == pb.TRAIN:
        cluster.close(worker, reply.splits[0])
    cluster.evaluated(worker, reply.splits[0], [4.0, 1.0])
    cluster.kill()
    old = sqlite3.connect(cluster.path)
    with old:
        old.execute("ALTER TABLE evaluations DROP COLUMN scores")
        old.execute("UPDATE epochs SET value = json_remove(value, '$.evaluated')")
    assert [c[1] for c in old.execute("PRAGMA table_info(evaluations)")] == ["split", "sums"]
    assert "evaluated" not in old.execute("SELECT value FROM epochs").fetchone()[0]
    old.close()
    cluster.start()
    c = cluster.coordinator
    assert c.work.results == {2: [4.0, 1.0]}
    assert c.work.history[0].evaluated == 0
    for member in c.members.alive("worker"):
        cluster.heartbeat(member.incarnation)
    cluster.evaluated(worker, cluster.lease(worker).splits[0], [4.0, 3.0])
    assert [r["metrics"] for r in cluster.status()["history"]] == [{"hr": 0.25}, {"hr": 0.5}]


def test_a_manifest_from_before_there_were_scores_is_gone_back_to(cluster: Any) -> None:
    cluster.shards()
    worker, _ = cluster.workers()
    cluster.train_epoch(worker)
    saved = cluster.manifest(2)
    for result in saved.metrics["history"]:
        del result["evaluated"]
    cluster.coordinator.begin_run(saved, "/cut-000002")
    assert asdict(cluster.coordinator.work.history[0])["evaluated"] == 0


def test_scores_come_back_as_they_were(tmp_path: Path) -> None:
    store = Store(tmp_path / "s").open()
    with store:
        store.set_evaluation(0, FIRST)
        store.set_evaluation(1, [1.0, 2.0])
        store.set_evaluation(1, SECOND)
        store.set_evaluation(0, [1.0, 0.5])
    store.close()
    store = Store(tmp_path / "s").open()
    assert store.evaluations() == {0: [1.0, 0.5], 1: SECOND}
    store.close()


class Gate:
    """A merge that says when it has begun, and goes on when it is told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun, self.go = threading.Event(), threading.Event()
        self.merges = 0
        monkeypatch.setattr("oarlock.cluster.epoch_end.merge", self._merge)

    def _merge(self, *arguments: Any) -> Any:
        self.merges += 1
        self.begun.set()
        assert self.go.wait(SECONDS)
        return merge(*arguments)


def promptly(work: Callable[[], Any]) -> Any:
    """Return what ``work()`` does in a thread of its own; fail if it waits for what only comes later."""
    with ThreadPoolExecutor(1) as threads:
        return threads.submit(work).result(SECONDS)


@pytest.fixture
def merging(trained: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The same job while the thread that reported its last split merges what was found."""
    evaluate(trained)
    trained.scored(trained.one, 0, FIRST)
    trained.gate = Gate(monkeypatch)
    with ThreadPoolExecutor(1) as threads:
        trained.reported = threads.submit(trained.scored, trained.two, 1, SECOND)
        assert trained.gate.begun.wait(SECONDS)
        yield trained
        trained.gate.go.set()


def test_members_are_answered_while_an_evaluation_is_merged(merging: Any) -> None:
    """Nobody's lease may run out for want of an answer, and nobody may merge it twice."""
    c = merging.coordinator
    shards = [m.incarnation for m in c.members.alive("shard")]
    promptly(lambda: merging.pass_time(3 * merging.spec.lease_seconds, merging.one, merging.two, *shards))
    assert promptly(lambda: merging.lease(merging.one)).work == pb.WAIT
    # Its answer was lost: what it says is known.
    promptly(lambda: merging.scored(merging.two, 1, SECOND))
    status = promptly(merging.status)
    assert (status["epoch"], status["evaluated"], status["history"], status["phase"]) == (0, 2, [], "training")
    assert len(c.members.alive("worker")) == 2
    assert merging.gate.merges == 1
    merging.gate.go.set()
    merging.reported.result(SECONDS)
    (result,) = merging.status()["history"]
    assert result["metrics"] == TOGETHER
    assert (merging.status()["epoch"], merging.status()["phase"], merging.gate.merges) == (1, "writing", 1)
    assert result["evaluate_seconds"] == pytest.approx(3 * merging.spec.lease_seconds)


def test_a_job_that_failed_while_an_evaluation_was_merged_stays_so(merging: Any) -> None:
    merging.coordinator.fail("no reason")
    merging.gate.go.set()
    merging.reported.result(SECONDS)
    assert (merging.status()["phase"], merging.status()["history"]) == ("failed", [])


def test_a_stop_waits_for_an_evaluation_that_is_merged(merging: Any) -> None:
    """Else the checkpoint that it ends with would have the epoch evaluated anew."""
    c = merging.coordinator
    c.stop(True, "asked")
    for worker in (merging.one, merging.two):
        c.member_gone(c.members.all[worker], "left")
    orders = Orders(c, None, merging.path.parent / "checkpoints")
    cuts = []
    orders.cutting._make = lambda gate, wrong: cuts.append(len(c.work.history)) or asyncio.sleep(0)
    asyncio.run(orders.cutting.step())
    assert cuts == []
    merging.gate.go.set()
    merging.reported.result(SECONDS)
    asyncio.run(orders.cutting.step())
    assert cuts == [1]


def test_a_merge_that_fails_is_tried_again(trained: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluate(trained)
    trained.scored(trained.one, 0, FIRST)

    def fail(*_: Any) -> Any:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr("oarlock.cluster.epoch_end.merge", fail)
        with pytest.raises(MemoryError):
            trained.scored(trained.two, 1, SECOND)
    assert trained.status()["history"] == []
    trained.coordinator.tick()
    assert [r["metrics"] for r in trained.status()["history"]] == [TOGETHER]
