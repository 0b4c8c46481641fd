# SPDX-License-Identifier: Apache-2.0
"""Closing: answers about blocks that are closed for a hand-over, kept back until that has ended (SEMANTICS section 6).

Whoever was told at once to ask again would ask a few milliseconds later, and again, and the coordinator as well where the block
went. Who is told at the end asks once, and in the right place.

Invariant: an answer is kept as long as one of its blocks is closed here, and no longer; it is given without the push lock, which
covers all else, but for ``fail``. So many are kept at most that whatever ends a hand-over finds a thread.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from oarlock.proto.errors import PSError
from oarlock.proto.pending import Pending
from oarlock.proto.shard_pb2 import PushReply
from oarlock.ps.holdings import Holdings

MOST_KEPT = 64


@dataclass(frozen=True, eq=False)
class Kept:
    """Given to ``pending`` at the end: ``answer``, or what that stands for, with where ``numbers`` are now; or an error."""

    numbers: NDArray[np.int32]
    pending: Pending
    answer: PushReply | Pending | PSError

    def give(self) -> None:
        """Answer, once there is an answer."""
        found = self.answer
        if isinstance(found, PSError):
            self.pending.fail(found)
        elif isinstance(found, PushReply):
            self.pending.resolve(found)
        else:
            found.add_done_callback(self._pass_on)

    def _pass_on(self) -> None:
        assert isinstance(self.answer, Pending), "whoever has an answer has given it"
        try:
            self.pending.resolve(self.answer.result())
        except PSError as error:
            self.pending.fail(error)


class Closing:
    """The answers that are kept about closed blocks of ``holdings``."""

    def __init__(self, holdings: Holdings) -> None:
        self._holdings = holdings
        self._kept: list[Kept] = []
        self._most = MOST_KEPT

    def closed(self, numbers: NDArray[np.int32]) -> NDArray[np.int32]:
        """Return those of the blocks that are closed for a hand-over. The push lock is held."""
        if not self._holdings.closed:
            return numbers[:0]
        found: NDArray[np.int32] = numbers[np.isin(numbers, list(self._holdings.closed))]
        return found

    def keep(self, numbers: NDArray[np.int32], reply: PushReply, answer: PushReply | Pending) -> PushReply | Pending:
        """Return the answer to a push, that is ``answer``, in whose ``reply`` it says where ``numbers`` are: now, or later."""
        if len(self.closed(numbers)) and len(self._kept) < self._most:
            pending = Pending(so_far=reply)
            self._kept.append(Kept(numbers, pending, answer))
            return pending
        self._holdings.tell_where(numbers, reply.where)
        return answer

    def refuse(self, numbers: NDArray[np.int32], error: PSError) -> Pending | None:
        """Return what stands for an error about blocks that is raised later; None: it is raised now. The push lock is held."""
        if not len(self.closed(numbers)) or len(self._kept) >= self._most:
            return None
        pending = Pending(so_far=error)
        self._kept.append(Kept(numbers, pending, error))
        return pending

    def ended(self) -> list[Kept]:
        """Return what is to be given now, and is kept no more. The push lock is held."""
        if not self._kept:
            return []
        over = [each for each in self._kept if not len(self.closed(each.numbers))]
        self._kept = [each for each in self._kept if each not in over]
        for each in over:
            reply = each.pending.so_far
            if isinstance(reply, PushReply):
                self._holdings.tell_where(each.numbers, reply.where)
        return over

    def fail(self, error: PSError) -> None:
        """Let nobody wait any more: this shard's part in the run is over. The loop calls it, and waits for no lock."""
        self._most = 0
        kept, self._kept = self._kept, []
        for each in kept:
            each.pending.fail(error)


def give(answers: Iterable[Kept]) -> None:
    """Give answers. No lock is held."""
    for each in answers:
        each.give()
