# SPDX-License-Identifier: Apache-2.0
"""What a process records of its work if it was asked to (``--trace FILE``), and where such a file may stand.

Invariant: a file that is no trace is never overwritten; without ``--trace`` nothing is recorded and no handler is wrapped. The
recording itself may be done from any thread.
"""

import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from oarlock.proto.errors import InvalidArgument
from oarlock.proto.methods import METHODS
from oarlock.proto.rpc.counts import Counts
from oarlock.telemetry.trace import Tracer, Track, now
from oarlock.telemetry.trace_format import is_trace

# Requests that are worth an event each; heartbeats and questions of people are not.
TRACED = (
    *("Shard.Pull", "Shard.Push", "Shard.Marks", "Shard.Adopt", "Shard.Write", "Shard.Close"),
    *("Coordinator.Join", "Coordinator.Lease", "Coordinator.CloseSplit"),
)


def trace_target(text: str) -> Path:
    """Return the file to write a trace to, links followed; InvalidArgument if it cannot be written or is something else."""
    try:
        path = Path(os.path.realpath(text))
        kind = path.stat().st_mode if path.exists() else None
        if kind is not None and stat.S_ISDIR(kind):
            raise InvalidArgument(f"--trace {text}: this is a folder: name a file in it")
        if kind is not None and (not stat.S_ISREG(kind) or (path.stat().st_size and not is_trace(path))):
            raise InvalidArgument(
                f"--trace {text}: there is a file that is no trace: move it away, or give another name"
            )
        if not path.parent.is_dir():
            raise InvalidArgument(f"--trace {text}: the folder {path.parent} does not exist: make it first")
        # The job ends by putting a new file in its place; whether that works shows only by trying.
        beside = partial_of(path)
        beside.open("xb").close()
        beside.unlink()
        if kind is not None:
            path.open("ab").close()
    except (OSError, ValueError) as error:
        words = (error.strerror if isinstance(error, OSError) else "") or str(error)
        raise InvalidArgument(f"--trace {text}: it cannot be written ({words}): give another file") from None
    return path


def partial_of(path: Path) -> Path:
    """Return where a trace is put together before it takes its place."""
    return path.with_name(f".trace-{os.getpid()}.partial")


@contextmanager
def traced(role: str, path: str | Path | None) -> Iterator[Track | None]:
    """Record this process into a file while the body runs; None: it does not."""
    if path is None:
        yield None
        return
    target = trace_target(str(path))
    try:
        tracer = Tracer(target, role).start()
    except OSError as error:
        raise InvalidArgument(f"--trace {path}: it cannot be written ({error.strerror}): give another file") from None
    try:
        yield tracer.main
    finally:
        tracer.close()


def trace_requests(counts: Counts, track: Track | None) -> None:
    """Record the requests that a server counts, with their bytes."""
    if track is None:
        return
    for method in TRACED:
        counts.of(method).observer = _observer(track, METHODS[method].attribute)


def _observer(track: Track, name: str) -> Callable[[int, int, float], None]:
    def observe(received: int, sent: int, seconds: float) -> None:
        end = now()
        track.complete(name, end - int(seconds * 1e9), end, {"received": received, "sent": sent})

    return observe


class TracedHandler:
    """A handler of messages within this process, which no server counts: its requests are recorded, and have no bytes."""

    def __init__(self, handler: object, track: Track) -> None:
        self._handler = handler
        self._track = track
        self._names = {METHODS[method].attribute for method in TRACED}

    def __getattr__(self, name: str) -> Any:
        answer = getattr(self._handler, name)
        if name not in self._names:
            return answer

        def timed(request: Any) -> Any:
            begin = now()
            try:
                return answer(request)
            finally:
                self._track.complete(name, begin, now())

        return timed


def recorded(handler: object, track: Track | None) -> object:
    """Return ``handler``, its requests recorded if there is a track."""
    return handler if track is None else TracedHandler(handler, track)
