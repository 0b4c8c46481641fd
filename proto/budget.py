# SPDX-License-Identifier: Apache-2.0
"""A budget: bytes that requests in work take before they use them, and give back. Who finds none waits, in order of arrival.

Invariant: what is taken is never above the limit, but by `force`, for what is there already. A claim over the whole limit counts
as the whole, so it runs alone. Nobody waits longer than was said; a claim whose peer has moved nothing for ``stall_seconds`` is
ended once its bytes are in somebody's way. Called from many threads.
"""

import time
from collections import deque
from collections.abc import Callable
from threading import Condition, Lock

from oarlock.proto.errors import Unavailable

# So long a request waits for memory before it is refused. Its bytes wait in the system's buffers, which slows its sender down.
WAIT_SECONDS = 1.0
# So long the peer of a claim may move nothing while others wait for its bytes.
STALL_SECONDS = 1.0


class Claim:
    """Bytes of one request: how many, since when its peer is to move some of them, and how to end it."""

    __slots__ = ("_end", "ended", "size", "stalled_since")

    def __init__(self, size: int, end: Callable[[], object] | None) -> None:
        self.size = size
        self._end = end
        self.ended = False
        self.stalled_since: float | None = None

    def waits(self) -> None:
        """From now on it is the peer's turn to send or to read; also: it did."""
        self.stalled_since = time.monotonic()

    def works(self) -> None:
        """From now on it is this process's turn."""
        self.stalled_since = None

    def end(self) -> None:
        """End the connection; the bytes come back once its thread has seen that."""
        self.stalled_since = None
        self.ended = True
        if self._end is not None:
            self._end()


class _Waiter:
    __slots__ = ("claim", "granted", "turn")

    def __init__(self, claim: Claim, lock: Lock) -> None:
        self.claim = claim
        self.granted = False
        self.turn = Condition(lock)


class Budget:
    """``limit`` bytes of what is ``named`` so; a refusal names ``setting``, which gives more."""

    def __init__(self, limit: int, named: str, setting: str, *, stall_seconds: float = STALL_SECONDS) -> None:
        self.limit = limit
        self._named = named
        self._setting = setting
        self._stall_seconds = stall_seconds
        self._lock = Lock()
        self._held: set[Claim] = set()
        self._queue: deque[_Waiter] = deque()
        self._closed = False
        self.taken = 0
        self.refused = 0

    @property
    def waiting(self) -> int:
        """How many wait for their turn."""
        return len(self._queue)

    def take(self, size: int, end: Callable[[], object] | None = None, *, seconds: float = WAIT_SECONDS) -> Claim:
        """Return a claim on ``size`` bytes, which ``give`` gives back; Unavailable if there are none within ``seconds``.

        ``end`` closes the connection of a peer that does nothing; it must not wait.
        """
        claim = Claim(min(size, self.limit), end)
        with self._lock:
            if not self._queue and self._fits(claim):
                self._grant(claim)
                return claim
            if not self._closed:
                waiter = _Waiter(claim, self._lock)
                self._queue.append(waiter)
                try:
                    self._wait(waiter, time.monotonic() + seconds)
                finally:
                    if not waiter.granted:
                        self._queue.remove(waiter)
                        # A smaller one behind it may fit.
                        self._admit()
                if waiter.granted:
                    return claim
            self.refused += 1
            taken = self.taken
        raise Unavailable(
            f"{size} bytes are wanted of the {self.limit} for {self._named}, of which {taken} are taken: this process has more "
            f"work than memory for it ({self._setting}); send again after a pause"
        )

    def force(self, size: int) -> Claim:
        """Return a claim on bytes that are used already, whatever the limit."""
        claim = Claim(size, None)
        with self._lock:
            self._grant(claim)
        return claim

    def give(self, claim: Claim) -> None:
        """Give the bytes of a claim back; those who wait get them."""
        with self._lock:
            self._held.remove(claim)
            self.taken -= claim.size
            self._admit()

    def close(self) -> None:
        """Refuse at once from now on whoever would wait."""
        with self._lock:
            self._closed = True
            for waiter in self._queue:
                waiter.turn.notify()

    def _fits(self, claim: Claim) -> bool:
        return self.taken + claim.size <= self.limit

    def _grant(self, claim: Claim) -> None:
        self._held.add(claim)
        self.taken += claim.size

    def _admit(self) -> None:
        while self._queue and self._fits(self._queue[0].claim):
            waiter = self._queue.popleft()
            self._grant(waiter.claim)
            waiter.granted = True
            waiter.turn.notify()
        if self._queue:
            # Who is first now looks after those that stall.
            self._queue[0].turn.notify()

    def _wait(self, waiter: _Waiter, until: float) -> None:
        while not waiter.granted and not self._closed and (left := until - time.monotonic()) > 0:
            if self._queue[0] is waiter:
                self._send_away(waiter.claim)
                left = min(left, max(self._stall_seconds / 4, 0.01))
            waiter.turn.wait(left)

    def _send_away(self, wanted: Claim) -> None:
        """End claims whose peers stall, the longest first, until what they give back is enough."""
        now = time.monotonic()
        stalled = [(c.stalled_since, c) for c in self._held if c.stalled_since is not None]
        # What was ended is on its way back.
        missing = self.taken + wanted.size - self.limit - sum(c.size for c in self._held if c.ended)
        for since, claim in sorted(stalled, key=lambda pair: pair[0]):
            if missing <= 0 or now - since < self._stall_seconds:
                return
            missing -= claim.size
            claim.end()
