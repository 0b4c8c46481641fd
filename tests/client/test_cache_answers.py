# SPDX-License-Identifier: Apache-2.0
"""Wrong answers to pulls of a worker that keeps rows: each is Malformed, and neither the caches nor the shards change."""

import numpy as np
import pytest
import rig
from cache_rig import DIM, Worker, job_of

from oarlock.proto.arrays import pack
from oarlock.proto.errors import Malformed
from oarlock.proto.shard_pb2 import PullReply


def int32(*values):
    return pack(np.array(values, np.int32))


def uint32(*values):
    return pack(np.array(values, np.uint32))


def rows_of(n):
    return pack(np.full((n, DIM), 7, np.float32))


# What a shard answers to a pull of four keys, of which the last is not kept, and what is wrong with that.
ANSWERS = {
    "a row that is not kept is missing": (
        rows_of(1),
        int32(0),
        uint32(5),
        "of user did not come, and no row of it is kept",
    ),
    "nothing came": (rows_of(0), int32(), uint32(), "of user did not come, and no row of it is kept"),
    "beyond the end": (rows_of(2), int32(3, 4), uint32(5, 5), "not ascending within 0 to 3"),
    "below 0": (rows_of(2), int32(-1, 3), uint32(5, 5), "not ascending within 0 to 3"),
    "twice": (rows_of(2), int32(3, 3), uint32(5, 5), "not ascending within 0 to 3"),
    "not in order": (rows_of(4), int32(0, 2, 1, 3), uint32(5, 5, 5, 5), "not ascending within 0 to 3"),
    "more rows": (rows_of(3), int32(0, 3), uint32(5, 5), "3 rows and 2 versions of user for 2 positions"),
    "fewer rows": (rows_of(1), int32(0, 3), uint32(5, 5), "1 rows and 2 versions of user for 2 positions"),
    "fewer versions": (rows_of(2), int32(0, 3), uint32(5), "2 rows and 1 versions of user for 2 positions"),
    "no positions": (rows_of(4), None, uint32(5, 5, 5, 5), "positions and versions of 0 and 1 tables for 1"),
    "no versions": (rows_of(4), int32(0, 1, 2, 3), None, "positions and versions of 1 and 0 tables for 1"),
    "neither, and rows are missing": (rows_of(2), None, None, "2 rows and 4 versions of user for 4 positions"),
    "positions of another type": (
        rows_of(2),
        uint32(0, 3),
        uint32(5, 5),
        "positions of user: dtype uint32, wanted int32",
    ),
    "versions of another type": (rows_of(2), int32(0, 3), int32(5, 5), "versions of user: dtype int32, wanted uint32"),
    "rows of another width": (
        pack(np.zeros((2, 3), np.float32)),
        int32(0, 3),
        uint32(5, 5),
        "rows of user: 3 columns, wanted 2",
    ),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_an_answer_that_cannot_be_changes_nothing(name, spy):
    rows, positions, versions, problem = ANSWERS[name]
    job = job_of(bound=1, shards=1)
    spy.inner = job.transport
    answer = PullReply(
        rows=[rows],
        positions=[] if positions is None else [positions],
        versions=[] if versions is None else [versions],
    )

    async def body():
        worker = Worker(job, transport=spy)
        *there, absent = rig.group_keys(job.layout, worker.client.routes, "user", [1, 2, 3, 4]).keys.tolist()
        await worker.push(there)
        await worker.pull(there)
        told, state = worker.caches.told(), rig.state(job)
        spy.answers.append(lambda a, m, r: answer if m == "Shard.Pull" else None)
        with pytest.raises(Malformed, match=problem):
            await worker.pull([1, 2, 3, 4])
        assert worker.caches.told() == told
        assert rig.state(job) == state
        spy.answers.clear()
        assert await worker.pull([1, 2, 3, 4]) == {**dict.fromkeys(there, 1), absent: 0}

    rig.run(body())
