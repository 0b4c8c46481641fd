# SPDX-License-Identifier: Apache-2.0
"""The worker's clock: which of its groups are acknowledged, and which one may pull.

Invariant: under ssp(s) rows for group g are pulled only once every active worker has all of its groups below g - s behind it,
so what is computed on holds them; under geo once this worker's own groups below g are acknowledged, so that its local copy
begins with all of its own steps. Groups are numbered in the order in which they are scheduled. Under async nothing waits.
One event loop.
"""

import asyncio
import logging

from oarlock.client.membership import Membership
from oarlock.proto.coordinator_pb2 import Clock
from oarlock.proto.errors import PSError

logger = logging.getLogger(__name__)

FIRST_PAUSE_SECONDS = 0.002


class WorkerClock:
    """Numbers groups, counts acknowledgements, and waits for the slowest worker."""

    def __init__(self, member: Membership) -> None:
        self._member = member
        self._bounded = member.spec.mode == "ssp"
        self._local = member.spec.mode == "geo"
        self._moved = asyncio.Event()
        self._staleness = member.spec.staleness
        # Telling of every group would be telling too often where s leaves room.
        self._every = max(1, (self._staleness + 1) // 4)
        self._next = 0
        self._acknowledged = 0
        self._early: set[int] = set()
        self._told = 0
        self._telling: asyncio.Task[None] | None = None
        self._asking = asyncio.Lock()

    def begin(self, minimum: int) -> None:
        """Go on from the minimum, but never back: this worker was given splits and had none."""
        self._member.minimum = max(self._member.minimum, minimum)
        if self._bounded:
            self._next = self._acknowledged = self._told = max(minimum, self._acknowledged)

    def number(self) -> int:
        """Return the number of the next group to be scheduled."""
        self._next += 1
        return self._next - 1

    def acknowledged(self, number: int) -> None:
        """Note that every block has acknowledged the group of this number."""
        self._early.add(number)
        while self._acknowledged in self._early:
            self._early.remove(self._acknowledged)
            self._acknowledged += 1
        # Those that wait look again; who waits from now on waits for the next one.
        self._moved.set()
        self._moved = asyncio.Event()
        if self._bounded and self._telling is None and self._acknowledged - self._told >= self._every:
            # Others may wait for this one, though it waits for nobody itself.
            self._telling = asyncio.ensure_future(self._tell())
            self._telling.add_done_callback(self._has_told)

    def on_wire(self, number: int) -> int:
        """Return what messages carry as the group's number: from 1 on, 0 outside ssp."""
        return number + 1 if self._bounded else 0

    def message(self, *, active: bool) -> Clock:
        """Return what the coordinator is told."""
        if not self._bounded:
            return Clock(active=active)
        self._told = self._acknowledged
        return Clock(active=active, acknowledged=self._acknowledged, heard=self._member.minimum)

    async def may_pull(self, number: int) -> None:
        """Wait until the group of this number may pull its rows."""
        while self._local and self._acknowledged < number:
            await self._moved.wait()
        if not self._bounded:
            return
        wanted = number - self._staleness
        pause = FIRST_PAUSE_SECONDS
        while self._member.minimum < wanted:
            # One asks for all that wait.
            async with self._asking:
                if self._member.minimum >= wanted:
                    return
                await self._tell()
                if self._member.minimum < wanted:
                    await asyncio.sleep(pause)
                    pause = min(2 * pause, self._member.spec.heartbeat_seconds / 4)

    async def _tell(self) -> None:
        try:
            await self._member.beat()
        except PSError as error:
            # The regular heartbeat learns of it, too, and deals with it.
            logger.debug("event=clock_unheard error=%s", error)

    def _has_told(self, task: "asyncio.Task[None]") -> None:
        self._telling = None
