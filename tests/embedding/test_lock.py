# SPDX-License-Identifier: Apache-2.0
"""The lock of a block: changes exclude each other, pulls run together, and whoever needs the block alone has it alone."""

import threading

import embedding_reference as reference
import numpy as np
import pytest

from oarlock.embedding.jit import jit
from oarlock.embedding.lock import (
    LOCK_BYTES,
    WRITER,
    enter,
    enter_mutex,
    leave,
    leave_mutex,
    reopen,
    shut,
    swap_if,
    try_enter,
)
from oarlock.embedding.pointer import address_of, load_i64, store_i64

ROUNDS = 20_000 if reference.JIT else 100


@pytest.fixture
def lock():
    words = np.zeros(LOCK_BYTES // 8, np.int64)
    yield words
    assert words.tolist() == [0, 0]  # whoever took something gave it back


@jit
def add_under_mutex(lock, word, rounds):
    for _ in range(rounds):
        enter_mutex(lock)
        store_i64(word, 0, load_i64(word, 0) + 1)
        leave_mutex(lock)


@jit
def change_both(lock, words, rounds):
    """Make two words differ for a while, alone."""
    for _ in range(rounds):
        enter_mutex(lock)
        shut(lock)
        store_i64(words, 0, load_i64(words, 0) + 1)
        for _ in range(20):
            store_i64(words, 2, load_i64(words, 0))
        store_i64(words, 1, load_i64(words, 1) + 1)
        reopen(lock)
        leave_mutex(lock)


@jit
def look_at_both(lock, words, rounds):
    """Return how often the two words differed for a reader."""
    torn = 0
    for _ in range(rounds):
        enter(lock)
        if load_i64(words, 0) != load_i64(words, 1):
            torn += 1
        leave(lock)
    return torn


@jit
def swap(word, expected, value):
    return swap_if(word, expected, value)


def together(*calls):
    """Run calls in threads that begin at once; return what they gave."""
    out, barrier = [None] * len(calls), threading.Barrier(len(calls))

    def run(number, call):
        barrier.wait()
        out[number] = call()

    threads = [threading.Thread(target=run, args=pair) for pair in enumerate(calls)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return out


def test_words_say_who_is_inside(lock):
    address = address_of(lock)
    enter_mutex(address)
    assert try_enter(address)  # pulls go on while someone holds the mutex
    assert lock.tolist() == [1, 1]
    leave(address)
    shut(address)
    assert lock.tolist() == [1, WRITER]
    assert not try_enter(address)
    assert lock.tolist() == [1, WRITER]
    reopen(address)
    assert try_enter(address)
    assert try_enter(address)
    assert lock.tolist() == [1, 2]
    leave(address)
    leave(address)
    leave_mutex(address)


def test_a_swap_happens_only_where_the_expected_value_is():
    word = np.array([5], np.int64)
    assert swap(address_of(word), 4, 9) == 5
    assert word[0] == 5
    assert swap(address_of(word), 5, 9) == 5
    assert word[0] == 9


def test_no_addition_under_the_mutex_is_lost(lock):
    count = np.zeros(1, np.int64)
    together(*[lambda: add_under_mutex(address_of(lock), address_of(count), ROUNDS)] * 3)
    assert count[0] == 3 * ROUNDS


def test_a_reader_never_sees_what_is_half_changed(lock):
    words = np.zeros(3, np.int64)
    write = lambda: change_both(address_of(lock), address_of(words), ROUNDS)  # noqa: E731
    read = lambda: look_at_both(address_of(lock), address_of(words), ROUNDS)  # noqa: E731
    found = together(write, read, write, read)
    assert [found[1], found[3]] == [0, 0]
    assert words[:2].tolist() == [2 * ROUNDS] * 2


def test_shut_waits_for_readers_and_keeps_new_ones_out(lock):
    address, order = address_of(lock), []
    enter(address)
    enter_mutex(address)

    def write():
        shut(address)
        order.append("alone")
        reopen(address)
        leave_mutex(address)

    def read():
        enter(address)
        order.append("inside")
        leave(address)

    writer = threading.Thread(target=write)
    writer.start()
    while lock[1] < WRITER:  # until the writer waits
        assert order == []
    assert lock[1] == WRITER + 1
    reader = threading.Thread(target=read)
    reader.start()
    assert order == []
    leave(address)
    writer.join()
    reader.join()
    assert order == ["alone", "inside"]
