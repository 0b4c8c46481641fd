# SPDX-License-Identifier: Apache-2.0
"""A row's version rises with each change of the row, and who keeps one gets the row again when it changed too often."""

import threading
from pathlib import Path

import embedding_reference as reference
import numpy as np
import pytest
from table_reference import group

from oarlock.embedding import cold
from oarlock.embedding.content import BlockRows
from oarlock.embedding.descriptor import LEFT
from oarlock.embedding.lookup import counter_names
from oarlock.embedding.make import make_table
from oarlock.embedding.newer import Newer
from oarlock.embedding.spec import (
    Admission,
    CacheSpec,
    Eviction,
    Guard,
    Initializer,
    OptimizerSpec,
    Part,
    TableSpec,
    table_from_json,
    to_json,
)
from oarlock.embedding.versions import MOST
from oarlock.proto.errors import InvalidArgument, Malformed, StalePlacement

MANY = reference.MANY
SGD, ZEROS = OptimizerSpec("sgd"), Initializer("zeros")
# Rows with a gradient of -1 for each update: a row's value is the number of its updates.
EXPANDING = {"parts": (Part(1, SGD, ZEROS), Part(2, SGD, ZEROS)), "expand_score": 0.05}


def make(bound=3, blocks=4, folder=None, **more):
    kinds = {} if "parts" in more else {"optimizer": SGD, "initializer": ZEROS}
    spec = TableSpec("t", 3, blocks=blocks, cache=CacheSpec(10, bound), **kinds | more)
    table = make_table(spec, seed=5, spill_folder=folder)
    for block in range(blocks):
        table.adopt(block)
    return table


def push(table, keys, gradient=-1.0, **more):
    found, blocks, counts, _ = group("t", table.bits, list(keys), set(range(table.spec.blocks)))
    gradients = np.full((len(found), 3), gradient, np.float32)
    return table.push(found, blocks, counts, gradients, rate=1.0, **more)


def newer(table, keys, kept, bound=0):
    """Return what ``pull_newer`` sends to who keeps these versions of keys: {key: (version, row)}."""
    found, blocks, counts, order = group("t", table.bits, list(keys), set(range(table.spec.blocks)))
    kept = np.broadcast_to(np.array(kept, np.uint32), len(keys))[order]
    sent = table.pull_newer(found, blocks, counts, kept, bound=bound)
    assert isinstance(sent, Newer)
    assert (sent.positions.dtype, sent.versions.dtype, sent.rows.dtype) == (np.int32, np.uint32, np.float32)
    assert sent.positions.tolist() == sorted(set(sent.positions.tolist()))
    return {
        int(found[i]): (version, row.tolist())
        for i, version, row in zip(sent.positions.tolist(), sent.versions.tolist(), sent.rows, strict=True)
    }


def version(table, key):
    return newer(table, [key], 0)[key][0]


def test_the_spec_of_a_cache_goes_both_ways_and_is_checked():
    for cache in (None, CacheSpec(1), CacheSpec(1 << 30, 100, "lfu"), CacheSpec(1, 9, adaptive=True)):
        spec = TableSpec("t", 2, cache=cache)
        assert table_from_json(to_json(spec)) == spec
    before = {k: v for k, v in to_json(TableSpec("t", 2)).items() if k != "cache"}
    assert table_from_json(before).cache is None  # a spec of before there were caches
    old = table_from_json(before | {"cache": {"rows": 1, "bound": 2, "policy": "lru"}}).cache
    assert old == CacheSpec(1, 2)  # of before bounds were adaptive
    for wrong in (
        {"rows": 0},
        {"rows": 1.5},
        {"rows": True},
        {"rows": 1, "bound": -1},
        {"rows": 1, "policy": "fifo"},
        {"rows": 1, "adaptive": 1},
        {},
    ):
        with pytest.raises(InvalidArgument, match="cache"):
            table_from_json(before | {"cache": wrong})
    for wrong in (7, "lru", [1]):
        with pytest.raises(InvalidArgument, match="cache"):
            table_from_json(before | {"cache": wrong})
        with pytest.raises(InvalidArgument, match="cache"):
            TableSpec("t", 2, cache=wrong)
    assert counter_names(TableSpec("t", 2, usage=True, cache=CacheSpec(1))) == ["occurrences", "last_update", "version"]


@pytest.mark.parametrize("more", [{}, {"dtype": "int8"}, {"dtype": "float16"}, EXPANDING, {"memory_bytes": 1}])
def test_each_update_of_a_row_raises_its_version_and_nothing_else_does(tmp_path, more):
    table = make(folder=tmp_path, **more)
    assert newer(table, [1, 2], 0) == {1: (0, [0, 0, 0]), 2: (0, [0, 0, 0])}
    for turn in range(1, 4):
        push(table, [1])
        assert version(table, 1) == turn
    push(table, [1, 2], np.nan)
    newer(table, [1], 1, 2)
    assert [version(table, key) for key in (1, 2)] == [3, 0]
    table.close()


def test_a_key_that_comes_twice_in_a_push_is_two_updates():
    table = make()
    push(table, [1, 1, 1])
    push(table, [1, 1])
    assert newer(table, [1], 0) == {1: (5, [5, 5, 5])}


def test_what_is_taken_back_is_a_change_too():
    table = make(guard=Guard(undo=3))
    push(table, [1])
    push(table, [1])
    assert table.undo(np.array([1, 9], np.uint64), steps=2).tolist() == [2, 0]
    assert newer(table, [1], 0) == {1: (3, [0, 0, 0])}
    assert newer(table, [1], 2, bound=0) == {1: (3, [0, 0, 0])}


def test_keys_that_are_not_admitted_are_absent():
    table = make(admission=Admission("count", occurrences=3), absent="first")
    push(table, [1])
    assert newer(table, [1], 7, bound=3) == {1: (0, [0, 0, 0])}
    push(table, [1], occurrences=np.array([2], np.uint32))
    assert version(table, 1) == 1


def test_rows_beyond_the_bound_come_and_no_others():
    table = make(bound=10)
    for turn in range(8):
        push(table, range(turn, 8))  # key k has version k + 1
    for bound in range(11):
        for kept in range(1, 13):
            expected = {key for key in range(8) if key + 1 < kept or key + 1 - kept > bound}
            assert set(newer(table, range(8), kept, bound)) == expected
    assert set(newer(table, range(8), 0, 10)) == set(range(8))
    assert set(newer(table, [100], 5, 10)) == {100}
    assert set(newer(table, range(8), MOST, 10)) == set(range(8))


@pytest.mark.parametrize("more", [{}, {"blocks": 1}, {"blocks": 64}, {"dtype": "bfloat16"}, EXPANDING])
def test_many_rows_are_judged_each_by_itself(rng, more):
    table = make(bound=4, **more)
    updates = rng.integers(0, 6, MANY)  # those with none are absent
    for turn in range(5):
        push(table, np.flatnonzero(updates > turn).tolist())
    kept = rng.integers(0, 7, MANY)
    for bound in (0, 2, 4):
        found = newer(table, range(MANY), kept, bound)
        wanted = (kept == 0) | (updates < kept) | (updates - kept > bound)
        assert found == {int(key): (updates[key], [updates[key]] * 3) for key in np.flatnonzero(wanted)}
    assert newer(table, [], []) == {}


def test_a_row_that_was_evicted_and_created_again_is_never_taken_for_the_one_before():
    table = make(bound=3, blocks=1, eviction=Eviction(age=1))
    for turn in range(5):
        push(table, [1], step=turn)
    push(table, [2], step=100)
    assert table.sweep(0, tick=100)[0] == 1
    for kept in range(1, 6):
        assert newer(table, [1], kept, 3) == {1: (0, [0, 0, 0])}
    push(table, [1], step=100)
    again, row = newer(table, [1], 0)[1]
    assert row == [1, 1, 1]
    for kept in range(1, 6):
        assert newer(table, [1], kept, 3), "a row of the life before is taken for this one"
    assert again > 5 + 3
    assert version(table, 2) == 1
    push(table, [3])
    assert newer(table, [3], 0)[3] == (again, [1, 1, 1])  # a new key cannot be told from one that came again


def test_the_highest_of_the_versions_that_left_counts():
    table = make(bound=3, blocks=1, eviction=Eviction(norm=0.5))
    table.import_block(0, content(table, [2, 9, 4])._replace(weights=np.zeros((3, 3), np.float32)))
    assert table.sweep(0, tick=0)[0] == 3
    push(table, [0, 7])
    assert {key: v for key, (v, _) in newer(table, [0, 7], 0).items()} == {0: 9 + 3 + 1, 7: 9 + 3 + 1}


def test_a_byte_budget_lets_rows_go_like_a_sweep():
    table = make(bound=2, blocks=1, eviction=Eviction(max_bytes=1))
    for turn in range(6):
        push(table, range(16), step=turn)
    push(table, range(100, 110), step=9)
    gone = [key for key in range(16) if table.explain(key)["present"] is False]
    assert gone
    push(table, gone[:1], step=10)
    assert newer(table, gone[:1], 6, 2)
    assert version(table, gone[0]) > 6 + 2


def content(table, versions):
    keys = np.arange(len(versions), dtype=np.uint64)
    ones = np.ones((len(keys), 3), np.float32)
    return BlockRows(
        keys, ones, np.zeros((len(keys), table.state_columns), np.float32), np.array(versions, np.uint32)[:, None]
    )


def test_a_version_stops_at_the_highest_and_such_a_row_is_always_sent():
    table = make(bound=3, blocks=1, eviction=Eviction(norm=0.5))
    table.import_block(0, content(table, [MOST - 1, MOST, 7]))
    assert set(newer(table, [0, 1, 2], [MOST - 1, MOST, 7], 3)) == {1}
    push(table, [0, 1])
    assert {key: v for key, (v, _) in newer(table, [0, 1], MOST, 3).items()} == {0: MOST, 1: MOST}
    push(table, [0, 1, 2], 2.0)  # rows 0 and 1 are of zeros, and go
    push(table, [2], -9.0)
    assert table.sweep(0, tick=0)[0] == 2
    push(table, [0], -1.0)
    assert {key: v for key, (v, _) in newer(table, [0, 2], MOST, 3).items()} == {0: MOST, 2: 9}


def test_versions_travel_with_a_block_and_rows_that_came_without_are_sent_until_they_change():
    one, other = make(blocks=1), make(blocks=1)
    for turn in range(3):
        push(one, range(turn, 5))
    other.import_block(0, one.export_block(0))
    assert newer(other, range(5), 0) == newer(one, range(5), 0)
    plain = make_table(TableSpec("t", 3, SGD, ZEROS, 1), seed=5)
    plain.adopt(0)
    push(plain, range(5))
    other.import_block(0, plain.export_block(0))  # a content of before there were versions
    assert newer(other, [0], 1, 3) == {0: (0, [1, 1, 1])}
    push(other, [0])
    assert newer(other, [0], 0) == {0: (1, [2, 2, 2])}


def test_rows_in_the_spill_file_have_their_versions(tmp_path, monkeypatch):
    monkeypatch.setattr(cold, "LEAST_ROWS", 16)
    table = make(bound=2, folder=tmp_path, memory_bytes=1, dtype="float16")
    many = max(MANY, 300)
    updates = [2 if key % 2 == 0 and key > 0 else 1 for key in range(many)]
    for begin in (0, 1, 2):
        push(table, range(begin, many, 2))
    assert table._cold.file.counts.records_written > 0
    for begin in range(0, 600 if reference.JIT else 60, 20):
        keys = range(begin, begin + 20)
        found = newer(table, keys, 1, 0)
        expected = {key: (2, [2, 2, 2]) for key in keys if updates[key] == 2}
        # A row that could not come back at once is sent, and not to be kept.
        assert {key: sent for key, sent in found.items() if sent[0]} == expected
    assert table._cold.file.counts.records_read > 0
    table.close()
    assert list(Path(tmp_path).iterdir()) == []


def test_requests_that_do_not_fit_are_refused():
    table = make(bound=2)
    keys, blocks, counts, _ = group("t", table.bits, [1, 2], set(range(4)))
    kept = np.zeros(2, np.uint32)
    for bound in (-1, 3, True, 1.0):
        with pytest.raises(InvalidArgument, match=r"cache\.bound = 2"):
            table.pull_newer(keys, blocks, counts, kept, bound=bound)
    with pytest.raises(Malformed, match="3 versions for 2 keys"):
        table.pull_newer(keys, blocks, counts, np.zeros(3, np.uint32), bound=0)
    with pytest.raises((Malformed, InvalidArgument), match="versions"):
        table.pull_newer(keys, blocks, counts, kept.astype(np.int64), bound=0)
    with pytest.raises(Malformed):
        table.pull_newer(keys, blocks, counts + np.int32(1), kept, bound=0)
    table.drop(int(blocks[0]))
    with pytest.raises(StalePlacement):
        table.pull_newer(keys, blocks, counts, kept, bound=0)
    plain = make_table(TableSpec("t", 3, blocks=4), seed=5)
    with pytest.raises(InvalidArgument, match="set cache"):
        plain.pull_newer(keys, blocks, counts, kept, bound=0)


@pytest.mark.parametrize("more", [{}, EXPANDING, {"memory_bytes": 1}])
def test_a_row_is_never_older_than_the_version_that_it_comes_with(tmp_path, monkeypatch, more):
    """Pushers raise all rows while two threads look: each part of a row has at least as many updates as its version says."""
    monkeypatch.setattr(cold, "LEAST_ROWS", 16)
    rows, rounds = (400, 60) if reference.JIT else (40, 3)
    table = make(bound=1, folder=tmp_path, **more)
    keys, blocks, counts, _ = group("t", table.bits, range(rows), set(range(4)))
    minus = np.full((rows, 3), -1, np.float32)
    done, errors, seen = threading.Event(), [], []

    def pusher():
        for _ in range(rounds):
            table.push(keys, blocks, counts, minus, rate=1.0)

    def looker():
        kept = np.zeros(rows, np.uint32)
        while not done.is_set():
            found = table.pull_newer(keys, blocks, counts, kept, bound=1)
            assert (found.rows.min(axis=1) >= found.versions).all(), "a row is older than its version"
            assert (found.versions >= kept[found.positions]).all() or more
            kept[found.positions] = found.versions
            seen.append(len(found.positions))

    def run(work):
        try:
            with np.errstate(over="ignore"):
                work()
        except BaseException as error:
            errors.append(error)

    lookers = [threading.Thread(target=run, args=(looker,)) for _ in range(2)]
    pushers = [threading.Thread(target=run, args=(pusher,)) for _ in range(2)]
    for thread in lookers + pushers:
        thread.start()
    for thread in pushers:
        thread.join()
    done.set()
    for thread in lookers:
        thread.join()
    assert errors == []
    assert sum(seen) > 0
    assert newer(table, range(rows), 0) == {key: (2 * rounds, [2 * rounds] * 3) for key in range(rows)} or more
    table.close()


def test_what_left_is_remembered_by_block_and_not_by_what_comes_instead():
    table = make(bound=0, blocks=1, eviction=Eviction(norm=0.5))
    push(table, [1], 0.0)
    assert table.sweep(0, tick=0)[0] == 1
    assert table.descriptors[0, LEFT] == 1
    table.drop(0)
    table.adopt(0)
    assert table.descriptors[0, LEFT] == 0
