# SPDX-License-Identifier: Apache-2.0
"""Watched: what was read from files that may be replaced while the process runs.

Invariant: what `now` returns was whole and right when it was read. A newer version that is not is reported once, and the one
before it goes on. Files are looked at once every ``look_seconds`` at most, by whoever asks; any thread.
"""

import logging
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from threading import Lock
from typing import Generic, TypeVar

from oarlock.proto.errors import InvalidArgument, PSError

logger = logging.getLogger(__name__)

T = TypeVar("T")
Stamp = tuple[tuple[int, ...] | None, ...]

LOOK_SECONDS = 1.0
# Files that are being replaced while they are read are read again, so often.
READS = 3


class Watched(Generic[T]):
    """What ``read`` makes of the files at ``paths``; ``read`` raises a PSError for what cannot be used."""

    def __init__(self, paths: Sequence[Path], read: Callable[[], T], *, look_seconds: float = LOOK_SECONDS) -> None:
        self._paths = tuple(paths)
        self._read = read
        self._look_seconds = look_seconds
        self._lock = Lock()
        self._looked = 0.0
        self._seen: Stamp = ()
        self._value: T
        # Counts the versions that were read.
        self.version = 0

    def open(self) -> "Watched[T]":
        """Read the files for the first time; the PSError of ``read``."""
        self._seen, self._value = self._whole()
        self._looked = time.monotonic()
        self.version = 1
        return self

    def now(self) -> T:
        """Return the newest version that can be used."""
        if time.monotonic() - self._looked >= self._look_seconds and self._lock.acquire(blocking=False):
            try:
                self._look()
            finally:
                self._looked = time.monotonic()
                self._lock.release()
        return self._value

    def _look(self) -> None:
        stamp = self._stamp()
        if stamp == self._seen:
            return
        try:
            self._seen, self._value = self._whole()
        except PSError as error:
            self._seen = stamp
            logger.error("event=file_refused error=%s (what was read before goes on)", error)
            return
        self.version += 1
        logger.info("event=file_read_again path=%s", ",".join(map(str, self._paths)))

    def _whole(self) -> tuple[Stamp, T]:
        """Return what the files hold, and their stamp, if they were the same before and after."""
        for _ in range(READS):
            stamp = self._stamp()
            try:
                value = self._read()
            except PSError:
                if stamp == self._stamp():
                    raise
                continue
            if stamp == self._stamp():
                return stamp, value
        raise InvalidArgument(f"{', '.join(map(str, self._paths))} changed again and again while it was read")

    def _stamp(self) -> Stamp:
        return tuple(map(_stamp_of, self._paths))


def _stamp_of(path: Path) -> tuple[int, ...] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ctime_ns, found.st_size, found.st_ino, found.st_mode, found.st_uid


def read_secret_file(path: Path, what: str, most: int) -> bytes:
    """Return the bytes of a file that only its owner may read; InvalidArgument, by name, for any other."""
    try:
        # Not kept waiting by a pipe, and what was looked at is what is read.
        opened = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise InvalidArgument(f"{what} {path} cannot be read: {error.strerror}") from None
    try:
        found = os.fstat(opened)
        if found.st_mode & 0o170000 != 0o100000:
            raise InvalidArgument(f"{what} {path} is no regular file")
        if found.st_uid not in (os.geteuid(), 0):
            raise InvalidArgument(f"{what} {path} belongs to user {found.st_uid}: it has to be this user's, or root's")
        if found.st_mode & 0o077:
            raise InvalidArgument(
                f"{what} {path} can be read or written by others (mode {found.st_mode & 0o777:03o}): chmod 600 it, and if "
                "anybody else uses this machine make new secrets"
            )
        with os.fdopen(os.dup(opened), "rb") as file:
            data = file.read(most + 1)
    except OSError as error:
        raise InvalidArgument(f"{what} {path} cannot be read: {error.strerror}") from None
    finally:
        os.close(opened)
    if len(data) > most:
        raise InvalidArgument(f"{what} {path} has more than {most} bytes")
    return data
