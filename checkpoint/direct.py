# SPDX-License-Identifier: Apache-2.0
"""Large files past the system's cache: a copy less, and no memory taken from those who train.

What a cut writes is not read again soon, and what a restore reads is read once; yet the cache would take as many fresh pages,
whose faults cost more processor time than checksums do. Invariant: a file is the same by either way; where a file
system knows no direct way, or refuses a part, the rest goes through its cache. Any thread.
"""

import errno
import os
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from oarlock.embedding.recycled import Recycled

if TYPE_CHECKING:
    from oarlock.checkpoint.files import Calls

# Of a smaller file the system's cache costs next to nothing.
LEAST_BYTES = 1 << 20
# A multiple of every disk's unit; memory of whole pages is aligned to it.
UNIT = 4096
CHUNK_BYTES = 4 << 20
# For all threads; what was read stays taken as long as somebody looks at it.
buffers = Recycled(keep=128 << 20)


def write_direct(calls: "Calls", descriptor: int, pieces: Iterable[memoryview]) -> None:
    """Write all pieces to a new file."""
    direct = calls.bypass(descriptor, True)
    chunk, filled = buffers.take(CHUNK_BYTES), 0
    for piece in pieces:
        rest = np.frombuffer(piece, np.uint8)
        while len(rest):
            n = min(len(rest), CHUNK_BYTES - filled)
            chunk[filled : filled + n] = rest[:n]
            rest, filled = rest[n:], filled + n
            if filled == CHUNK_BYTES:
                direct = _write(calls, descriptor, chunk.data, direct)
                filled = 0
    whole = filled // UNIT * UNIT
    direct = _write(calls, descriptor, chunk.data[:whole], direct)
    if whole < filled:
        # The end is no whole unit.
        if direct:
            calls.bypass(descriptor, False)
        _write(calls, descriptor, chunk.data[whole:filled], False)


def _write(calls: "Calls", descriptor: int, rest: memoryview, direct: bool) -> bool:
    """Write ``rest``; return whether the direct way is still taken."""
    while rest:
        try:
            rest = rest[calls.write(descriptor, rest) :]
        except OSError as error:
            # After a part of a unit was written, or where the unit is larger.
            if not direct or error.errno != errno.EINVAL:
                raise
            calls.bypass(descriptor, False)
            direct = False
    return direct


def read_direct(calls: "Calls", descriptor: int, size: int) -> NDArray[np.uint8]:
    """Return the first ``size`` bytes of a file, read-only, or as many as there are."""
    direct = calls.bypass(descriptor, True)
    room = buffers.take(-(-size // UNIT) * UNIT)
    at = 0
    while at < size:
        try:
            n = os.preadv(descriptor, [room.data[at:]], at)
        except OSError as error:
            if not direct or error.errno != errno.EINVAL:
                raise
            calls.bypass(descriptor, False)
            direct = False
            continue
        if not n:
            break
        at += n
    found = room[: min(at, size)]
    found.flags.writeable = False
    return found
