# SPDX-License-Identifier: Apache-2.0
"""Burdens: sizes and loads of blocks by what shards tell of their tables, and when a coordinator does something about them."""

from typing import Any

import numpy as np
import pytest

from oarlock.cluster.burdens import Burdens

EVERY = 30.0
USER, ITEM, DENSE = slice(0, 8), slice(8, 12), slice(12, 16)


@pytest.fixture
def pair(make_cluster: Any) -> Any:
    """Two shards with copies of each other's blocks, in training; they are told to be alive by ``tell``."""
    cluster = make_cluster(replicas=1, rebalance_seconds=EVERY)
    cluster.joined = cluster.shards()
    return cluster


def tell(cluster: Any, shard: int, user: int = 0, item: int = 0, **other: Any) -> None:
    """Let a shard say what it holds, and how many rows of its tables were served since it began."""
    member = next(m for m in cluster.coordinator.members.alive("shard") if m.id == shard)
    told = {"bytes": 3000, "table_bytes": {"user": 1200, "item": 800}, "table_served": {"user": user, "item": item}}
    member.stats = {**told, **other}


def look(cluster: Any, burdens: Burdens, now: float) -> bool:
    return burdens.look(cluster.coordinator.records, {m.id: m for m in cluster.coordinator.members.alive("shard")}, now)


def test_bytes_are_shared_out_among_the_blocks_that_are_held(pair: Any) -> None:
    burdens = Burdens(pair.coordinator.layout, EVERY)
    tell(pair, 0)
    assert not look(pair, burdens, 0.0), "not all have told"
    tell(pair, 1, bytes=2600, table_bytes={"user": 2000, "item": 400})
    assert look(pair, burdens, 0.0)
    assert burdens.sizes[USER].tolist() == [200] * 8, "the mean of 1200 and of 2000 bytes of eight blocks"
    assert burdens.sizes[ITEM].tolist() == [150] * 4
    # 1000 and 200 bytes of 100 values, in slices of 30.
    assert burdens.sizes[DENSE].tolist() == [180, 180, 180, 60]


def test_loads_are_shared_out_among_the_blocks_that_are_owned(pair: Any) -> None:
    c = pair.coordinator
    burdens = Burdens(c.layout, EVERY)
    for now, rows in ((0.0, 0), (10.0, 400)):
        tell(pair, 0, user=rows)
        tell(pair, 1, user=3 * rows)
        look(pair, burdens, now)
    owned = [np.flatnonzero((c.records.owners == s)[:8]) for s in (0, 1)]
    assert burdens.loads[owned[0]].tolist() == [10.0] * 4
    assert burdens.loads[owned[1]].tolist() == [30.0] * 4
    assert burdens.loads[ITEM].sum() == burdens.loads[DENSE].sum() == 0
    assert burdens.over(c.records)["load"] == pytest.approx(0.5)
    assert burdens.uneven(c.records)


def test_what_is_believed_of_a_block_moves_with_it(pair: Any) -> None:
    c = pair.coordinator
    burdens = Burdens(c.layout, EVERY)
    rows = np.zeros(2)

    def pass_time(now: float, *rates: float) -> None:
        rows[:] += 10 * np.array(rates)
        for shard in (0, 1):
            tell(pair, shard, user=int(rows[shard]))
        look(pair, burdens, now)

    pass_time(0.0, 0, 0)
    pass_time(10.0, 40, 120)
    block = int(np.flatnonzero((c.records.owners == 1)[:8])[0])
    with c.store as store:
        c.records.change(store, np.array([block], np.int32), np.array([0], np.int32), np.array([[0, 1]], np.int32))
    before = burdens.loads.copy()
    pass_time(20.0, 70, 90)
    assert burdens.loads.tolist() == before.tolist(), "both had other blocks in this time, too"
    # It was a cold one: what made the other shard busy stayed there.
    pass_time(30.0, 41, 119)
    assert burdens.loads[block] < 20
    others = (c.records.owners == 1)[:8]
    assert burdens.loads[USER][others].sum() == pytest.approx(119)
    assert burdens.loads[USER][~others].sum() == pytest.approx(41)


@pytest.mark.parametrize(
    "wrong",
    [
        {"table_bytes": None},
        {"table_bytes": {"user": 1}},
        {"table_served": {"user": "many", "item": 1}},
        {"table_bytes": {"user": -1, "item": 1}},
        {"bytes": 1 << 80},
        {"bytes": True},
    ],
)
def test_what_is_no_measurement_changes_nothing(pair: Any, wrong: dict[str, Any]) -> None:
    burdens = Burdens(pair.coordinator.layout, EVERY)
    before = burdens.sizes.copy()
    tell(pair, 0)
    tell(pair, 1, **wrong)
    assert not look(pair, burdens, 0.0)
    assert burdens.sizes.tolist() == before.tolist()


def test_it_is_looked_once_in_a_while() -> None:
    class Nothing:
        tables, blocks, dense_base, table_base = (), 0, 0, ()
        dense_lengths = np.zeros(0, np.int64)

    burdens = Burdens(Nothing(), EVERY)  # type: ignore[arg-type]
    assert [burdens.due(now) for now in (5.0, 34.9, 35.0, 36.0, 65.0)] == [False, False, True, False, True]
    assert not Burdens(Nothing(), 0.0).due(1e9)  # type: ignore[arg-type]


# What the coordinator does about it


def passes(cluster: Any, seconds: float, *rates: float) -> None:
    """Let time pass in which shards serve rows of ``user`` at these rates, and the coordinator look."""
    c = cluster.coordinator
    for shard, rate in enumerate(rates):
        member = next(m for m in c.members.alive("shard") if m.id == shard)
        known = member.stats.get("table_served", {"user": 0})["user"]
        tell(cluster, shard, user=int(known + rate * seconds))
    cluster.clock.now += seconds
    c.members.grant_full_term(cluster.clock.now)
    c.copies.step()


def test_a_shard_that_is_busier_than_others_hands_over(pair: Any) -> None:
    c = pair.coordinator
    passes(pair, 1.0, 0, 0)
    for _ in range(3):
        passes(pair, EVERY, 100, 100)
    assert c.copies.at_rest
    assert pair.status()["uneven"] == {"bytes": 0.0, "load": 0.0}
    passes(pair, EVERY, 100, 320)
    moves = [flight.move for flight in c.copies.moving.flights.values()]
    assert moves
    assert all(m.heir == 0 and m.to == m.leaves == -1 for m in moves), (
        "who has a copy takes over, and nothing is copied"
    )


def test_nothing_moves_while_a_gate_stands_or_by_a_setting(make_cluster: Any) -> None:
    cluster = make_cluster(replicas=1, rebalance_seconds=0)
    cluster.shards()
    for _ in range(4):
        passes(cluster, EVERY, 100, 900)
    assert cluster.coordinator.copies.at_rest


def test_while_a_gate_stands_it_is_not_looked(pair: Any) -> None:
    c = pair.coordinator
    passes(pair, 1.0, 0, 0)
    passes(pair, EVERY, 100, 100)
    c.cuts.stand()
    passes(pair, EVERY, 100, 900)
    assert not c.copies.looks
    c.cuts.open()
    c.copies.held = True
    passes(pair, EVERY, 100, 900)
    assert not c.copies.looks
