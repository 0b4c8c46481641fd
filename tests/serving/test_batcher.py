# SPDX-License-Identifier: Apache-2.0
"""Micro-batching: who is alone does not wait, who comes meanwhile is joined, and what is too much is refused."""

import threading
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from oarlock.proto.errors import Unavailable
from oarlock.serving.batcher import Batcher
from oarlock.serving.scorer import Scored

SECONDS = 20.0


@dataclass
class Rows:
    """Samples whose scores are their numbers; ``bad``: they cannot be scored."""

    numbers: list[int]
    bad: bool | Exception = False
    keys: dict[str, Any] = field(default_factory=dict)
    feeds: dict[str, Any] = field(default_factory=dict)

    @property
    def samples(self) -> int:
        return len(self.numbers)


class Scorer:
    """Scores once it is let; ``batches``: what it was given."""

    def __init__(self, max_batch: int = 8) -> None:
        self.max_batch = max_batch
        self.batches: list[tuple[Any, list[list[int]]]] = []
        self.entered = threading.Semaphore(0)
        self.let = threading.Semaphore(0)

    def score(self, state: Any, parts: Any) -> list[Scored]:
        self.batches.append((state, [part.numbers for part in parts]))
        self.entered.release()
        assert self.let.acquire(timeout=SECONDS)
        for part in parts:
            if part.bad:
                raise part.bad if isinstance(part.bad, Exception) else ValueError("bad samples")
        return [Scored(np.array(part.numbers, np.float32), 0) for part in parts]


class Callers:
    """Threads that each ask once; ``found``: by their first number, what they got."""

    def __init__(self, batcher: Batcher) -> None:
        self.batcher = batcher
        self.found: dict[int, Any] = {}
        self.threads: list[threading.Thread] = []

    def ask(self, numbers: list[int], state: Any = "a", bad: bool | Exception = False) -> None:
        def call() -> None:
            try:
                self.found[numbers[0]] = self.batcher.score(state, Rows(numbers, bad)).scores.tolist()  # type: ignore[arg-type]
            except Exception as error:
                self.found[numbers[0]] = error

        waited = self.batcher.waiting
        thread = threading.Thread(target=call)
        thread.start()
        self.threads.append(thread)
        # In order: the next one asks once this one waits, or computes.
        while thread.is_alive() and self.batcher.waiting == waited and not self.batcher._scorer_entered(numbers):  # type: ignore[attr-defined]
            pass

    def join(self) -> None:
        for thread in self.threads:
            thread.join(SECONDS)
            assert not thread.is_alive()


@pytest.fixture
def scorer() -> Scorer:
    return Scorer()


def batcher_of(*scorers: Scorer, **options: Any) -> Any:
    made: Any = Batcher(scorers, **options)  # type: ignore[arg-type]
    made._scorer_entered = lambda numbers: any(numbers in parts for s in scorers for _, parts in s.batches)
    return made


def test_who_is_alone_is_computed_at_once(scorer: Scorer) -> None:
    batcher = batcher_of(scorer)
    scorer.let.release(3)
    for number in range(3):
        assert batcher.score("a", Rows([number])).scores.tolist() == [number]
    assert [parts for _, parts in scorer.batches] == [[[0]], [[1]], [[2]]]


def test_what_comes_meanwhile_is_the_next_batch_up_to_its_size(scorer: Scorer) -> None:
    batcher = batcher_of(scorer)
    callers = Callers(batcher)
    callers.ask([1])
    for first in (2, 4, 6, 8, 10):
        callers.ask([first, first + 1])
    assert batcher.waiting == 10
    scorer.let.release(3)
    callers.join()
    assert [parts for _, parts in scorer.batches] == [[[1]], [[2, 3], [4, 5], [6, 7], [8, 9]], [[10, 11]]]
    assert callers.found == {1: [1], **{n: [n, n + 1] for n in (2, 4, 6, 8, 10)}}
    assert (batcher.waiting, batcher.batches) == (0, 3)


def test_a_batch_is_of_one_state(scorer: Scorer) -> None:
    batcher = batcher_of(scorer)
    callers = Callers(batcher)
    callers.ask([1])
    for number, state in ((2, "a"), (3, "b"), (4, "b"), (5, "a")):
        callers.ask([number], state)
    scorer.let.release(4)
    callers.join()
    assert scorer.batches == [("a", [[1]]), ("a", [[2]]), ("b", [[3], [4]]), ("a", [[5]])]


def test_more_than_a_batch_is_computed_alone(scorer: Scorer) -> None:
    batcher = batcher_of(scorer)
    callers = Callers(batcher)
    callers.ask([1])
    callers.ask([2])
    callers.ask(list(range(10, 30)))
    callers.ask([3])
    scorer.let.release(4)
    callers.join()
    assert [parts for _, parts in scorer.batches] == [[[1]], [[2]], [list(range(10, 30))], [[3]]]


def test_what_fails_fails_alone(scorer: Scorer) -> None:
    batcher = batcher_of(scorer)
    callers = Callers(batcher)
    callers.ask([1])
    callers.ask([2])
    callers.ask([3], bad=True)
    callers.ask([4])
    scorer.let.release(9)
    callers.join()
    assert isinstance(callers.found.pop(3), ValueError)
    assert callers.found == {1: [1], 2: [2], 4: [4]}
    assert batcher.score("a", Rows([9])).scores.tolist() == [9]


def test_too_much_is_refused_at_once(scorer: Scorer) -> None:
    batcher = batcher_of(scorer, queue_samples=4)
    callers = Callers(batcher)
    callers.ask([1])
    # One may have as many as it likes: who is first in the queue is next.
    callers.ask([10, 11, 12, 13, 14])
    with pytest.raises(Unavailable, match="overloaded: 5 samples wait"):
        batcher.score("a", Rows([2]))
    scorer.let.release(2)
    callers.join()
    assert (batcher.waiting, batcher.overloaded) == (0, 1)


def test_nobody_waits_for_ever(scorer: Scorer) -> None:
    batcher = batcher_of(scorer, queue_seconds=0.05)
    callers = Callers(batcher)
    callers.ask([1])
    with pytest.raises(Unavailable, match=r"overloaded: a prediction did not come to its turn within 0\.05 s"):
        batcher.score("a", Rows([2]))
    assert batcher.waiting == 0
    scorer.let.release(2)
    callers.join()
    assert batcher.score("a", Rows([3])).scores.tolist() == [3]


def test_all_scorers_are_used() -> None:
    scorers = Scorer(), Scorer()
    batcher = batcher_of(*scorers)
    callers = Callers(batcher)
    callers.ask([1])
    callers.ask([2])
    assert sum(len(each.batches) for each in scorers) == 2
    for each in scorers:
        each.let.release()
    callers.join()


def test_many_callers_all_get_their_own() -> None:
    scorers = [Scorer() for _ in range(3)]
    for each in scorers:
        each.let = threading.Semaphore(100_000)
    batcher = batcher_of(*scorers)
    wrong: list[int] = []

    def ask(number: int) -> None:
        for i in range(300):
            mine = [number * 1000 + i] * (1 + i % 5)
            if batcher.score(i % 2, Rows(mine)).scores.tolist() != mine:
                wrong.append(i)

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)
    assert not wrong
    assert batcher.waiting == 0
    assert all(sum(map(len, parts)) <= 8 for each in scorers for _, parts in each.batches)


def test_what_is_lacked_by_all_is_not_tried_for_each(scorer: Scorer) -> None:
    """Such as rows of another server: each try may take seconds, in which nobody else is computed."""
    batcher = batcher_of(scorer)
    callers = Callers(batcher)
    callers.ask([1])
    for number in range(2, 8):
        callers.ask([number], bad=Unavailable("no rows") if number == 4 else False)
    scorer.let.release(2)
    callers.join()
    assert [parts for _, parts in scorer.batches] == [[[1]], [[n] for n in range(2, 8)]]
    assert all(isinstance(callers.found[n], Unavailable) for n in range(2, 8))
