# SPDX-License-Identifier: Apache-2.0
"""The errors that cross process borders.

    PSError                  base; carries code, retryable, and what the message names (shard, table, ...)
    +-- InvalidArgument      a value is outside its limits; nothing was changed
    |   +-- Malformed        a message's lengths, dtypes or contents contradict each other
    |   +-- SpecMismatch     two sides disagree about a table or a dense parameter
    +-- VersionMismatch      the two sides speak different versions of the protocol
    +-- UnknownTable         no such table or dense parameter in this job
    +-- NotFound             no such job, shard, worker, split, method or checkpoint
    +-- WrongJob             the message belongs to another job
    +-- WrongRun             the message belongs to another line of the job's history
    +-- WrongIncarnation     the message was meant for a process that is gone
    +-- StalePlacement       the block is elsewhere, under a newer generation (retryable)
    +-- LeaseLost            the sender's right has expired
    +-- Unavailable          not now: starting, closing, or no answer (retryable)
    +-- DeadlineExceeded     no answer in time (retryable)
    +-- OutOfMemory          a limit of memory or message size would be exceeded
    +-- CorruptCheckpoint    a file of a checkpoint is missing, truncated or altered
    +-- Internal             a defect in Oarlock
    +-- Unauthenticated      the caller did not say who it is, or nobody knows it
    +-- PermissionDenied     the caller is known, and may not do this

Invariant: ``CODES`` never changes the meaning of a number; tests pin it.
"""

from typing import Any, ClassVar


class PSError(Exception):
    """Base of the tree. ``details`` holds what the error names: shard, table, block, generation, ..."""

    code: ClassVar[int] = 1
    retryable: ClassVar[bool] = False

    def __init__(self, message: str, /, **details: Any) -> None:
        super().__init__(message)
        self.message = message
        self.details = details

    def __str__(self) -> str:
        return self.message


class InvalidArgument(PSError):
    """A value is outside its limits; nothing was changed."""

    code = 2


class Malformed(InvalidArgument):
    """A message's lengths, dtypes or contents contradict each other."""

    code = 3


class SpecMismatch(InvalidArgument):
    """Two sides disagree about a table or a dense parameter."""

    code = 4


class VersionMismatch(PSError):
    """The two sides speak different versions of the protocol."""

    code = 5


class UnknownTable(PSError):
    """No such table or dense parameter in this job."""

    code = 6


class NotFound(PSError):
    """No such job, shard, worker, split, method or checkpoint."""

    code = 7


class WrongJob(PSError):
    """The message belongs to another job."""

    code = 8


class WrongRun(PSError):
    """The message belongs to another line of the job's history."""

    code = 9


class WrongIncarnation(PSError):
    """The message was meant for a process that is gone."""

    code = 10


class StalePlacement(PSError):
    """The block is elsewhere, under a newer generation; fetch the placement and send again."""

    code = 11
    retryable = True


class LeaseLost(PSError):
    """The sender's right has expired; join anew."""

    code = 12


class Unavailable(PSError):
    """Not now: starting, closing, or no answer; send again after a pause."""

    code = 13
    retryable = True


class DeadlineExceeded(PSError):
    """No answer in time; the operation may or may not have happened."""

    code = 14
    retryable = True


class OutOfMemory(PSError):
    """A limit of memory or message size would be exceeded."""

    code = 15


class CorruptCheckpoint(PSError):
    """A file of a checkpoint is missing, truncated or altered."""

    code = 16


class Internal(PSError):
    """A defect in Oarlock; please report it with the message."""

    code = 17


class Unauthenticated(PSError):
    """The caller did not say who it is, or nobody knows it; give a token of the job."""

    code = 18


class PermissionDenied(PSError):
    """The caller is known, and may not do this; give a token of a role that may."""

    code = 19


def _tree(kind: type[PSError]) -> list[type[PSError]]:
    return [kind, *(sub for child in kind.__subclasses__() for sub in _tree(child))]


CODES: dict[int, type[PSError]] = {kind.code: kind for kind in _tree(PSError)}
