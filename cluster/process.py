# SPDX-License-Identifier: Apache-2.0
"""The life of a coordinator process: lock the state, listen, carry out orders, end when the job is over and members are told.

Invariant: the state is open (and so locked) before the first message is answered, and stays locked from run to run.
"""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager

from oarlock.checkpoint.store import CheckpointStore
from oarlock.client.job import OVER
from oarlock.cluster.beginning import next_run
from oarlock.cluster.coordinator import Coordinator
from oarlock.cluster.orders import Orders
from oarlock.cluster.phases import Phases
from oarlock.cluster.service import CoordinatorService
from oarlock.proto.errors import Unavailable
from oarlock.telemetry.trace import Track

logger = logging.getLogger(__name__)


async def run_job(
    service: CoordinatorService,
    orders_of: Callable[[Coordinator], AbstractContextManager[Orders]],
    checkpoints: CheckpointStore,
    track: Track | None = None,
) -> None:
    """Run until the job is over, run after run, each under a coordinator of its own, which has ``orders_of`` it meanwhile.

    ``service`` answers for the first one, whose job's checkpoints are in ``checkpoints``. ``track``: of a trace.
    """
    while True:
        coordinator = service.newest
        with orders_of(coordinator) as orders:
            await run_coordinator(coordinator, orders, track)
        if coordinator.handed_on is None:
            return
        # Not on the loop: the cut may be in a store that is far away.
        loop = asyncio.get_running_loop()
        service.take_over(await loop.run_in_executor(None, next_run, coordinator, checkpoints))


async def run_coordinator(coordinator: Coordinator, orders: Orders, track: Track | None = None) -> None:
    """Run until the job is over and its members have left, or had a lease's time to hear of it; or until its run is over, and the
    file is handed on. ``track``: of a trace.
    """
    pause = coordinator.spec.heartbeat_seconds / 10
    orders.stages.track = track
    phases = Phases(coordinator, track)

    def in_charge() -> bool:
        return coordinator.phase not in OVER and coordinator.handed_on is None

    async def carry_out(step: Callable[[], Awaitable[None]], rest: Callable[[float], Awaitable[None]]) -> None:
        while in_charge():
            phases.look()
            await step()
            phases.look()
            await rest(pause)

    # Beside the judging of leases: an order to a shard that hangs would otherwise never be given up. And a cut, which may be
    # written for minutes, beside all other orders. What moves goes on as soon as somebody reports.
    loops = (
        (orders.step, asyncio.sleep),
        (orders.cutting.step, asyncio.sleep),
        (orders.carrying.step, orders.carrying.rest),
    )
    working = [asyncio.ensure_future(carry_out(step, rest)) for step, rest in loops]
    try:
        while in_charge() and not any(task.done() for task in working):
            coordinator.tick()
            phases.look()
            await asyncio.wait(working, timeout=pause, return_when=asyncio.FIRST_COMPLETED)
        for task in working:
            if task.done():
                task.result()
    except Unavailable:
        # Whoever was about to record something when the file was handed on.
        if coordinator.handed_on is None:
            raise
    finally:
        for task in working:
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait(working)
            await orders.carrying.close()
            if coordinator.handed_on is not None:
                # The next run's cuts go to the same place, and old ones may be about to be deleted there.
                await orders.cutting.close()
        phases.end()
    if coordinator.handed_on is not None:
        return
    clock = asyncio.get_running_loop().time
    end = clock() + coordinator.spec.lease_seconds
    while clock() < end and (coordinator.members.alive("shard") or coordinator.members.alive("worker")):
        coordinator.tick()
        await asyncio.sleep(pause)
    logger.info("event=coordinator_over phase=%s", coordinator.phase)
