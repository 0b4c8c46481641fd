# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest

from oarlock.embedding import pointer
from oarlock.embedding.jit import jit
from oarlock.proto.errors import Malformed


@jit
def touch(floats, words, n):
    total = np.float32(0)
    for i in range(n):
        pointer.prefetch(floats + 4 * i)
        total += pointer.load_f32(floats, i)
        pointer.store_f32(floats, i, np.float32(2 * i))
    pointer.store_u64(words, 1, pointer.load_u64(words, 0))
    return total, pointer.load_i64(words, 1), pointer.bit_length(n)


def test_loads_and_stores_reach_the_array_and_prefetch_changes_nothing():
    floats = np.arange(10, dtype=np.float32)
    words = np.array([np.uint64(2**64 - 5), 0], np.uint64)
    total, seen, bits = touch(pointer.address_of(floats), pointer.address_of(words), 9)
    assert (total, seen, bits) == (36, -5, 4)
    assert floats.tolist() == [0, 2, 4, 6, 8, 10, 12, 14, 16, 9]
    assert int(words[1]) == 2**64 - 5


@jit
def length(n):
    return pointer.bit_length(n)


@pytest.mark.parametrize("n", [0, 1, 2, 15, 16, 1 << 40, (1 << 62) + 3])
def test_bit_length(n):
    assert length(n) == n.bit_length()


@pytest.mark.parametrize("kind", [bytes, bytearray])
def test_kernel_array_lends_read_only_memory_without_a_copy_and_keeps_it_alive(kind):
    raw = np.frombuffer(kind(range(32)), np.uint64)
    raw.flags.writeable = False
    lent = pointer.kernel_array("keys", raw, np.uint64)
    assert lent.flags.writeable
    assert not raw.flags.writeable
    assert np.shares_memory(raw, lent)
    expected = raw.tolist()
    del raw
    assert lent.tolist() == expected


def test_kernel_array_copies_what_kernels_cannot_take_and_leaves_the_rest():
    plain = np.zeros(4, np.uint64)
    assert pointer.kernel_array("keys", plain, np.uint64) is plain
    strided = np.arange(8, dtype=np.uint64)[::2]
    unaligned = np.frombuffer(b"x" + bytes(range(16)), np.uint8)[1:].view(np.uint64)
    for odd in (strided, unaligned):
        fit = pointer.kernel_array("keys", odd, np.uint64)
        assert fit.flags.c_contiguous
        assert fit.flags.aligned
        assert fit.tolist() == odd.tolist()


@pytest.mark.parametrize("wrong", [np.zeros(3, np.int64), np.zeros((3, 1), np.uint64), [1, 2]])
def test_kernel_array_names_what_does_not_fit(wrong):
    with pytest.raises(Malformed, match="keys: expected an array of uint64 with 1 dim"):
        pointer.kernel_array("keys", wrong, np.uint64)
