# SPDX-License-Identifier: Apache-2.0
"""The life of a coordinator process: lock the state, listen, carry out orders, end when the job is over and members are told.

Invariant: the state is open (and so locked) before the first message is answered.
"""

import asyncio
import contextlib
import logging

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

    async def carry_out() -> None:
        while coordinator.phase not in OVER:
            phases.look()
            await orders.step()
            phases.look()
            await asyncio.sleep(pause)

    # Beside the judging of leases: an order to a shard that hangs would otherwise never be given up.
    orders_carried_out = asyncio.ensure_future(carry_out())
    try:
        while coordinator.phase not in OVER and not orders_carried_out.done():
            coordinator.tick()
            phases.look()
            await asyncio.wait([orders_carried_out], timeout=pause)
        if orders_carried_out.done():
            orders_carried_out.result()
    finally:
        orders_carried_out.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait([orders_carried_out])
        phases.end()
    clock = asyncio.get_running_loop().time
    end = clock() + coordinator.spec.lease_seconds
    while clock() < end and (coordinator.members.alive("shard") or coordinator.members.alive("worker")):
        coordinator.tick()
        await asyncio.sleep(pause)
    logger.info("event=coordinator_over phase=%s", coordinator.phase)
