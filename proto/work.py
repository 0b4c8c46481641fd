# SPDX-License-Identifier: Apache-2.0
"""Requests in work: the memory that they may take together, and until when their callers wait for an answer.

Invariant: a request holds a claim on its bytes from before they are received until they are worked on, and one on its answer from
before that is made until it was sent; both come back however it ends. What its caller no longer waits for is refused, before
anything was changed. A handler speaks of its own request by `expects` and `refuse_late`, in the thread that calls it; both do
nothing where no limit was set (in one process).
"""

import threading
import time
from collections.abc import Callable
from typing import Any

from oarlock.proto.budget import STALL_SECONDS, WAIT_SECONDS, Budget, Claim
from oarlock.proto.buffers import Buffers
from oarlock.proto.errors import DeadlineExceeded
from oarlock.proto.pending import Pending, Waits

REQUEST_MEMORY_BYTES = 1 << 30
REQUEST_MEMORY_RANGE = (64 << 20, 1 << 50)
SETTING = "request_memory_bytes"
# Smaller messages and answers are not counted, so that orders get through whatever else there is.
SMALL_BYTES = 1 << 16
# Buffers that frames are received into and that are kept for the next ones, of all connections together.
MOST_KEPT = 64
# How long an answer that is not there yet is waited for where nobody said how long the caller waits.
PENDING_SECONDS = 60.0

_here = threading.local()


class Memory:
    """What all requests in work may take: three eighths of the limit for what is received, three for answers, one for kept
    buffers, and one is left for what is not counted (threads, small messages, what the allocator keeps).

    The shares are apart, so that requests that wait for room for their answers never keep out the answers they wait for.
    """

    def __init__(self, limit: int = REQUEST_MEMORY_BYTES, *, stall_seconds: float = STALL_SECONDS) -> None:
        self.limit = limit
        self.received = Budget(limit // 8 * 3, "what is received", SETTING, stall_seconds=stall_seconds)
        self.answers = Budget(limit // 8 * 3, "answers", SETTING, stall_seconds=stall_seconds)
        self.buffers = Buffers(MOST_KEPT, most_bytes=limit // 8)
        self._lock = threading.Lock()
        self._late = 0

    def late(self, what: str) -> DeadlineExceeded:
        """Count a request that nobody waits for, and return its error."""
        with self._lock:
            self._late += 1
        return DeadlineExceeded(
            f"{what}: the time that the caller gave it was over before its turn came; nothing was done"
        )

    @property
    def refused(self) -> dict[str, int]:
        """Requests that were refused: for want of memory, and because they came to their turn too late."""
        return {"memory": self.received.refused + self.answers.refused, "late": self._late}

    @property
    def nbytes(self) -> dict[str, int]:
        """Bytes that are taken, and the limit of all."""
        return {
            "received": self.received.taken,
            "answers": self.answers.taken,
            "buffers": self.buffers.nbytes,
            "limit": self.limit,
        }

    def close(self) -> None:
        """Let nobody wait any more."""
        self.received.close()
        self.answers.close()


class Work:
    """One request. ``seconds``: how long its caller waits from now on, None: not known; ``gone`` tells whether it has gone away.
    One thread."""

    def __init__(
        self,
        memory: Memory,
        named: str,
        *,
        seconds: float | None = None,
        end: Callable[[], object] | None = None,
        waits: Waits | None = None,
        gone: Callable[[], bool] = lambda: False,
    ) -> None:
        self._memory = memory
        self._named = named
        self._until = None if seconds is None else time.monotonic() + seconds
        self._end = end
        self._waits = waits or Waits()
        self._gone = gone
        self._received: Claim | None = None
        self._answers: list[Claim] = []
        # How many copies of an answer there are at a time.
        self.copies = 1

    def __enter__(self) -> "Work":
        return self

    def __exit__(self, *_: object) -> None:
        self.received()
        while self._answers:
            self._memory.answers.give(self._answers.pop())

    def refuse_late(self) -> None:
        """Raise DeadlineExceeded if the caller no longer waits."""
        if self._until is not None and time.monotonic() >= self._until:
            raise self._memory.late(self._named)

    def _patience(self) -> float:
        self.refuse_late()
        return WAIT_SECONDS if self._until is None else min(WAIT_SECONDS, self._until - time.monotonic())

    def wait(self, pending: Pending) -> Any:
        """Return the answer that comes later, for which this thread waits; or raise what it failed with, DeadlineExceeded once
        the caller waits no more, Unavailable at the end."""
        left = PENDING_SECONDS if self._until is None else self._until - time.monotonic()
        return self._waits.wait(pending, left, self._named, gone=self._gone)

    def receives(self, size: int) -> None:
        """Take ``size`` bytes for the request, which the peer is to send now; Unavailable, DeadlineExceeded."""
        if size > SMALL_BYTES:
            self._received = self._memory.received.take(size, self._end, seconds=self._patience())
            self.moved()

    def moved(self) -> None:
        """Note that the peer has sent or read something."""
        for claim in (self._received, *self._answers):
            if claim is not None:
                claim.waits()

    def works(self) -> None:
        """Note that all of the request has come."""
        if self._received is not None:
            self._received.works()

    def received(self) -> None:
        """Give back what was taken for the request: nobody looks at it any more."""
        if self._received is not None:
            self._memory.received.give(self._received)
            self._received = None

    def expects(self, size: int) -> None:
        """Take ``size`` bytes for the answer, and as many for each further copy; Unavailable, DeadlineExceeded."""
        if size > SMALL_BYTES:
            taking = self._memory.answers.take
            self._answers.append(taking(size * self.copies, self._end, seconds=self._patience()))

    def answers(self, size: int) -> None:
        """Count an answer of ``size`` bytes that was made, as far as the handler had not said so; it is sent now."""
        more = size - sum(claim.size for claim in self._answers)
        if more > SMALL_BYTES:
            self._answers.append(self._memory.answers.force(more))
        self.moved()

    def here(self) -> "_Here":
        """Have this thread's `expects` and `refuse_late` speak of it within the body."""
        return _Here(self)


class _Here:
    """A body within which this thread works on one request."""

    def __init__(self, work: Work) -> None:
        self._work = work

    def __enter__(self) -> None:
        _here.work = self._work

    def __exit__(self, *_: object) -> None:
        _here.work = None


def expects(size: int) -> None:
    """Take ``size`` bytes for the answer to the request that this thread works on, before it is made; Unavailable if there are
    none in time: nothing may have been changed by then."""
    work: Work | None = getattr(_here, "work", None)
    if work is not None:
        work.expects(size)


def refuse_late() -> None:
    """Raise DeadlineExceeded if nobody waits any more for the request that this thread works on. Before anything is changed."""
    work: Work | None = getattr(_here, "work", None)
    if work is not None:
        work.refuse_late()
