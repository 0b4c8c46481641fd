# SPDX-License-Identifier: Apache-2.0
"""The trace of a whole job: a part for each process, in the job's folder, put together into one file when the job is over.

Invariant: the file appears whole or not at all, and in the place of an earlier one only then. A part that ends in the middle,
since its process was killed, gives what it has; what cannot be read is told and left out. Whatever goes wrong here, the job's
own result stands, and the parts stay.
"""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from oarlock.client.trace import partial_of
from oarlock.telemetry import trace_format

logger = logging.getLogger(__name__)

FOLDER = "trace"


class TraceParts:
    """The parts of a job's trace, in a folder of their own."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._given = 0

    def begin(self) -> "TraceParts":
        """Make the folder, without parts of an earlier run of the job."""
        self._folder.mkdir(exist_ok=True)
        for old in self.found():
            old.unlink()
        return self

    def next(self, role: str, number: int) -> Path:
        """Return the file of a process that is about to start; one that was there before it keeps its own."""
        self._given += 1
        return self._folder / f"{self._given:04d}-{role}-{number}.json"

    def options(self, role: str, number: int) -> list[str]:
        return ["--trace", str(self.next(role, number))]

    def found(self) -> list[Path]:
        return sorted(self._folder.glob("[0-9]*-*-*.json"))

    def end(self) -> None:
        """Delete the parts."""
        for part in self.found():
            part.unlink()
        self._folder.rmdir()


@contextmanager
def traced_job(target: Path | None, folder: Path, say: Callable[[str], None]) -> Iterator[TraceParts | None]:
    """Give out parts while the body runs a job, then make them ``target``, and say so. None: there is no trace."""
    if target is None:
        yield None
        return
    parts = TraceParts(folder / FOLDER).begin()
    try:
        yield parts
    finally:
        try:
            for warning in merge(parts.found(), target):
                logger.warning("event=trace_incomplete text=%s", warning)
                say(f"warning: {warning}")
            parts.end()
            say(f"trace in {target}")
        except OSError as error:
            say(f"warning: the trace {target} could not be written ({error}); its parts are in {folder / FOLDER}")


def merge(parts: list[Path], target: Path) -> list[str]:
    """Make one trace of several, in the place of what ``target`` was; return what is to be said of it."""
    partial = partial_of(target)
    try:
        with partial.open("wb") as out:
            merged = _Merged(out)
            for part in parts:
                merged.add(part)
            merged.end()
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
    return merged.warnings


class _Merged:
    """A trace that is being put together. Numbers of processes that two parts have are told apart."""

    def __init__(self, out: BinaryIO) -> None:
        self.warnings: list[str] = []
        self._out = out
        self._before = trace_format.HEAD
        self._taken: set[int] = set()
        # What processes and rows are called; the last word holds.
        self._about: dict[tuple[int, int, str], dict[str, Any]] = {}
        self._dropped = 0

    def add(self, part: Path) -> None:
        bad = 0
        own: dict[int, int] = {}
        try:
            for found in trace_format.events(part):
                if found is None:
                    bad += 1
                    continue
                event, line = found
                number = self._number(own, event["pid"])
                if number != event["pid"]:
                    event["pid"] = number
                    line = trace_format.encoded(event)
                if event["ph"] == "M":
                    self._about[event["pid"], event["tid"], event["name"]] = event
                else:
                    self._note_dropped(event)
                    self._put(line)
        except OSError as error:
            if error.filename is None or Path(error.filename) != part:
                # It is the other file, which cannot be written.
                raise
            self.warnings.append(f"a part of the trace cannot be read: {error}")
        if bad:
            what = "1 line" if bad == 1 else f"{bad} lines"
            self.warnings.append(
                f"the trace lacks {what} of {part.name}, cut off when its process was killed or damaged"
            )

    def _number(self, own: dict[int, int], pid: int) -> int:
        if pid not in own:
            number = pid
            while number in self._taken:
                number += 1
            self._taken.add(number)
            own[pid] = number
        return own[pid]

    def _note_dropped(self, event: dict[str, Any]) -> None:
        count = event.get("args", {}).get("count")
        if event["ph"] == "i" and event["name"] == trace_format.DROPPED and type(count) is int and count > 0:
            self._dropped += count

    def _put(self, line: bytes) -> None:
        self._out.write(self._before + line)
        self._before = trace_format.SEPARATOR

    def end(self) -> None:
        for event in self._about.values():
            self._put(trace_format.encoded(event))
        if self._before == trace_format.HEAD:
            self._out.write(self._before)
        self._out.write(trace_format.tail(self._dropped))
        if self._dropped:
            self.warnings.append(f"the trace lacks {self._dropped} events, which came faster than they could be kept")
