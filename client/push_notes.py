# SPDX-License-Identifier: Apache-2.0
"""Notes of pushes: a line for every message of a push that a shard answered, in a file of the worker that sent it.

They tell when training went on after a process died, which counters cannot: by block, and to the microsecond. Invariant: a line
says of a block that it is done only if the shard's answer said so, so after every required copy had it; it is written as soon
as the answer was read, by one write. Moments are of ``time.monotonic``, which all processes of a machine share. Without
``--push-notes`` nothing is done. One event loop writes a file; anybody reads.
"""

import logging
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from oarlock.proto.errors import InvalidArgument
from oarlock.proto.shard_pb2 import PushRequest

logger = logging.getLogger(__name__)

ENDING = ".pushes"


def line_of(blocks: int) -> np.dtype[np.void]:
    """Return the form of a line: ``shard`` is the incarnation that answered, ``done`` a bit for each block of the job."""
    fields = [("sent", "<f8"), ("told", "<f8"), ("shard", "<u8"), ("split", "<i8"), ("group", "<i8"), ("rank", "<i8")]
    return np.dtype([*fields, ("done", "u1", (-(-blocks // 8),))])


class PushNotes:
    """``open()``, then ``note`` for each answer, then ``close()``."""

    def __init__(self, folder: Path, blocks: int, incarnation: int) -> None:
        self._path = folder / f"{incarnation:016x}{ENDING}"
        self._blocks = blocks
        self._line = np.zeros(1, line_of(blocks))
        self._done = np.zeros(blocks, np.bool_)

    def open(self) -> "PushNotes":
        try:
            self._out = self._path.open("ab", buffering=0)
        except OSError as error:
            raise InvalidArgument(f"--push-notes {self._path.parent}: cannot be written ({error.strerror})") from None
        return self

    def note(self, sent: float, request: PushRequest, shard: int, blocks: NDArray[np.int32], moved: object) -> None:
        """Note that ``shard`` answered for ``blocks``, but the ``moved`` ones, a message sent at ``sent``."""
        self._done[:] = False
        self._done[blocks] = True
        self._done[moved] = False
        line = self._line[0]
        line["sent"], line["told"], line["shard"] = sent, time.monotonic(), shard
        line["split"], line["group"], line["rank"] = request.split, request.group, request.rank
        line["done"] = np.packbits(self._done)
        try:
            self._out.write(self._line.tobytes())
        except OSError as error:
            # A full disk is no reason to stop training.
            logger.warning("event=push_unnoted error=%s", error)

    def close(self) -> None:
        self._out.close()


def read_notes(folder: Path, blocks: int) -> NDArray[np.void]:
    """Return all lines in a folder by the moment that they were told, with ``worker``, the incarnation that wrote them.

    A line that its process was killed in the middle of is left out.
    """
    form = line_of(blocks)
    found = [np.empty(0, [("worker", "<u8"), *form.descr])]
    for path in sorted(folder.glob(f"*{ENDING}")):
        data = path.read_bytes()
        lines = np.frombuffer(data[: len(data) - len(data) % form.itemsize], form)
        mine = np.empty(len(lines), found[0].dtype)
        mine["worker"] = int(path.name.removesuffix(ENDING), 16)
        for name in form.names or ():
            mine[name] = lines[name]
        found.append(mine)
    whole = np.concatenate(found)
    ordered: NDArray[np.void] = whole[np.argsort(whole["told"], kind="stable")]
    return ordered


def blocks_done(lines: NDArray[np.void], blocks: int) -> NDArray[np.bool_]:
    """Return bool[lines, blocks]: which blocks each line says are done."""
    return np.unpackbits(lines["done"], axis=1, count=blocks).astype(np.bool_)
