# SPDX-License-Identifier: Apache-2.0
"""Memory that is used again: large pieces for a while, which are kept warm for whoever wants the next.

A page that a process touches for the first time costs it a fault, and where the machine's own memory is virtual the
host another, ten times as much as writing to it. Invariant: memory is handed out again only after the array that it was handed
out as, and every view of that, are gone; at most ``keep`` bytes that nobody uses are kept. Any thread.
"""

import threading
from typing import Any

import numpy as np
from numpy.typing import NDArray

from oarlock.embedding.memory import PAGE, Pages, touch

Bytes = NDArray[np.uint8]


class Recycled:
    """Hands out memory in pieces of whole pages; ``keep``: how many bytes are kept when they are not in use."""

    def __init__(self, keep: int) -> None:
        self._keep = keep
        # Entered again where the collector of garbage finds lent memory meanwhile.
        self._lock = threading.RLock()
        self._free: dict[int, list[Pages]] = {}
        self.kept = 0

    def take(self, size: int) -> Bytes:
        """Return ``size`` bytes, uint8[size], that begin with a page and hold anything; MemoryError when there are none."""
        room = _rounded(size)
        with self._lock:
            pages = self._pop(room)
        return self._lent(pages or Pages(room, huge=True), size)

    def warm(self, size: int, total: int) -> None:
        """See to it that pieces of ``size`` bytes, ``total`` in all or what may be kept, are there and were touched before."""
        while self.warm_one(size, total):
            pass

    def warm_one(self, size: int, total: int) -> bool:
        """As ``warm``, one piece of it; return whether there was one to be warmed."""
        room = _rounded(size)
        with self._lock:
            have = len(self._free.get(room, ())) * room
            if have >= total or self.kept + room > self._keep:
                return False
        pages = Pages(room, huge=True)
        touch(pages.address, room)
        self.take_back(pages)
        return True

    def take_back(self, pages: Pages) -> None:
        """Keep memory that nobody uses any more, or let it go."""
        with self._lock:
            if self.kept + pages.size <= self._keep:
                self._free.setdefault(pages.size, []).append(pages)
                self.kept += pages.size

    def let_go(self) -> None:
        """Keep nothing of what nobody uses now."""
        with self._lock:
            self._free, self.kept = {}, 0

    def _pop(self, room: int) -> Pages | None:
        free = self._free.get(room)
        if not free:
            return None
        self.kept -= room
        return free.pop()

    def _lent(self, pages: Pages, size: int) -> Bytes:
        found: Bytes = np.asarray(_Lent(self, pages))
        return found[:size]


class _Lent:
    """What an array of lent memory stands on: gone when the last view of it is."""

    def __init__(self, owner: Recycled, pages: Pages) -> None:
        self._owner, self._pages = owner, pages

    @property
    def __array_interface__(self) -> dict[str, Any]:
        return {"version": 3, "typestr": "|u1", "shape": (self._pages.size,), "data": (self._pages.address, False)}

    def __del__(self) -> None:
        self._owner.take_back(self._pages)


def _rounded(size: int) -> int:
    """Return a size with few others near it, so that pieces of about one size can take each other's place."""
    step = max(PAGE, 1 << max(0, size.bit_length() - 4))
    return -(-max(size, 1) // step) * step
