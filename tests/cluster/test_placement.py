# SPDX-License-Identifier: Apache-2.0
"""Placement: every block has an owner, the shares are equal, and equal arguments give equal answers."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from oarlock.client.layout import Layout
from oarlock.cluster.placement import balanced
from oarlock.embedding.spec import DenseSpec, TableSpec
from oarlock.proto.errors import InvalidArgument

layouts = st.builds(
    lambda blocks, dense: Layout(
        tuple(TableSpec(f"t{i}", 2, blocks=1 << b) for i, b in enumerate(blocks)),
        tuple(DenseSpec(f"d{i}", (n,), slice=s) for i, (n, s) in enumerate(dense)),
    ),
    st.lists(st.integers(0, 7), min_size=1, max_size=5),
    st.lists(st.tuples(st.integers(1, 5000), st.integers(100, 2000)), max_size=5),
)
shard_ids = st.lists(st.integers(0, 60), min_size=1, max_size=9, unique=True)


@given(layouts, shard_ids)
def test_a_partition_with_equal_shares(layout: Layout, shards: list[int]) -> None:
    owners = balanced(layout, shards)
    assert owners.dtype == np.int32
    assert owners.shape == (layout.blocks,)
    assert set(owners.tolist()) <= set(shards)
    for base, table in zip(layout.table_base, layout.tables, strict=True):
        shares = [int((owners[base : base + table.blocks] == s).sum()) for s in shards]
        assert max(shares) - min(shares) <= 1
    # All tables together are as even as each of them.
    of_tables = [int((owners[: layout.dense_base] == s).sum()) for s in shards]
    assert max(of_tables) - min(of_tables) <= 1


@given(layouts, shard_ids, st.randoms())
def test_the_order_of_shards_does_not_matter(layout: Layout, shards: list[int], random: object) -> None:
    mixed = list(shards)
    random.shuffle(mixed)  # type: ignore[attr-defined]
    np.testing.assert_array_equal(balanced(layout, shards), balanced(layout, mixed))


@given(layouts, shard_ids)
def test_dense_bytes_are_even_up_to_one_block(layout: Layout, shards: list[int]) -> None:
    owners = balanced(layout, shards)[layout.dense_base :]
    lengths = np.array([b.length for b in layout.dense_blocks])
    loads = [int(lengths[owners == s].sum()) for s in shards]
    assert max(loads) - min(loads) <= max(lengths, default=0)


def test_no_shard_is_an_error() -> None:
    with pytest.raises(InvalidArgument, match="at least one shard"):
        balanced(Layout((TableSpec("t", 2, blocks=2),), ()), [])
