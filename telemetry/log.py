# SPDX-License-Identifier: Apache-2.0
"""Log lines: one per event with consequences, `time level logger event=... key=value`.

Only a process's entry point calls `to_stream` or `to_file`; libraries never configure logging.
"""

import logging
import sys
from pathlib import Path

FORMAT = "%(asctime)s %(levelname)s %(name)s %(message)s"


def to_stream(level: str) -> None:
    """Write log lines of ``level`` and above to standard error."""
    _install(logging.StreamHandler(sys.stderr), level)


def to_file(path: Path, level: str) -> None:
    """Append log lines of ``level`` and above to a file."""
    _install(logging.FileHandler(path, encoding="utf-8"), level)


def _install(handler: logging.Handler, level: str) -> None:
    handler.setFormatter(logging.Formatter(FORMAT))
    root = logging.getLogger("oarlock")
    root.addHandler(handler)
    root.setLevel(level.upper())
