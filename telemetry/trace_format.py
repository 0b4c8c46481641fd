# SPDX-License-Identifier: Apache-2.0
"""The Chrome trace format as this project writes it: one JSON object, one event a line; and how such lines are read back.

Invariant: a file that ends anywhere, since its process was killed, is whole up to its last whole line: the head ends its line,
and every later event begins with the comma that parts it from the one before. What is read is hostile until checked here.
Pure but for reading; any thread.
"""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

# Every trace of this project begins with these bytes, by which it is known.
HEAD = b'{"displayTimeUnit":"ms","traceEvents":[\n'
SEPARATOR = b",\n"
# Instant events of this name count what is missing from a trace.
DROPPED = "events dropped"
# A line of ours is a tenth of this.
MAX_LINE_BYTES = 16 << 10
_KINDS = ("X", "M", "i")
# What viewers take for the number of a process or of a row in it.
_MAX_ID = (1 << 32) - 1
# Made once: what json.dumps makes anew for every call costs more than the event does.
_encode = json.JSONEncoder(separators=(",", ":"), allow_nan=False, default=str).encode


def tail(dropped: int) -> bytes:
    """Return what ends a trace."""
    return b'\n],"otherData":{"dropped":%d}}\n' % dropped


def encoded(event: Mapping[str, Any]) -> bytes:
    """Return the line of an event."""
    return _encode(event).encode()


def dumped(arguments: Mapping[str, Any]) -> str:
    """Return an event's arguments as JSON, whatever they are."""
    try:
        return _encode(arguments)
    except ValueError:
        return _encode({str(name): str(value) for name, value in arguments.items()})


def complete(pid: int, tid: int, name: str, begin: int, nanoseconds: int, arguments: Mapping[str, Any] | None) -> bytes:
    """Return the line of something that began at ``begin`` (CLOCK_MONOTONIC) and took ``nanoseconds``. ``name`` is JSON."""
    args = f',"args":{dumped(arguments)}' if arguments else ""
    return (
        f'{{"ph":"X","pid":{pid},"tid":{tid},"ts":{begin // 1000}.{begin % 1000:03d},'
        f'"dur":{nanoseconds // 1000}.{nanoseconds % 1000:03d},"name":{name}{args}}}'
    ).encode()


def metadata(pid: int, tid: int, kind: str, argument: str, value: str | int) -> bytes:
    """Return the line that says what a process or row is: ``kind`` process_name, thread_name, ..._sort_index."""
    return encoded({"ph": "M", "pid": pid, "tid": tid, "ts": 0, "name": kind, "args": {argument: value}})


def dropped(pid: int, at: int, count: int) -> bytes:
    """Return the line that says that ``count`` events before ``at`` are missing."""
    return encoded(
        {"ph": "i", "s": "p", "pid": pid, "tid": 0, "ts": at / 1000, "name": DROPPED, "args": {"count": count}}
    )


def is_trace(path: Path) -> bool:
    """Return whether a file begins as a trace of this project does."""
    with path.open("rb") as file:
        return file.read(len(HEAD)) == HEAD


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is no JSON")


_decode = json.JSONDecoder(parse_constant=_refuse).decode


def events(path: Path) -> Iterator[tuple[dict[str, Any], bytes] | None]:
    """Yield the events of a trace with their lines, None for each line that is none. The file's end may be missing.

    OSError as it comes.
    """
    with path.open("rb") as file:
        if file.read(len(HEAD)) != HEAD:
            yield None
            return
        while line := file.readline(MAX_LINE_BYTES):
            if line.startswith(b"]"):
                return
            line = line.strip(b",\n")
            event = _event(line)
            yield None if event is None else (event, line)


def _event(line: bytes) -> dict[str, Any] | None:
    try:
        found = _decode(line.decode())
    except (ValueError, RecursionError):
        return None
    return found if _is_sound(found) else None


def _is_sound(found: Any) -> bool:
    if not isinstance(found, dict) or found.get("ph") not in _KINDS or not isinstance(found.get("name"), str):
        return False
    if not all(type(found.get(name)) is int and 0 <= found[name] <= _MAX_ID for name in ("pid", "tid")):
        return False
    times = ("ts", "dur") if found["ph"] == "X" else ("ts",)
    if not all(_is_time(found.get(name)) for name in times):
        return False
    return isinstance(found.get("args", {}), dict)


def _is_time(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= 0
