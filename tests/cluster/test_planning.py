# SPDX-License-Identifier: Apache-2.0
"""Planning: every block placed, sets of different shards, even shares, few bytes, and nothing left to plan afterwards."""

from dataclasses import dataclass

import numpy as np
import pytest
from numpy.typing import NDArray

from oarlock.client.layout import Layout
from oarlock.cluster.moves import DRAINED, INCOMPLETE, SURPLUS
from oarlock.cluster.planning import Balance, Blocks, Moves, blocks_of, carried_out, place, plan
from oarlock.embedding.spec import DenseSpec, TableSpec
from oarlock.proto.errors import InvalidArgument

Members = NDArray[np.int32]


@dataclass
class Case:
    """Random tables, dense blocks, shards and a number of copies."""

    blocks: Blocks
    replicas: int
    ids: list[int]
    rng: np.random.Generator

    @property
    def dense(self) -> int:
        return self.blocks.uneven[0]

    def crew(self, most: int = 9) -> list[int]:
        return sorted(self.rng.permutation(self.ids)[: self.rng.integers(1, most)].tolist())


def drawn(seed: int, loaded: bool = False) -> Case:
    rng = np.random.default_rng(seed)
    tables = [int(2 ** rng.integers(0, 8)) for _ in range(rng.integers(1, 6))]
    dense = int(rng.integers(0, 10))
    table = np.repeat(np.arange(len(tables) + 1), [*tables, dense]).astype(np.int32)
    each = rng.integers(100, 5000, len(tables))
    sizes = np.concatenate([np.repeat(each, tables), rng.integers(1, 5000, dense)]).astype(np.int64)
    loads = rng.pareto(1.2, len(table)) * 100 if loaded else np.zeros(len(table))
    ids = rng.choice(40, 12, replace=False).tolist()
    return Case(Blocks(table, sizes, loads, (len(tables),)), int(rng.integers(0, 3)), ids, rng)


def check_sets(members: Members, shards: list[int], replicas: int) -> None:
    assert ((members >= 0).sum(axis=1) == min(replicas + 1, len(shards))).all()
    assert (members[:, 0] >= 0).all()
    assert np.isin(members[members >= 0], shards).all()
    ordered = np.sort(members, axis=1)
    assert not ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any()


def check_even(case: Case, members: Members, shards: list[int]) -> None:
    for table in range(case.dense):
        of = members[case.blocks.table == table]
        owned = [int((of[:, 0] == s).sum()) for s in shards]
        held = [int((of == s).sum()) for s in shards]
        assert max(owned) - min(owned) <= 1
        assert max(held) - min(held) <= 1
    sizes = case.blocks.sizes
    dense = case.blocks.table == case.dense
    if dense.any():
        held = [int(sizes[dense & (members == s).any(axis=1)].sum()) for s in shards]
        assert max(held) <= max(1.3 * sum(held) / len(held), min(held) + int(sizes[dense].max()))


@pytest.mark.parametrize("seed", range(40))
def test_a_first_placement_is_whole_even_and_final(seed: int) -> None:
    case = drawn(seed)
    shards = case.crew()
    members = place(case.blocks, shards, replicas=case.replicas)
    assert members.dtype == np.int32
    assert members.shape == (len(case.blocks.table), case.replicas + 1)
    check_sets(members, shards, case.replicas)
    check_even(case, members, shards)
    assert len(plan(case.blocks, members, shards, replicas=case.replicas)) == 0
    np.testing.assert_array_equal(members, place(case.blocks, shards[::-1], replicas=case.replicas))


@pytest.mark.parametrize("replicas", [1, 2])
def test_the_copies_of_one_shards_blocks_lie_on_all_others(replicas: int) -> None:
    blocks = Blocks(np.zeros(512, np.int32), np.ones(512, np.int64), np.zeros(512))
    members = place(blocks, range(16), replicas=replicas)
    for shard in range(16):
        copies = np.bincount(members[members[:, 0] == shard, 1], minlength=16)
        assert copies[shard] == 0
        # 32 blocks on 15 others.
        assert (np.delete(copies, shard) >= 1).all()
        assert copies.max() <= 4


@pytest.mark.parametrize("sizes", [(2, 2), (3, 3, 3), (4, 2, 1), (1, 1, 5), (1, 3)])
@pytest.mark.parametrize("replicas", [1, 2])
def test_copies_lie_on_different_hosts(sizes: tuple[int, ...], replicas: int) -> None:
    names = [f"host{i}" for i, n in enumerate(sizes) for _ in range(n)]
    hosts = dict(enumerate(names))
    blocks = Blocks(np.repeat([0, 1], [256, 64]).astype(np.int32), np.full(320, 10, np.int64), np.zeros(320))
    members = place(blocks, list(hosts), replicas=replicas, hosts=hosts)
    check_sets(members, list(hosts), replicas)
    for of in members.tolist():
        assert len({hosts[s] for s in of if s >= 0}) == min(replicas + 1, len(sizes))
    if len(set(sizes)) == 1:
        assert np.ptp(np.bincount(members[:, 0])) <= 2
        assert np.ptp(np.bincount(members[members >= 0])) <= 2
    # A shard that leaves changes nothing about it, where enough hosts remain.
    rest = [s for s in hosts if s != 0]
    moves = plan(blocks, members, rest, leaving=[0], replicas=replicas, hosts=hosts)
    for of in carried_out(members, moves).tolist():
        assert len({hosts[s] for s in of if s >= 0}) == min(replicas + 1, len({hosts[s] for s in rest}))


@pytest.mark.parametrize("loaded", [False, True])
@pytest.mark.parametrize("seed", range(40))
def test_any_crew_becomes_any_other(seed: int, loaded: bool) -> None:
    case = drawn(seed, loaded)
    blocks, replicas = case.blocks, case.replicas
    shards = case.crew()
    members = place(blocks, shards, replicas=replicas)
    for _ in range(3):
        old, shards = shards, case.crew()
        leaving = [s for s in old if s not in shards]
        moves = plan(blocks, members, shards, leaving=leaving, replicas=replicas)
        part = moves.some(slice(0, int(case.rng.integers(0, len(moves) + 1))))
        between = carried_out(members, part)
        members = carried_out(members, moves)
        check_sets(members, shards, replicas)
        if not loaded:
            check_even(case, members, shards)
        assert len(plan(blocks, members, shards, leaving=leaving, replicas=replicas)) == 0
        # Planned anew after some of it was done, it comes to the same: nothing is undone.
        rest = plan(blocks, between, shards, leaving=leaving, replicas=replicas)
        spared = 3 * int(blocks.sizes.max())
        assert part.bytes.sum() + rest.bytes.sum() <= (1.5 if loaded else 1.1) * moves.bytes.sum() + spared
        check_sets(carried_out(between, rest), shards, replicas)


def least(case: Case, members: Members, old: list[int], new: list[int]) -> float:
    """Return the bytes without which it cannot be: what sets lose with those that leave, or what newcomers are to have."""
    want = min(case.replicas + 1, len(new))
    stay = np.isin(members, new) & (members >= 0)
    lost = (np.maximum(want - stay.sum(axis=1), 0) * case.blocks.sizes).sum()
    come = case.blocks.sizes.sum() * want * len(set(new) - set(old)) / len(new)
    return float(max(lost, come))


@pytest.mark.parametrize("seed", range(40))
def test_little_more_moves_than_has_to(seed: int) -> None:
    case = drawn(seed)
    # Enough equal blocks that rounding is not what is measured.
    case.blocks = Blocks(
        np.repeat(np.arange(3), 256).astype(np.int32), np.repeat([1000, 200, 3000], 256), np.zeros(768), (3,)
    )
    a, b = sorted(case.rng.choice(np.arange(1, 13), 2, replace=False).tolist())
    few, many = case.ids[:a], case.ids[:b]
    members = place(case.blocks, few, replicas=case.replicas)
    up = plan(case.blocks, members, many, replicas=case.replicas)
    assert up.bytes.sum() <= 1.1 * least(case, members, few, many)
    members = carried_out(members, up)
    down = plan(case.blocks, members, few, leaving=set(many) - set(few), replicas=case.replicas)
    assert down.bytes.sum() <= 1.1 * least(case, members, many, few)


@pytest.mark.parametrize("replicas", [0, 1, 2])
def test_two_to_four_to_two(replicas: int) -> None:
    blocks = Blocks(np.zeros(64, np.int32), np.full(64, 100, np.int64), np.zeros(64))
    two = place(blocks, [0, 1], replicas=replicas)
    up = plan(blocks, two, [0, 1, 2, 3], replicas=replicas)
    assert up.bytes.sum() == {0: 32, 1: 64, 2: 96}[replicas] * 100
    four = carried_out(two, up)
    down = plan(blocks, four, [0, 1], leaving=[2, 3], replicas=replicas)
    kept = np.isin(four, [0, 1]).sum(axis=1)
    assert down.bytes.sum() == (min(replicas + 1, 2) - np.minimum(kept, 2)).sum() * 100
    assert np.isin(carried_out(four, down), [0, 1, -1]).all()
    assert (down.reason == DRAINED).all()


def test_who_is_a_member_takes_over_without_a_byte() -> None:
    blocks = Blocks(np.zeros(64, np.int32), np.full(64, 100, np.int64), np.zeros(64))
    members = place(blocks, [0, 1], replicas=1)
    moves = plan(blocks, members, [0], leaving=[1], replicas=1)
    assert moves.bytes.sum() == 0
    assert (moves.add == -1).all()
    assert (moves.drop == 1).all()
    assert (carried_out(members, moves)[:, 0] == 0).all()


def check_steps(members: Members, moves: Moves) -> None:
    """Do all steps one by one: who takes over is a member by then, who leaves is not the owner, nobody is added twice."""
    sets = {b: [m for m in of if m >= 0] for b, of in enumerate(members.tolist())}
    for block, add, owner, drop in zip(
        *(x.tolist() for x in (moves.block, moves.add, moves.owner, moves.drop)), strict=True
    ):
        of = sets[block]
        if add >= 0:
            assert add not in of
            of.append(add)
        if owner >= 0:
            assert owner in of
            of.remove(owner)
            of.insert(0, owner)
        if drop >= 0:
            assert drop in of[1:]
            of.remove(drop)
    done = carried_out(members, moves).tolist()
    assert [[m for m in of if m >= 0][:1] for of in done] == [of[:1] for of in sets.values()]
    assert [sorted(m for m in of if m >= 0) for of in done] == [sorted(of) for of in sets.values()]


@pytest.mark.parametrize("seed", range(20))
def test_steps_can_be_done_in_their_order(seed: int) -> None:
    case = drawn(seed)
    old, new = case.crew(), case.crew()
    members = place(case.blocks, old, replicas=case.replicas)
    for replicas in (case.replicas, 0, 2):
        moves = plan(case.blocks, members, new, leaving=set(old) - set(new), replicas=replicas)
        check_steps(members, moves)
        assert (np.diff(moves.reason) >= 0).all()


def test_a_death_is_made_good_by_many() -> None:
    blocks = Blocks(np.zeros(1024, np.int32), np.full(1024, 100, np.int64), np.zeros(1024))
    members = place(blocks, range(16), replicas=1)
    # Who had the copy was promoted; shard 3 is in no set any more.
    alone = (members == 3).any(axis=1)
    promoted = members.copy()
    promoted[alone, 0] = np.where(members[alone, 0] == 3, members[alone, 1], members[alone, 0])
    promoted[alone, 1] = -1
    rest = [s for s in range(16) if s != 3]
    moves = plan(blocks, promoted, rest, replicas=1)
    completing = moves.some(moves.reason == INCOMPLETE)
    assert completing.block.tolist() == moves.block[: len(completing)].tolist()
    assert set(completing.block.tolist()) == set(np.flatnonzero(alone).tolist())
    assert moves.bytes.sum() == alone.sum() * 100
    # All take their part of the copies, and of the ownership.
    assert set(completing.add.tolist()) == set(rest)
    assert np.ptp(np.bincount(carried_out(promoted, moves)[:, 0])[rest]) <= 1


def test_a_block_whose_owner_is_dead_waits() -> None:
    blocks = Blocks(np.zeros(8, np.int32), np.full(8, 100, np.int64), np.zeros(8))
    members = place(blocks, [0, 1, 2], replicas=1)
    moves = plan(blocks, members, [0, 1], replicas=1)
    assert not (members[moves.block, 0] == 2).any()


def test_copies_that_are_too_many_go() -> None:
    blocks = Blocks(np.zeros(64, np.int32), np.full(64, 100, np.int64), np.zeros(64))
    members = place(blocks, range(4), replicas=2)
    moves = plan(blocks, members, range(4), replicas=0)
    assert set(moves.reason.tolist()) == {SURPLUS}
    assert moves.bytes.sum() == 0
    assert np.bincount(carried_out(members, moves)[:, 0]).tolist() == [16] * 4


@pytest.mark.parametrize("replicas", [0, 1])
def test_load_is_evened_out_once_it_is_uneven(replicas: int) -> None:
    rng = np.random.default_rng(1)
    even = Blocks(np.zeros(256, np.int32), np.full(256, 100, np.int64), rng.uniform(90, 110, 256))
    members = place(even, range(4), replicas=replicas)
    assert len(plan(even, members, range(4), replicas=replicas)) == 0
    hot = Blocks(even.table, even.sizes, even.loads * np.where(members[:, 0] == 2, 3.0, 1.0))
    moves = plan(hot, members, range(4), replicas=replicas)
    burden = np.bincount(carried_out(members, moves)[:, 0], hot.loads)
    assert burden.max() <= 1.1 * burden.mean()
    if replicas:
        assert moves.bytes.sum() == 0
    assert len(moves) <= 32
    # A block that is hotter than a shard's share cannot be helped.
    one = Blocks(even.table, even.sizes, np.where(np.arange(256) == 7, 1e6, 1.0))
    after = carried_out(members, plan(one, members, range(4), replicas=replicas))
    assert len(plan(one, after, range(4), replicas=replicas)) == 0


def test_a_layout_as_blocks() -> None:
    layout = Layout((TableSpec("a", 2, blocks=4), TableSpec("b", 2, blocks=2)), (DenseSpec("d", (700,), slice=300),))
    blocks = blocks_of(layout, np.ones(layout.blocks, np.int64))
    assert blocks.table.tolist() == [0, 0, 0, 0, 1, 1, 2, 2, 2]
    assert blocks.uneven == (2,)
    assert not blocks.loads.any()


def test_very_many_small_tables() -> None:
    blocks = Blocks(np.repeat(np.arange(1500), 2).astype(np.int32), np.full(3000, 10, np.int64), np.zeros(3000))
    members = place(blocks, range(3), replicas=1)
    check_sets(members, [0, 1, 2], 1)
    moves = plan(blocks, members, range(6), replicas=1)
    held = np.bincount(carried_out(members, moves).reshape(-1))
    assert held.max() <= 1.21 * held.mean()
    assert moves.bytes.sum() <= 1.1 * 30000


def test_wrong_arguments() -> None:
    blocks = Blocks(np.zeros(2, np.int32), np.ones(2, np.int64), np.zeros(2))
    with pytest.raises(InvalidArgument, match="at least one shard"):
        place(blocks, [], replicas=0)
    with pytest.raises(InvalidArgument, match="aims < starts"):
        Balance(starts=0.1, aims=0.2)
