# SPDX-License-Identifier: Apache-2.0
"""A lock that many readers share, or one writer has alone.

Invariant: nobody reads while somebody writes. A writer that waits goes before readers that come after it, so it is not waited for
forever; readers do not read within reading. Any thread.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Condition


class Sharing:
    """``reading`` and ``writing`` are entered."""

    def __init__(self) -> None:
        self._changed = Condition()
        self._readers = 0
        self._writing = False
        self._waiting = 0

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Wait until nobody writes; until it is left nobody will."""
        with self._changed:
            self._changed.wait_for(lambda: not self._writing and not self._waiting)
            self._readers += 1
        try:
            yield
        finally:
            with self._changed:
                self._readers -= 1
                self._changed.notify_all()

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Wait until nobody else is here; until it is left nobody will be."""
        with self._changed:
            self._waiting += 1
            try:
                self._changed.wait_for(lambda: not self._writing and not self._readers)
            finally:
                self._waiting -= 1
            self._writing = True
        try:
            yield
        finally:
            with self._changed:
                self._writing = False
                self._changed.notify_all()
