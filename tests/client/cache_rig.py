# SPDX-License-Identifier: Apache-2.0
"""What the tests of pulls with caches run on: a job whose table ``user`` workers keep rows of, and such workers.

A conftest loads it as ``cache_rig``. One thread.
"""

import numpy as np
import rig

from oarlock.client.caches import Caches
from oarlock.client.client import Client
from oarlock.client.push import RowGradients
from oarlock.client.retry import Retry
from oarlock.embedding.spec import CacheSpec, TableSpec

PATIENT = Retry(deadline_seconds=10000.0)
DIM = 2


def job_of(bound=0, rows=100, policy="lru", shards=3, **changes):
    """A job with a table ``user`` that workers keep rows of, and ``item`` that they do not."""
    user = TableSpec("user", DIM, rig.SGD, rig.ZEROS, 8, cache=CacheSpec(rows, bound, policy), **changes)
    return rig.Job(rig.spec_of(tables=(user, TableSpec("item", 3, rig.SGD, rig.ZEROS, 4))), shards).place()


class Worker:
    """A client with caches, whose groups count up."""

    def __init__(self, job, split=0, transport=None, seed=0):
        self.job, self.split, self.group = job, split, 0
        self.member = job.member(transport, retry=PATIENT, seed=seed)
        self.client, self.caches = Client(self.member), Caches(job.spec.tables)
        self.cache = self.caches.of["user"]

    async def pull(self, raw, *, tables=("user",), caches=True):
        """Return {key: first value of its row}."""
        keys = {name: rig.group_keys(self.job.layout, self.client.routes, name, raw) for name in tables}
        dims = {t.name: t.dim for t in self.job.layout.tables}
        rows = {name: np.full((len(found.keys), dims[name]), np.nan, np.float32) for name, found in keys.items()}
        await self.client.pull(keys, rows, caches=self.caches if caches else None)
        for found in rows.values():
            assert (found == found[:, :1]).all()
        return dict(zip(keys["user"].keys.tolist(), rows["user"][:, 0].tolist(), strict=True))

    async def push(self, raw, value=-1.0, step=0):
        keys = rig.group_keys(self.job.layout, self.client.routes, "user", raw)
        gradients = np.full((len(keys.keys), DIM), value, np.float32)
        await self.client.push(self.split, self.group, {"user": RowGradients(keys, gradients, 1.0)}, step=step)
        self.group += 1


def move(job, number, to):
    """Move a block, and have all shards go by the new placement."""
    job.move(number, to)
    for shard in job.shards.values():
        shard.generation = job.generation


def owner_of(job, key):
    """Return (number of the key's block, its owner)."""
    block = int(rig.group_keys(job.layout, job.routes(), "user", [key]).blocks[0])
    return block, int(job.owners[block])


def counted(job, what):
    return sum(getattr(shard, what)[0] for shard in job.shards.values())
