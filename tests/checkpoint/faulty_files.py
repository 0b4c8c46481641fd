# SPDX-License-Identifier: Apache-2.0
"""A file system of any kind that fails at a chosen operation, in the ways of networks and disks."""

import errno
import os
from collections.abc import Callable
from typing import Any

WRITES = ("write_file", "commit_file", "delete", "delete_folder", "sync_folder")
MODES = ("error", "late", "die", "die late", "half", "full", "read-only")


class FaultyFiles:
    """``files``, but operation ``fail_at`` (1 is the first) does not go well. ``mode``:

    ``error``: it fails, and is not done; ``late``: it is done, and answers with an error nevertheless;
    ``die``, ``die late``: the same, and all later ones fail, as nobody is there to ask for them;
    ``half``: a file gets half of its bytes, and the answer says that all is well;
    ``full``, ``read-only``: from then on, nothing can be written.
    """

    def __init__(self, files: Any, fail_at: int, mode: str) -> None:
        self._files, self._fail_at, self._mode = files, fail_at, mode
        self.log: list[str] = []

    @property
    def root(self) -> str:
        return str(self._files.root)

    def __getattr__(self, name: str) -> Any:
        real = getattr(self._files, name)

        def call(*arguments: Any, **options: Any) -> Any:
            self.log.append(f"{name} {' '.join(str(each) for each in arguments[:1])}")
            return self._do(name, real, arguments, options)

        return call

    def _do(self, name: str, real: Callable[..., Any], arguments: Any, options: Any) -> Any:
        at = len(self.log) - self._fail_at
        writes, mode = name in WRITES, self._mode
        if mode in ("full", "read-only"):
            if at < 0 or not writes or (mode == "full" and name.startswith("delete")):
                return real(*arguments, **options)
            raise OSError(errno.ENOSPC if mode == "full" else errno.EROFS, "nothing can be written", arguments[0])
        if mode == "half" and at == 0 and name == "write_file":
            data = b"".join(arguments[1])
            return real(arguments[0], data[: len(data) // 2])
        if mode == "half" or at < 0 or (at > 0 and not mode.startswith("die")):
            return real(*arguments, **options)
        if at == 0 and mode.endswith("late"):
            real(*arguments, **options)
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(self.log[-1]))
