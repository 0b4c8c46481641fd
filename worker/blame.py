# SPDX-License-Identifier: Apache-2.0
"""Blame: the split at which a worker met its error, told to the coordinator, which stops the job after three such workers.

Invariant: only the split that was worked on is charged, and only with errors that another try there would meet again.
"""

from collections.abc import Awaitable
from typing import TypeVar

from oarlock.proto.coordinator_pb2 import TRAIN, ReleaseRequest
from oarlock.proto.errors import LeaseLost, PSError, WrongJob, WrongRun

T = TypeVar("T")


class Blame:
    """The first error that was met with a split, if any."""

    def __init__(self) -> None:
        self.release: ReleaseRequest | None = None

    async def of(self, work: int, split: int, awaitable: Awaitable[T]) -> T:
        """Return what ``awaitable`` gives, done for this split."""
        try:
            return await awaitable
        except Exception as error:
            self.note(work, split, error)
            raise

    def note(self, work: int, split: int, error: BaseException) -> None:
        """Charge the split with an error that was met with it."""
        if self.release is None and _is_of_the_work(error):
            reason = reason_of(error)
            if work == TRAIN:
                self.release = ReleaseRequest(splits=[split], reason=reason)
            else:
                self.release = ReleaseRequest(evaluations=[split], reason=reason)


def _is_of_the_work(error: BaseException) -> bool:
    """Whether the error is about what was done, and not about who did it or when."""
    if isinstance(error, PSError):
        return not error.retryable and not isinstance(error, LeaseLost | WrongRun | WrongJob)
    return isinstance(error, Exception) and not isinstance(error, ExceptionGroup)


def reason_of(error: BaseException) -> str:
    """Return an error in words: a PSError's own, any other's with its type."""
    return str(error) if isinstance(error, PSError) else f"{type(error).__name__}: {error}"
