# SPDX-License-Identifier: Apache-2.0
"""A job whose table has rows that begin narrow: pushed, pulled, repeated, moved to another shard's memory."""

import numpy as np
import rig

from oarlock.client.push import PushIdentity, RowGradients, cut_push
from oarlock.embedding.expanding import ExpandingTable
from oarlock.embedding.spec import Part, TableSpec

PARTS = (Part(1, rig.SGD, rig.ZEROS), Part(2, rig.SGD, rig.ZEROS))
USER = TableSpec("user", 3, parts=PARTS, blocks=8, expand_score=0.25)  # with the third show, or a click


def test_the_third_push_of_a_job_expands_and_a_repetition_counts_for_nothing():
    job = rig.Job(rig.spec_of(tables=(USER,), dense=()), shards=1).place()
    (table,) = job.shards[0].tables
    assert isinstance(table, ExpandingTable)

    def push(group, raw, *, clicks=None):
        keyset = rig.group_keys(job.layout, job.routes(), "user", raw)
        n = len(keyset.keys)
        clicked = None if clicks is None else np.full(n, clicks, np.float32)
        part = RowGradients(keyset, np.full((n, 3), -1, np.float32), 1.0, np.ones(n, np.uint32), clicked)
        (made,) = cut_push(job.layout, job.routes(), PushIdentity(3, group, group), {"user": part}, None, 1.0)
        made.request.header.CopyFrom(job.header(0))
        return job.services[0].push(made.bulk)

    for group in (0, 1, 1, 1):
        push(group, range(40))
    assert job.rows("user", range(40)).tolist() == [[2, 0, 0]] * 40
    assert (table.rows, table.expanded) == (40, 0)
    assert "expanded" not in job.shards[0].stats()
    push(2, range(30))
    push(2, range(30))
    push(3, range(100, 105), clicks=1.0)
    assert job.rows("user", range(40)).tolist() == [[3, 1, 1]] * 30 + [[2, 0, 0]] * 10
    assert job.rows("user", range(98, 105)).tolist() == [[0, 0, 0]] * 2 + [[1, 1, 1]] * 5
    assert job.shards[0].stats()["expanded"] == {"user": 35}
    assert job.shards[0].sequence.tolist() == [table.version(block) for block in range(8)]
