# SPDX-License-Identifier: Apache-2.0
"""Turns: who of those that wait for one of a few places gets the next one that is free.

Invariant: no place is free while somebody waits. Turns go by arrival as long as who waits longest has at least half of its time
left; from then on there are more calls than can be answered, and the newest comes first. By arrival every place would go to who
has hardly any time left, and all that is done for it would be in vain: that those who come late are served while those who came
early give up is what keeps work done in time at all. One event loop.
"""

import asyncio
from collections import OrderedDict


class Turns:
    """``places`` places."""

    def __init__(self, places: int) -> None:
        self._free = places
        # By arrival; until when each goes before those that come later.
        self._waiting: OrderedDict[asyncio.Future[None], float] = OrderedDict()

    @property
    def free(self) -> bool:
        """Whether one could be had without waiting."""
        return self._free > 0

    async def acquire(self, until: float) -> None:
        """Take a place, which ``release`` gives back, or wait for one; the caller gives up at ``until``, a time of the loop."""
        if self._free:
            self._free -= 1
            return
        loop = asyncio.get_running_loop()
        turn = loop.create_future()
        self._waiting[turn] = (loop.time() + until) / 2
        try:
            await turn
        except BaseException:
            if self._waiting.pop(turn, None) is None and not turn.cancelled():
                # It was given a place and cannot use it.
                self.release()
            raise

    def release(self) -> None:
        """Give a place back, to who is next."""
        while self._waiting:
            late = asyncio.get_running_loop().time() > next(iter(self._waiting.values()))
            turn, _ = self._waiting.popitem(last=late)
            if not turn.done():
                turn.set_result(None)
                return
        self._free += 1
