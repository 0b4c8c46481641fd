# SPDX-License-Identifier: Apache-2.0
"""Adoption: what concerns a shard it is told at once, and all else now and then."""

from pathlib import Path

import numpy as np

from oarlock.client.router import ShardAddress
from oarlock.cluster.adoption import LAZY_SECONDS, Adoption
from oarlock.cluster.record import Records
from oarlock.cluster.store import Store


def test_records_that_do_not_concern_a_shard_are_told_together(tmp_path: Path) -> None:
    store = Store(tmp_path / "s").open()
    records = Records(4, 0)
    adoption = Adoption(records)

    def record(owner: int) -> None:
        with store:
            records.change(
                store, np.array([0], np.int32), np.array([owner], np.int32), np.array([[owner, -1]], np.int32)
            )

    def tell(now: float) -> list[int]:
        due = adoption.due(now)
        for shard in due:
            adoption.under_way.discard(shard)
            adoption.adopted(shard, records.generation, records.listed)
        return sorted(due)

    with store:
        owners = np.zeros(4, np.int32)
        records.place(store, owners, owners[:, None], [ShardAddress(i, f"a:{i}", 10 + i) for i in range(3)])
    assert tell(0.0) == [0, 1, 2]
    record(1)
    assert tell(LAZY_SECONDS / 4) == [0, 1], "who owned it, and who does"
    record(0)
    assert tell(LAZY_SECONDS / 2) == [0, 1]
    assert tell(LAZY_SECONDS) == [2], "both records at once"
    assert adoption.settled
    store.close()
