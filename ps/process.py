# SPDX-License-Identifier: Apache-2.0
"""The life of a shard process: listen, compile, join, keep the lease, join anew if the job goes back, end when it does.

Invariant: it joins only after its kernels are compiled (compiling holds the interpreter lock), and its address answers
from before the join until after the job is over.
"""

import asyncio
import gc
import logging
import random
from concurrent.futures import Executor

from oarlock.client.membership import Membership
from oarlock.client.telemetry import Telemetry
from oarlock.embedding.saved import make_some_ready
from oarlock.proto.coordinator_pb2 import SHARD
from oarlock.proto.errors import PSError, WrongRun
from oarlock.proto.transport import Transport
from oarlock.ps.compacting import REST, Compacting
from oarlock.ps.identity import Identity
from oarlock.ps.replicating import Replicating
from oarlock.ps.service import ShardService
from oarlock.ps.shard import Shard
from oarlock.ps.telemetry import shard_source

# How long one thread may keep the interpreter from another that waits for it. With Python's 5 ms the slowest pulls beside a table
# that grows take 10 to 20 times the median, with this 2 to 3 times; threads are in kernels, without the interpreter, anyway.
SWITCH_SECONDS = 0.0002

logger = logging.getLogger(__name__)

# Between two slices of a sweep, and between two looks whether one is due.
BUSY_SECONDS = 0.005
IDLE_SECONDS = 0.1
# Between two looks whether memory for the next cut is lacking.
LOOK_SECONDS = 2.0


async def run_shard(
    transport: Transport,
    coordinator: str,
    service: ShardService,
    address: str,
    *,
    rng: random.Random,
    telemetry: Telemetry | None = None,
    executor: Executor | None = None,
) -> None:
    """Serve as a member of the coordinator's job until it is over. ``service`` listens at ``address`` already.

    A job that goes back by itself is joined anew, run after run. Files are compacted in a thread of ``executor`` (None: of the
    loop's own).
    """
    telemetry, before = telemetry or Telemetry(), 0
    while True:
        member = Membership(transport, coordinator, SHARD, rng=rng, address=address)
        spec = await member.join()
        if member.run <= before:
            raise WrongRun(f"run {before} is over, and this shard is told to join run {member.run}", run=member.run)
        identity = Identity(spec.job_bytes, member.run, member.id, member.incarnation)
        try:
            shard = service.configure(spec, identity, holds_lease=member.holds_lease)
        except PSError as error:
            # It would be waited for.
            await member.leave(str(error))
            raise
        before = member.run
        try:
            await _serve(member, service, shard, telemetry, executor)
        except WrongRun as refused:
            service.let_go()
            if not await member.is_in_the_next_run(refused):
                raise
            logger.info("event=run_over id=%d run=%d", member.id, member.run)
            del member, shard
            continue
        logger.info("event=shard_over id=%d phase=%s", member.id, member.phase)
        await member.leave()
        return


async def _serve(
    member: Membership, service: ShardService, shard: Shard, telemetry: Telemetry, executor: Executor | None
) -> None:
    """Serve in one run of the job; WrongRun once that is over and another one has begun."""
    with telemetry.of_member(member, shard_source(service, shard)):
        async with member.kept(telemetry.told(service.told)):
            beside = [
                asyncio.ensure_future(_collect()),
                asyncio.ensure_future(_sweep(shard)),
                asyncio.ensure_future(_compact(member, service.compacting, executor)),
                asyncio.ensure_future(_make_ready(shard, executor)),
                asyncio.ensure_future(Replicating(shard, member, executor).run()),
            ]
            try:
                await member.over.wait()
            finally:
                service.compacting.stop()
                for task in beside:
                    task.cancel()


async def _collect() -> None:
    """Give back what is left of the run before: it is in cycles, and its memory is needed."""
    # First the shard, once nobody is about it any more; then its tables, which are kept until they are closed.
    for _ in range(2):
        await asyncio.sleep(IDLE_SECONDS)
        gc.collect()


async def _sweep(shard: Shard) -> None:
    """Evict rows, slice by slice, until cancelled."""
    while not shard.sweeper.idle:
        await asyncio.sleep(BUSY_SECONDS if shard.sweep_some() else IDLE_SECONDS)


async def _compact(member: Membership, compacting: Compacting, executor: Executor | None) -> None:
    """Make long chains of files short, a block at a time and gently, until cancelled."""
    loop = asyncio.get_running_loop()
    while True:
        compacting.committed(member.committed)
        rest = IDLE_SECONDS
        if compacting.due:
            begun = loop.time()
            await loop.run_in_executor(executor, compacting.step)
            rest = max(BUSY_SECONDS, REST * (loop.time() - begun - compacting.waited))
        await asyncio.sleep(rest)


async def _make_ready(shard: Shard, executor: Executor | None) -> None:
    """Have memory ready for the next cut, a piece at a time, until cancelled: taken when it begins, it holds up pushes."""
    loop = asyncio.get_running_loop()
    while True:
        most = sum(table.nbytes for table in shard.tables)
        more = await loop.run_in_executor(executor, make_some_ready, most)
        await asyncio.sleep(IDLE_SECONDS if more else LOOK_SECONDS)
