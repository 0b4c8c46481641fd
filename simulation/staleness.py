# SPDX-License-Identifier: Apache-2.0
"""The bound of ssp(s), tested at every pull: its rows hold all groups of every active worker that are more than s behind.

Invariant: who is active since when is read off the coordinator's answers, and what is done off the pushes that a shard has
handled, not off any clock. A worker that is given splits while it has none begins at the minimum, or where it was, if that
is further; with the last of them closed it has none, whether it asks for more or not.
"""

from typing import Any

from oarlock.proto.coordinator_pb2 import TRAIN
from oarlock.proto.errors import PSError


class Bound:
    """Follows one job. ``violation`` of a pull is said in words, empty if there is none.

    ``follows``: blocks stay where they are, so that every shard gets something of every group.
    """

    def __init__(self, staleness: int, *, follows: bool) -> None:
        self._staleness = staleness
        self._follows = follows
        # First number of each active worker (incarnation), and what each shard has of it.
        self._begin: dict[int, int] = {}
        self._done: dict[int, dict[int, set[int]]] = {}
        self._answers: dict[int, tuple[int, list[int], int]] = {}
        # The splits that each was given and has not closed, and those that were closed: an old answer may come again.
        self._open: dict[int, set[int]] = {}
        self._closed: set[int] = set()

    def answered(self, method: str, request: Any, reply: Any) -> None:
        """After the coordinator answered a question."""
        if reply is None or isinstance(reply, PSError):
            return
        if method == "Coordinator.Lease":
            self._leased(request, reply)
        elif method == "Coordinator.CloseSplit" and request.work == TRAIN:
            self._closed.add(request.split)
            left = self._open.get(request.header.sender, set())
            left.discard(request.split)
            if not left:
                self.gone(request.header.sender)

    def _leased(self, request: Any, reply: Any) -> None:
        sender = request.header.sender
        if request.clock.active:
            if reply.work == TRAIN:
                self._open.setdefault(sender, set()).update(set(reply.splits) - self._closed)
            return
        answer = (request.number, list(reply.splits), reply.minimum)
        if self._answers.get(sender) == answer:
            # The same question again, and the same answer; another life of the coordinator may lease the same from later on.
            return
        self._answers[sender] = answer
        self.gone(sender)
        if reply.work == TRAIN:
            # It counts on from where it was, unless all others are further.
            self._begin[sender], self._done[sender] = max(reply.minimum, request.clock.acknowledged), {}
            self._open[sender] = set(reply.splits) - self._closed

    def gone(self, sender: int) -> None:
        """The worker is no member any more, or has no splits."""
        self._begin.pop(sender, None)
        self._done.pop(sender, None)
        self._open.pop(sender, None)

    def pushed(self, shard: int, request: Any) -> None:
        """After a shard has applied, or skipped, all of a push."""
        done = self._done.get(request.header.sender)
        if done is not None and request.number:
            done.setdefault(shard, set()).add(request.number - 1)

    def violation(self, shard: int, request: Any) -> str:
        """Return what a pull that a shard is about to answer lacks."""
        sender = request.header.sender
        if not self._follows or not request.number or sender not in self._begin:
            return ""
        number = request.number - 1
        for worker, begin in self._begin.items():
            done = self._done[worker].get(shard, ())
            missing = next((n for n in range(begin, number - self._staleness) if n not in done), None)
            if missing is not None:
                return (
                    f"group {number} of worker {sender} pulls from shard {shard} without group {missing} of worker {worker}, "
                    f"with s = {self._staleness}"
                )
        return ""
