# SPDX-License-Identifier: Apache-2.0
"""A stream: what is to be told to one other shard of the blocks that it has copies of, in the order in which it was done.

Invariant: operations have numbers that ascend by one; one is kept until the other side has answered for it, and sent again as it
was. ``Leading``'s lock covers it.
"""

from collections import deque

from oarlock.client.router import ShardAddress
from oarlock.ps.operations import Operation, nbytes, pieces

# Of one message; an operation alone may be larger.
MESSAGE_BYTES = 16 << 20
# Beside its arrays.
OPERATION_BYTES = 256


class Stream:
    """Operations ``first`` to ``next`` - 1 are kept for shard ``to``; ``number`` is the stream's own."""

    def __init__(self, to: ShardAddress, number: int) -> None:
        self.to = to
        self.number = number
        self.first = 0
        self.next = 0
        self.nbytes = 0
        self._kept: deque[tuple[Operation, int]] = deque()

    def append(self, operation: Operation) -> None:
        """Keep an operation; one that is larger than a message in pieces, each of some of its blocks."""
        for piece in pieces(operation, MESSAGE_BYTES):
            size = nbytes(piece) + OPERATION_BYTES
            self._kept.append((piece, size))
            self.nbytes += size
            self.next += 1

    def some(self) -> tuple[int, list[Operation]]:
        """Return the number of the first operation, and those that make a message from there on."""
        out: list[Operation] = []
        total = 0
        for operation, size in self._kept:
            total += size
            if out and total > MESSAGE_BYTES:
                break
            out.append(operation)
        return self.first, out

    def answered(self, upto: int) -> bool:
        """Let go of the operations below ``upto``; return whether there were any."""
        before = self.first
        while self.first < min(upto, self.next):
            self.nbytes -= self._kept.popleft()[1]
            self.first += 1
        return self.first > before
