# SPDX-License-Identifier: Apache-2.0
"""What a shard knows of cuts: the newest one whose view it began, and which pushes of before it may still come.

    a push numbered     from a worker that stood at the gate      from any other worker
    with the cut        applied                                   applied
    below it            applied; the view is torn: this worker    refused (LeaseLost): it was not there, so nobody knows
                        opened its gate by itself                 which of its groups are in which blocks

Invariant: a number below the newest one comes to nothing here, and so does one that was given up, in whatever order messages
arrive. Guarded by the shard's push lock.
"""

from collections.abc import Collection

from oarlock.proto.common_pb2 import Header
from oarlock.proto.errors import InvalidArgument, LeaseLost


class Cuts:
    """``number``: the newest cut whose view was begun here, 0 if there is none."""

    def __init__(self) -> None:
        self.number = 0
        self.torn = False
        self._workers: frozenset[int] = frozenset()
        self._given_up = 0

    def is_new(self, number: int) -> bool:
        """Return whether cut ``number`` is to be begun, False if that was done already."""
        self.check_newer(number)
        return number != self.number

    def begin(self, number: int, workers: Collection[int]) -> bool:
        """Take up cut ``number``, for which ``workers`` (incarnations) wait; return False if that was done already."""
        if not self.is_new(number):
            return False
        self.number, self._workers, self.torn = number, frozenset(workers), False
        return True

    def check_newer(self, number: int) -> None:
        """Raise InvalidArgument for a number that comes to nothing here."""
        if number < 1 or number < self.number or number <= self._given_up:
            newest = max(self.number, self._given_up)
            raise InvalidArgument(f"cut {number} was given up, cut {newest} is the newest one here", cut=number)

    def give_up(self, number: int) -> bool:
        """Refuse to begin cut ``number`` from now on; return whether its view was begun."""
        self._given_up = max(self._given_up, number)
        return number == self.number

    def check(self, header: Header) -> None:
        """Deal with the number that a push carries."""
        if header.cut >= self.number:
            return
        if header.sender not in self._workers:
            raise LeaseLost(
                f"the push is of before cut {self.number}, for which its worker did not wait: join anew",
                incarnation=header.sender,
            )
        self.torn = True
