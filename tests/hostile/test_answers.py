# SPDX-License-Identifier: Apache-2.0
"""A shard that answers nonsense: a worker meets an error by name, or numbers of the right shape."""

import logging
import random

import mutate
import numpy as np
import pytest
import rig

from oarlock.client.client import Client
from oarlock.client.retry import Retry
from oarlock.proto.arrays import pack
from oarlock.proto.bulk import Bulk, inlined
from oarlock.proto.errors import Internal, Malformed, PSError
from oarlock.proto.shard_pb2 import PushReply

ANSWERS = 600


class Liar(rig.Spy):
    """Passes requests on, and changes the answers of ``method`` once they are on their way back."""

    def __init__(self, inner, method, rng):
        super().__init__(inner)
        self.method = method
        self.rng = rng

    async def call(self, address, method, request, *, timeout_seconds):
        reply = await self.inner.call(address, method, request, timeout_seconds=timeout_seconds)
        if method == self.method:
            beside = isinstance(reply, Bulk)
            reply = inlined(reply)
            changed = type(reply)()
            changed.CopyFrom(reply)
            mutate.message_of(self.rng, changed)
            return Bulk(changed, ()) if beside else changed
        return reply


def client_of(job, transport):
    return Client(job.member(transport, retry=Retry(deadline_seconds=2, call_seconds=1)))


async def pulls(client, job, group):
    keys = {name: rig.group_keys(job.layout, client.routes, name, range(9)) for name in ("user", "item")}
    rows = {t.name: np.empty((len(keys[t.name].keys), t.dim), np.float32) for t in job.layout.tables}
    await client.pull(keys, rows, dense=np.empty(job.layout.dense_size, np.float32))


@pytest.mark.parametrize(
    ("method", "act"),
    [
        ("Shard.Pull", pulls),
        ("Shard.Push", lambda client, job, group: rig.push(client, job, split=0, group=group)),
        ("Shard.Marks", lambda client, job, group: client.next_group(0)),
    ],
)
def test_hundreds_of_changed_answers(method, act, seed, caplog):
    caplog.set_level(logging.ERROR)
    job = rig.Job(rig.spec_of(), shards=2).place()
    liar = Liar(job.transport, method, random.Random(seed))
    came = 0

    async def body():
        nonlocal came
        for group in range(ANSWERS):
            try:
                await act(client_of(job, liar), job, group)
                came += 1
            except PSError as error:
                if isinstance(error, Internal):
                    raise

    rig.run(body())
    assert 0 < came < ANSWERS


@pytest.mark.parametrize("moved", [[17], [-1], [1 << 30], [-(1 << 31)], [12]])
def test_blocks_that_moved_and_were_never_sent(moved):
    """The first was an IndexError, the second meant the last block, which went out once more."""
    job = rig.Job(rig.spec_of(), shards=1).place()
    spy = rig.Spy(job.transport)
    answer = PushReply(moved=pack(np.array(moved, np.int32)))
    spy.answers.append(lambda address, method, request: answer if method == "Shard.Push" else None)

    async def body():
        with pytest.raises(Malformed, match="blocks moved which were not sent"):
            await rig.push(client_of(job, spy), job)

    rig.run(body())
