# SPDX-License-Identifier: Apache-2.0
"""The life of a coordinator process: lock the state, listen, carry out orders, end when the job is over and members are told.

Invariant: the state is open (and so locked) before the first message is answered.
"""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable

from oarlock.client.job import OVER
from oarlock.cluster.coordinator import Coordinator
from oarlock.cluster.orders import Orders
from oarlock.cluster.phases import Phases
from oarlock.telemetry.trace import Track

logger = logging.getLogger(__name__)


async def run_coordinator(coordinator: Coordinator, orders: Orders, track: Track | None = None) -> None:
    """Run until the job is over and its members have left, or had a lease's time to hear of it. ``track``: of a trace."""
    pause = coordinator.spec.heartbeat_seconds / 10
    orders.stages.track = track
    phases = Phases(coordinator, track)

    async def carry_out(step: Callable[[], Awaitable[None]], rest: Callable[[float], Awaitable[None]]) -> None:
        while coordinator.phase not in OVER:
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
        while coordinator.phase not in OVER and not any(task.done() for task in working):
            coordinator.tick()
            phases.look()
            await asyncio.wait(working, timeout=pause, return_when=asyncio.FIRST_COMPLETED)
        for task in working:
            if task.done():
                task.result()
    finally:
        for task in working:
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait(working)
            await orders.carrying.close()
        phases.end()
    clock = asyncio.get_running_loop().time
    end = clock() + coordinator.spec.lease_seconds
    while clock() < end and (coordinator.members.alive("shard") or coordinator.members.alive("worker")):
        coordinator.tick()
        await asyncio.sleep(pause)
    logger.info("event=coordinator_over phase=%s", coordinator.phase)
