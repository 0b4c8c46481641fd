# SPDX-License-Identifier: Apache-2.0
"""Tracer: what a process did when, as a file that trace viewers show. A track is a process in the picture, a row a thread.

Invariant: whoever records appends one tuple and waits for nobody; memory holds at most ``capacity`` events and the file ``most``,
what is more is counted as dropped. Events of one row never overlap: what runs beside itself gets a further row of its own name.
Times are nanoseconds of CLOCK_MONOTONIC, which all processes of a host share. Recorded from any thread, written by one.
"""

import contextlib
import json
import logging
import os
import time
from bisect import bisect_right, insort
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from threading import Event, Lock, Thread
from typing import Any, BinaryIO

from oarlock.telemetry import trace_format

logger = logging.getLogger(__name__)

# Events in memory between two writes: about 20 MB at the most, and 60,000 events a second.
CAPACITY = 1 << 16
# Events in a file: about 200 MB. Viewers take no more either.
MOST_EVENTS = 2_000_000
# A process that is killed loses what it did in the last of these.
FLUSH_SECONDS = 1.0
# Rows from top to bottom, in the order in which a batch goes through them; others follow as they come.
ROWS = (
    *("phase", "join", "adopt", "lease", "read", "encode", "dedup", "pull", "wait_for_pull", "compute"),
    *("wait_for_push", "encode_push", "push", "close", "close_split", "evaluate", "predict", "checkpoint", "write"),
)
# Lanes that a row's number has room for.
_LANES = 10_000
_ROLES = ("coordinator", "shard", "worker")

now = time.monotonic_ns


class Track:
    """One process of the picture; ``name`` may change once more is known of it."""

    __slots__ = ("_tracer", "name", "pid", "rows", "said")

    def __init__(self, tracer: "Tracer", name: str, pid: int) -> None:
        self._tracer = tracer
        self.name = name
        self.pid = pid
        # The writer's: rows by name, and the name that it has written.
        self.rows: dict[str, _Row] = {}
        self.said = ""

    def complete(
        self, row: str, begin: int, end: int, arguments: Mapping[str, Any] | None = None, *, name: str = ""
    ) -> None:
        """Record what began at ``begin`` and is over since ``end``. ``arguments`` are not changed afterwards.

        ``name``: of the event, if it has another one than its row.
        """
        tracer = self._tracer
        waiting = len(tracer.events)
        if waiting >= tracer.wake_at and not tracer.crowded(waiting):
            return
        tracer.events.append((self, row, begin, end, arguments, name))

    def beside(self, name: str) -> "Track":
        """Return another process of the same file, for what runs in one process and is several to the reader."""
        return self._tracer.track(name)


_Recorded = tuple[Track, str, int, int, Mapping[str, Any] | None, str]


class _Row:
    """The lanes of what has one name: their numbers sorted by when they were last in use."""

    __slots__ = ("base", "lanes", "name")

    def __init__(self, name: str, base: int) -> None:
        self.name = json.dumps(name)
        self.base = base
        self.lanes: list[tuple[int, int]] = []

    def take(self, begin: int, end: int) -> tuple[int, bool]:
        """Return (lane, whether it is new) for an event, the events coming by when they end.

        The free lane that was in use last keeps the others free for what began earlier: no further lane is needed then.
        """
        place = bisect_right(self.lanes, (begin, _LANES))
        new = place == 0
        lane = len(self.lanes) if new else self.lanes.pop(place - 1)[1]
        insort(self.lanes, (end, lane))
        return lane, new


class Tracer:
    """Writes the trace of a process to ``path`` between ``start`` and ``close``."""

    def __init__(
        self,
        path: Path,
        name: str,
        *,
        capacity: int = CAPACITY,
        most: int = MOST_EVENTS,
        flush_seconds: float = FLUSH_SECONDS,
    ) -> None:
        self.path = path
        self.main = Track(self, name, os.getpid())
        self.events: deque[_Recorded] = deque()
        self.wake_at = capacity // 2
        self.dropped = 0
        self._tracks = [self.main]
        self._capacity = capacity
        self._left = most
        self._flush_seconds = flush_seconds
        self._counting, self._writing = Lock(), Lock()
        self._wanted = Event()
        self._over = False
        self._told = 0
        self._file: BinaryIO | None = None
        self._thread = Thread(target=self._write_on, name="oarlock-trace", daemon=True)

    def start(self) -> "Tracer":
        """Begin the file, in the place of what was there. OSError if it cannot be written."""
        # Held for as long as the tracer lasts, over many calls.
        self._file = self.path.open("wb")
        try:
            head = trace_format.metadata(self.main.pid, 0, "process_name", "name", self.main.name)
            self._put(trace_format.HEAD, head)
            self._file.flush()
        except OSError:
            self._end_file()
            raise
        self._thread.start()
        return self

    def track(self, name: str) -> Track:
        """Return a further track."""
        with self._writing:
            made = Track(self, name, self.main.pid + len(self._tracks))
            self._tracks.append(made)
        return made

    def crowded(self, waiting: int) -> bool:
        """Have what waits written; return False if there is no room for more, which is counted."""
        if waiting < self._capacity:
            self._wanted.set()
            return True
        with self._counting:
            self.dropped += 1
        return False

    def flush(self) -> None:
        """Write what was recorded until now."""
        with self._writing:
            self._flush()

    def close(self) -> None:
        """Write the rest and end the file; what is recorded afterwards is dropped. Idempotent."""
        self._over = True
        self._wanted.set()
        if self._thread.ident is not None:
            self._thread.join()
        with self._writing:
            self._flush()
            if self._file is not None:
                with self._failures_told():
                    self._put(trace_format.tail(self.dropped))
                self._end_file()
        if self.dropped:
            logger.warning("event=trace_incomplete path=%s dropped=%d", self.path, self.dropped)

    def _write_on(self) -> None:
        while not self._over:
            self._wanted.wait(self._flush_seconds)
            self._wanted.clear()
            if not self._over:
                self.flush()

    def _flush(self) -> None:
        recorded = [self.events.popleft() for _ in range(len(self.events))]
        if self._file is None:
            return
        over = len(recorded) - self._left
        if over > 0:
            del recorded[self._left :]
            with self._counting:
                self.dropped += over
            # Nothing more is taken in.
            self._capacity = self.wake_at = 0
        self._left -= len(recorded)
        # A row's lanes are given out in the order in which events end; threads may have recorded them in another.
        recorded.sort(key=lambda event: event[3])
        with self._failures_told():
            for track in self._tracks:
                if track.said != track.name:
                    track.said = track.name
                    self._say("process_name", track.pid, 0, "name", track.said)
                    self._say("process_sort_index", track.pid, 0, "sort_index", _place(track.said))
            for event in recorded:
                self._put_event(*event)
            if self.dropped > self._told and (self._left or self._over):
                missing, self._told = self.dropped - self._told, self.dropped
                self._put(trace_format.SEPARATOR, trace_format.dropped(self.main.pid, now(), missing))
            self._file.flush()

    def _put_event(
        self, track: Track, about: str, begin: int, end: int, arguments: Mapping[str, Any] | None, name: str
    ) -> None:
        row = track.rows.get(about)
        if row is None:
            place = ROWS.index(about) if about in ROWS else len(ROWS) + len(track.rows)
            row = track.rows[about] = _Row(about, (1 + place) * _LANES)
        # Nothing ends before it begins, and a lane is free at its own last instant.
        lane, new = row.take(begin, max(begin, end))
        if new:
            self._name_lane(track.pid, row, about, lane)
        shown = json.dumps(name) if name else row.name
        line = trace_format.complete(track.pid, row.base + lane, shown, begin, max(0, end - begin), arguments)
        self._put(trace_format.SEPARATOR, line)

    def _name_lane(self, pid: int, row: _Row, name: str, lane: int) -> None:
        if lane == 1:
            # It was the only one until now.
            self._say("thread_name", pid, row.base, "name", f"{name} 1")
        self._say("thread_name", pid, row.base + lane, "name", f"{name} {lane + 1}" if lane else name)
        self._say("thread_sort_index", pid, row.base + lane, "sort_index", row.base + lane)

    def _say(self, kind: str, pid: int, tid: int, argument: str, value: str | int) -> None:
        self._put(trace_format.SEPARATOR, trace_format.metadata(pid, tid, kind, argument, value))

    def _put(self, *parts: bytes) -> None:
        assert self._file is not None
        self._file.write(b"".join(parts))

    @contextlib.contextmanager
    def _failures_told(self) -> Iterator[None]:
        """Give the file up if it cannot be written: a trace is no reason for a job to fail."""
        try:
            yield
        except OSError as error:
            logger.warning("event=trace_failed path=%s error=%s", self.path, error)
            self._capacity = self.wake_at = 0
            self._end_file()

    def _end_file(self) -> None:
        if self._file is not None:
            # What it could not write before it cannot write now.
            with contextlib.suppress(OSError):
                self._file.close()
            self._file = None
        self._capacity = self.wake_at = 0


def _place(name: str) -> int:
    """Return where a process stands in the picture: the coordinator, then shards, then workers, by number."""
    role, _, number = name.partition(" ")
    known = _ROLES.index(role) if role in _ROLES else len(_ROLES)
    return known * 100_000 + (min(int(number), 99_999) if number.isascii() and number.isdecimal() else 0)
