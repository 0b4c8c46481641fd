# SPDX-License-Identifier: Apache-2.0
"""How long an owner waits for a copy that does not answer before it asks for a smaller set, and how it rests between copies that
nobody waits for, in virtual time."""

import asyncio
import random
from types import SimpleNamespace

import numpy as np
import pytest
from rig import spec_of
from scenes_rig import Copies, done, travelled

from oarlock.proto.coordinator_pb2 import SLOW, ReportReply
from oarlock.proto.errors import Unavailable
from oarlock.ps.replicating import COPYING_SHARE, SILENT_LEASES, Replicating
from oarlock.simulation.loop import Inline, VirtualLoop

LEASE_SECONDS = 5.0
IMAGE_SECONDS = 0.1


class Member:
    """Shard 0 as a member of a job whose shard 1 cannot be reached until ``healed``."""

    coordinator = "coordinator"
    id = 0

    def __init__(self, job, loop, healed):
        self.transport = self
        self.spec = SimpleNamespace(lease_seconds=LEASE_SECONDS)
        self.rng = random.Random(1)
        self.reported = []
        self._job, self._loop, self._healed = job, loop, healed

    def header(self, target=0):
        return self._job.header(1 if target else 0, sender=self._job.addresses[0].incarnation)

    async def call(self, address, method, request, *, timeout_seconds):
        now = self._loop.time()
        if method == "Coordinator.Report":
            self.reported.append((now, request.told, request.shard))
            return ReportReply()
        if now < self._healed:
            await asyncio.sleep(1.0)
            raise Unavailable(f"no answer from {address}")
        return self._job.services[1].replicate(travelled("Shard.Replicate", request))


@pytest.fixture
def loop():
    made = VirtualLoop()
    yield made
    made.close()


def run(loop, healed_after):
    """Return what shard 0 reports after a push whose copy cannot be reached for a while, and whether it was acknowledged."""
    job = Copies(spec_of(), 2)
    job.begin([(0, 1)] * job.layout.blocks)
    job.settle()
    job.heard(0)
    begun = loop.time()
    member = Member(job, loop, begun + healed_after)

    async def body():
        working = asyncio.ensure_future(Replicating(job.shards[0], member).run())
        answer = job.push(0, 0)[0]
        await asyncio.sleep(4 * SILENT_LEASES * LEASE_SECONDS)
        working.cancel()
        await asyncio.wait([working])
        return done(answer)

    acknowledged = loop.run_until_complete(body())
    return [(at - begun, told, shard) for at, told, shard in member.reported], acknowledged


def test_a_copy_that_is_away_for_a_while_is_waited_for(loop):
    reported, acknowledged = run(loop, SILENT_LEASES * LEASE_SECONDS - 2)
    assert reported == []
    assert acknowledged


def test_a_copy_that_stays_away_is_to_leave_the_sets(loop):
    reported, _ = run(loop, 1e9)
    at, told, shard = reported[0]
    assert SILENT_LEASES * LEASE_SECONDS <= at < SILENT_LEASES * LEASE_SECONDS + 2
    assert (told, shard) == (SLOW, 1)


class Slow(Member):
    """As Member; shard 1 can be reached, and takes a while for each image."""

    def __init__(self, job, loop):
        super().__init__(job, loop, 0.0)
        self.images = []

    async def call(self, address, method, request, *, timeout_seconds):
        if method == "Shard.Replicate" and request.message.operations[0].WhichOneof("does") == "image":
            self.images.append(self._loop.time())
            await asyncio.sleep(IMAGE_SECONDS)
        return await super().call(address, method, request, timeout_seconds=timeout_seconds)


@pytest.mark.parametrize(("leisurely", "gap"), [(False, IMAGE_SECONDS), (True, IMAGE_SECONDS / COPYING_SHARE)])
def test_an_owner_rests_between_copies_that_nobody_waits_for(loop, leisurely, gap):
    job = Copies(spec_of(), 2)
    job.begin([(0,)] * job.layout.blocks)
    member = Slow(job, loop)

    async def body():
        working = asyncio.ensure_future(Replicating(job.shards[0], member, Inline()).run())
        for number in range(4):
            job.give(number, 1, leisurely=leisurely)
        await asyncio.sleep(10.0)
        working.cancel()
        await asyncio.wait([working])

    loop.run_until_complete(body())
    assert np.diff(member.images) == pytest.approx([gap] * 3, rel=0.01)
