# SPDX-License-Identifier: Apache-2.0
"""An answer that is not there yet: a handler returns it in place of a reply, and whoever has to do with it answers later.

Invariant: it is answered once, by the first `resolve` or `fail`; what comes after that changes nothing. Each callback is called
once, in the thread that answers (or at once, if that was done), and never under a lock. Any thread.
"""

import logging
import time
from collections.abc import Callable
from threading import Event, Lock
from typing import Any

from oarlock.proto.errors import DeadlineExceeded, PSError, Unavailable

logger = logging.getLogger(__name__)

# How often who waits looks whether anybody still wants the answer.
LOOK_SECONDS = 1.0


class Pending:
    """``resolve(reply)`` or ``fail(error)`` answers it."""

    __slots__ = ("_callbacks", "_error", "_lock", "_reply", "done", "so_far")

    def __init__(self, so_far: Any = None) -> None:
        self._lock = Lock()
        self._callbacks: list[Callable[[], object]] = []
        self._reply: Any = None
        self._error: PSError | None = None
        # What the answer will be, if nothing comes between; None: that is not known.
        self.so_far = so_far
        # Whether it was answered.
        self.done = False

    def resolve(self, reply: Any) -> None:
        """Answer with a message (or a Bulk), as the handler would have returned it."""
        self._answer(reply, None)

    def fail(self, error: PSError) -> None:
        """Answer with an error, as the handler would have raised it."""
        self._answer(None, error)

    def _answer(self, reply: Any, error: PSError | None) -> None:
        with self._lock:
            if self.done:
                return
            self._reply, self._error = reply, error
            self.done = True
            callbacks, self._callbacks = self._callbacks, []
        for each in callbacks:
            _call(each)

    def add_done_callback(self, callback: Callable[[], object]) -> None:
        """Call ``callback()`` once it is answered. It must not wait; what it raises is logged."""
        with self._lock:
            if not self.done:
                self._callbacks.append(callback)
                return
        _call(callback)

    def remove_done_callback(self, callback: Callable[[], object]) -> None:
        """Call it no more, if it was not called yet."""
        with self._lock:
            if callback in self._callbacks:
                self._callbacks.remove(callback)

    def result(self) -> Any:
        """Return the answer, or raise what it failed with; only once it is ``done``."""
        if self._error is not None:
            raise self._error
        return self._reply

    def wait(self, seconds: float, named: str = "the answer") -> Any:
        """Return the answer, for which this thread waits; DeadlineExceeded after ``seconds``."""
        return Waits().wait(self, seconds, named)


def _call(callback: Callable[[], object]) -> None:
    try:
        callback()
    except Exception:
        logger.exception("event=callback_failed")


class Waits:
    """Threads that wait for answers, and an end to that: after ``close`` nobody waits any more."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._waking: set[Event] = set()
        self._closed = False

    def __len__(self) -> int:
        return len(self._waking)

    def wait(
        self, pending: Pending, seconds: float, named: str = "the answer", *, gone: Callable[[], bool] = lambda: False
    ) -> Any:
        """Return the answer; DeadlineExceeded after ``seconds``, Unavailable at the end, or once whoever asked is ``gone``."""
        wake = Event()
        with self._lock:
            if not self._closed:
                self._waking.add(wake)
        pending.add_done_callback(wake.set)
        try:
            return self._woken(pending, wake, time.monotonic() + seconds, named, gone)
        finally:
            pending.remove_done_callback(wake.set)
            with self._lock:
                self._waking.discard(wake)

    def _woken(self, pending: Pending, wake: Event, until: float, named: str, gone: Callable[[], bool]) -> Any:
        while not pending.done:
            left = until - time.monotonic()
            if self._closed:
                raise Unavailable(f"{named}: this process is ending")
            if left <= 0:
                raise DeadlineExceeded(f"{named}: it was not complete in time; it may or may not have happened")
            if not wake.wait(min(left, LOOK_SECONDS)) and gone():
                raise Unavailable(f"{named}: nobody waits for the answer any more")
        return pending.result()

    def close(self) -> None:
        """Have all who wait for what is not answered yet end by Unavailable."""
        with self._lock:
            self._closed = True
            for wake in self._waking:
                wake.set()
