# SPDX-License-Identifier: Apache-2.0
"""A budget: never above its limit, first come first served, nobody waits for ever, and all comes back."""

import contextlib
import random
import threading
import time

import pytest

from oarlock.proto.budget import Budget
from oarlock.proto.errors import DeadlineExceeded, Unavailable
from oarlock.proto.work import SMALL_BYTES, Memory, Work, expects, refuse_late

SECONDS = 30


def made(limit=100, **options):
    return Budget(limit, "tests", "a_setting", **options)


def until(there):
    end = time.monotonic() + SECONDS
    pause = threading.Event()
    while not there():
        assert time.monotonic() < end
        # The threads that it waits for need the interpreter.
        pause.wait(0.001)


def waiting(budget, size, done, name):
    """Take in a thread; ``done`` hears of it."""
    before = budget.waiting

    def body():
        claim = budget.take(size, seconds=SECONDS)
        done.append(name)
        budget.give(claim)

    thread = threading.Thread(target=body)
    thread.start()
    until(lambda: budget.waiting == before + 1)
    return thread


def test_what_is_taken_is_not_there_for_others_until_it_comes_back():
    budget = made()
    first = budget.take(60)
    with pytest.raises(
        Unavailable, match=r"50 bytes are wanted of the 100 for tests, of which 60 are taken.*a_setting"
    ):
        budget.take(50, seconds=0)
    second = budget.take(40)
    assert (budget.taken, budget.refused) == (100, 1)
    budget.give(first)
    budget.give(second)
    assert (budget.taken, budget.waiting) == (0, 0)


def test_what_is_over_the_limit_runs_alone():
    budget = made()
    small = budget.take(1)
    with pytest.raises(Unavailable):
        budget.take(1000, seconds=0)
    budget.give(small)
    whole = budget.take(1000)
    with pytest.raises(Unavailable):
        budget.take(1, seconds=0)
    budget.give(whole)
    assert budget.taken == 0


def test_a_large_claim_is_not_passed_by_small_ones():
    budget, done = made(), []
    held = budget.take(60)
    threads = [waiting(budget, 80, done, "large"), *(waiting(budget, 10, done, n) for n in range(3))]
    # There is room for a small one, but it came later.
    assert done == []
    budget.give(held)
    for thread in threads:
        thread.join(SECONDS)
    assert done[0] == "large" or budget.refused == 0
    assert sorted(map(str, done)) == ["0", "1", "2", "large"]
    assert budget.taken == 0


def test_who_gives_up_lets_the_next_one_in():
    budget, done = made(), []
    held = budget.take(60)
    gave_up = []

    def impatient():
        try:
            budget.take(80, seconds=0.05)
        except Unavailable:
            gave_up.append(1)

    first = threading.Thread(target=impatient)
    first.start()
    until(lambda: budget.waiting == 1 or gave_up)
    claim = budget.take(10, seconds=SECONDS)
    first.join(SECONDS)
    assert gave_up == [1]
    budget.give(claim)
    budget.give(held)
    assert (budget.taken, done) == (0, [])


def test_those_who_stall_are_ended_the_longest_first_and_no_more_than_needed():
    budget, ended = made(stall_seconds=0.0), []
    claims = []

    def end_of(number):
        def end():
            ended.append(number)
            # The thread of its connection gives it back.
            threading.Thread(target=budget.give, args=(claims[number],)).start()

        return end

    for number in range(4):
        claims.append(budget.take(25, end_of(number)))
    for number in (2, 0, 3):
        claims[number].waits()
    taken = budget.take(40, seconds=SECONDS)
    assert ended == [2, 0]
    budget.give(taken)
    # Who is worked on is nobody's to end.
    claims[3].works()
    with pytest.raises(Unavailable):
        budget.take(80, seconds=0.02)
    assert ended == [2, 0]


def test_closing_lets_nobody_wait():
    budget = made()
    held = budget.take(100)
    failed = []

    def body():
        try:
            budget.take(1, seconds=1e6)
        except Unavailable:
            failed.append(1)

    thread = threading.Thread(target=body)
    thread.start()
    until(lambda: budget.waiting == 1)
    budget.close()
    thread.join(SECONDS)
    assert failed == [1]
    with pytest.raises(Unavailable):
        budget.take(1, seconds=1e6)
    budget.give(held)
    # What needs no wait is had until the end.
    budget.give(budget.take(1))


def test_many_threads_never_hold_more_than_there_is(seed):
    budget = made()
    lock, held, most = threading.Lock(), [0], [0]

    def body(number):
        rng = random.Random(seed * 100 + number)
        for _ in range(60):
            size = rng.randrange(1, 60)
            try:
                claim = budget.take(size, seconds=rng.choice([0, SECONDS]))
            except Unavailable:
                continue
            with lock:
                held[0] += size
                most[0] = max(most[0], held[0])
            with lock:
                held[0] -= size
            budget.give(claim)

    threads = [threading.Thread(target=body, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)
    assert 0 < most[0] <= 100
    assert (budget.taken, budget.waiting) == (0, 0)


def test_a_request_gives_back_all_that_it_took_however_it_ends():
    memory = Memory(1 << 20)
    with contextlib.suppress(ValueError), Work(memory, "Shard.Pull") as work:
        work.receives(100_000)
        work.copies = 2
        with work.here():
            expects(80_000)
        work.answers(300_000)
        found = memory.nbytes
        assert (found["received"], found["answers"]) == (100_000, 300_000)
        raise ValueError("broken")
    found = memory.nbytes
    assert (found["received"], found["answers"]) == (0, 0)


def test_small_ones_are_not_counted():
    memory = Memory(1 << 20)
    with Work(memory, "Shard.Pull") as work, work.here():
        work.receives(SMALL_BYTES)
        expects(SMALL_BYTES)
        work.answers(SMALL_BYTES)
        assert memory.nbytes["received"] == memory.nbytes["answers"] == 0


def test_handlers_outside_of_a_server_have_no_limit():
    expects(1 << 60)
    refuse_late()


def test_what_is_late_is_refused_and_counted():
    memory = Memory(1 << 20)
    with Work(memory, "Shard.Push", seconds=0.0) as work, work.here():
        with pytest.raises(DeadlineExceeded, match=r"Shard\.Push.*nothing was done"):
            refuse_late()
        with pytest.raises(DeadlineExceeded):
            work.receives(1 << 19)
    assert memory.refused == {"memory": 0, "late": 2}
