# SPDX-License-Identifier: Apache-2.0
"""Where a table's rows and indexes lie: large pieces of address space, on huge pages where the system gives them.

    Arena     chunks of rows of all blocks, one behind the other
    Slots     indexes of all blocks that have the same size, block n in place n; a block that grows moves to the next size

Blocks of a table fill evenly, so those of one size share huge pages that none of them could fill alone. Invariant: what was
handed out neither moves nor shrinks until it is given back; what was given back costs no memory until it is handed out
again. Memory that was never written costs nothing but address space. Any thread.
"""

import contextlib
import ctypes
import mmap
import threading
from typing import Any

import numpy as np
from numpy.typing import NDArray

from oarlock.embedding.pointer import LINE, address_of

HUGE = 2 << 20
FIRST_SEGMENT = 256 << 10  # a small table shall not cost megabytes
LAST_SEGMENT = 256 << 20
PAGE = mmap.PAGESIZE


class Pages:
    """Zeroed memory of its own, of at least ``size`` bytes at ``address``, back to the system when it is forgotten."""

    def __init__(self, size: int, *, huge: bool) -> None:
        huge = huge and size >= 2 * HUGE
        # Private: shared memory would get no huge pages, and keep what is given back.
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        self._map = mmap.mmap(-1, size + (HUGE if huge else LINE), flags=flags)
        self._bytes: NDArray[Any] = np.frombuffer(self._map, np.uint8)
        start = address_of(self._bytes)
        self.address = -(-start // HUGE) * HUGE if huge else -(-start // LINE) * LINE
        self.size = size
        self._shift = self.address - start
        if huge and hasattr(mmap, "MADV_HUGEPAGE"):
            # Refused where the system is built without them: then pages are small, and that is all.
            with contextlib.suppress(OSError):
                self._map.madvise(mmap.MADV_HUGEPAGE)

    def release(self, address: int, size: int) -> None:
        """Give the whole pages of a part back to the system; they read as zeros afterwards."""
        base = self.address - self._shift
        begin = -(-(address - base) // PAGE) * PAGE
        end = (address - base + size) // PAGE * PAGE
        if end > begin and hasattr(mmap, "MADV_DONTNEED"):
            with contextlib.suppress(OSError):
                self._map.madvise(mmap.MADV_DONTNEED, begin, end - begin)


class Slots:
    """Zeroed places of one size, one for each block of a table, in one piece of address space."""

    def __init__(self, size: int, blocks: int) -> None:
        self.size = size
        self._pages = Pages(size * blocks, huge=True)
        self._taken: set[int] = set()

    def take(self, block: int) -> int:
        """Return the address of a block's place, 0 if it has it already."""
        if block in self._taken:
            return 0
        self._taken.add(block)
        return self._pages.address + block * self.size

    def give_back(self, block: int) -> bool:
        """Take a block's place back; return whether any is still taken."""
        address = self._pages.address + block * self.size
        self._pages.release(address, self.size)
        # Pages that it shared with its neighbours stayed.
        begin, end = -(-address // PAGE) * PAGE, (address + self.size) // PAGE * PAGE
        edges = [(address, min(begin, address + self.size)), (max(end, address), address + self.size)]
        for first, last in edges if begin <= end else [(address, address + self.size)]:
            ctypes.memset(first, 0, max(0, last - first))
        self._taken.discard(block)
        return bool(self._taken)


class IndexMemory:
    """The index memory of a table's blocks: Slots for each size in use."""

    def __init__(self, blocks: int) -> None:
        self._blocks = blocks
        self._lock = threading.Lock()
        self._slots: dict[int, Slots] = {}
        self._alone: dict[int, Pages] = {}

    def take(self, block: int, size: int) -> int:
        """Return the address of ``size`` zeroed bytes for a block's index; MemoryError when there are none."""
        try:
            with self._lock:
                slots = self._slots.get(size)
                if slots is None:
                    slots = self._slots[size] = Slots(size, self._blocks)
                address = slots.take(block)
                if address == 0:
                    # The block is about to be replaced by one of the same size.
                    pages = Pages(size, huge=True)
                    address = pages.address
                    self._alone[address] = pages
                return address
        except (OSError, OverflowError, ValueError) as error:
            raise MemoryError(str(error)) from None

    def give_back(self, block: int, size: int, address: int) -> None:
        """Take back what ``take`` handed out."""
        with self._lock:
            if self._alone.pop(address, None) is None and not self._slots[size].give_back(block):
                del self._slots[size]


class Arena:
    """Hands out chunks by size. ``used`` bytes are handed out at present."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._segments: list[Pages] = []
        self._next = 0
        self._end = 0
        self._free: dict[int, list[int]] = {}
        self.used = 0

    def take(self, size: int) -> int:
        """Return the address of ``size`` bytes, on a cache line of their own; MemoryError when there are none."""
        size = -(-size // LINE) * LINE
        with self._lock:
            free = self._free.get(size)
            if free:
                address = free.pop()
            else:
                if self._next + size > self._end:
                    self._extend(size)
                address = self._next
                self._next += size
            self.used += size
            return address

    def give_back(self, address: int, size: int) -> None:
        """Take back what ``take`` handed out with the same size."""
        size = -(-size // LINE) * LINE
        with self._lock:
            self._free.setdefault(size, []).append(address)
            self.used -= size
            for segment in self._segments:
                if segment.address <= address < segment.address + segment.size:
                    segment.release(address, size)

    def _extend(self, size: int) -> None:
        double = 2 * self._segments[-1].size if self._segments else FIRST_SEGMENT
        wanted = max(min(double, LAST_SEGMENT), -(-size // PAGE) * PAGE)
        try:
            segment = Pages(wanted, huge=True)
        except OSError as error:
            raise MemoryError(str(error)) from None
        self._segments.append(segment)
        self._next = segment.address
        self._end = segment.address + segment.size
