# SPDX-License-Identifier: Apache-2.0
"""Moving and promotion, row by row of the tables in SEMANTICS section 6: what follows of each failure."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from oarlock.client.router import ShardAddress
from oarlock.cluster.moving import (
    BREATH_SECONDS,
    CONFIRM,
    COPY,
    GATHER_SECONDS,
    HAND,
    HAND_SECONDS,
    MOST_COPIES,
    REOPEN,
    REPEAT_SECONDS,
    Change,
    Move,
    Moving,
    Order,
)
from oarlock.cluster.promotion import WAIT_SECONDS, Chosen, Promotion
from oarlock.cluster.record import Records
from oarlock.cluster.store import Store

TERM = 3


class Table:
    """Records of blocks that all belong to shard 0, with copies as told; and what moves."""

    def __init__(self, store: Store, *, blocks: int, replicas: int, most_closed: int = 2) -> None:
        self.store = store
        self.records = Records(blocks, replicas)
        owners = np.zeros(blocks, np.int32)
        members = np.tile(np.arange(replicas + 1, dtype=np.int32), (blocks, 1))
        with store:
            self.records.place(store, owners, members, [ShardAddress(i, f"a:{i}", 10 + i) for i in range(5)])
        self.moving = Moving(self.records, most_closed, TERM)
        self.moving.opened = 0

    def record(self, block: int, owner: int, *members: int, confirmed: bool = True) -> None:
        """Make a record; ``confirmed``: its owner has said that all members have all that was done before it."""
        with self.store:
            self.records.change(
                self.store, np.array([block], np.int32), np.array([owner], np.int32), np.array([members], np.int32)
            )
        self.moving.recorded([block])
        if confirmed:
            self.moving.confirmed(block, self.records.generation)

    def make(self, change: Change) -> None:
        self.record(change.block, change.owner, *change.members)

    def gone(self, shard: int) -> None:
        self.records.shard_gone(shard)
        self.moving.gone(shard)


@pytest.fixture
def make_table(tmp_path: Path) -> Any:
    store = Store(tmp_path / "s").open()
    yield lambda **other: Table(store, **{"blocks": 8, "replicas": 0, **other})
    store.close()


def kinds(orders: list[Order]) -> list[tuple[str, int, int]]:
    return [(o.kind, o.block, o.shard) for o in orders]


def test_a_move_from_its_copy_to_its_end(make_table: Any) -> None:
    table = make_table()
    moving = table.moving
    moving.want([Move(1, 0, 3, 3)])
    orders, changes = moving.step(0.0)
    assert (kinds(orders), changes) == ([(COPY, 1, 3)], [])
    assert orders[0].generation == 1
    table.record(1, 0, 0, 3)
    (order,), changes = moving.step(0.1)
    assert (order.kind, order.owner, order.shard, order.generation, order.term) == (HAND, 0, 3, 2, TERM)
    assert moving.handed(1, TERM, order.order) == 3
    table.record(1, 3, 3)
    assert moving.step(0.2) == ([], [])
    assert moving.idle


def test_orders_of_which_nothing_is_heard_are_given_again(make_table: Any) -> None:
    table = make_table()
    table.moving.want([Move(1, 0, 3, 3)])
    assert len(table.moving.step(0.0)[0]) == 1
    assert table.moving.step(REPEAT_SECONDS / 2) == ([], [])
    assert kinds(table.moving.step(REPEAT_SECONDS)[0]) == [(COPY, 1, 3)]
    table.record(1, 0, 0, 3)
    first = table.moving.step(2.0)[0][0].order
    second = table.moving.step(2.0 + REPEAT_SECONDS)[0][0].order
    assert second > first
    assert table.moving.handed(1, TERM, first) == 3, "it was not opened in between"


def test_the_target_dies_while_it_is_copied_to(make_table: Any) -> None:
    table = make_table()
    table.moving.want([Move(1, 0, 3, 3), Move(2, 0, 4, 4)])
    table.moving.step(0.0)
    assert table.moving.copies_to(3) == [1]
    table.gone(3)
    table.moving.step(0.1)
    assert sorted(table.moving.flights) == [2]


def test_the_target_dies_while_the_block_is_closed(make_table: Any) -> None:
    table = make_table()
    table.record(1, 0, 0, 3)
    table.moving.want([Move(1, 0, 3, 3)])
    (order,), _ = table.moving.step(0.0)
    table.gone(3)
    assert table.moving.handed(1, TERM, order.order) is None
    assert [(o.kind, o.order) for o in table.moving.step(0.1)[0]] == [(REOPEN, order.order)]


def test_the_owner_dies_while_the_block_is_closed(make_table: Any) -> None:
    table = make_table(replicas=1)
    table.record(1, 0, 0, 1, 3)
    table.moving.want([Move(1, 0, 3, 3)])
    table.moving.step(0.0)
    table.gone(0)
    table.moving.step(0.1)
    assert table.moving.idle
    assert not table.moving.closed


def test_a_member_that_is_removed_while_the_block_is_closed_begins_it_anew(make_table: Any) -> None:
    table = make_table(replicas=1)
    table.record(1, 0, 0, 1, 3)
    table.moving.want([Move(1, 0, 3, 3)])
    (first,), _ = table.moving.step(0.0)
    table.record(1, 0, 0, 3)
    assert table.moving.step(0.1) == ([], [])
    (second,), _ = table.moving.step(0.2 + BREATH_SECONDS)
    assert (second.kind, second.generation) == (HAND, first.generation + 1)
    assert table.moving.handed(1, TERM, first.order) is None, "of the record before"
    assert table.moving.handed(1, TERM, second.order) == 3


def test_a_block_is_not_closed_for_ever(make_table: Any) -> None:
    table = make_table()
    table.record(1, 0, 0, 3)
    table.moving.want([Move(1, 0, 3, 3)])
    (first,), _ = table.moving.step(0.0)
    now, given = 0.0, {first.order}
    while table.moving.flights:
        now += REPEAT_SECONDS
        orders, _ = table.moving.step(now)
        given |= {o.order for o in orders if o.kind == HAND}
    assert now >= HAND_SECONDS
    assert len(given) > 1
    assert {o.kind for o in orders} == {REOPEN}
    assert {o.order for o in orders} == given, "it is closed under whichever came last"
    for order in orders:
        table.moving.reopened(order)
    assert table.moving.step(now + 10 * REPEAT_SECONDS) == ([], [])


def test_a_late_report_of_another_order_takes_the_place_of_none(make_table: Any) -> None:
    """The block is closed under the newest that came: a word about an older one opens nothing."""
    table = make_table()
    table.record(1, 0, 0, 3)
    generation = table.records.of(1)[2]
    for order in (3, 1):
        assert table.moving.handed(1, TERM, order) is None
    orders, _ = table.moving.step(0.0)
    assert [(o.kind, o.generation, o.order) for o in orders] == [(REOPEN, generation, 3), (REOPEN, generation, 1)]
    table.moving.reopened(orders[1])
    again, _ = table.moving.step(REPEAT_SECONDS)
    assert [o.order for o in again] == [3]


def test_a_report_of_an_order_that_nobody_knows_is_answered_by_opening(make_table: Any) -> None:
    """A coordinator that was started again, or that gave the order up."""
    table = make_table()
    assert table.moving.handed(1, TERM - 1, 77) is None
    (order,), _ = table.moving.step(0.0)
    assert (order.kind, order.generation, order.term, order.order) == (REOPEN, 1, TERM - 1, 77)
    assert table.moving.step(REPEAT_SECONDS / 2) == ([], [])
    assert len(table.moving.step(REPEAT_SECONDS)[0]) == 1, "until it is answered"
    table.record(1, 0, 0, 3)
    assert table.moving.step(2 * REPEAT_SECONDS) == ([], []), "or the record is another one"


def test_so_many_blocks_are_closed_at_once_and_what_is_held_back_closes_none(make_table: Any) -> None:
    table = make_table(most_closed=2)
    for block in range(5):
        table.record(block, 0, 0, 3)
    table.moving.want([Move(b, 0, 3, 3) for b in range(5)])
    orders, _ = table.moving.step(0.0)
    assert len(orders) == len(table.moving.closed) == 2
    assert len({o.order for o in orders}) == 1, "they travel together"
    table.moving.hold(True)
    closed = orders[0].block
    assert table.moving.handed(closed, TERM, orders[0].order) == 3, "what is closed ends"
    table.record(closed, 3, 3)
    assert table.moving.step(0.1) == ([], [])
    table.moving.give_up_closed()
    assert not table.moving.closed
    assert [o.kind for o in table.moving.step(0.2)[0]] == [REOPEN]
    table.moving.hold(False)
    assert [o.kind for o in table.moving.step(0.3)[0]] == [], "who pushes gets on first"
    assert [o.kind for o in table.moving.step(0.3 + BREATH_SECONDS)[0]] == [HAND, HAND]


def test_blocks_are_closed_together_once_all_copies_are_there(make_table: Any) -> None:
    table = make_table(most_closed=8)
    table.moving.want([Move(b, 0, 3, 3) for b in range(3)])
    assert kinds(table.moving.step(0.0)[0]) == [(COPY, b, 3) for b in range(3)]
    table.record(0, 0, 0, 3)
    table.record(1, 0, 0, 3)
    assert table.moving.step(0.1) == ([], []), "the third is on its way"
    table.record(2, 0, 0, 3, confirmed=False)
    assert table.moving.step(0.2) == ([], []), "its copy lacks something still"
    table.moving.confirmed(2, table.records.generation)
    assert kinds(table.moving.step(0.3)[0]) == [(HAND, b, 3) for b in range(3)]


def test_a_block_whose_record_changes_while_it_waits_is_closed_once(make_table: Any) -> None:
    table = make_table(most_closed=8)
    table.moving.want([Move(b, 0, 3, 3) for b in range(2)])
    table.moving.step(0.0)
    for generation in range(3):
        table.record(0, 0, 0, 3)
        assert table.moving.step(0.1 * generation) == ([], [])
    table.record(1, 0, 0, 3)
    assert kinds(table.moving.step(0.5)[0]) == [(HAND, 0, 3), (HAND, 1, 3)]


def test_a_copy_waits_for_others_for_a_while_and_no_longer(make_table: Any) -> None:
    table = make_table(most_closed=8)
    table.moving.want([Move(b, 0, 3, 3) for b in range(2)])
    table.moving.step(0.0)
    table.record(0, 0, 0, 3)
    table.moving.step(0.1)
    late = 0.1 + GATHER_SECONDS
    assert (HAND, 0, 3) not in kinds(table.moving.step(late - 0.01)[0])
    assert (HAND, 0, 3) in kinds(table.moving.step(late)[0])


def test_what_was_never_confirmed_is_closed_in_the_end(make_table: Any) -> None:
    """The word of it may have come to an earlier life, or be on its way."""
    table = make_table()
    table.moving.want([Move(1, 0, 3, 3)])
    table.moving.step(0.0)
    table.record(1, 0, 0, 3, confirmed=False)
    table.moving.step(0.1)
    assert table.moving.step(REPEAT_SECONDS) == ([], [])
    assert kinds(table.moving.step(0.1 + REPEAT_SECONDS)[0]) == [(HAND, 1, 3)]


def test_a_copy_is_urgent_where_one_is_missing(make_table: Any) -> None:
    table = make_table(replicas=1)
    table.record(1, 0, 0)
    table.moving.want([Move(1, -1, 3), Move(2, 0, 3, 3)])
    assert {o.block: o.leisurely for o in table.moving.step(0.0)[0]} == {1: False, 2: True}


def test_so_many_copies_of_an_owner_are_under_way(make_table: Any) -> None:
    table = make_table(blocks=100)
    table.moving.want([Move(b, 0, 3, 3) for b in range(100)])
    orders, _ = table.moving.step(0.0)
    assert len(orders) == MOST_COPIES
    table.record(0, 0, 0, 3)
    assert kinds(table.moving.step(0.1)[0]) == [(COPY, MOST_COPIES, 3)]


def test_a_member_too_many_leaves_once_the_rest_has_confirmed(make_table: Any) -> None:
    table = make_table(replicas=1)
    table.record(1, 0, 0, 1, 3, confirmed=False)
    table.moving.want([Move(1, 1, 3)])
    assert table.moving.step(0.0) == ([], [])
    assert table.moving.flights[1].stage == CONFIRM
    table.moving.confirmed(1, 1)
    assert table.moving.step(0.1)[1] == [], "of the record before"
    table.moving.confirmed(1, 2)
    assert table.moving.step(0.2)[1] == [Change(1, 0, (0, 3))]


def test_what_was_confirmed_to_an_earlier_life_is_confirmed_again(make_table: Any) -> None:
    table = make_table(replicas=1)
    table.record(1, 0, 0, 1, 3)
    table.moving = Moving(table.records, 2, TERM + 1)
    table.moving.want([Move(1, 1, 3)])
    (change,) = table.moving.step(0.0)[1]
    assert change == Change(1, 0, (0, 1, 3)), "the same record, in a new generation"
    table.make(change)
    table.moving.confirmed(1, 3)
    assert table.moving.step(0.1)[1] == [Change(1, 0, (0, 3))]


# Promotion


def test_the_member_that_has_most_owns_it_alone(make_table: Any) -> None:
    table = make_table(replicas=2)
    promotion = Promotion(table.records)
    table.gone(0)
    promotion.begin([1, 2], 0.0)
    assert promotion.ask(0.0) == {1: [1, 2], 2: [1, 2]}
    assert promotion.ask(0.1) == {}
    promotion.answered(1, [1, 2], [1, 1], [7, 9])
    assert promotion.step(0.2) == [], "another member lives"
    promotion.answered(2, [1, 2], [1, 1], [8, 9])
    assert promotion.step(0.3) == [Chosen(1, 2), Chosen(2, 1)]
    table.record(1, 2, 2)
    promotion.recorded([1])
    assert promotion.step(0.4) == [Chosen(2, 1)]


def test_a_member_that_does_not_answer_is_asked_again_and_not_waited_for_for_ever(make_table: Any) -> None:
    table = make_table(replicas=2)
    promotion = Promotion(table.records)
    table.gone(0)
    promotion.begin([1], 0.0)
    promotion.ask(0.0)
    promotion.answered(1, [1], [1], [5])
    promotion.failed(2, 0.1)
    assert promotion.ask(0.2) == {2: [1]}
    assert promotion.step(WAIT_SECONDS / 2) == []
    assert promotion.step(WAIT_SECONDS) == [Chosen(1, 1)]
    promotion.answered(2, [1], [1], [6])
    assert promotion.step(WAIT_SECONDS) == [Chosen(1, 2)], "it came back before a choice was recorded"


def test_a_member_that_dies_while_it_is_asked(make_table: Any) -> None:
    table = make_table(replicas=2)
    promotion = Promotion(table.records)
    table.gone(0)
    promotion.begin([1], 0.0)
    promotion.answered(1, [1], [1], [5])
    table.gone(2)
    assert promotion.step(0.1) == [Chosen(1, 1)]


def test_without_a_living_member_that_has_it_a_block_is_lost(make_table: Any) -> None:
    table = make_table(replicas=1)
    promotion = Promotion(table.records)
    table.gone(0)
    promotion.begin([1], 0.0)
    promotion.answered(1, [1], [0], [0])
    assert promotion.step(0.1) == [Chosen(1, -1)]
    table.gone(1)
    assert promotion.step(0.1) == [Chosen(1, -1)]
