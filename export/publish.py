# SPDX-License-Identifier: Apache-2.0
"""How a file that is made gets its name: written beside it under another, made durable, then linked or renamed.

Invariant: under ``path`` there is the whole file or what was there before; nothing that somebody else has put there is replaced
unless it was asked for. Any thread.
"""

import os
from pathlib import Path

from oarlock.proto.errors import InvalidArgument


def refuse_existing(path: Path, *, force: bool = False, hint: str = "") -> None:
    """Raise unless a file can be made at ``path``; ``force``: it may replace another file."""
    if path.is_dir() or (path.exists() and not force):
        raise InvalidArgument(f"{path} is there already: give another name" + ("" if path.is_dir() else hint))
    if not path.parent.is_dir():
        raise InvalidArgument(f"{path}: there is no folder {path.parent}")


def partial_of(path: Path) -> Path:
    """Return the name under which what becomes ``path`` is written."""
    return path.with_name(f".{path.name}.{os.getpid()}")


def publish(partial: Path, path: Path, *, force: bool = False, hint: str = "") -> None:
    """Give a finished file its name."""
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    if not force:
        try:
            # Unlike a rename it replaces nothing that somebody else has put there meanwhile.
            os.link(partial, path)
            return
        except FileExistsError:
            raise InvalidArgument(f"{path} is there by now: give another name{hint}") from None
        except OSError:
            pass  # a file system without links
    os.replace(partial, path)
