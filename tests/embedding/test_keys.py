# SPDX-License-Identifier: Apache-2.0
import embedding_reference as reference
import numpy as np
import pytest

from oarlock.embedding import keys as module
from oarlock.embedding.hashing import blocks_of, key_mix, mix64, table_salt
from oarlock.embedding.keys import KeySorter, gather, merge, unmix64
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


def test_numbers_start_anew_without_old_keys_coming_back():
    sorter, rank = KeySorter(), np.zeros(1, np.int32)
    keys = np.arange(10, dtype=np.uint64)
    sorter.build(keys, SALT, 0, rank)
    # What an older call may have left: numbers above those of the first calls after the start.
    sorter._numbers[:] = (1 << 32) - 1
    sorter._base = (1 << 32) - 15
    for expected in ((1 << 32) - 5, 11, 21):
        sorter._numbers[::2] = np.uint32(sorter._base - 1)
        sorter._numbers[1::2] = 0
        same(sorter.build(keys, SALT, 0, rank), reference.group("t", 0, keys))
        assert sorter._base == expected


def test_many_batches_of_one_sorter_each_forget_the_others():
    sorter, rng = KeySorter(), np.random.default_rng(3)
    rank = np.arange(4, dtype=np.int32)
    for _ in range(200 if reference.JIT else 20):
        keys = rng.integers(0, 30, int(rng.integers(0, 40)), dtype=np.uint64)
        same(sorter.build(keys, SALT, 2, rank), reference.group("t", 2, keys))


def test_a_call_that_was_interrupted_leaves_nothing_behind(monkeypatch):
    sorter, rank = KeySorter(), np.zeros(1, np.int32)
    keys = np.arange(16, dtype=np.uint64)
    same(sorter.build(keys[:1], SALT, 0, rank), reference.group("t", 0, keys[:1]))

    def interrupted(*arguments):
        kernel(*arguments)
        raise KeyboardInterrupt

    kernel = module.group_keys
    monkeypatch.setattr(module, "group_keys", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sorter.build(keys, SALT, 0, rank)
    monkeypatch.undo()
    again = keys[::-1].copy()
    same(sorter.build(again, SALT, 0, rank), reference.group("t", 0, again))


def test_keys_that_share_a_place_are_told_apart():
    # Mixes whose low bits are equal begin at one place of whatever table; the last ones go round its end.
    low = np.uint64((1 << 16) - 1)
    mixes = (np.arange(60, dtype=np.uint64) << np.uint64(16)) | low
    keys = np.array([int(unmix64(m)) for m in mixes], np.uint64) ^ SALT
    assert [int(key_mix(SALT, k)) for k in keys] == mixes.tolist()
    raw = np.concatenate([keys, keys[::-1], keys[:7]])
    same(KeySorter().build(raw, SALT, 3, np.arange(8, dtype=np.int32)), reference.group("t", 3, raw))


def test_unmix_undoes_the_mix():
    for value in [0, 1, (1 << 64) - 1, *np.random.default_rng(0).integers(0, 1 << 64, 100, dtype=np.uint64).tolist()]:
        assert int(unmix64(np.uint64(mix64(np.uint64(value))))) == value


def test_one_sorter_serves_tables_in_turn_and_orders_that_change_in_place():
    sorter, keys = KeySorter(), reference.EDGES["many"]
    orders = {bits: np.random.default_rng(bits).permutation(1 << bits) for bits in (2, 5, 0)}
    ranks = {bits: np.argsort(order).astype(np.int32) for bits, order in orders.items()}
    for _ in range(2):
        for bits, rank in ranks.items():
            same(sorter.build(keys, SALT, bits, rank), reference.group("t", bits, keys, orders[bits].tolist()))
    ranks[2][:] = ranks[2][::-1].copy()
    order = np.argsort(ranks[2]).tolist()
    same(sorter.build(keys, SALT, 2, ranks[2]), reference.group("t", 2, keys, order))
    ranks[2][0] = ranks[2][1]
    with pytest.raises(Malformed, match="each of 0 to 3 once"):
        sorter.build(keys, SALT, 2, ranks[2])
    with pytest.raises(Malformed, match="each of 0 to 7 once"):
        sorter.build(keys, SALT, 3, ranks[5])


def test_a_read_only_order_is_known_again_and_the_number_of_known_orders_is_bounded():
    sorter, keys = KeySorter(), reference.EDGES["small"]
    rank = np.frombuffer(np.arange(4, dtype=np.int32).tobytes(), np.int32)
    for _ in range(3):
        same(sorter.build(keys, SALT, 2, rank), reference.group("t", 2, keys))
    assert len(sorter._orders) == 1
    kept = [np.arange(4, dtype=np.int32) for _ in range(200)]
    for rank in kept:
        sorter.build(keys[:3], SALT, 2, rank)
    assert len(sorter._orders) <= 64


@pytest.mark.parametrize("case", reference.EDGES)
def test_occurrences_count_the_positions_of_each_key(case):
    keys = reference.EDGES[case]
    found = KeySorter().build(keys, SALT, 3, np.arange(8, dtype=np.int32))
    occurrences = found.occurrences()
    assert occurrences.dtype == np.int32
    assert occurrences.tolist() == [keys.tolist().count(k) for k in found.keys.tolist()]


def test_occurrences_of_a_set_that_points_outside_its_keys_are_refused():
    found = KeySorter().build(reference.EDGES["small"], SALT, 0, np.zeros(1, np.int32))
    with pytest.raises(Malformed, match="inverse points outside"):
        found._replace(keys=found.keys[:-1]).occurrences()


@pytest.mark.skipif(not reference.JIT, reason="too many keys for plain Python")
@pytest.mark.parametrize("bits", [0, 6, 12])
def test_a_batch_as_large_as_those_of_training_is_sorted_as_numpy_would(bits):
    rng = np.random.default_rng(5)
    keys = np.minimum(rng.zipf(1.05, 53_248), (1 << 63) - 1).astype(np.uint64)
    rank = rng.permutation(1 << bits).astype(np.int32)
    sorter = KeySorter()
    for part in (keys, keys[:9000], keys[::-1].copy()):
        distinct, first, inverse = np.unique(part, return_index=True, return_inverse=True)
        block = np.empty(len(distinct), np.int32)
        blocks_of(distinct, SALT, bits, block)
        order = np.lexsort((first, rank[block]))
        found = sorter.build(part, SALT, bits, rank)
        assert found.keys.tolist() == distinct[order].tolist()
        assert found.inverse.tolist() == np.argsort(order)[inverse.reshape(-1)].tolist()
        blocks, starts = np.unique(rank[block][order], return_index=True)
        assert found.blocks.tolist() == np.argsort(rank)[blocks].tolist()
        assert found.counts.tolist() == np.diff([*starts, len(distinct)]).tolist()


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
