# SPDX-License-Identifier: Apache-2.0
"""Work: one holder per split, closed once, epochs in order, evaluation independent of who and when."""

import itertools
import math

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from oarlock.client.closed import SPLIT_WINDOW
from oarlock.cluster.work import MAX_FAILURES, Grant, Work
from oarlock.proto.errors import LeaseLost, NotFound


def work(splits: int = 3, evaluation: int = 2, epochs: int = 2) -> Work:
    return Work(splits, evaluation, epochs, ("hr", "ndcg"))


def train(w: Work, worker: int = 1) -> None:
    while (grant := w.grant(worker, 2)).kind == "train":
        for split in grant.splits:
            assert w.close(worker, split, 10, 4.0)


def test_the_lowest_free_splits_are_leased_and_never_twice() -> None:
    w = work()
    assert w.grant(1, 2) == Grant("train", (0, 1), (True, True))
    assert w.grant(2, 2) == Grant("train", (2,), (True,))
    assert w.grant(3, 2) == Grant("wait")
    assert w.open_splits() == [0, 1, 2]


def test_a_split_is_closed_once_by_its_holder() -> None:
    w = work()
    w.grant(1, 1)
    with pytest.raises(LeaseLost, match="leased to 1, not to incarnation 2"):
        w.close(2, 0, 10, 1.0)
    with pytest.raises(LeaseLost, match="leased to nobody"):
        w.close(1, 1, 10, 1.0)
    assert w.close(1, 0, 10, 1.0)
    assert not w.close(1, 0, 10, 1.0), "a repeated report"
    assert not w.close(2, 0, 99, 1.0)
    assert (w.samples, w.loss_sum) == (10, 1.0)


def test_splits_that_do_not_exist() -> None:
    w = work()
    for split in (6, 1 << 63):
        with pytest.raises(NotFound, match="no training split"):
            w.close(1, split, 1, 1.0)
    for split in (4, 1 << 63):
        with pytest.raises(NotFound, match="no evaluation split"):
            w.evaluate(1, split, [1.0, 0.0, 0.0])


def test_a_split_given_back_is_not_fresh_any_more() -> None:
    w = work()
    w.grant(1, 2)
    assert w.release(1, "train", 0, "")
    assert w.grant(2, 1) == Grant("train", (0,), (False,))
    assert w.release(1, "train", 0, ""), "it holds that lease no more"
    assert w.leases["train", 0] == 2


def test_leases_of_one_worker() -> None:
    w = work()
    w.grant(1, 2)
    w.grant(2, 1)
    assert w.leased_to(1) == [("train", 0), ("train", 1)]
    assert w.leased_to(2) == [("train", 2)]
    assert w.leased_to(3) == []


def test_after_a_restart_nothing_is_fresh_and_reports_of_forgotten_leases_count() -> None:
    w = work()
    w.all_touched = True
    assert w.grant(1, 1) == Grant("train", (0,), (False,))
    # Worker 2 had split 1, and split 0 too, under the coordinator's earlier life.
    assert w.close(2, 1, 10, 1.0)
    assert w.close(2, 0, 10, 1.0)
    assert not w.close(1, 0, 10, 1.0)
    assert (w.samples, w.leases) == (20, {})
    with pytest.raises(LeaseLost):
        w.close(2, 3, 10, 1.0)  # of the next epoch


def test_evaluation_begins_when_all_is_closed_and_the_next_epoch_when_all_is_evaluated() -> None:
    w = work()
    grant = w.grant(1, 3)
    for split in grant.splits[:2]:
        w.close(1, split, 10, 5.0)
    assert w.grant(2, 1).kind == "wait"
    with pytest.raises(LeaseLost, match="not due"):
        w.evaluate(2, 0, [1.0, 0.0, 0.0])
    w.close(1, 2, 10, 5.0)
    assert w.grant(2, 1) == Grant("evaluate", (0,), (False,))
    assert w.grant(1, 5) == Grant("evaluate", (1,), (False,))
    assert w.grant(3, 1).kind == "wait"
    assert w.evaluate(1, 1, [2.0, 1.0, 0.0])
    assert not w.evaluate(1, 1, [2.0, 9.0, 9.0])
    assert not w.evaluated
    assert w.evaluate(2, 0, [2.0, 2.0, 1.0])
    result = w.finish_epoch()
    assert (result.epoch, result.samples, result.loss) == (0, 30, 0.5)
    assert result.metrics == {"hr": 0.75, "ndcg": 0.25}
    assert w.grant(1, 1) == Grant("train", (3,), (True,))
    assert not w.evaluate(1, 1, [2.0, 1.0, 0.0]), "of the epoch before"


def test_the_order_of_arrival_does_not_change_the_result() -> None:
    sums = {0: [1.0, 0.1, 1e-9], 1: [3.0, 0.7, 1e9], 2: [7.0, 0.2, 0.3], 3: [0.1, 1e-17, 1.0]}
    seen = set()
    for order in itertools.permutations(range(4)):
        w = work(1, 4, 1)
        train(w)
        w.grant(1, 4)
        for split in order:
            w.evaluate(1, split, sums[split])
        seen.add(tuple(w.finish_epoch().metrics.values()))
    assert len(seen) == 1


def test_no_evaluation_files() -> None:
    w = work(2, 0, 1)
    train(w)
    assert w.trained
    assert w.evaluated
    assert w.grant(1, 1).kind == "wait"
    assert w.finish_epoch().metrics == {"hr": None, "ndcg": None}, "nothing was measured"
    assert w.grant(1, 1).kind == "finished"


def test_the_window_above_the_floor() -> None:
    w = work(SPLIT_WINDOW + 10, 0, 1)
    grant = w.grant(1, SPLIT_WINDOW + 10)
    assert grant.splits == tuple(range(SPLIT_WINDOW))
    for split in grant.splits[1:]:
        w.close(1, split, 1, 1.0)
    assert w.grant(2, 5).kind == "wait", "split 0 holds the window"
    w.close(1, 0, 1, 1.0)
    assert w.grant(2, 5).splits == tuple(range(SPLIT_WINDOW, SPLIT_WINDOW + 5))


def test_a_split_that_fails_on_several_workers_is_at_fault() -> None:
    w = work()
    for worker in range(MAX_FAILURES - 1):
        w.grant(worker, 1)
        assert w.release(worker, "train", 0, "bad rows")
    w.grant(0, 1)
    assert w.release(0, "train", 0, "bad rows again"), "the same worker twice is one worker"
    w.grant(99, 1)
    assert not w.release(99, "train", 0, "bad rows")


def test_errors_about_splits_that_one_does_not_hold_count_for_nothing() -> None:
    w = work()
    for worker in range(10):
        assert w.release(worker, "train", 1 << 60, "hostile")
        assert w.release(worker, "train", 0, "hostile")
    assert w.failures == {}


def test_training_splits_that_come_back_are_counted() -> None:
    w = work()
    w.grant(1, 3)
    w.close(1, 0, 5, 0.0)
    w.release(1, "train", 1, "")
    w.release(1, "train", 1, "")
    w.release(2, "train", 2, "not its own")
    assert w.given_back == 1
    w.grant(2, 1)
    w.close(2, 1, 5, 0.0)
    w.close(1, 2, 5, 0.0)
    assert w.grant(1, 2).kind == "evaluate"
    w.release(1, "evaluate", 0, "")
    assert w.given_back == 1, "an evaluation keeps nothing"


def test_of_a_worker_that_nobody_heard_again_all_that_it_can_have_had_counts() -> None:
    w = work(splits=4)
    w.all_touched = True
    w.claim(1, {("train", 1)})
    w.close(2, 0, 5, 0.0)
    w.vanished(1)
    assert w.given_back == 1
    w.vanished(9)
    assert w.given_back == 3, "two splits are nobody's"
    for split in (1, 2, 3):
        w.close(2 - (split == 1), split, 5, 0.0)
    w.vanished(9)
    assert w.given_back == 3, "all are closed"


def test_the_best_epoch_is_the_earliest_of_equals() -> None:
    w = work(1, 1, 3)
    for hr in (0.2, 0.5, 0.5):
        train(w)
        w.grant(1, 1)
        w.evaluate(1, w.epoch, [1.0, hr, 0.0])
        w.finish_epoch()
    best = w.best()
    assert best is not None
    assert best.epoch == 1


class Workers(RuleBasedStateMachine):
    """Several workers that lease, close, give back, repeat themselves, evaluate and vanish, against a plain model."""

    SPLITS, EVALUATION, EPOCHS = 4, 3, 3

    def __init__(self) -> None:
        super().__init__()
        self.w = Work(self.SPLITS, self.EVALUATION, self.EPOCHS, ("hr",))
        self.held: dict[tuple[str, int], int] = {}
        self.ever: set[int] = set()
        self.closed: set[int] = set()
        self.results: set[int] = set()

    workers = st.integers(1, 4)

    @rule(worker=workers, wanted=st.integers(1, 3))
    def lease(self, worker: int, wanted: int) -> None:
        grant = self.w.grant(worker, wanted)
        assert len(grant.splits) == len(grant.fresh) <= wanted
        for split, fresh in zip(grant.splits, grant.fresh, strict=True):
            assert (grant.kind, split) not in self.held, "two holders"
            self.held[grant.kind, split] = worker
            if grant.kind == "train":
                assert split // self.SPLITS == self.w.epoch
                assert split not in self.closed
                assert fresh == (split not in self.ever)
                self.ever.add(split)
            else:
                assert self.w.trained
                assert split not in self.results
        if grant.kind == "wait":
            free = self.due() - {s for _, s in self.held}
            assert not free, f"{free} could be leased"

    def due(self) -> set[int]:
        e = self.w.epoch
        if len(self.closed) < (e + 1) * self.SPLITS:
            return set(range(e * self.SPLITS, (e + 1) * self.SPLITS)) - self.closed
        return set(range(e * self.EVALUATION, (e + 1) * self.EVALUATION)) - self.results

    @rule(worker=workers, split=st.integers(0, SPLITS * EPOCHS - 1))
    def close(self, worker: int, split: int) -> None:
        if split in self.closed:
            assert not self.w.close(worker, split, 7, 1.0)
        elif self.held.get(("train", split)) == worker:
            assert self.w.close(worker, split, 7, 1.0)
            self.closed.add(split)
            del self.held["train", split]
        else:
            with pytest.raises(LeaseLost):
                self.w.close(worker, split, 7, 1.0)

    @precondition(lambda self: any(k == "train" for k, _ in self.held))
    @rule(data=st.data())
    def close_held(self, data: st.DataObject) -> None:
        split = data.draw(st.sampled_from(sorted(s for k, s in self.held if k == "train")))
        self.close(self.held["train", split], split)

    @precondition(lambda self: any(k == "evaluate" for k, _ in self.held))
    @rule(data=st.data())
    def evaluate_held(self, data: st.DataObject) -> None:
        split = data.draw(st.sampled_from(sorted(s for k, s in self.held if k == "evaluate")))
        assert self.w.evaluate(self.held.pop(("evaluate", split)), split, [2.0, 1.0])
        self.results.add(split)
        if self.w.trained and self.w.evaluated:
            before = self.w.epoch
            result = self.w.finish_epoch()
            assert (result.epoch, result.samples) == (before, 7 * self.SPLITS), "samples counted once"
            assert math.isclose(result.metrics["hr"], 0.5)

    @rule(worker=workers)
    def vanish(self, worker: int) -> None:
        for kind, split in self.w.leased_to(worker):
            assert self.held.pop((kind, split)) == worker
            assert self.w.release(worker, kind, split, "")

    @invariant()
    def agrees(self) -> None:
        assert self.w.leases == self.held
        assert {s for s in range(self.SPLITS * self.EPOCHS) if s in self.w.closed} == self.closed
        assert self.w.open_splits() == sorted(s for k, s in self.held if k == "train")
        assert self.w.finished == (self.w.epoch == self.EPOCHS)


TestWorkers = Workers.TestCase
TestWorkers.settings = settings(max_examples=60, stateful_step_count=60, derandomize=True, deadline=None)
