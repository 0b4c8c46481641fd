# SPDX-License-Identifier: Apache-2.0
"""One request to one part of a model: which of its servers are asked, when a second one is, and what a failure means.

Invariant: each server of the part is asked once at most; the first good answer counts, and whoever is asked beside it is
dropped. An attempt has half of the time that is left as long as there is another server, so one that hangs costs time and not the
answer. Decides alone: blocking and asynchronous clients send (hedged.py, hedged_async.py). One thread, or one event loop.
"""

import time
from collections.abc import Callable, Generator
from typing import Any, NamedTuple, TypeVar

from oarlock.proto.errors import DeadlineExceeded, InvalidArgument, PSError, WrongJob
from oarlock.serving.fleet import Fleet, Replica

NEVER = float("inf")
# A server that has no answer after so long has failed.
HASTY_SECONDS = 0.5


class Question(NamedTuple):
    """What a part is asked. ``size``: keys or vectors, by which its time is judged.

    ``elsewhere``: errors of a server that another one of the part may not have, though nothing is wrong with it.
    """

    method: str
    request: Any
    size: int
    elsewhere: tuple[type[PSError], ...] = ()


_T = TypeVar("_T")
# What is asked of several parts, step after step: questions by part go out, answers by part come in.
Steps = Generator[dict[int, Question], dict[int, Any], _T]


class Attempt:
    """A server that is asked. ``until``: when to give it up; ``sent``: what the client has of it."""

    __slots__ = ("begun", "hedge", "replica", "sent", "until")

    def __init__(self, replica: Replica, begun: float, until: float, hedge: bool) -> None:
        self.replica = replica
        self.begun = begun
        self.until = until
        self.hedge = hedge
        self.sent: Any = None


class Asking:
    """``question`` to ``part``, answered ``until`` then by the clock."""

    def __init__(
        self, fleet: Fleet, part: int, question: Question, until: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.question = question
        self.part = part
        self._fleet = fleet
        self._until = until
        self._clock = clock
        self._tried: list[Replica] = []
        self.attempts: list[Attempt] = []
        self._hedge_at = NEVER

    def begin(self) -> Attempt:
        """Return the first attempt; Unavailable if there is nobody to ask."""
        seconds = self._fleet.began(self.question.size)
        attempt = self._next(hedge=False)
        if attempt is None:
            raise self._fleet.nobody(self.part)
        self._hedge_at = attempt.begun + seconds
        return attempt

    def _next(self, *, hedge: bool) -> Attempt | None:
        replica = self._fleet.choose(self.part, self._tried)
        if replica is None:
            return None
        self._tried.append(replica)
        now = self._clock()
        left = self._until - now
        until = now + left / 2 if self._fleet.others(self.part, self._tried) else self._until
        attempt = Attempt(replica, now, until, hedge)
        self.attempts.append(attempt)
        return attempt

    @property
    def wake(self) -> float:
        """When there is something to do though nobody has answered."""
        return min([self._hedge_at, *(each.until for each in self.attempts)])

    def hedge(self) -> Attempt | None:
        """Return an attempt at another server if it is time for one."""
        if self._clock() < self._hedge_at:
            return None
        self._hedge_at = NEVER
        if not self._fleet.others(self.part, self._tried) or not self._fleet.may_hedge():
            return None
        return self._next(hedge=True)

    def late(self) -> list[Attempt]:
        """Return the attempts whose time is over."""
        now = self._clock()
        return [each for each in self.attempts if now >= each.until]

    def no_answer(self, attempt: Attempt) -> DeadlineExceeded:
        """Return the error that an attempt ends with whose time is over."""
        return DeadlineExceeded(f"{self.question.method} at {attempt.replica.address}: no answer in time")

    def answered(self, attempt: Attempt) -> list[Attempt]:
        """Take note of a good answer; return the attempts that are to be dropped."""
        now = self._clock()
        self.attempts.remove(attempt)
        size = self.question.size
        self._fleet.answered(attempt.replica, size, now - attempt.begun, hedge=attempt.hedge)
        losers, self.attempts = self.attempts, []
        for each in losers:
            self._fleet.dropped(each.replica, size, now - each.begun, late=not each.hedge)
        return losers

    def failed(self, attempt: Attempt, error: PSError) -> Attempt | None:
        """Return an attempt at another server, or None if another one is still asked; raises what cannot be mended so."""
        self.attempts.remove(attempt)
        harmless = isinstance(error, self.question.elsewhere)
        # It is another process by now, which has something else.
        other = isinstance(error, WrongJob) or (isinstance(error, InvalidArgument) and "part" in error.details)
        # Who asks for an answer in no time says nothing about a server that has none then.
        hasty = isinstance(error, DeadlineExceeded) and self._clock() - attempt.begun < HASTY_SECONDS
        self._fleet.failed(attempt.replica, error, aside=not (harmless or hasty) and (error.retryable or other))
        if not (harmless or error.retryable or other):
            raise error
        if self.attempts:
            return None
        following = self._next(hedge=False)
        if following is None:
            raise self._fleet.nobody(self.part) if other else error
        self._fleet.failed_over()
        return following

    def give_up(self) -> list[Attempt]:
        """Return the attempts that are still under way, which are to be dropped."""
        left, self.attempts = self.attempts, []
        for each in left:
            self._fleet.dropped(each.replica, self.question.size, self._clock() - each.begun, late=False)
        return left
