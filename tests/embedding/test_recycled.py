# SPDX-License-Identifier: Apache-2.0
"""Memory that is used again."""

import gc

import numpy as np
import pytest

from oarlock.embedding.memory import PAGE
from oarlock.embedding.pointer import address_of
from oarlock.embedding.recycled import Recycled

MIB = 1 << 20


def test_memory_comes_back_only_when_the_last_view_is_gone() -> None:
    memory = Recycled(8 * MIB)
    first = memory.take(4 * MIB)
    first[:] = 7
    where, part = address_of(first), first[100:200].reshape(10, 10)
    del first
    other = memory.take(4 * MIB)
    assert memory.kept == 0
    assert address_of(other) != where
    other[:] = 9
    assert (part == 7).all()
    del part
    assert memory.kept == 4 * MIB
    again = memory.take(4 * MIB)
    assert address_of(again) == where
    assert memory.kept == 0


def test_no_more_is_kept_than_asked_for() -> None:
    memory = Recycled(8 * MIB)
    pieces = [memory.take(3 * MIB) for _ in range(5)]
    pieces.clear()
    assert memory.kept == 6 * MIB
    memory.let_go()
    assert memory.kept == 0


def test_a_piece_takes_the_place_of_one_of_about_its_size() -> None:
    memory = Recycled(64 * MIB)
    where = address_of(memory.take(16 * MIB - 5))
    found = memory.take(16 * MIB - 12345)
    assert (address_of(found), len(found), memory.kept) == (where, 16 * MIB - 12345, 0)
    small = memory.take(1)
    assert len(small) == 1
    assert address_of(small) % PAGE == 0


def test_memory_is_warmed_up_to_what_may_be_kept() -> None:
    memory = Recycled(10 * MIB)
    memory.warm(4 * MIB, 100 * MIB)
    assert memory.kept == 8 * MIB
    memory.warm(4 * MIB, 4 * MIB)
    assert memory.kept == 8 * MIB
    taken = memory.take(4 * MIB)
    assert memory.kept == 4 * MIB
    memory.warm(4 * MIB, 8 * MIB)
    assert memory.kept == 8 * MIB
    del taken
    assert memory.kept == 8 * MIB, "more may not be kept"


def test_the_collector_may_find_lent_memory_while_some_is_taken() -> None:
    memory = Recycled(64 * MIB)
    for _ in range(50):
        ring: list[object] = [memory.take(MIB)]
        ring.append(ring)
        del ring
        gc.collect(0)
        assert len(memory.take(MIB)) == MIB
    gc.collect()
    assert memory.kept > 0


def test_what_is_not_to_be_had_is_an_error() -> None:
    with pytest.raises(MemoryError):
        Recycled(0).take(1 << 62)
    assert np.asarray(Recycled(0).take(0)).shape == (0,)
