# SPDX-License-Identifier: Apache-2.0
import embedding_reference as reference
import numpy as np
import pytest

from oarlock.embedding.hashing import table_salt
from oarlock.embedding.keys import KeySorter, gather, merge
from oarlock.proto.errors import InvalidArgument, Malformed

SALT = table_salt("t")


def same(found, expected):
    for name, a, b in zip(found._fields, found, expected, strict=True):
        assert a.dtype == b.dtype, name
        assert a.tolist() == b.tolist(), name


@pytest.mark.parametrize("case", reference.EDGES)
@pytest.mark.parametrize("bits", [0, 3, 6])
def test_equals_the_twin_for_any_order_of_blocks(case, bits):
    keys = reference.EDGES[case]
    sorter = KeySorter()
    for seed in range(3):
        order = np.random.default_rng(seed).permutation(1 << bits)
        rank = np.argsort(order).astype(np.int32)
        same(sorter.build(keys, SALT, bits, rank), reference.group("t", bits, keys, order.tolist()))


def test_one_sorter_serves_batches_of_any_size_and_forgets_the_last_one():
    sorter, rng = KeySorter(), np.random.default_rng(0)
    rank = np.arange(8, dtype=np.int32)
    sizes = (5, 0, 40, 60, 33, 64, 65, 1, 100) + ((1000, 1023, 3, 1030) if reference.JIT else ())
    for n in sizes:
        keys = rng.integers(0, 50, n, dtype=np.uint64)
        same(sorter.build(keys, SALT, 3, rank), reference.group("t", 3, keys))


def test_outputs_stay_as_they_are_when_the_sorter_goes_on():
    sorter, rank = KeySorter(), np.arange(8, dtype=np.int32)
    first = sorter.build(reference.EDGES["many"], SALT, 3, rank)
    sorter.build(reference.EDGES["wide"], SALT, 3, rank)
    same(first, reference.group("t", 3, reference.EDGES["many"]))


def test_the_round_number_wraps_without_old_keys_coming_back():
    sorter, rank = KeySorter(), np.zeros(1, np.int32)
    keys = np.arange(10, dtype=np.uint64)
    sorter.build(keys, SALT, 0, rank)
    sorter._round = (1 << 32) - 1
    for expected in (1, 2):
        same(sorter.build(keys, SALT, 0, rank), reference.group("t", 0, keys))
        assert sorter._round == expected


@pytest.mark.parametrize("rank", [[0, 1, 2], [0, 1, 2, 2], [0, 1, 2, 4], [0, 1, 2, 3, 4], [-1, 0, 1, 2]])
def test_a_rank_that_is_no_permutation_is_refused(rank):
    with pytest.raises(Malformed, match="each of 0 to 3 once"):
        KeySorter().build(reference.EDGES["small"], SALT, 2, np.array(rank, np.int32))


@pytest.mark.parametrize("case", reference.EDGES)
@pytest.mark.parametrize("dim", [1, 5, 16])
def test_merge_and_gather_equal_the_twins_to_the_bit(case, dim):
    found = KeySorter().build(reference.EDGES[case], SALT, 3, np.arange(8, dtype=np.int32))
    rng = np.random.default_rng(dim)
    n, u = len(found.inverse), len(found.keys)
    gradients = (rng.normal(size=(n, dim)) * 10.0 ** rng.integers(-4, 4, (n, 1))).astype(np.float32)
    out = np.full((u, dim), np.nan, np.float32)
    merge(gradients, found.inverse, out)
    expected = np.zeros((u, dim), np.float32)
    for i in range(n):
        expected[found.inverse[i]] += gradients[i]
    assert out.tobytes() == expected.tobytes()
    spread = np.full((n, dim), np.nan, np.float32)
    gather(out, found.inverse, spread)
    assert spread.tobytes() == expected[found.inverse].tobytes()


def test_merge_and_gather_refuse_what_would_leave_the_arrays():
    inverse = np.array([0, 1, 1], np.int32)
    wide, narrow = np.zeros((3, 2), np.float32), np.zeros((2, 2), np.float32)
    for call in (lambda w, i, n: merge(w, i, n), lambda w, i, n: gather(n, i, w)):
        call(wide, inverse, narrow)
        with pytest.raises(Malformed, match="3 raw keys do not fit"):
            call(wide[:2], inverse, narrow)
        with pytest.raises(Malformed, match="3 raw keys do not fit"):
            call(wide, inverse, np.zeros((2, 3), np.float32))
        for bad in (inverse + np.int32(1), inverse - np.int32(1)):
            with pytest.raises(Malformed, match="inverse points outside"):
                call(wide, bad, narrow)
    with pytest.raises(InvalidArgument, match="writable"):
        gather(narrow, inverse, np.zeros((2, 3), np.float32).T)
    with pytest.raises(InvalidArgument, match="writable"):
        merge(wide, inverse, np.zeros((2, 2), np.float32).T)
    frozen = narrow.copy()
    frozen.flags.writeable = False
    with pytest.raises(InvalidArgument, match="writable"):
        merge(wide, inverse, frozen)
