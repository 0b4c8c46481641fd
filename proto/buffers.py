# SPDX-License-Identifier: Apache-2.0
"""Buffers: memory that is used again once nobody looks at it. Fresh memory costs more than the bytes that are written into it,
since the system hands it out page by page.

Invariant: what `take` returns shares no memory with anything that is still referred to: every array and view of a buffer holds
a reference to it, so one that has none beside the list's own is free. Any thread.
"""

import math
import mmap
import sys
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

# Enough for the widest registers and a line of the cache.
ALIGNMENT = 64
# A buffer that was needed once for something larger is not kept.
KEEP_BYTES = 16 << 20
# A new one has room for somewhat more than was asked for: the next request is seldom of the same size.
LEAST_BYTES = 1 << 16
# Smaller ones are made anew.
SMALL_BYTES = 1 << 14
# From here on the system is asked for memory, and gets it back: the allocator would keep what a thread gave up.
MAPPED_BYTES = 1 << 20
# From here on pages are to be huge ones, as numpy has it.
HUGE_BYTES = 1 << 22


class Buffers:
    """At most ``most`` buffers of up to ``keep_bytes`` each and ``most_bytes`` in all (None: no such limit) are kept, beside
    those that are in use."""

    def __init__(self, most: int, *, keep_bytes: int = KEEP_BYTES, most_bytes: int | None = None) -> None:
        self._most = most
        self._keep_bytes = keep_bytes if most_bytes is None else min(keep_bytes, most_bytes)
        self._most_bytes = most * keep_bytes if most_bytes is None else most_bytes
        self._kept: list[NDArray[np.uint8]] = []
        self._lock = Lock()

    @property
    def nbytes(self) -> int:
        """Bytes of what is kept, in use or not."""
        with self._lock:
            return self._bytes()

    def _bytes(self) -> int:
        return sum(buffer.nbytes for buffer in self._kept)

    def take(self, size: int) -> NDArray[np.uint8]:
        """Return uint8[size], from a multiple of 64 on, with anything in it. MemoryError if there is no room."""
        if size < SMALL_BYTES:
            # Looking for one that is free costs more than such a one.
            return _aligned(np.empty(size + ALIGNMENT, np.uint8), size)
        with self._lock:
            best = spare = -1
            for i in range(len(self._kept)):
                # Beside the list's reference there is the argument's.
                if sys.getrefcount(self._kept[i]) != 2:
                    continue
                room = self._kept[i].nbytes
                if room >= size + ALIGNMENT:
                    if best < 0 or room < self._kept[best].nbytes:
                        best = i
                elif spare < 0 or room < self._kept[spare].nbytes:
                    spare = i
            if best >= 0:
                return _aligned(self._kept[best], size)
            if spare >= 0:
                del self._kept[spare]
            room = size + size // 4 + LEAST_BYTES
            keep = room <= self._keep_bytes and self._make_room(room)
            # What is not kept needs no room to spare.
            made = _made(room if keep else size + ALIGNMENT)
            if keep:
                self._kept.append(made)
            return _aligned(made, size)

    def _make_room(self, room: int) -> bool:
        """Give up free buffers until one of ``room`` bytes may be kept; return whether it may."""
        over = self._bytes() + room - self._most_bytes
        for i in range(len(self._kept) - 1, -1, -1):
            if over > 0 and sys.getrefcount(self._kept[i]) == 2:
                over -= self._kept[i].nbytes
                del self._kept[i]
        return over <= 0 and len(self._kept) < self._most

    def array(self, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        """Return an array with anything in it; a small one is fresh, which costs nothing."""
        wanted: np.dtype[Any] = np.dtype(dtype)
        size = math.prod(shape) * wanted.itemsize
        if size < LEAST_BYTES:
            return np.empty(shape, wanted)
        return self.take(size).view(wanted).reshape(shape)

    def copy(self, values: NDArray[Any]) -> NDArray[Any]:
        """Return a C-contiguous copy of ``values``."""
        out = self.array(values.shape, values.dtype)
        np.copyto(out, values)
        return out


def _made(size: int) -> NDArray[np.uint8]:
    if size < MAPPED_BYTES:
        return np.empty(size, np.uint8)
    try:
        mapped = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if size >= HUGE_BYTES:
            mapped.madvise(mmap.MADV_HUGEPAGE)
    except OSError as error:
        raise MemoryError(f"{size} bytes cannot be had: {error}") from None
    return np.frombuffer(mapped, np.uint8)


def _aligned(buffer: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    # Ten times as fast as `ctypes.data`.
    begin = -buffer.__array_interface__["data"][0] % ALIGNMENT
    return buffer[begin : begin + size]
