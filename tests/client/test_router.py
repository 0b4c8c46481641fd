# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
import rig

from oarlock.client.layout import Layout
from oarlock.client.router import ShardAddress, make_routes, pack_placement, unpack_placement
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
