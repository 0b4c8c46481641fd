# SPDX-License-Identifier: Apache-2.0
"""Places: how many calls of one kind a server has at once, and who has to go when somebody else comes.

Invariant: at most ``limit`` calls hold a place, and a newcomer gets one as long as any of them has waited for its peer for
``stall_seconds``. So a call that stalls (an idle stream, half a request, an answer that nobody reads) holds its thread only until
somebody else needs it. Called from many threads; a Place's own methods from the thread of its call.
"""

import time
from collections.abc import Callable
from threading import Condition

# So long a peer may do nothing before its place can go to another call; its caller then comes again (Unavailable).
STALL_SECONDS = 1.0


class Place:
    """One call's: since when it waits for its peer, and how to end it."""

    __slots__ = ("cancel", "stalled_since")

    def __init__(self, cancel: Callable[[], object], now: float) -> None:
        self.cancel = cancel
        self.stalled_since: float | None = now

    def waits(self) -> None:
        """From now on the peer is to send or to read something."""
        self.stalled_since = time.monotonic()

    def works(self) -> None:
        """From now on it is the server's turn."""
        self.stalled_since = None


class Places:
    """``limit`` places for calls."""

    def __init__(self, limit: int, *, stall_seconds: float = STALL_SECONDS) -> None:
        self._limit = limit
        self._stall_seconds = stall_seconds
        self._held: set[Place] = set()
        self._changed = Condition()
        self._closed = False

    def __len__(self) -> int:
        return len(self._held)

    def enter(self, cancel: Callable[[], object], *, patient: bool) -> Place | None:
        """Return a place, or None if all are held by calls that do something (``patient``: wait for one) or at the end."""
        with self._changed:
            while not self._closed:
                now = time.monotonic()
                if len(self._held) >= self._limit:
                    self._send_away(now)
                if len(self._held) < self._limit:
                    place = Place(cancel, now)
                    self._held.add(place)
                    return place
                if not patient:
                    return None
                self._changed.wait(max(self._stall_seconds / 4, 0.01))
            return None

    def _send_away(self, now: float) -> None:
        """End the call that has stalled the longest, if it did so for long enough."""
        stalled = [(p.stalled_since, p) for p in self._held if p.stalled_since is not None]
        since, place = min(stalled, key=lambda pair: pair[0], default=(now, None))
        if place is not None and now - since >= self._stall_seconds:
            self._held.remove(place)
            place.cancel()

    def leave(self, place: Place) -> None:
        with self._changed:
            self._held.discard(place)
            self._changed.notify()

    def end_all(self) -> None:
        """End all calls that hold a place."""
        with self._changed:
            for place in self._held:
                place.cancel()

    def close(self) -> None:
        """Let nobody in any more, nor wait."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
