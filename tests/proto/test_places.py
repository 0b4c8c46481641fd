# SPDX-License-Identifier: Apache-2.0
"""Places: who is let in, who has to go for it, and who is told to come again."""

import threading

import pytest

from oarlock.proto.rpc import places as module
from oarlock.proto.rpc.places import Places


class Clock:
    """Stands for the module ``time``."""

    def __init__(self):
        self.now = 100.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    made = Clock()
    monkeypatch.setattr(module, "time", made)
    return made


@pytest.fixture
def gone():
    return []


def enter(places, gone, name):
    return places.enter(lambda: gone.append(name), patient=False)


def test_places_are_limited_and_come_back(clock, gone):
    places = Places(2, stall_seconds=1)
    first, second = (enter(places, gone, n) for n in "ab")
    assert enter(places, gone, "c") is None
    places.leave(first)
    assert enter(places, gone, "d") is not None
    assert enter(places, gone, "e") is None
    assert gone == []
    # Leaving twice gives nobody's place away.
    places.leave(first)
    assert enter(places, gone, "f") is None
    places.leave(second)
    assert enter(places, gone, "g") is not None


def test_the_longest_staller_goes_first(clock, gone):
    places = Places(3, stall_seconds=1)
    held = {}
    for name in "abc":
        held[name] = enter(places, gone, name)
        clock.now += 0.25
    clock.now += 0.75
    # a has stalled for 1.5 s, b for 1.25 s, c for 1 s; but a has just been heard of.
    held["a"].waits()
    assert enter(places, gone, "d") is not None
    assert gone == ["b"]
    assert enter(places, gone, "e") is not None
    assert gone == ["b", "c"]
    assert enter(places, gone, "f") is None
    # Who was sent away has no place to leave any more.
    places.leave(held["b"])
    assert enter(places, gone, "g") is None


def test_who_is_worked_for_stays(clock, gone):
    places = Places(1, stall_seconds=1)
    held = enter(places, gone, "a")
    held.works()
    clock.now += 1000
    assert enter(places, gone, "b") is None
    held.waits()
    assert enter(places, gone, "b") is None
    clock.now += 1
    assert enter(places, gone, "b") is not None
    assert gone == ["a"]


def test_the_patient_wait_until_somebody_leaves_or_all_ends():
    places = Places(1, stall_seconds=1000)
    held = enter(places, [], "a")
    got = []
    came = threading.Semaphore(0)

    def wait():
        got.append(places.enter(lambda: None, patient=True))
        came.release()

    threads = [threading.Thread(target=wait) for _ in range(2)]
    for thread in threads:
        thread.start()
    places.leave(held)
    assert came.acquire(timeout=30)
    assert got[0] is not None
    places.close()
    for thread in threads:
        thread.join(30)
    assert [g is None for g in got] == [False, True]
    assert enter(places, [], "late") is None
