# SPDX-License-Identifier: Apache-2.0
"""Where a table's rows and indexes lie: large pieces of address space, on huge pages where the system gives them.

    Arena     chunks of rows of all blocks, one behind the other
    Slots     indexes of all blocks that have the same size; a block that grows moves to the next size

Blocks of a table fill evenly, so those of one size share huge pages that none of them could fill alone. Invariant: what was
handed out neither moves nor shrinks until it is given back; what was given back costs no memory until it is handed out
again. Memory that was never written costs nothing but address space. Any thread.
"""

import ctypes
import mmap
import os
import sys
import threading
from typing import ClassVar

import numpy as np

from oarlock.embedding.jit import jit
from oarlock.embedding.pointer import LINE, Int, store_u8

HUGE = 2 << 20
FIRST_SEGMENT = 256 << 10  # a small table shall not cost megabytes
LAST_SEGMENT = 256 << 20
PAGE = mmap.PAGESIZE
# Not in the mmap module before Python 3.12; the same number on x86-64 and arm64.
MAP_NORESERVE = 0x4000 if sys.platform == "linux" else 0
MOST_HOLES = 8192  # a process may have some 65,000 mappings

_FAILED = ctypes.c_void_p(-1).value
_system = ctypes.CDLL(None, use_errno=True)
_map, _unmap, _advise = _system.mmap, _system.munmap, _system.madvise
_map.restype = ctypes.c_void_p
_map.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_unmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_advise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


@jit
def touch(address: Int, size: Int) -> None:
    """Have memory behind every page of a part that is about to be used and holds nothing yet."""
    for offset in range(0, size, PAGE):
        store_u8(address + offset, 0, np.uint8(0))
    store_u8(address + size - 1, 0, np.uint8(0))


class Pages:
    """Zeroed memory of its own, of at least ``size`` bytes at ``address``, back to the system when it is forgotten.

    The system is called by ctypes, not by the mmap module, which would keep the interpreter's lock meanwhile: giving
    back hundreds of megabytes takes milliseconds, in which no pull could begin or end.
    """

    holes: ClassVar[int] = 0  # of all of them that huge pages are kept out of: each costs two of the system's mappings

    def __init__(self, size: int, *, huge: bool) -> None:
        huge = huge and size >= 2 * HUGE
        align = HUGE if huge else LINE
        self._length = -(-(size + align) // PAGE) * PAGE
        # Private: memory that may be shared with other processes gets no huge pages.
        # Without a reserve: places of blocks that are stored elsewhere are never written to.
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
        start = _map(None, self._length, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0)
        if start in (None, _FAILED):
            raise MemoryError(f"no {size} bytes of memory: {os.strerror(ctypes.get_errno())}")
        self._start = int(start)
        self._holes = 0
        self.address = -(-start // align) * align
        self.size = size
        self._huge = huge and hasattr(mmap, "MADV_HUGEPAGE")
        if self._huge:
            # Refused where the system is built without them: then pages are small, and that is all.
            _advise(self.address, size // PAGE * PAGE, mmap.MADV_HUGEPAGE)

    def __del__(self) -> None:
        if getattr(self, "_start", 0):
            Pages.holes -= self._holes
            _unmap(self._start, self._length)

    def release(self, address: int, size: int) -> None:
        """Give the whole pages of a part back to the system; they read as zeros afterwards."""
        begin, end = _whole(address, size)
        if end > begin and hasattr(mmap, "MADV_DONTNEED"):
            if _advise(begin, end - begin, mmap.MADV_DONTNEED):
                ctypes.memset(begin, 0, end - begin)  # memory that is locked stays
            elif self._huge and Pages.holes < MOST_HOLES:
                # Or the system would soon fill the hole with zeros, to make huge pages of what is left around it.
                _advise(begin, end - begin, mmap.MADV_NOHUGEPAGE)
                self._holes += 1
                Pages.holes += 1

    def restore(self, address: int, size: int) -> None:
        """Let a part that was released have huge pages again."""
        begin, end = _whole(address, size)
        if end > begin and self._huge:
            _advise(begin, end - begin, mmap.MADV_HUGEPAGE)
            if self._holes:
                self._holes -= 1
                Pages.holes -= 1


def _whole(address: int, size: int) -> tuple[int, int]:
    """Return begin and end of the whole pages in a part; end may lie before begin when there are none."""
    return -(-address // PAGE) * PAGE, (address + size) // PAGE * PAGE


class Slots:
    """Zeroed places of one size, at most one for each block of a table, in one piece of address space."""

    def __init__(self, size: int, blocks: int) -> None:
        self.size = size
        self._pages = Pages(size * blocks, huge=True)
        self._used = 0  # places handed out at least once: side by side, so that they share huge pages from the start
        self._free: list[int] = []
        self._room = blocks

    def take(self) -> int:
        """Return the address of a place, 0 if all are taken."""
        if self._free:
            address = self._free.pop()
            self._pages.restore(address, self.size)
            return address
        if self._used == self._room:
            return 0
        self._used += 1
        return int(self._pages.address + (self._used - 1) * self.size)

    def give_back(self, address: int) -> bool:
        """Take a place back; return whether any is still taken."""
        self._pages.release(address, self.size)
        # Pages that it shared with its neighbours stayed.
        begin, end = _whole(address, self.size)
        for first, last in (
            ((address, begin), (end, address + self.size)) if begin <= end else ((address, address + self.size),)
        ):
            ctypes.memset(first, 0, last - first)
        self._free.append(address)
        return len(self._free) < self._used


class IndexMemory:
    """The index memory of a table's blocks: Slots for each size in use."""

    def __init__(self, blocks: int) -> None:
        self._blocks = blocks
        self._lock = threading.Lock()
        self._slots: dict[int, Slots] = {}
        self._alone: dict[int, Pages] = {}

    def take(self, size: int) -> int:
        """Return the address of ``size`` zeroed bytes for a block's index; MemoryError when there are none."""
        try:
            with self._lock:
                slots = self._slots.get(size)
                if slots is None:
                    try:
                        slots = self._slots[size] = Slots(size, self._blocks)
                    except MemoryError:
                        slots = None  # so much address space is not to be had
                address = slots.take() if slots is not None else 0
                if address == 0:
                    # Or a block is about to be replaced by another of the same size.
                    pages = Pages(size, huge=True)
                    address = pages.address
                    self._alone[address] = pages
                return address
        except (OverflowError, ctypes.ArgumentError) as error:
            raise MemoryError(str(error)) from None

    def give_back(self, address: int, size: int) -> None:
        """Take back what ``take`` handed out."""
        with self._lock:
            if self._alone.pop(address, None) is None and not self._slots[size].give_back(address):
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
                self._segment(address).restore(address, size)
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
            self._segment(address).release(address, size)

    def _segment(self, address: int) -> Pages:
        return next(s for s in self._segments if s.address <= address < s.address + s.size)

    def _extend(self, size: int) -> None:
        double = 2 * self._segments[-1].size if self._segments else FIRST_SEGMENT
        wanted = max(min(double, LAST_SEGMENT), -(-size // PAGE) * PAGE)
        segment = Pages(wanted, huge=True)
        self._segments.append(segment)
        self._next = segment.address
        self._end = segment.address + segment.size
