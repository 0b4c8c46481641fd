# SPDX-License-Identifier: Apache-2.0
"""Roots: the folders and URLs below which a request may name a checkpoint to read or a folder to write.

Invariant: what passes `check` is, as its file system resolves it, a root or below one; a link that leads out of a root is
outside. Without roots all may be named: such a process answers its own machine alone (docs/security.md). Any thread.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

from oarlock.checkpoint.cuts import split_cut
from oarlock.checkpoint.place import FOLDER, resolved
from oarlock.proto.errors import PermissionDenied


class Roots:
    """``paths``: None for no bounds."""

    def __init__(self, paths: Iterable[str] | None = None) -> None:
        self._roots = None if paths is None else [resolved(split_cut(path)[0]) for path in paths]

    def check(self, path: str) -> None:
        """Raise PermissionDenied for a path that is nowhere below a root."""
        if self._roots is None:
            return
        found = resolved(split_cut(path)[0])
        if ".." in found[1].split("/") or not any(_below(found, root) for root in self._roots):
            raise PermissionDenied(
                f"{path[:300]!r} is below none of the roots of this process: start it with --root for what it may read, or give "
                "`roots` under [security] of the job file"
            )


def _below(path: tuple[str, ...], root: tuple[str, ...]) -> bool:
    if (path[0], *path[2:]) != (root[0], *root[2:]):
        return False
    return path[1] == root[1] or path[1].startswith(root[1].rstrip("/") + "/")


class _Begun(Protocol):
    @property
    def path(self) -> str: ...


class Job(Protocol):
    """What a job says of checkpoints."""

    @property
    def checkpoint_path(self) -> str: ...
    @property
    def restore(self) -> str: ...
    @property
    def warm_start(self) -> _Begun: ...


def roots_of(job: Job, folder: Path | None = None) -> tuple[str, ...]:
    """Return where the checkpoints are that a job writes and begins with; ``folder``: its own, if that is known."""
    own = [] if folder is None else [str(folder / FOLDER)]
    return tuple(path for path in (*own, job.checkpoint_path, job.restore, job.warm_start.path) if path)
