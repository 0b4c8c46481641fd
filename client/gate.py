# SPDX-License-Identifier: Apache-2.0
"""The gate of a worker: its pushes pass through, and for a cut it shuts, so that every group is in all blocks or in none.

Invariant: while it is shut no push is under way; it opens when the coordinator says so, or by itself once nothing was heard for
``PATIENCE * gate_seconds``. By itself it keeps the number of the cut before, by which shards know that this worker did not wait.
Only pushes wait: pulls, computing and reading go on. One event loop.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from oarlock.proto.coordinator_pb2 import GateReply, GateRequest
from oarlock.proto.errors import PSError

if TYPE_CHECKING:
    from oarlock.client.membership import Membership

logger = logging.getLogger(__name__)

# Between two questions whether it is open; the more workers ask, the longer each one waits.
PAUSE_SECONDS = 0.002
PAUSE_OF_EACH_WORKER = 0.00025
# Who has heard nothing for so many times ``gate_seconds`` opens by itself.
PATIENCE = 2


class Gate:
    """``cut``: the last one whose gate was opened, which pushes carry."""

    def __init__(self, member: "Membership") -> None:
        self._member = member
        self.cut = 0
        self._announced = 0
        # The last one for which it shut.
        self._shut_for = 0
        self._standing: asyncio.Task[None] | None = None
        self._under_way = 0
        self._is_open = asyncio.Event()
        self._is_open.set()
        # Set whenever a push ends, and whenever something was heard of a cut.
        self._changed = asyncio.Event()

    @property
    def is_open(self) -> bool:
        return self._is_open.is_set()

    @asynccontextmanager
    async def passed(self) -> AsyncIterator[None]:
        """Wait until the gate is open; it does not count as shut before the body has ended."""
        while not self._is_open.is_set():
            await self._is_open.wait()
        self._under_way += 1
        try:
            yield
        finally:
            self._under_way -= 1
            self._changed.set()

    def hear(self, opened: int, gate: int = 0, seconds: float = 0.0) -> None:
        """Take in what the coordinator says: the last gate that it opened, and the next one, which shuts in ``seconds``."""
        if opened > self.cut:
            self.cut = opened
            self._member.acknowledged.opened(opened)
            self._changed.set()
        if gate > max(self.cut, self._announced):
            self._announced = gate
            self.forget()
            self._standing = asyncio.ensure_future(self._stand(gate, seconds))

    def forget(self) -> None:
        """Stand at no gate any more."""
        if self._standing is not None:
            self._standing.cancel()
            self._standing = None

    async def _stand(self, cut: int, seconds: float) -> None:
        """Shut at the announced moment, say so once no push is under way, and open when told so."""
        await asyncio.sleep(max(0.0, seconds))
        if self.cut >= cut:
            return
        self._is_open.clear()
        self._shut_for = cut
        try:
            while self._under_way and self.cut < cut:
                self._changed.clear()
                await self._changed.wait()
            await self._ask_until_open(cut)
        finally:
            # Who is told of the next gate while its last question is on the way ends here when that one is shut already.
            if self._shut_for == cut:
                self._is_open.set()

    async def _ask_until_open(self, cut: int) -> None:
        member, clock = self._member, asyncio.get_running_loop().time
        patience = PATIENCE * member.spec.gate_seconds
        pause = PAUSE_SECONDS + PAUSE_OF_EACH_WORKER * member.spec.workers
        heard = clock()
        while self.cut < cut:
            request = GateRequest(header=member.header(), cut=cut)
            try:
                reply: GateReply = await member.transport.call(
                    member.coordinator, "Coordinator.Gate", request, timeout_seconds=patience / 4
                )
                self.hear(reply.opened)
                heard = clock()
            except PSError as error:
                if not error.retryable:
                    # The next heartbeat meets the same and deals with it.
                    logger.info("event=gate_refused cut=%d error=%s", cut, error)
                    return
            if clock() - heard >= patience:
                logger.warning("event=gate_opened_alone cut=%d seconds=%g", cut, patience)
                return
            if self.cut < cut:
                self._changed.clear()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._changed.wait(), pause)
