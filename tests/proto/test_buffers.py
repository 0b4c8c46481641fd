# SPDX-License-Identifier: Apache-2.0
"""Buffers: memory comes again when nobody looks at it, and never before."""

import random
import threading

import numpy as np
import pytest

from oarlock.proto.arrays import pack, unpack
from oarlock.proto.buffers import ALIGNMENT, LEAST_BYTES, Buffers


def place_of(array):
    return array.ctypes.data


def test_memory_comes_again_once_the_last_view_is_gone():
    buffers = Buffers(2)
    first = buffers.take(100_000)
    place, view = place_of(first), memoryview(first).cast("B")[10:]
    derived = np.frombuffer(view, np.uint8)[5:].reshape(-1, 1)
    for held in ("first", "view", "derived"):
        assert place_of(buffers.take(100_000)) != place, held
        if held == "first":
            del first
        elif held == "view":
            del view
    del derived
    assert place in {place_of(buffers.take(100_000)) for _ in range(2)}


def test_what_unpack_returns_keeps_the_memory():
    buffers = Buffers(1)
    beside = []
    message = pack(buffers.copy(np.arange(50_000, dtype=np.float32)), beside)
    place = place_of(beside[0])
    values = unpack(message, np.float32, "values", parts=[memoryview(beside.pop()).cast("B")])
    assert place_of(buffers.take(200_000)) != place
    assert values[-1] == 49_999
    del values
    assert place_of(buffers.take(200_000)) == place


def test_the_smallest_that_fits_is_taken_and_too_small_a_one_given_up():
    buffers = Buffers(2)
    large, small = buffers.take(4 << 20), buffers.take(100_000)
    places = place_of(large), place_of(small)
    del large, small
    assert place_of(buffers.take(50_000)) == places[1]
    assert place_of(buffers.take(1 << 20)) == places[0]
    before = buffers.nbytes
    # None fits: the smaller one goes for it, so that two are kept, as before.
    buffers.take(8 << 20)
    kept = buffers.nbytes
    assert before + (7 << 20) < kept < before + (12 << 20)
    held = [buffers.take(100) for _ in range(2)]
    assert (len(held), buffers.nbytes) == (2, kept)


def test_neither_many_nor_large_ones_are_kept():
    buffers = Buffers(3, keep_bytes=1 << 20)
    held = [buffers.take(LEAST_BYTES) for _ in range(10)]
    assert 0 < buffers.nbytes <= 3 << 20
    del held
    kept = buffers.nbytes
    buffers.take(2 << 20)
    assert buffers.nbytes <= kept


@pytest.mark.parametrize("size", [0, 1, 63, 64, 65, LEAST_BYTES, 1_000_001])
def test_sizes_and_alignment(size):
    taken = Buffers(1).take(size)
    assert (taken.nbytes, taken.dtype) == (size, np.uint8)
    assert not size or place_of(taken) % ALIGNMENT == 0


@pytest.mark.parametrize("shape", [(0,), (0, 3), (7,), (1000, 3), (50_000, 2)])
def test_arrays_and_copies(rng, shape):
    buffers = Buffers(2)
    values = rng.normal(size=(2 * shape[0], *shape[1:])).astype(np.float32)[::2]
    copied = buffers.copy(values)
    assert copied.flags.c_contiguous
    assert copied.dtype == np.float32
    assert np.array_equal(copied, values)
    assert not np.shares_memory(copied, buffers.copy(values))


def test_threads_never_get_the_same_memory(seed):
    buffers = Buffers(4)
    wrong = []

    def work(number):
        rng = random.Random(seed + number)
        held = []
        for _ in range(300):
            taken = buffers.take(rng.choice((1000, 70_000, 200_000)))
            taken[:] = number
            held.append(taken)
            if len(held) > rng.randrange(4):
                wrong.extend(1 for each in held if np.any(each != number))
                held.clear()
                del taken

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
