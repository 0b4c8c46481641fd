# SPDX-License-Identifier: Apache-2.0
"""Dense values for processes that serve a job's predictions: those of the blocks that are others than what who asks has.

Invariant: nothing is changed. The values of an answer are of one instant, between two pushes, or between two steps where the job
has ranks: they are copied with the push lock held, which takes no longer than the copy of what one answer may have. They leave
at a bounded rate, all who ask together. Called from many threads.
"""

from collections.abc import Callable
from threading import Lock
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from oarlock.proto.arrays import pack, unpack
from oarlock.proto.errors import Malformed
from oarlock.proto.shard_pb2 import ChangesReply, ChangesRequest
from oarlock.proto.work import expects

if TYPE_CHECKING:
    from oarlock.ps.shard import Shard

# Of one answer, which has one block in any case; and in a second.
DENSE_BYTES = 32 << 20
DENSE_BYTES_PER_SECOND = 128 << 20
# A stamp is one more than the operations of a block, with how often it came or went here in the bits above these.
_LIFE = np.uint64(40)

Numbers = NDArray[np.int32]


class DenseChanges:
    """Adds the dense values of ``shard`` to answers."""

    def __init__(self, shard: "Shard", *, clock: Callable[[], float], answer_bytes: int = DENSE_BYTES) -> None:
        self._shard = shard
        self._clock = clock
        self._answer_bytes = answer_bytes
        self._counting = Lock()
        # When the next values may leave.
        self._next = 0.0
        self.bytes = 0

    def asked(self, request: ChangesRequest) -> Numbers:
        """Return the dense blocks that a request asks of, by their numbers: int32[d]."""
        if not request.HasField("dense"):
            return np.empty(0, np.int32)
        layout = self._shard.layout
        numbers: Numbers = unpack(request.dense, np.int32, "dense blocks").astype(np.int32)
        if len(numbers) and (
            numbers[0] < layout.dense_base or numbers[-1] >= layout.blocks or not (numbers[1:] > numbers[:-1]).all()
        ):
            raise Malformed(f"dense blocks are not ascending, from {layout.dense_base} to below {layout.blocks}")
        return numbers

    def add(self, request: ChangesRequest, reply: ChangesReply) -> int:
        """Add to an answer what is news of the dense blocks that are asked of and owned here; return how many bytes."""
        numbers = self.asked(request)
        if not len(numbers):
            return 0
        shard, layout = self._shard, self._shard.layout
        known = unpack(request.dense_stamps, np.uint64, "stamps")
        if len(known) != len(numbers):
            raise Malformed(f"{len(numbers)} dense blocks with {len(known)} stamps")
        # Before the lock is asked for.
        room = int(min(4 * layout.lengths_of(numbers).sum(), self._answer_bytes + 4 * layout.dense_lengths.max()))
        expects(room)
        if not self._may_leave():
            reply.dense_left = len(numbers)
            return 0
        with shard.push_lock:
            here = shard.owned[numbers]
            numbers, known = numbers[here], known[here]
            blocks = (numbers - layout.dense_base).astype(np.int64)
            stamps = (shard.dense_sequence[blocks] + 1).astype(np.uint64)
            stamps += shard.dense_group.lives(blocks).astype(np.uint64) << _LIFE
            news = np.flatnonzero(stamps != known)
            ends = 4 * np.cumsum(layout.dense_lengths[blocks[news]])
            some = news[: max(1, int(np.searchsorted(ends, self._answer_bytes, side="right")))]
            values = np.empty(int(layout.dense_lengths[blocks[some]].sum()), np.float32)
            if len(some):
                shard.dense_group.pull(blocks[some], values)
        reply.dense_left = len(news) - len(some)
        reply.dense.CopyFrom(pack(numbers[some]))
        reply.dense_stamps.CopyFrom(pack(stamps[some]))
        reply.dense_values.CopyFrom(pack(values))
        with self._counting:
            self.bytes += values.nbytes
            self._next = max(self._next, self._clock()) + values.nbytes / DENSE_BYTES_PER_SECOND
        return values.nbytes

    def _may_leave(self) -> bool:
        with self._counting:
            return self._next <= self._clock()
