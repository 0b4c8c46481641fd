# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
import rig

from oarlock.client.layout import Layout
from oarlock.client.router import (
    Changes,
    ShardAddress,
    make_routes,
    pack_changes,
    pack_placement,
    unpack_changes,
    unpack_placement,
)
from oarlock.embedding.spec import TableSpec
from oarlock.proto.arrays import pack
from oarlock.proto.common_pb2 import Member, Placement
from oarlock.proto.errors import Malformed, OutOfMemory

LAYOUT = Layout(rig.spec_of().tables, rig.spec_of().dense)
SHARDS = {s: ShardAddress(s, f"host-{s}:1", 100 + s) for s in (4, 7)}


def message(of, **changes):
    members = [Member(id=s.id, address=s.address, incarnation=s.incarnation) for s in SHARDS.values()]
    values = {"generation": 3, "owners": pack(np.array(of, np.int32)), "shards": members}
    return Placement(**{**values, **changes})


def test_blocks_of_an_owner_lie_side_by_side(rng):
    layout = Layout((TableSpec("a", 2, blocks=256), TableSpec("b", 2, blocks=2)), LAYOUT.dense)
    owners = rng.choice([4, 7, -1], 256 + 2 + 5).astype(np.int32)
    routes = make_routes(layout, 3, owners, SHARDS)
    for base, table, ranks in zip(layout.table_base, layout.tables, routes.ranks, strict=True):
        mine = owners[base : base + table.blocks]
        assert sorted(ranks) == list(range(table.blocks))
        assert ranks.dtype == np.int32
        in_order = [(int(mine[b]), b) for b in np.argsort(ranks)]
        assert in_order == sorted(in_order)


def test_a_placement_travels_whole(rng):
    owners = rng.choice([4, 7, -1], 17).astype(np.int32)
    routes = unpack_placement(LAYOUT, pack_placement(9, owners, SHARDS))
    assert (routes.generation, routes.shards) == (9, SHARDS)
    assert np.array_equal(routes.owners, owners)
    owners[:] = 4
    assert not np.array_equal(routes.owners, owners)


@pytest.mark.parametrize(
    ("placement", "problem"),
    [
        (message([4] * 16), "names 16 blocks, the job has 17"),
        (message([4] * 18), "names 18 blocks, the job has 17"),
        (Placement(), "names 0 blocks, the job has 17"),
        (message([4] * 16 + [5]), "gives blocks to shard 5, which it does not list"),
        (message([4] * 16 + [-2]), "gives blocks to shard -2, which it does not list"),
        (message([-1] * 17, owners=pack(np.zeros(17, np.uint32))), "placement owners: dtype uint32, wanted int32"),
        (message([4] * 17, shards=[Member(id=4), Member(id=4)]), "different numbers from 0 to 2147483647"),
        (message([-1] * 17, shards=[Member(id=1 << 31)]), "different numbers from 0 to 2147483647"),
        (message([-1] * 17, shards=[Member(id=(1 << 32) - 1)]), "different numbers from 0 to 2147483647"),
    ],
)
def test_a_placement_that_contradicts_itself_or_the_job_is_malformed(placement, problem):
    with pytest.raises(Malformed, match=problem):
        unpack_placement(LAYOUT, placement)


def test_a_placement_of_a_claimed_size_is_not_believed():
    with pytest.raises(OutOfMemory, match="over the limit"):
        unpack_placement(LAYOUT, message([4], owners={"data": b"1234", "dtype": 2, "shape": [1 << 31]}))


def test_blocks_may_belong_to_nobody_yet():
    routes = unpack_placement(LAYOUT, message([-1] * 17, shards=[]))
    assert routes.shards == {}
    assert routes.owners.tolist() == [-1] * 17


# Records of blocks, and what changes of them


def record(blocks, owners, generations, *, since=3, generation=None, members=None, shards=SHARDS):
    """A change."""
    members = [[o, -1] for o in owners] if members is None else members
    return Changes(
        max(generations, default=since) if generation is None else generation,
        since,
        False,
        np.array(blocks, np.int32),
        np.array(owners, np.int32),
        np.array(generations, np.int64),
        np.array(members, np.int32).reshape(len(blocks), -1 if len(blocks) else 2),
        dict(shards),
    )


def routes_at(generation=3, owner=4):
    return make_routes(LAYOUT, generation, np.full(17, owner, np.int32), SHARDS)


def same(one, other):
    for name in ("generation", "shards", "whole", "since"):
        assert getattr(one, name) == getattr(other, name), name
    for name in ("blocks", "owners", "generations", "members"):
        a, b = getattr(one, name), getattr(other, name)
        assert a.dtype == b.dtype
        assert np.array_equal(a, b), name


def test_a_change_travels_whole():
    sent = record([2, 16], [7, -1], [5, 4], members=[[7, 4], [-1, -1]])
    same(unpack_changes(LAYOUT, pack_changes(sent)), sent)
    none = record([], [], [])
    same(unpack_changes(LAYOUT, pack_changes(none)), none)


def test_a_whole_placement_may_tell_of_each_record(rng):
    owners = rng.choice([4, 7], 17).astype(np.int32)
    generations = np.arange(17, dtype=np.int64)
    members = np.stack([owners, 11 - owners, np.full(17, -1, np.int32)], axis=1)
    message = pack_placement(40, owners, SHARDS, generations=generations, members=members)
    found = unpack_changes(LAYOUT, message)
    assert (found.whole, found.generation, found.since) == (True, 40, 0)
    assert np.array_equal(found.members, members)
    assert np.array_equal(found.generations, generations)
    assert np.array_equal(unpack_placement(LAYOUT, message).generations, generations)
    same(unpack_changes(LAYOUT, pack_changes(found)), found)
    plain = unpack_changes(LAYOUT, pack_placement(9, owners, SHARDS))
    assert plain.generations.tolist() == [9] * 17
    assert np.array_equal(plain.members, owners[:, None])


def change(**changes):
    message = pack_changes(record([2, 16], [7, 4], [5, 4], members=[[7, 4], [4, -1]]))
    for name, value in changes.items():
        if hasattr(value, "DESCRIPTOR"):
            getattr(message, name).CopyFrom(value)
        elif value is None:
            message.ClearField(name)
        else:
            setattr(message, name, value)
    return message


def of32(*values):
    return pack(np.array(values, np.int32))


@pytest.mark.parametrize(
    ("placement", "problem"),
    [
        (change(blocks=of32(2)), "names 2 owners of 1 blocks"),
        (change(blocks=of32(2, 17)), "not ascending, from 0 to below 17"),
        (change(blocks=of32(-1, 3)), "not ascending, from 0 to below 17"),
        (change(blocks=of32(3, 3)), "not ascending"),
        (change(blocks=of32(3, 2)), "not ascending"),
        (change(since=6), "of generation 5 tells of changes since 6"),
        (change(owners=of32(7, 5)), "gives blocks to shard 5, which it does not list"),
        (change(generations=pack(np.array([5], np.uint64))), "names 1 generations of 2 blocks"),
        (change(generations=pack(np.array([5, 6], np.uint64))), "a block is of generation 6, the placement of 5"),
        (
            change(generations=pack(np.array([5, (1 << 64) - 1], np.uint64))),
            "a block is of generation 18446744073709551615",
        ),
        (change(generations=of32(5, 4)), "dtype int32, wanted uint64"),
        (change(generation=1 << 63), "generation 9223372036854775808 is over"),
        (change(members=of32(7, 4)), "1 dimensions, wanted 2"),
        (change(members=pack(np.array([[7, 4]], np.int32))), r"copy sets have shape \(1, 2\), wanted 2 of 1 to 64"),
        (change(members=pack(np.empty((2, 0), np.int32))), r"copy sets have shape \(2, 0\)"),
        (change(members=pack(np.full((2, 65), -1, np.int32))), r"copy sets have shape \(2, 65\)"),
        (change(members=pack(np.array([[7, 5], [4, -1]], np.int32))), "shard 5, which it does not list"),
        (change(members=pack(np.array([[7, -2], [4, -1]], np.int32))), "shard -2, which it does not list"),
        (change(members=pack(np.array([[4, 7], [4, -1]], np.int32))), "owner is not the first"),
        (change(members=pack(np.array([[7, -1, 4], [4, -1, -1]], np.int32))), "goes on behind its end"),
        (change(members=pack(np.array([[7, 4, 4], [4, -1, -1]], np.int32))), "names a shard twice"),
        (change(members=pack(np.array([[7, 4, 7], [4, -1, -1]], np.int32))), "names a shard twice"),
    ],
)
def test_a_change_that_contradicts_itself_or_the_job_is_malformed(placement, problem):
    unpack_changes(LAYOUT, change())
    with pytest.raises(Malformed, match=problem):
        unpack_changes(LAYOUT, placement)


def test_a_change_is_no_placement():
    with pytest.raises(Malformed, match="names 2 blocks that changed, all of them are wanted"):
        unpack_placement(LAYOUT, change())


def test_of_a_change_each_block_takes_what_is_newer():
    before = routes_at()
    after = before.after(record([2, 16], [7, 7], [5, 4]))
    assert (after.generation, before.generation) == (5, 3)
    assert after.generations.tolist() == [3, 3, 5, *[3] * 13, 4]
    assert after.owners.tolist() == [4, 4, 7, *[4] * 13, 7]
    assert before.owners.tolist() == [4] * 17
    # The same again, and one that is older for one of them.
    assert after.after(record([2, 16], [7, 7], [5, 4])) is after
    last = after.after(record([1, 2, 16], [7, 4, 4], [6, 4, 6]))
    assert (last.generation, last.owners.tolist()) == (6, [4, 7, 7, *[4] * 14])
    assert last.generations.tolist() == [3, 6, 5, *[3] * 13, 6]


def test_routes_after_changes_are_those_of_the_placement(rng):
    owners, generations = rng.choice([4, 7, -1], 17).astype(np.int32), np.full(17, 1, np.int64)
    routes = make_routes(LAYOUT, 1, owners.copy(), SHARDS)
    for generation in range(2, 60):
        blocks = np.flatnonzero(rng.random(17) < rng.choice([0.05, 0.5])).astype(np.int32)
        owners[blocks] = rng.choice([4, 7, -1], len(blocks))
        generations[blocks] = generation
        told = record(blocks, owners[blocks], generations[blocks], since=generation - 1, generation=generation)
        routes = routes.after(told)
        wanted = make_routes(LAYOUT, generation, owners, SHARDS)
        assert routes.generation == generation
        assert np.array_equal(routes.owners, owners)
        assert np.array_equal(routes.generations, generations)
        assert all(np.array_equal(a, b) for a, b in zip(routes.ranks, wanted.ranks, strict=True))
        assert {s: d.tolist() for s, d in routes.dense.items()} == {
            s: (LAYOUT.dense_base + np.flatnonzero(owners[LAYOUT.dense_base :] == s)).tolist()
            for s in SHARDS
            if (owners[LAYOUT.dense_base :] == s).any()
        }
        assert all(d.dtype == np.int32 for d in routes.dense.values())


def test_a_change_of_copy_sets_alone_leaves_the_order_of_blocks():
    before = routes_at()
    after = before.after(record([2], [4], [5], members=[[4, 7]]))
    assert (after.generation, after.generations[2]) == (5, 5)
    assert after.owners is before.owners
    assert after.ranks is before.ranks


def test_only_tables_whose_blocks_moved_are_sorted_anew():
    before = routes_at()
    after = before.after(record([LAYOUT.table_base[1]], [7], [5]))
    assert after.ranks[0] is before.ranks[0]
    assert after.ranks[1] is not before.ranks[1]
    assert after.dense is before.dense


def test_a_change_since_a_later_generation_leaves_gaps():
    """What is newer is true, but how far everything is known stays as it was."""
    before = routes_at()
    told = record([2], [7], [8], since=7)
    assert before.lacks(told)
    after = before.after(told)
    assert (after.generation, after.owners[2], after.generations[2]) == (3, 7, 8)
    # All of it comes afterwards, as old as it may be for that block.
    owners = np.full(17, 4, np.int32)
    owners[1] = 7
    whole = unpack_changes(LAYOUT, pack_placement(7, owners, SHARDS, generations=np.full(17, 7, np.int64)))
    assert not after.lacks(whole)
    known = after.after(whole)
    assert (known.generation, known.owners.tolist()) == (7, [4, 7, 7, *[4] * 14])


def test_the_word_of_a_shard_reaches_no_generation():
    after = routes_at().after(record([2], [7], [8], since=0), complete=False)
    assert (after.generation, after.owners[2], after.generations[2]) == (3, 7, 8)


MOVED = ShardAddress(9, "host-9:1", 109)


def test_a_change_tells_of_all_living_shards():
    before = make_routes(LAYOUT, 3, np.array([4] * 16 + [7], np.int32), SHARDS)
    told = record([2], [9], [5], shards={4: SHARDS[4], 9: MOVED})
    # 7 has died, but a record names it.
    assert set(before.after(told).shards) == {4, 7, 9}
    gone = record([2, 16], [9, 9], [5, 5], shards={4: SHARDS[4], 9: MOVED})
    assert set(before.after(gone).shards) == {4, 9}


def test_a_shard_tells_only_where_newer_owners_are():
    elsewhere = ShardAddress(7, "elsewhere:1", 999)
    told = record([2], [9], [5], shards={4: elsewhere, 7: elsewhere, 9: MOVED})
    assert routes_at().after(told, complete=False).shards == {**SHARDS, 9: MOVED}
    old = record([2], [9], [2], since=0, shards={9: MOVED})
    before = routes_at()
    assert before.after(old, complete=False) is before
