# SPDX-License-Identifier: Apache-2.0
"""Records: a change writes as many rows as it has blocks, all comes back, and messages tell what is new."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from oarlock.client.router import ShardAddress
from oarlock.cluster import record
from oarlock.cluster.record import Records
from oarlock.cluster.store import Store
from oarlock.proto.arrays import unpack

SHARDS = [ShardAddress(i, f"a:{i}", 100 + i) for i in range(3)]


@pytest.fixture
def store(tmp_path: Path) -> Any:
    found = Store(tmp_path / "s").open()
    yield found
    found.close()


def placed(store: Store, blocks: int = 6, replicas: int = 1) -> Records:
    records = Records(blocks, replicas)
    owners = (np.arange(blocks) % 3).astype(np.int32)
    with store:
        records.place(store, owners, np.stack([owners, (owners + 1) % 3], axis=1).astype(np.int32), SHARDS)
    return records


def again(store: Store, blocks: int = 6, replicas: int = 1) -> Records:
    records = Records(blocks, replicas)
    records.take_up(store)
    return records


def same(one: Records, other: Records) -> None:
    assert (one.generation, one.shards) == (other.generation, other.shards)
    for name in ("owners", "generations", "members"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


def change(records: Records, store: Store, block: int, owner: int, *members: int) -> None:
    with store:
        records.change(store, np.array([block], np.int32), np.array([owner], np.int32), np.array([members], np.int32))


def test_all_comes_back_after_any_number_of_changes(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "FOLD_ROWS", 4)
    records = placed(store)
    same(records, again(store))
    for turn in range(12):
        change(records, store, turn % 5, turn % 3, turn % 3, (turn + 1) % 3)
        same(records, again(store))


def test_a_change_of_few_blocks_writes_few_rows(store: Store) -> None:
    records = placed(store, blocks=1000)
    before = store.placement()
    change(records, store, 7, 2, 2, 0)
    assert store.placement() == before, "the base is as it was"
    assert [(b, g, o) for b, g, o, _ in store.records()] == [(7, 2, 2)]
    change(records, store, 7, 1, 1)
    assert [(b, g, o) for b, g, o, _ in store.records()] == [(7, 3, 1)]


def test_the_owner_is_the_first_member_and_the_rest_ascend(store: Store) -> None:
    records = placed(store)
    change(records, store, 0, 2, 0, 1, 2)
    assert records.of(0) == (2, [2, 0, 1], 2)
    change(records, store, 0, 1, 1)
    assert records.of(0) == (1, [1], 3)


def test_a_file_of_before_there_were_copies(store: Store) -> None:
    with store:
        store.set_placement(5, np.array([0, 1, 0], np.int32).tobytes(), [{"id": 0, "address": "a:0", "incarnation": 9}])
    records = again(store, 3)
    assert records.generation == 5
    assert [records.of(b) for b in range(3)] == [(0, [0], 5), (1, [1], 5), (0, [0], 5)]
    assert records.shards == {0: ShardAddress(0, "a:0", 9)}
    change(records, store, 1, 0, 0)
    same(records, again(store, 3))


def test_messages_are_whole_or_what_is_newer(store: Store) -> None:
    records = placed(store)
    whole = records.message()
    assert (whole.generation, whole.HasField("blocks"), whole.HasField("members")) == (1, False, True)
    change(records, store, 4, 2, 2, 1)
    change(records, store, 2, 0, 0, 1)
    told = records.message(since=2)
    assert (told.generation, told.since) == (3, 2)
    assert unpack(told.blocks, np.int32, "blocks").tolist() == [2]
    assert unpack(told.generations, np.uint64, "generations").tolist() == [3]
    assert unpack(told.members, np.int32, "members", dims=2).tolist() == [[0, 1, -1]]
    assert [m.id for m in told.shards] == [0, 1, 2]
    assert unpack(records.message(since=1).blocks, np.int32, "blocks").tolist() == [2, 4]


def test_owners_alone_of_one_generation_travel_as_ever(store: Store) -> None:
    records = Records(6, 0)
    owners = np.zeros(6, np.int32)
    with store:
        records.place(store, owners, owners[:, None], SHARDS[:1])
    told = records.message()
    assert not told.HasField("members")
    assert not told.HasField("generations")


def test_the_dead_are_told_of_until_no_record_names_them(store: Store) -> None:
    records = placed(store)
    records.shard_gone(2)
    assert [m.id for m in records.message().shards] == [0, 1, 2]
    assert 2 not in records.shards
    for block in records.named(2).tolist():
        owner, members, _ = records.of(block)
        rest = [m for m in members if m != 2]
        change(records, store, block, owner if owner != 2 else rest[0], *rest)
    with store:
        records.forget(store, 2)
    assert sorted(again(store).shards) == [0, 1]


def test_a_generation_that_is_reserved_is_not_given(store: Store) -> None:
    records = placed(store)
    records.reserved = 7
    change(records, store, 0, 1, 1)
    assert records.generation == 8
