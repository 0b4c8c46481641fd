# SPDX-License-Identifier: Apache-2.0
"""Holders: rows of a plan become moves, what is under way is counted as done, and sets that lack members come first."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from oarlock.client.router import ShardAddress
from oarlock.cluster.holders import wanted
from oarlock.cluster.moving import Move
from oarlock.cluster.planning import Blocks
from oarlock.cluster.record import Records
from oarlock.cluster.store import Store

BLOCKS = Blocks(np.zeros(12, np.int32), np.full(12, 100, np.int64), np.zeros(12))


@pytest.fixture
def make_records(tmp_path: Path) -> Any:
    """Return records of twelve blocks with the copy sets that are given, among shards 0 to 4."""
    store = Store(tmp_path / "state.sqlite").open()

    def make(sets: list[tuple[int, ...]], replicas: int) -> Records:
        records = Records(len(sets), replicas)
        members = np.full((len(sets), replicas + 2), -1, np.int32)
        for row, each in zip(members, sets, strict=True):
            row[: len(each)] = each
        with store:
            records.place(store, members[:, 0], members, [ShardAddress(i, f"a:{i}", 10 + i) for i in range(5)])
        return records

    yield make
    store.close()


def test_a_drained_owner_is_followed_by_a_newcomer_in_one_move(make_records: Any) -> None:
    moves = wanted(make_records([(0,)] * 6 + [(1,)] * 6, 0), BLOCKS, [0, 2])
    assert sorted(moves, key=lambda m: m.block) == [Move(b, 1, 2, 2) for b in range(6, 12)]


def test_who_holds_a_copy_takes_over_before_the_owner_is_replaced(make_records: Any) -> None:
    records = make_records([(0, 1)] * 4 + [(1, 2)] * 4 + [(2, 0)] * 4, 1)
    moves = wanted(records, BLOCKS, [0, 1])
    drained = [m for m in moves if m.block >= 4]
    assert {m.block for m in drained} == set(range(4, 12)), "of every block that the leaving one holds"
    assert all(m.leaves == 2 and m.to in (0, 1) for m in drained)
    taken = [m for m in moves if records.owners[m.block] == 2]
    assert len(taken) == 4
    assert all(m.heir in (0, 1) for m in taken)


def test_a_set_that_lacks_a_member_comes_before_balance(make_records: Any) -> None:
    moves = wanted(make_records([(0, 1)] * 11 + [(1,)], 1), BLOCKS, [0, 1, 2])
    assert (moves[0].block, moves[0].leaves) == (11, -1)
    assert len({m.block for m in moves}) == len(moves), "one move of a block at a time"


def test_what_is_under_way_is_as_good_as_done(make_records: Any) -> None:
    records = make_records([(0,)] * 12, 0)
    moves = wanted(records, BLOCKS, [0, 1])
    assert len(moves) == 6
    assert wanted(records, BLOCKS, [0, 1], under_way=moves) == []
    rest = wanted(records, BLOCKS, [0, 1], under_way=moves[:2])
    assert len(rest) == 4
    assert not {m.block for m in rest} & {m.block for m in moves[:2]}


def test_nobody_leaves_a_set_that_has_nobody_in_its_place(make_records: Any) -> None:
    records = make_records([(0, 1)] * 12, 1)
    assert wanted(records, BLOCKS, [0]) == []
    assert wanted(records, BLOCKS, []) == []
    assert {(m.heir, m.to) for m in wanted(records, BLOCKS, [1])} == {(1, -1)}, "and yet the owner can be another one"


def test_blocks_that_wait_for_an_owner_are_left_alone(make_records: Any) -> None:
    moves = wanted(make_records([(0,)] * 12, 0), BLOCKS, [0, 1], waiting=range(8))
    assert len(moves) == 2
    assert all(m.block >= 8 for m in moves)


def test_copies_go_to_other_hosts(make_records: Any) -> None:
    hosts = {0: "one", 1: "one", 2: "two", 3: "two"}
    moves = wanted(make_records([(0,)] * 6 + [(1,)] * 6, 1), BLOCKS, list(hosts), hosts=hosts)
    assert len(moves) == 12
    assert all(hosts[m.to] == "two" for m in moves)


def test_a_full_set_makes_room_first(make_records: Any) -> None:
    records = make_records([(0, 1, 2)] + [(0, 1), (1, 2), (2, 0)] * 3 + [(3, 4), (4, 3)], 1)
    moves = {m.block: m for m in wanted(records, BLOCKS, [3, 4])}
    assert (moves[0].leaves, moves[0].to) in {(0, -1), (1, -1), (2, -1)}
    assert moves[0].heir in ({1, 2} if moves[0].leaves == 0 else {-1, 1, 2})
    assert all(m.to in (3, 4) for m in moves.values() if m.block)
