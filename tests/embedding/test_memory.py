# SPDX-License-Identifier: Apache-2.0
"""Memory for rows: pieces never overlap, come back zeroed or reused, and an exhausted system is a MemoryError."""

import ctypes
import mmap

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from oarlock.embedding import memory
from oarlock.embedding.memory import FIRST_SEGMENT, HUGE, LAST_SEGMENT, Arena, IndexMemory, Pages
from oarlock.embedding.pointer import LINE


def seen(address, size):
    return np.frombuffer((ctypes.c_uint8 * size).from_address(address), np.uint8)


def test_pieces_are_lines_of_their_own_and_do_not_overlap():
    arena, rng = Arena(), np.random.default_rng(0)
    taken = [(arena.take(size), size) for size in rng.integers(1, 100_000, 200).tolist()]
    for number, (address, size) in enumerate(taken):
        assert address % LINE == 0
        assert not seen(address, size).any()
        seen(address, size)[:] = number % 255 + 1
    for number, (address, size) in enumerate(taken):
        assert (seen(address, size) == number % 255 + 1).all()
    assert arena.used == sum(-(-size // LINE) * LINE for _, size in taken)


def test_what_is_given_back_is_handed_out_again_and_its_pages_go_back_to_the_system():
    arena = Arena()
    size = 10 * mmap.PAGESIZE
    first, second = arena.take(size), arena.take(size)
    seen(first, size)[:] = 1
    seen(second, size)[:] = 2
    arena.give_back(first, size)
    assert arena.used == size
    inside = seen(first, size)[mmap.PAGESIZE : -mmap.PAGESIZE]
    assert not inside.any()  # the system took the whole pages
    assert (seen(second, size) == 2).all()
    assert arena.take(size) == first
    assert arena.take(size) not in (first, second)
    assert arena.used == 3 * size


def test_segments_double_up_to_a_limit_and_are_large_enough_for_the_largest_piece(monkeypatch):
    sizes = []

    class Recorded(Pages):
        def __init__(self, size, *, huge):
            sizes.append(size)
            super().__init__(size, huge=huge)

    monkeypatch.setattr(memory, "Pages", Recorded)
    arena = Arena()
    for _ in range(40):
        arena.take(FIRST_SEGMENT // 4)
    assert sizes == [FIRST_SEGMENT << i for i in range(4)]
    arena.take(LAST_SEGMENT + 1)
    assert sizes[-1] == LAST_SEGMENT + mmap.PAGESIZE
    arena.take(64)
    assert len(sizes) == 5 or sizes[-1] == LAST_SEGMENT


def test_pages_for_large_pieces_begin_where_a_huge_page_can():
    assert Pages(2 * HUGE, huge=True).address % HUGE == 0
    small = Pages(100, huge=True)
    assert small.address % LINE == 0
    assert not seen(small.address, 100).any()


def test_an_exhausted_system_is_a_memory_error_and_leaves_the_arena_usable(monkeypatch):
    arena = Arena()
    arena.take(1000)

    with monkeypatch.context() as patch:
        patch.setattr(memory, "_map", lambda *_: memory._FAILED)
        with pytest.raises(MemoryError, match="bytes of memory"):
            arena.take(FIRST_SEGMENT)
        assert arena.used == 1024
        assert seen(arena.take(64), 64).sum() == 0
    assert arena.take(FIRST_SEGMENT) % LINE == 0


def test_places_of_one_size_lie_side_by_side_and_come_back_zeroed():
    memories = memory.IndexMemory(3)
    size = 3 * mmap.PAGESIZE + LINE
    places = [memories.take(size) for _ in range(3)]
    assert [place - places[0] for place in places] == [0, size, 2 * size]
    for number, place in enumerate(places):
        assert place % LINE == 0
        seen(place, size)[:] = number + 1
    extra = memories.take(size)  # a block that is about to replace one of the same size
    assert extra not in places
    assert not seen(extra, size).any()
    memories.give_back(extra, size)
    memories.give_back(places[1], size)
    assert (seen(places[0], size) == 1).all()
    assert (seen(places[2], size) == 3).all()
    assert memories.take(size) == places[1]
    assert not seen(places[1], size).any()
    for place in places:
        memories.give_back(place, size)
    assert memories._slots == {}
    assert memories._alone == {}


def test_a_huge_page_is_not_made_of_what_was_given_back():
    pages = Pages(8 * HUGE, huge=True)
    seen(pages.address, 8 * HUGE)[:] = 1
    hole = pages.address + HUGE // 2
    pages.release(hole, HUGE)
    assert not seen(hole, HUGE).any()
    assert (seen(pages.address, HUGE // 2) == 1).all()
    pages.restore(hole, HUGE)
    seen(hole, HUGE)[:] = 2
    assert seen(pages.address + 2 * HUGE, LINE).all()


@given(st.lists(st.tuples(st.integers(0, 3), st.sampled_from([256, 320, 4096, 3 * 4096 + 64])), max_size=40))
def test_indexes_of_blocks_are_apart_and_begin_zeroed(steps):
    indexes, held = IndexMemory(4), {}
    for number, (block, size) in enumerate(steps):
        # As blocks do: the new one is taken before the old one is given back.
        address = indexes.take(size)
        assert address % LINE == 0
        assert not seen(address, size).any()
        seen(address, size)[:] = number % 255 + 1
        if block in held:
            before, old, _ = held[block]
            indexes.give_back(old, before)
        held[block] = size, address, number % 255 + 1
        for length, place, value in held.values():
            assert (seen(place, length) == value).all()
    for size, address, _ in held.values():
        indexes.give_back(address, size)
    assert indexes._slots == indexes._alone == {}
