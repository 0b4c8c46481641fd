# SPDX-License-Identifier: Apache-2.0
"""A probe pulls what a pull without a cache would, and knows which kept rows a pull under the bound would have used."""

import numpy as np
import pytest
import rig
from cache_rig import DIM, Worker, job_of

from oarlock.client.probe import Probe
from oarlock.proto.errors import InvalidArgument
from oarlock.proto.shard_pb2 import PullRequest

KEYS = list(range(1, 41))


async def pulled(worker, caches):
    """Return the keys in the order of the request, and their rows."""
    keys = {"user": rig.group_keys(worker.job.layout, worker.client.routes, "user", KEYS)}
    rows = {"user": np.full((len(KEYS), DIM), np.nan, np.float32)}
    await worker.client.pull(keys, rows, caches=caches)
    return keys["user"].keys, rows["user"]


def test_a_probe_gets_fresh_rows_and_remembers_those_that_are_kept():
    job = job_of(bound=3)

    async def body():
        one, other = Worker(job), Worker(job, split=1)
        await one.push(KEYS)
        await pulled(one, one.caches)
        # Each key is updated as often again as its number says, modulo 6.
        for turn in range(5):
            await other.push([key for key in KEYS if key % 6 > turn])
        probe = Probe(one.caches, "user")
        keys, fresh = await pulled(one, probe)
        behind = (keys % 6).astype(np.float32)
        assert fresh[:, 0].tolist() == (1 + behind).tolist()
        assert probe.stale(fresh)[:, 0].tolist() == np.where(behind <= 3, 1, 1 + behind).tolist()
        shares = [np.mean(behind <= bound) for bound in (0, 1, 2, 3, 5)]
        assert probe.saved((0, 1, 2, 3, 5)) == pytest.approx(shares)
        # What came is kept: the next pull finds nothing that is behind.
        again = Probe(one.caches, "user")
        keys, rows = await pulled(one, again)
        assert np.array_equal(rows, fresh)
        assert again.stale(rows) is None
        assert again.saved((0, 3)) == (1.0, 1.0)

    rig.run(body())


def test_rows_that_are_not_kept_are_neither_stale_nor_saved():
    job = job_of(bound=3)

    async def body():
        one, other = Worker(job), Worker(job, split=1)
        await other.push(KEYS)
        probe = Probe(one.caches, "user")
        _, rows = await pulled(one, probe)
        assert (rows == 1).all()
        assert probe.stale(rows) is None
        assert probe.saved((0, 3)) == (0.0, 0.0)

    rig.run(body())


def test_requests_ask_with_the_bound_of_the_moment_and_probes_with_none(spy):
    job = job_of(bound=3)
    spy.inner = job.transport

    async def body():
        worker = Worker(job, transport=spy)
        await worker.push(KEYS)
        for bound in (3, 1, 2):
            worker.caches.bounds["user"] = bound
            await pulled(worker, worker.caches)
            await pulled(worker, Probe(worker.caches, "user"))
        worker.caches.bounds["user"] = 4
        with pytest.raises(InvalidArgument, match=r"bound = 4 is above cache.bound = 3"):
            await pulled(worker, worker.caches)

    rig.run(body())
    requests = [PullRequest.FromString(data) for _, _, data, _ in spy.sent("Shard.Pull")]
    asked = [table.bound for request in requests for table in request.tables]
    # The job has three shards, and each of them keys.
    assert asked[:18] == [b for bound in (3, 1, 2) for b in (bound,) * 3 + (0,) * 3]
    assert set(asked[18:]) == {4}


def test_a_probe_that_was_not_pulled_with_knows_nothing():
    with pytest.raises(InvalidArgument, match="was not pulled with"):
        Probe(Worker(job_of(bound=3)).caches, "user").saved((0,))
