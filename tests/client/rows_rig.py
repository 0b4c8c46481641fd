# SPDX-License-Identifier: Apache-2.0
"""A small job whose rows tools ask for, for tests/ps and tests/client. A conftest loads it as ``rows_rig``."""

import random

import numpy as np
import rig

from oarlock.client.retry import Retry
from oarlock.client.router import pack_placement
from oarlock.client.rows import RowsClient
from oarlock.embedding.policy import Eviction, Guard
from oarlock.embedding.spec import Initializer, OptimizerSpec, TableSpec
from oarlock.proto.arrays import pack
from oarlock.proto.coordinator_pb2 import DescribeReply
from oarlock.proto.errors import Unavailable
from oarlock.proto.shard_pb2 import PushRequest, RowsRequest, TableGradients, TableKeys

RAW = tuple(range(40))
TABLES = (
    TableSpec(
        "user",
        2,
        OptimizerSpec("adagrad"),
        Initializer("uniform", 0.1),
        8,
        guard=Guard(undo=3),
        eviction=Eviction(age=9),
    ),
    TableSpec("item", 3, rig.SGD, rig.ZEROS, 4),
)


class Coordinator(rig.Coordinator):
    """Answers Describe as well."""

    def __init__(self, job):
        super().__init__()
        self.message, self.job, self.run, self.step = job.coordinator.message, job, job.run, 12

    def describe(self, request):
        self.asked += 1
        if self.message is None:
            raise Unavailable("no placement yet")
        job = self.job
        return DescribeReply(
            job=job.spec.job_bytes, run=self.run, spec=job.spec.to_json(), placement=self.message, step=self.step
        )


def job_of(shards=1, tables=TABLES, **changes):
    job = rig.Job(rig.spec_of(tables=tables, **changes), shards=shards).place()
    job.coordinator = Coordinator(job)
    job.transport.serve(job.coordinator, "coordinator")
    return job


def keys_of(job, raw=RAW, name="user"):
    found = rig.group_keys(job.layout, job.routes(), name, raw)
    number = job.layout.table_index[name]
    return TableKeys(table=number, keys=pack(found.keys), blocks=pack(found.blocks), counts=pack(found.counts))


def train(job, group, *, raw=RAW, name="user", value=1.0):
    """Push a group of gradients of ``value`` to the rows of ``raw``, wherever they are."""
    for shard, service in job.services.items():
        number = job.layout.table_index[name]
        found = rig.group_keys(job.layout, job.routes(), name, raw)
        owners = job.owners[job.layout.table_base[number] + found.blocks]
        rows = np.repeat(owners == shard, found.counts)
        part = TableKeys(
            table=number,
            keys=pack(found.keys[rows]),
            blocks=pack(found.blocks[owners == shard]),
            counts=pack(found.counts[owners == shard]),
        )
        gradients = np.full((rows.sum(), job.layout.tables[number].dim), value, np.float32)
        made = TableGradients(keys=part, gradients=pack(gradients), rate=0.5)
        service.push(PushRequest(header=job.header(shard), split=1, group=group, tables=[made]))


def ask(job, verb, keys=None, **fields):
    request = RowsRequest(header=job.header(0), verb=verb, keys=keys, **fields)
    return job.services[0].rows(request)


def client(made, transport=None, **given):
    retry = Retry(deadline_seconds=5.0, call_seconds=1.0)
    return RowsClient(transport or made.transport, "coordinator", rng=random.Random(1), retry=retry, **given)


def asked(made, body, transport=None, **given):
    async def work():
        tool = client(made, transport, **given)
        await tool.open()
        return await body(tool)

    return rig.run(work())[0]


def array(*keys):
    return np.array(keys, np.uint64)


def job_message(job):
    return pack_placement(job.generation, job.owners, job.addresses)
