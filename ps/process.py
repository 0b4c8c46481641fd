# SPDX-License-Identifier: Apache-2.0
"""The life of a shard process: listen, compile, join, keep the lease, end when the job does.

Invariant: it joins only after its kernels are compiled (compiling holds the interpreter lock), and its address answers
from before the join until after the job is over.
"""

import logging
import random

from oarlock.client.membership import Membership
from oarlock.proto.coordinator_pb2 import SHARD
from oarlock.proto.transport import Transport
from oarlock.ps.identity import Identity
from oarlock.ps.service import ShardService

logger = logging.getLogger(__name__)


async def run_shard(
    transport: Transport, coordinator: str, service: ShardService, address: str, *, rng: random.Random
) -> None:
    """Serve as a member of the coordinator's job until it is over. ``service`` listens at ``address`` already."""
    member = Membership(transport, coordinator, SHARD, rng=rng, address=address)
    spec = await member.join()
    identity = Identity(spec.job_bytes, member.run, member.id, member.incarnation)
    shard = service.configure(spec, identity, holds_lease=member.holds_lease)
    async with member.kept(shard.stats):
        await member.over.wait()
    logger.info("event=shard_over id=%d phase=%s", member.id, member.phase)
    await member.leave()
