# SPDX-License-Identifier: Apache-2.0
"""What is remembered of rows that left: each once, with ascending versions, and never less than is claimed."""

import numpy as np
import table_reference
from hypothesis import given
from hypothesis import strategies as st

from oarlock.embedding import tombstones
from oarlock.embedding.content import BlockRows
from oarlock.embedding.spec import Eviction, TableSpec
from oarlock.embedding.tombstones import Tombstones

STEPS = st.lists(
    st.tuples(st.sampled_from(["record", "record", "forget"]), st.integers(0, 6), st.integers(0, 4)), max_size=30
)


@given(STEPS, st.integers(1, 12))
def test_since_tells_all_that_left_after_a_version_or_that_it_no_longer_can(steps, most):
    kept, everything, version = Tombstones(), [], 0
    before, tombstones.MOST = tombstones.MOST, most
    try:
        for what, n, back in steps:
            if what == "forget":
                kept.forget(max(0, version - back))
            else:
                version += 1 + back
                kept.record(np.arange(n, dtype=np.uint64) + np.uint64(100 * version), version)
                everything += [(100 * version + i, version) for i in range(n)]
            assert len(kept) == sum(v > kept.floor for _, v in everything)
            newest = max((v for _, v in everything), default=0)
            assert len(kept) <= most or len(kept) == sum(v == newest for _, v in everything)
            for since in range(version + 2):
                found = kept.since(since)
                if since < kept.floor:
                    assert found is None
                else:
                    pairs = list(zip(found[0].tolist(), found[1].tolist(), strict=True))
                    assert pairs == [grave for grave in everything if grave[1] > since]
                    assert (found[0].dtype, found[1].dtype) == (np.uint64, np.int64)
    finally:
        tombstones.MOST = before


def test_an_imported_block_does_not_know_what_left_before_its_version():
    table = table_reference.stored(TableSpec("t", 1, blocks=1, eviction=Eviction(age=1)))
    table_reference.push(table, range(5))
    table.import_block(0, table.export_block(0), version=9)
    assert table.version(0) == 9
    assert table.tombstones(0, since=8) is None
    assert len(table.tombstones(0, since=9)[0]) == 0
    table.sweep(0, tick=100)
    keys, versions = table.tombstones(0, since=9)
    assert sorted(keys.tolist()) == list(range(5))
    assert versions.tolist() == [10] * 5
    table.import_block(0, BlockRows(*(part[:0] for part in table.export_block(0)[:3])))
    assert len(table.tombstones(0, since=0)[0]) == 0
